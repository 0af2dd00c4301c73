"""Files from others, mutated at random.

Each works or ends in one line, never in a traceback or a changed file.
"""

import contextlib
import copy
import functools
import io
import json
import pathlib
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data
import eval as evaluation
import prompts
import stage1
import stage2
import worlds
from anchor import load_anchor, save_anchor
from reference import tiny_clip

MODEL = tiny_clip(layers=2, width=64)
SPLIT = "split_zhou_DescribableTextures.json"


def each(check, n, values):
    """`check` of n draws of a hypothesis strategy, the same ones everywhere."""
    @settings(max_examples=n, derandomize=True, database=None, deadline=None,
              suppress_health_check=list(HealthCheck))
    @given(values)
    def one(value):
        check(value)
    one()


# ---------------------------------------------------------------------------- what "survives" means

def outcome(call):
    """What a script makes of `call`: exit code, stdout, stderr. Other exceptions come through."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace")    # as Python has it
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = call()
        except SystemExit as error:
            code = error.code
    out.flush(), err.flush()
    return code, out.buffer.getvalue().decode(), err.buffer.getvalue().decode()


def answered(name, call, *files):
    """`call` works or is answered in one line, and `files` are what they were.

    Returns whether it worked, stdout, stderr.
    """
    before = [pathlib.Path(file).read_bytes() for file in files]
    code, out, err = outcome(call)
    assert [pathlib.Path(file).read_bytes() for file in files] == before
    assert code in (0, 2), err
    if code == 2:
        worlds.one_line(err)
        assert err.startswith(f"{name}: "), err
    return code == 0, out, err


def survives(call, *files):
    """`answered` for a function of ours, as a script runs it. Returns whether it worked."""
    def as_a_script():
        return stage1.run_script("a script", lambda args: call() and None, None)
    return answered("a script", as_a_script, *files)[0]


def main_survives(script, argv, *files):
    """`answered` for a whole script."""
    call = functools.partial(script.main, [str(word) for word in argv])
    return answered(f"{script.__name__}.py", call, *files)


# ---------------------------------------------------------------------------- the mutations

TEXTS = st.one_of(
    st.sampled_from(["", " ", "\0", "\n", "\ud800", "é\u0301", "\u202eabc", "🦏", "'\"", "../..",
                     "final", "a\nb", "1e999", "&nbsp;", "<|endoftext|>", "word " * 60]),
    st.text(max_size=8))
NUMBERS = st.sampled_from([10 ** 30, 0.5, float("nan")])
PLAIN = st.one_of(st.none(), st.booleans(), st.integers(-3, 60), NUMBERS, TEXTS)
JSON = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5)
SHAPES = st.lists(st.integers(0, 5), max_size=3) | st.just([1, 64])
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.int64, torch.complex64])
TENSORS = st.builds(lambda shape, dtype, value: torch.full(shape, value).to(dtype),
                    SHAPES, DTYPES, st.sampled_from([0.5, float("nan")]))


def places(value, path=()):
    """Paths of all parts of nested dicts and lists."""
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


@st.composite
def mutated(draw, value, others):
    """`value` with one to three parts replaced or left out."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(sorted(places(value), key=len)))
        if not path:
            value = draw(others) if draw(st.integers(0, 9)) == 0 else value
            continue
        parent = functools.reduce(lambda part, key: part[key], path[:-1], value)
        if draw(st.booleans()):
            parent[path[-1]] = draw(others)
        else:
            del parent[path[-1]]
    return value


@st.composite
def damaged(draw, whole):
    """One to eight bits of these bytes flipped."""
    changed = bytearray(whole)
    for place in draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=8)):
        changed[place] ^= 1 << draw(st.integers(0, 7))
    return bytes(changed)


def json_bytes(values):
    return values.map(lambda value: json.dumps(value, ensure_ascii=False).encode(
        errors="surrogatepass"))


def torch_bytes(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def cut_short(whole, parts=40):
    """It cut at some forty places, and in each of its last 60 bytes, where an index may be."""
    step = max(1, len(whole) // parts)
    sizes = [*range(0, len(whole) - 60, step), *range(max(0, len(whole) - 60), len(whole))]
    return [whole[:size] for size in sizes]


# ---------------------------------------------------------------------------- one small run

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a CLIP's file, a small tree, and a run on it of two epochs a stage.

    The files that both stages would have gone on from are still there.
    """
    folder = tmp_path_factory.mktemp("world")
    torch.save(MODEL.state_dict(), folder / "clip.pt")
    names = worlds.dtd_tree(folder / "data", per_class=4, classes=4)
    worlds.write_descriptions(folder / "said.json", names)
    unlink = pathlib.Path.unlink

    def keep_last(path, missing_ok=False):
        if path.name != "last.pt":
            unlink(path, missing_ok)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pathlib.Path, "unlink", keep_last)
        worked, _, err = main_survives(stage2, ["--output", folder / "o", *command(folder)])
    assert worked, err
    return folder


def command(folder):
    return ["--dataset", "dtd", "--root", folder / "data", "--clip", folder / "clip.pt",
            "--no-plot", "--device", "cpu", "--epochs", "2", "--anchor-epochs", "2",
            "--descriptions", folder / "said.json"]


def file_of(world, name, kind="coop"):
    (path,) = (world / "o" / "dtd").glob(f"{kind}*/seed1/{name}")
    return path


# ---------------------------------------------------------------------------- files of a dataset

def test_split_files(tmp_path):
    worlds.dtd_tree(tmp_path, per_class=4, classes=3)
    file = tmp_path / "dtd" / SPLIT
    whole = file.read_bytes()

    def call():
        dataset = data.load_dataset("dtd", tmp_path)
        assert all(isinstance(name, str) for name in dataset.class_names)
        for item in dataset.train + dataset.val + dataset.test:
            assert 0 <= item.label < len(dataset.class_names)
            data.load_image(item.source)

    def check(content):
        file.write_bytes(content)
        return survives(call, file)
    assert check(whole) and not check(b"[" * 100_000)
    assert not any(map(check, cut_short(whole.rstrip())))
    each(check, 200, json_bytes(mutated(json.loads(whole), JSON)))
    each(check, 60, damaged(whole))


def test_description_files(tmp_path):
    sentences = {"banded": ["A banded texture has bands.", "It is 🦏 banded.", "."],
                 "(chy) blot": ["Blots."], "Éclair": ["Sweet", "long"]}
    file, whole = tmp_path / "said.json", json.dumps(sentences).encode()

    def call():
        found = data.load_descriptions(file, ["banded", "blot chy", "éclair"], 2)
        assert stage1.description_means(MODEL, found).isfinite().all()
        assert all(1 <= len(own) <= 2 for own in found)

    def check(content):
        file.write_bytes(content)
        return survives(call, file)
    assert check(whole) and not check(b"[" * 100_000)
    assert not any(map(check, cut_short(whole)))
    each(check, 150, json_bytes(mutated(sentences, JSON)))
    each(check, 80, damaged(whole))


# ---------------------------------------------------------------------------- our own files

def test_results_that_are_cut_short_or_something_else_are_named(tmp_path, world):
    file = tmp_path / "dtd" / "coop-anchoropt" / "seed1" / "results.json"
    file.parent.mkdir(parents=True)
    whole = file_of(world, "results.json").read_bytes()

    def worked(content):
        file.write_bytes(content)
        worked, _, err = main_survives(evaluation, [tmp_path], file)
        assert worked or str(file) in err
        return worked

    def refused(content):
        assert not worked(content)
    assert worked(whole) and not any(map(worked, cut_short(whole.rstrip())))
    each(refused, 30, json_bytes(JSON))


def check_checkpoint(path, content, call, n_parts=0, n_bytes=60):
    """`call()` reads `path`, a torch.save of `content`: cut short, bytes and parts changed."""
    whole = torch_bytes(content)

    def check(changed):
        path.write_bytes(changed)
        return survives(call, path)
    assert check(whole)
    assert not any(map(check, cut_short(whole)))
    each(check, n_bytes, damaged(whole))
    if n_parts:
        each(check, n_parts, mutated(content, PLAIN | TENSORS).map(torch_bytes))


def test_anchor_files(tmp_path):
    path = tmp_path / "anchor.pt"
    save_anchor(path, torch.randn(1, 64), {"preposition": "of", "class_names": ["ant", "rhino"]})

    def call():
        tokens, saved = load_anchor(path)
        assert tokens.dtype == torch.float32 and torch.isfinite(tokens).all()
        assert isinstance(saved, dict)
    check_checkpoint(path, torch.load(path, weights_only=True), call, 150)


def test_prompt_files(tmp_path, world):
    path, clip_model = tmp_path / "prompt.pt", prompts.load_clip(world / "clip.pt")

    def call():
        saved = evaluation.load_prompt(path)
        evaluation.load_learner(saved, clip_model)
    check_checkpoint(path, torch.load(file_of(world, "prompt.pt"), weights_only=True), call)


def test_the_file_that_a_stage_goes_on_from_is_refused_where_its_bytes_changed(tmp_path, world):
    path, prompt = tmp_path / "last.pt", file_of(world, "prompt.pt")
    content = torch.load(file_of(world, "last.pt"), weights_only=True)

    def call():
        part = evaluation.load_learner(evaluation.load_prompt(prompt), MODEL)
        parts = {"learner": part, "optimizer": stage1.sgd(part.parameters(), 0.002)}
        epochs = stage1.Epochs("a stage", 2, 1, parts, path, content["facts"])
        assert epochs.log == content["log"]
        for key, value in part.state_dict().items():
            assert torch.equal(value, content["learner"][key])
    check_checkpoint(path, content, call)


# ---------------------------------------------------------------------------- CLIPs of others

def use(path):
    """A loaded CLIP also takes a prompt: nothing about it may be found wrong later."""
    clip_model = prompts.load_clip(path)
    pixels = torch.zeros(1, 3, *prompts.preprocess_of(clip_model)["size"])
    with torch.no_grad():
        learner = prompts.CoOp(clip_model, ["ant"], prompts.PlainTemplate(clip_model, 4))
        assert learner.text_features().shape == prompts.encode_image(clip_model, pixels).shape


def small(state):
    """The same with a token table of one number on the disk."""
    name = next(key for key in state if key.endswith("token_embedding.weight"))
    return state | {name: torch.zeros(1, 1).expand(49408, state[name].shape[1])}


def test_clip_checkpoints(tmp_path):
    path = tmp_path / "clip.pt"
    state = small(dict(tiny_clip(layers=1, width=64).state_dict()))
    check_checkpoint(path, state, lambda: use(path), 80, 20)


# ---------------------------------------------------------------------------- whole scripts

def test_damaged_files_end_whole_scripts_in_one_line_and_do_no_harm_when_mended(tmp_path, world):
    """Each kind of file, cut in half, as eval.py and stage2.py meet it."""
    shutil.copytree(world, tmp_path / "w")
    folder = file_of(tmp_path / "w", "prompt.pt").parent
    (folder / "results.json").unlink()
    learn = ["--output", tmp_path / "w" / "o", *command(world)]
    carry = [folder, "--dataset", "dtd", "--root", world / "data", "--clip", world / "clip.pt",
             "--device", "cpu"]
    anchor = file_of(tmp_path / "w", "anchor.pt", "anchor")
    for path, script, argv in ((folder / "last.pt", stage2, learn), (anchor, stage2, learn),
                               (folder / "prompt.pt", evaluation, carry)):
        whole = path.read_bytes()
        path.write_bytes(whole[:len(whole) // 2])
        worked, _, err = main_survives(script, argv, path)
        assert not worked and str(path) in err
        path.write_bytes(whole)
    assert main_survives(stage2, learn)[0] and main_survives(evaluation, carry)[0]
