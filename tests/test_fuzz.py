"""Files and names from others, mutated at random.

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
from anchor import AnchorPrompt, load_anchor, save_anchor
from reference import TOKENIZER, as_huggingface, encode_77, random_state, relative, tiny_clip

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
NUMBERS = st.sampled_from([10 ** 30, -0.0, 0.5, float("nan"), float("inf")])
PLAIN = st.one_of(st.none(), st.booleans(), st.integers(-3, 60), NUMBERS, TEXTS)
JSON = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5)
SHAPES = st.lists(st.integers(0, 5), max_size=3) | st.sampled_from([[1, 64], [4, 64], [5, 5]])
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64,
                          torch.float64])
TENSORS = st.builds(lambda shape, dtype, value: torch.full(shape, value).to(dtype),
                    SHAPES, DTYPES, st.sampled_from([0.0, 0.5, float("nan"), float("inf")]))


def places(value, path=()):
    """Paths of all parts of nested dicts and lists."""
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


@st.composite
def mutated(draw, value, others):
    """`value` with one to three parts replaced, left out, doubled or under another key."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(sorted(places(value), key=len)))
        if not path:
            value = draw(others) if draw(st.integers(0, 9)) == 0 else value
            continue
        parent = functools.reduce(lambda part, key: part[key], path[:-1], value)
        action = draw(st.sampled_from(["replace", "replace", "replace", "drop", "double"]))
        if action == "replace":
            parent[path[-1]] = draw(others)
        elif action == "drop":
            del parent[path[-1]]
        elif isinstance(parent, list):
            parent.insert(path[-1], copy.deepcopy(parent[path[-1]]))
        else:
            parent[draw(TEXTS)] = parent.pop(path[-1])
    return value


@st.composite
def damaged(draw, whole):
    """Bytes cut off somewhere, or one to eight of their bits flipped, or bytes in between lost."""
    kind = draw(st.sampled_from(["cut", "flip", "flip", "flip", "lose"]))
    at = draw(st.integers(0, len(whole) - 1))
    if kind == "cut":
        return whole[:at]
    if kind == "lose":
        return whole[:at] + whole[at + draw(st.integers(1, 40)):]
    changed = bytearray(whole)
    for place in [at, *draw(st.lists(st.integers(0, len(whole) - 1), max_size=7))]:
        changed[place] ^= 1 << draw(st.integers(0, 7))
    return bytes(changed)


def json_bytes(values):
    """As a JSON file has them, in ASCII or not."""
    return st.builds(lambda value, ascii_only: json.dumps(value, ensure_ascii=ascii_only).encode(
        errors="surrogatepass"), values, st.booleans())


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


# ---------------------------------------------------------------------------- class names

WORDS = st.lists(st.sampled_from(["rhino", "yin yang", "water lilly", "a", "F-16A/B", "colt's"]),
                 min_size=1, max_size=60).map(" ".join)
CHARACTERS = st.text(st.characters(), max_size=12)      # of all of Unicode, lone surrogates too
MARKS = st.text(st.sampled_from("🦏🐘é\u200d'\"’“.!-_ \t"), max_size=30)
CLASS_NAMES = st.lists(WORDS | CHARACTERS | TEXTS | MARKS, min_size=1, max_size=3)
WRITTEN = "a photo of a {}, {{}} 🦏."


def ids(text):
    """Its tokens; none where it cannot be encoded at all."""
    with contextlib.suppress(UnicodeEncodeError):
        return TOKENIZER.encode(text)
    return []


def after_soft_tokens(names, n):
    template = prompts.PlainTemplate(MODEL, n)
    fast = prompts.CoOp(MODEL, names, template).text_features()
    return fast, encode_77(MODEL, template.soft_tokens, names)


def before_an_anchor(names, n):
    """Tab. 8's "after class token": [SOS] V_1..V_4, name, anchor, "." and [EOT] must fit."""
    template = prompts.AnchorTemplate(MODEL, 4, torch.randn(n, 64), "after-class")
    fast = prompts.CoOp(MODEL, names, template).text_features()
    return fast, encode_77(MODEL, template.soft_tokens, names, inside=template.anchor_tokens)


def after_an_anchor(names, n):
    prompt = AnchorPrompt(MODEL, names, n, "🦏")
    t_anc = torch.cat([prompt.tokens, MODEL.token_embedding.weight[ids("🦏")]])
    slow = encode_77(MODEL, t_anc, names)
    return prompt(), prompts.unit(slow)


def in_written_prompts(names, n):
    sentences = [WRITTEN.format(name).removesuffix(".") for name in names]
    return (prompts.ZeroShot(MODEL, names, WRITTEN).text_features(),
            encode_77(MODEL, torch.zeros(0, 64), sentences))        # which ends them with "."


def with_its_stop(name):
    return len(ids(name + "."))


# The prompt, and the tokens of a name in it with all that stands beside it.
@pytest.mark.parametrize("in_a_prompt, length", [
    (after_soft_tokens, lambda name, n: 1 + n + with_its_stop(name) + 1),
    (after_an_anchor, lambda name, n: 1 + n + len(ids("🦏")) + with_its_stop(name) + 1),
    # "!." is one token, "!" and "." are two.
    (before_an_anchor,
     lambda name, n: 1 + 4 + max(with_its_stop(name), len(ids(name)) + 1) + n + 1),
    (in_written_prompts, lambda name, n: 1 + len(ids(WRITTEN.format(name))) + 1)])
def test_class_names_work_exactly_where_they_have_tokens_and_fit(in_a_prompt, length):
    def check(drawn):
        names, n = drawn
        written = in_a_prompt is in_written_prompts
        fits = all(ids(WRITTEN.format(name) if written else name) and length(name, n) <= 77
                   for name in names)
        torch.manual_seed(0)
        try:
            with torch.no_grad():
                fast, slow = in_a_prompt(names, n)
        except ValueError as error:
            assert not fits and str(error)
            return
        assert fits and relative(fast, slow) < 1e-4
    each(check, 60, st.tuples(CLASS_NAMES, st.integers(1, 8)))


# ---------------------------------------------------------------------------- files of a dataset

@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    worlds.dtd_tree(root, per_class=4, classes=3)
    return root


def check_split(root, content):
    """Does this split file work? If so, all of it is sound. It is survived either way."""
    file = root / "dtd" / SPLIT
    whole = file.read_bytes()

    def call():
        dataset = data.load_dataset("dtd", root)
        assert all(isinstance(name, str) for name in dataset.class_names)
        assert dataset.train and dataset.test
        for item in dataset.train + dataset.val + dataset.test:
            assert 0 <= item.label < len(dataset.class_names)
            data.load_image(item.source)
    try:
        file.write_bytes(content)
        return survives(call, file)
    finally:
        file.write_bytes(whole)


def test_split_files(tree):
    whole = (tree / "dtd" / SPLIT).read_bytes()
    assert check_split(tree, whole) and check_split(tree, b"\xef\xbb\xbf" + whole)
    assert not check_split(tree, b"[" * 100_000)
    check = functools.partial(check_split, tree)
    assert not any(map(check, cut_short(whole.rstrip())))
    each(check, 200, json_bytes(mutated(json.loads(whole), JSON)))
    each(check, 80, damaged(whole))


def test_the_inventory_answers_any_split_file_in_its_line(tree):
    file = tree / "dtd" / SPLIT
    whole = file.read_text()

    def check(content):
        file.write_bytes(content)
        worked, out, _ = main_survives(data, ["--root", tree], file)
        assert worked and len(out.rstrip("\n").split("\n")) == len(data.DATASETS), out
    split = json.loads(whole.replace('"blotchy"', '"blot\\nchy"'))
    try:
        each(check, 15, json_bytes(mutated(split, JSON)))
    finally:
        file.write_text(whole)


def test_description_files(tmp_path):
    sentences = {"banded": ["A banded texture has bands.", "It is 🦏 banded.", "."],
                 "(chy) blot": ["Blots."], "Éclair": ["Sweet", "long"]}
    file, whole = tmp_path / "said.json", json.dumps(sentences).encode()

    def call():
        found = data.load_descriptions(file, ["banded", "blot chy", "éclair"], 2)
        features = stage1.description_features(MODEL, found)
        assert [len(feature) for feature in features] == [len(own) for own in found]
        assert all(1 <= len(own) <= 2 for own in found)

    def check(content):
        file.write_bytes(content)
        return survives(call, file)
    assert check(whole) and not check(b"[" * 100_000)
    assert not any(map(check, cut_short(whole)))

    each(check, 150, json_bytes(mutated(sentences, JSON)))
    each(check, 80, damaged(whole))


# ---------------------------------------------------------------------------- our own files

@pytest.mark.parametrize("name, options", [("results.json", []),
                                           ("eval-eurosat.json", ["--table", 2])])
def test_results_that_are_cut_short_or_something_else_are_named(tmp_path, world, name, options):
    file = tmp_path / "dtd" / "coop-anchoropt" / "seed1" / name
    file.parent.mkdir(parents=True)
    whole = file_of(world, "results.json").read_bytes()
    if name != "results.json":                  # an evaluation stands beside its run
        file.with_name("results.json").write_bytes(whole)
        whole = json.dumps(json.loads(whole) | {"dataset": "eurosat"}).encode()

    def worked(content):
        file.write_bytes(content)
        worked, _, err = main_survives(evaluation, [tmp_path, *options], file)
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


def test_released_anchor_files(tmp_path):
    path = tmp_path / "model.pth.tar"
    state = {"anchor_ctx_1": torch.zeros(1, 64).half(), "anchor_ctx_2": torch.ones(2, 64)}
    check_checkpoint(path, {"state_dict": state, "epoch": 3}, lambda: load_anchor(path), 80)


def test_prompt_files(tmp_path, world):
    path, clip_model = tmp_path / "prompt.pt", prompts.load_clip(world / "clip.pt")

    def call():
        saved = evaluation.load_prompt(path)
        evaluation.load_learner(path, saved, clip_model)
    content = torch.load(file_of(world, "prompt.pt"), weights_only=True)
    check_checkpoint(path, content, call, 150)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_file_that_a_stage_goes_on_from_is_refused_where_its_bytes_changed(tmp_path, world,
                                                                              stage):
    path, whole = tmp_path / "last.pt", file_of(world, "last.pt", ("anchor", "coop")[stage - 1])
    content = torch.load(whole, weights_only=True)
    assert len(content["log"]) == 2

    def call():
        part = AnchorPrompt(MODEL, ["ant", "rhino"])
        if stage == 2:
            prompt = file_of(world, "prompt.pt")
            part = evaluation.load_learner(prompt, evaluation.load_prompt(prompt), MODEL)
        name = ("prompt", "learner")[stage - 1]
        parts = {name: part, "optimizer": stage1.sgd(part.parameters(), 0.002)}
        try:
            epochs = stage1.Epochs("a stage", 2, 1, parts, path, content["facts"])
        except ValueError as error:
            assert str(path) in str(error)
            raise
        assert epochs.log == content["log"]
        for key, value in part.state_dict().items():
            assert torch.equal(value, content[name][key])
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


def test_configs_of_huggingfaces_folders(tmp_path):
    path = tmp_path / "config.json"
    torch.save(small(as_huggingface(random_state(64, 64, 1))), tmp_path / "pytorch_model.bin")
    config = {"auto_map": {"AutoModel": "mine.CLIP"},
              "text_config": {"num_attention_heads": 1, "hidden_act": "gelu"},
              "vision_config": {"num_attention_heads": 1, "image_size": 24, "patch_size": 8}}

    def check(content):
        path.write_bytes(content)
        return survives(lambda: use(tmp_path), path)
    whole = json.dumps(config).encode()
    assert check(whole) and not any(map(check, cut_short(whole)))
    each(check, 80, json_bytes(mutated(config, JSON)))


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
