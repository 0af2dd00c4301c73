"""Files and names from others, mutated at random: each works or ends in one line, never in a traceback or a changed file."""

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
from reference import TOKENIZER, encode_77, relative, tiny_clip

MODEL = tiny_clip(layers=2, width=64)
SPLIT = "split_zhou_DescribableTextures.json"


def cases(n):
    return settings(max_examples=n, derandomize=True, database=None, deadline=None,
                    suppress_health_check=list(HealthCheck))


# --------------------------------------------------------------------------------------------- what "survives" means

def outcome(call):
    """What a script makes of `call`: exit code, stdout, stderr. Any other exception than a user's comes through."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace")              # as Python opens stderr
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = call()
    out.flush(), err.flush()
    return code, out.buffer.getvalue().decode(), err.buffer.getvalue().decode()


def survives(call, *files, script="eval.py"):
    """`call` works or is answered in one line, and `files` are what they were. Returns whether it worked."""
    before = [pathlib.Path(file).read_bytes() for file in files]
    code, _, err = outcome(lambda: evaluation.run_script(script, call, "cpu"))
    assert [pathlib.Path(file).read_bytes() for file in files] == before
    assert code == 0 and err == "" or code == 2 and err.startswith(f"{script}: ") and err.count("\n") == 1, err
    return code == 0


def main_survives(script, name, argv, *files):
    before = [pathlib.Path(file).read_bytes() for file in files]
    code, out, err = outcome(lambda: script.main([str(word) for word in argv]))
    assert [pathlib.Path(file).read_bytes() for file in files] == before
    assert "Traceback" not in err and (code == 0 or code == 2 and err.startswith(f"{name}: ") and err.count("\n") == 1), err
    return code == 0, out


# --------------------------------------------------------------------------------------------------- the mutations

TEXTS = st.one_of(st.sampled_from(["", " ", "\0", "\n", "\ud800", "é\u0301", "\u202eabc", "🦏", "'\"", "../..", "final", "a\nb", "1e999",
                                   "&nbsp;", "<|endoftext|>", "word " * 60]), st.text(max_size=8))
PLAIN = st.one_of(st.none(), st.booleans(), st.integers(-3, 60), st.sampled_from([10 ** 30, -0.0, 0.5, float("nan"), float("inf")]),
                  TEXTS)
JSON = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=5)
TENSORS = st.builds(lambda shape, dtype, value: torch.full(shape, value).to(dtype),
                    st.lists(st.integers(0, 5), max_size=3) | st.sampled_from([[1, 64], [4, 64], [5, 5]]),
                    st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64, torch.float64]),
                    st.sampled_from([0.0, 0.5, float("nan"), float("inf")]))
SPARSE = st.sampled_from([torch.eye(3).to_sparse(), torch.zeros(1, 64).to_sparse(), torch.empty(1, 64, device="meta")])


def places(value, path=()):
    """Paths of all parts of nested dicts and lists."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for i in range(len(value)):
            yield from places(value[i], (*path, i))


@st.composite
def mutated(draw, value, others):
    """`value` with one to three parts replaced, left out, doubled or under another key."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        paths = sorted(places(value), key=len)
        path = draw(st.sampled_from(paths))
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
    for at in [at, *draw(st.lists(st.integers(0, len(whole) - 1), max_size=7))]:
        changed[at] ^= 1 << draw(st.integers(0, 7))
    return bytes(changed)


def torch_bytes(content, legacy=False):
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def cut_sizes(whole, step=23):
    return [*range(0, len(whole) - 150, step), *range(max(0, len(whole) - 150), len(whole))]


# --------------------------------------------------------------------------------------------------- one small run

@pytest.fixture(scope="module")
def small_toy():
    """Few images a class, for as long as the module runs."""
    whole = data.toy_dataset
    data.toy_dataset = functools.partial(whole, n_train=1, n_val=1, n_test=1)
    yield
    data.toy_dataset = whole


@pytest.fixture(scope="module")
def world(tmp_path_factory, small_toy):
    """A folder with a CLIP's file, a run trained with it (two epochs a stage), and the resume files of both stages."""
    folder = tmp_path_factory.mktemp("world")
    state = MODEL.state_dict()
    torch.save(state, folder / "clip.pt")
    keep = pathlib.Path.unlink
    pathlib.Path.unlink = lambda path, missing_ok=False: None if path.name == "last.pt" else keep(path, missing_ok)
    try:
        assert outcome(lambda: stage2.main(["--output", str(folder / "o"), *command(folder)]))[0] == 0
    finally:
        pathlib.Path.unlink = keep
    return folder


def command(folder, anchor_epochs=True):
    return ["--clip", str(folder / "clip.pt"), "--epochs", "2", *["--anchor-epochs", "2"] * anchor_epochs,
            "--max-descriptions", "1", "--no-plot", "--shots", "1"]


def file_of(world, name, kind="coop"):
    (path,) = [path for path in (world / "o").rglob(name) if path.parent.parent.name.startswith(kind)]
    return path


# ----------------------------------------------------------------------------------------------- class names

WORDS = st.lists(st.sampled_from(["rhino", "yin yang", "water lilly", "a", "F-16A/B", "colt's"]), min_size=1, max_size=60).map(" ".join)
CHARACTERS = st.text(st.characters(), max_size=12)                      # of all of Unicode, lone surrogates too
CLASS_NAMES = st.lists(WORDS | CHARACTERS | TEXTS | st.text(st.sampled_from("🦏🐘é\u200d'\"’“.!-_ \t"), max_size=30), min_size=1, max_size=3)


def ids(text):
    """Its tokens; None where it cannot be encoded at all."""
    with contextlib.suppress(UnicodeEncodeError):
        return TOKENIZER.encode(text)


@cases(150)
@given(CLASS_NAMES, st.integers(1, 8))
def test_class_names_work_exactly_where_they_have_tokens_and_fit(names, n_soft):
    room = 77 - 1 - n_soft - 1
    fits = all(ids(name) and len(ids(name + ".")) <= room for name in names)
    torch.manual_seed(0)
    template = prompts.PlainTemplate(MODEL, n_soft)
    try:
        learner = prompts.CoOp(MODEL, names, template)
    except ValueError as error:
        assert not fits and str(error)
        return
    assert fits
    with torch.no_grad():
        features = learner.text_features()
    assert relative(features, encode_77(MODEL, template.soft_tokens, names)) < 1e-4


@cases(100)
@given(CLASS_NAMES, st.integers(1, 3), st.sampled_from(["of", "none", "🦏", "", " ", "because of"]))
def test_class_names_behind_an_anchor(names, n_anchor, preposition):
    before = 1 + n_anchor + len(TOKENIZER.encode("" if preposition == "none" else preposition))
    fits = all(ids(name) and len(ids(name + ".")) <= 77 - before - 1 for name in names)
    try:
        features = AnchorPrompt(MODEL, names, n_anchor, preposition)()
    except ValueError as error:
        assert not fits and str(error)
        return
    assert fits and features.shape[0] == len(names) and torch.isfinite(features).all()


@cases(60)
@given(CLASS_NAMES, st.integers(1, 8))
def test_class_names_with_an_anchor_behind_them_and_in_zero_shot_prompts(names, n_anchor):
    anchor_tokens = torch.zeros(n_anchor, 64)
    for build in (lambda: prompts.CoOp(MODEL, names, prompts.AnchorTemplate(MODEL, 4, anchor_tokens, "after-class")),
                  lambda: prompts.ZeroShot(MODEL, names, "a photo of a {}, {{}} 🦏.")):
        with contextlib.suppress(ValueError):
            with torch.no_grad():
                features = build().text_features()
            assert features.shape[0] == len(names) and torch.isfinite(features).all()


# ----------------------------------------------------------------------------------------------- split files

@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    worlds.dtd_tree(root, per_class=4, classes=3)
    return root


def check_split(root, content):
    file = root / "dtd" / SPLIT
    whole = file.read_bytes()
    try:
        file.write_bytes(content)
        loaded = []
        if survives(lambda: loaded.append(data.load_dataset("dtd", root)), file):
            (dataset,) = loaded
            assert all(isinstance(name, str) for name in dataset.class_names) and dataset.train and dataset.test
            for item in dataset.train + dataset.val + dataset.test:
                assert 0 <= item.label < len(dataset.class_names) and data.load_image(item.source).mode == "RGB"
        return bool(loaded)
    finally:
        file.write_bytes(whole)


def test_split_files_with_parts_changed(tree):
    whole = json.loads((tree / "dtd" / SPLIT).read_text())

    @cases(250)
    @given(mutated(whole, JSON), st.booleans())
    def check(split, ascii_only):
        check_split(tree, json.dumps(split, ensure_ascii=ascii_only).encode(errors="surrogatepass"))
    check()


def test_split_files_with_bytes_changed(tree):
    whole = (tree / "dtd" / SPLIT).read_bytes()
    check_split(tree, b"[" * 100_000)
    check_split(tree, b'{"train": ' * 50_000)
    assert check_split(tree, b"\xef\xbb\xbf" + whole)
    for size in cut_sizes(whole, 11):
        assert not check_split(tree, whole[:size]) or not whole[size:].strip()

    @cases(150)
    @given(damaged(whole))
    def check(content):
        check_split(tree, content)
    check()


def test_the_inventory_answers_any_split_file_in_its_line(tree):
    file, whole = tree / "dtd" / SPLIT, json.loads((tree / "dtd" / SPLIT).read_text())

    def check_inventory(content):
        text = file.read_bytes()
        try:
            file.write_bytes(content)
            worked, out = main_survives(data, "data.py", ["--root", tree], file)
            assert worked and len(out.rstrip("\n").split("\n")) == len(data.DATASETS), out
        finally:
            file.write_bytes(text)
    renamed = json.loads(json.dumps(whole).replace('"blotchy"', '"blot\\nchy"'))
    renamed["train"] = [row for row in renamed["train"] if row[1] != 1]
    check_inventory(json.dumps(renamed).encode())

    @cases(15)
    @given(mutated(whole, JSON))
    def check(split):
        check_inventory(json.dumps(split).encode())
    check()


# ------------------------------------------------------------------------------------------ description files

@pytest.fixture(scope="module")
def sentences():
    return {"banded": ["A banded texture has bands.", "It is 🦏 banded."], "blot_chy": ["Blots."], "Éclair": ["Sweet", "long"]}


def check_descriptions(tmp_path, content, aliases=None):
    file = tmp_path / "descriptions.json"
    file.write_bytes(content)
    if aliases is not None:
        (tmp_path / "aliases.json").write_text(json.dumps(aliases))
        aliases = tmp_path / "aliases.json"

    def call():
        found = data.load_descriptions(file, ["banded", "blot chy", "éclair"], 2, aliases)
        features = stage1.description_features(MODEL, found)
        assert [len(feature) for feature in features] == [len(own) for own in found] and all(1 <= len(own) <= 2 for own in found)
    return survives(call, file)


def test_description_files_and_aliases(tmp_path, sentences):
    whole = json.dumps(sentences).encode()
    assert check_descriptions(tmp_path, whole)
    check_descriptions(tmp_path, b"[" * 100_000)
    for size in range(len(whole)):
        assert not check_descriptions(tmp_path, whole[:size])

    @cases(150)
    @given(mutated(sentences, JSON), st.booleans())
    def parts(changed, ascii_only):
        check_descriptions(tmp_path, json.dumps(changed, ensure_ascii=ascii_only).encode(errors="surrogatepass"))

    @cases(60)
    @given(mutated({"banded": "Éclair", "éclair": "banded"}, JSON))
    def other_names(aliases):
        check_descriptions(tmp_path, whole, aliases)

    @cases(100)
    @given(damaged(whole))
    def bytes_changed(content):
        check_descriptions(tmp_path, content)
    parts(), other_names(), bytes_changed()


# -------------------------------------------------------------------------------------------------- results

LISTINGS = [], ["--table", "1", "--on", "toy"], ["--table", "9", "--on", "toy"], ["--table", "S1", "--csv"]


def check_results(folder, content, *options):
    file = folder / "toy" / "coop-anchoropt" / "seed1" / "results.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return main_survives(evaluation, "eval.py", [folder, *options], file)[0]


def test_results_files(tmp_path, world):
    content = json.loads(file_of(world, "results.json").read_text())
    content["settings"] = evaluation.default_settings("toy", "coop", "anchoropt")              # so that it has a place in tables
    whole = json.dumps(content).encode()
    assert all(check_results(tmp_path, whole, *options) for options in LISTINGS)
    check_results(tmp_path, b"[" * 100_000)
    for size in cut_sizes(whole):
        assert not check_results(tmp_path, whole[:size])

    @cases(200)
    @given(mutated(content, JSON), st.sampled_from(LISTINGS))
    def parts(changed, options):
        check_results(tmp_path, json.dumps(changed).encode(), *options)

    @cases(100)
    @given(damaged(whole))
    def bytes_changed(content):
        check_results(tmp_path, content)
    parts(), bytes_changed()


# ---------------------------------------------------------------------------------------------- checkpoints

def check_checkpoints(path, content, call, n_parts, n_bytes, others=PLAIN | TENSORS | SPARSE):
    """`call()` reads `path`, which holds `content`, what torch.save takes: its parts changed, its bytes changed, cut short."""
    whole = torch_bytes(content)
    path.write_bytes(whole)
    assert survives(call, path)

    def check(changed):
        path.write_bytes(changed)
        return survives(call, path)
    for size in cut_sizes(whole, max(1, len(whole) // 60)):
        assert not check(whole[:size])

    @cases(n_parts)
    @given(mutated(content, others))
    def parts(changed):
        check(torch_bytes(changed))

    @cases(n_bytes)
    @given(damaged(whole))
    def bytes_changed(content):
        check(content)

    @cases(n_bytes)
    @given(damaged(torch_bytes(content, legacy=True)))
    def bytes_of_the_old_format_changed(content):
        check(content)
    parts(), bytes_changed(), bytes_of_the_old_format_changed()


def test_anchor_files(tmp_path):
    own = {key: evaluation.default_settings("toy", "coop", "anchoropt")[key] for key in evaluation.ANCHOR_SETTINGS}
    names, path = ["ant", "rhino"], tmp_path / "anchor.pt"
    wanted = own | {"dataset": "toy"}
    save_anchor(path, torch.randn(1, 64), own | {"class_names": names})
    content = torch.load(path, weights_only=True)

    def call():
        tokens, saved = load_anchor(path)
        assert tokens.dtype == torch.float32 and tokens.dim() == 2 and torch.isfinite(tokens).all()
        stage1.check_anchor(path, tokens, saved, wanted, MODEL, names)
        evaluation.anchor_features(MODEL, names, tokens, wanted)
    check_checkpoints(path, content, call, 150, 250)


def test_released_anchor_files(tmp_path):
    path = tmp_path / "model.pth.tar"
    content = {"state_dict": {"anchor_ctx_1": torch.zeros(1, 64).half(), "anchor_ctx_2": torch.ones(2, 64)}, "epoch": 3}
    check_checkpoints(path, content, lambda: load_anchor(path), 80, 60)


def test_prompt_files(tmp_path, world):
    path, clip_model = tmp_path / "prompt.pt", prompts.load_clip(str(world / "clip.pt"))

    def call():
        saved = evaluation.load_prompt(path)
        learner, anchor_tokens = evaluation.load_learner(path, saved, clip_model)
        learner.set_classes(["ant", "rhino"]).text_features(torch.zeros(1, 64))
    check_checkpoints(path, torch.load(file_of(world, "prompt.pt"), weights_only=True), call, 150, 100)


def test_the_resume_file_of_stage_2(tmp_path, world):
    path, clip_model = tmp_path / "last.pt", prompts.load_clip(str(world / "clip.pt"))
    saved = evaluation.load_prompt(file_of(world, "prompt.pt"))
    dataset = data.load_dataset("toy")
    images = dataset.train[:4], {}

    def call():
        learner, _ = evaluation.load_learner("prompt.pt", saved, clip_model)
        stage2.train(learner, images, saved["settings"], 1, path)
    content = torch.load(file_of(world, "last.pt"), weights_only=True)
    assert len(content["log"]) == 2
    check_checkpoints_that_go_on(path, content, call, 80, 40)


def test_the_resume_file_of_stage_1(tmp_path, world):
    path, prompt = tmp_path / "last.pt", AnchorPrompt(MODEL, ["ant", "rhino"])
    content = torch.load(file_of(world, "last.pt", "anchor"), weights_only=True)
    assert len(content["log"]) == 2
    targets = torch.zeros(2, 64)
    check_checkpoints_that_go_on(path, content, lambda: stage1.learn_anchor(
        prompt, targets, 2, 1, 0.002, 1000, 0, path, content["digest"]["value"]), 100, 60)


def check_checkpoints_that_go_on(path, content, call, *counts):
    """As `check_checkpoints`, for files that training rewrites when it goes on: the file as read is what may not change."""
    def on_a_copy():
        whole = path.read_bytes()
        try:
            call()
        except (ValueError, OSError) as error:
            assert path.read_bytes() == whole and str(path) in str(error), error
            raise
        finally:
            path.write_bytes(whole)
    check_checkpoints(path, content, on_a_copy, *counts)


def test_a_damaged_file_of_kept_features_is_made_again_and_never_believed(tmp_path, tree):
    images = data.Images(data.load_dataset("dtd", tree).test, data.test_transform(32))
    features, labels = evaluation.frozen_features(MODEL, "tiny", images, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()

    def check(content):
        path.write_bytes(content)
        again = evaluation.frozen_features(MODEL, "tiny", images, cache=tmp_path)
        assert torch.equal(again[0], features) and torch.equal(again[1], labels)
        assert list(tmp_path.iterdir()) == [path]
    for size in cut_sizes(whole, 200):
        check(whole[:size])
    cases(60)(given(damaged(whole))(check))()


def test_clip_checkpoints(tmp_path):
    """A loaded CLIP also takes a prompt: no vocabulary, width or context length may be found wrong later."""
    path, state = tmp_path / "clip.pt", dict(tiny_clip(layers=1, width=64).state_dict())
    state["token_embedding.weight"] = torch.zeros(1, 1).expand(49408, 64)             # one number on the disk

    def call():
        clip_model = prompts.load_clip(str(path))
        with torch.no_grad():
            text = prompts.CoOp(clip_model, ["ant"], prompts.PlainTemplate(clip_model, 4)).text_features()
            image = clip_model.encode_image(torch.zeros(1, 3, *2 * [clip_model.visual.input_resolution]))
        assert text.shape == image.shape
    check_checkpoints(path, state, call, 60, 25)
    for key, tensor in [("token_embedding.weight", torch.zeros(100, 64)), ("positional_embedding", torch.zeros(5, 64)),
                        ("token_embedding.weight", torch.zeros(49408, 32)), ("text_projection", torch.zeros(64, 7))]:
        path.write_bytes(torch_bytes(state | {key: tensor}))
        assert not survives(call, path)


# ----------------------------------------------------------------------------------------- whole scripts

def test_damaged_files_end_whole_scripts_in_one_line_and_do_no_harm_when_mended(tmp_path, world):
    """Each kind of file, cut in half, as eval.py and stage2.py meet it."""
    shutil.copytree(world, tmp_path / "w")
    folder, argv = file_of(tmp_path / "w", "prompt.pt").parent, ["--output", tmp_path / "w" / "o", *command(world)]
    (folder / "results.json").unlink()
    for path, run in [(folder / "last.pt", lambda: main_survives(stage2, "stage2.py", argv, path)),
                      (file_of(tmp_path / "w", "anchor.pt", "anchor"), lambda: main_survives(stage2, "stage2.py", argv, path)),
                      (folder / "prompt.pt", lambda: main_survives(evaluation, "eval.py", [folder, "--dataset", "toy", "--clip",
                                                                                           world / "clip.pt"], path))]:
        whole = path.read_bytes()
        path.write_bytes(whole[:len(whole) // 2])
        assert not run()[0]
        path.write_bytes(whole)
    assert main_survives(stage2, "stage2.py", argv)[0]


@pytest.mark.parametrize("option", ["--seeds -1", "--seeds 99999999999999999999", "--class-chunk -1", "--test-batch 0", "--workers -1",
                                    "--device meta", "--device gpu", "--cache-images -1", "--cache-images nan"])
def test_options_out_of_range_are_named(tmp_path, world, option):
    code, _, err = outcome(lambda: stage2.main(["--output", str(tmp_path), *command(world), *option.split()]))
    assert code == 2 and option.split()[0].strip("-").split("-")[0] in err and err.count("\n") == 1, err


def test_anchors_of_others_end_stage2_in_its_table_or_one_line(tmp_path, world):
    path, argv = tmp_path / "anchor.pt", ["--output", tmp_path / "o", *command(world, False)]
    content = torch.load(file_of(world, "anchor.pt", "anchor"), weights_only=True)
    argv[argv.index("--epochs") + 1] = "0"

    @cases(12)
    @given(mutated(content, PLAIN | TENSORS) | st.just(content))
    def check(changed):
        path.write_bytes(torch_bytes(changed))
        main_survives(stage2, "stage2.py", [*argv, "--anchor", path], path)
    check()
