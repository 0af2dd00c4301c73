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
from anchor import AnchorPrompt, anchor_features, load_anchor, save_anchor
from reference import TOKENIZER, encode_77, relative, tiny_clip

MODEL = tiny_clip(layers=2, width=64)
SPLIT = "split_zhou_DescribableTextures.json"


def cases(n):
    return settings(max_examples=n, derandomize=True, database=None, deadline=None,
                    suppress_health_check=list(HealthCheck))


# ---------------------------------------------------------------------------- what "survives" means

def outcome(call):
    """What a script makes of `call`: exit code, stdout, stderr.

    Any other exception than argparse's exit comes through.
    """
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
    if code == 2:
        assert err.startswith(f"{name}: "), err
        worlds.one_line(err)
    else:
        assert code == 0 and "Traceback" not in err, err
    return code == 0, out, err


def survives(call, *files):
    """`answered` for a function of ours, as a script runs it. Returns whether it worked."""
    def as_a_script():
        return stage1.run_script("eval.py", lambda args: call(), None)
    worked, _, err = answered("eval.py", as_a_script, *files)
    assert not worked or err == "", err
    return worked


def main_survives(script, name, argv, *files):
    """`answered` for a whole script. Returns whether it worked, and stdout."""
    return answered(name, lambda: script.main([str(word) for word in argv]), *files)[:2]


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
SPARSE = st.sampled_from([torch.eye(3).to_sparse(), torch.zeros(1, 64).to_sparse(),
                          torch.empty(1, 64, device="meta")])


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
    for place in [at, *draw(st.lists(st.integers(0, len(whole) - 1), max_size=7))]:
        changed[place] ^= 1 << draw(st.integers(0, 7))
    return bytes(changed)


def torch_bytes(content, legacy=False):
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def cut_sizes(whole, step=23):
    """Lengths to cut it at: every `step` bytes, and each of the last 60, where an index may be."""
    return [*range(0, len(whole) - 60, step), *range(max(0, len(whole) - 60), len(whole))]


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
        argv = [str(word) for word in command(folder)]
        code, _, err = outcome(lambda: stage2.main(["--output", str(folder / "o"), *argv]))
    assert code == 0, err
    return folder


def command(folder, anchor_epochs=True):
    words = ["--dataset", "dtd", "--root", folder / "data", "--clip", folder / "clip.pt",
             "--no-plot", "--device", "cpu", "--epochs", "2"]
    if anchor_epochs:
        words += ["--descriptions", folder / "said.json", "--anchor-epochs", "2"]
    return words


def file_of(world, name, kind="coop"):
    found = [path for path in (world / "o").rglob(name) if path.parent.parent.name.startswith(kind)]
    (path,) = found
    return path


# ---------------------------------------------------------------------------- class names

WORDS = st.lists(st.sampled_from(["rhino", "yin yang", "water lilly", "a", "F-16A/B", "colt's"]),
                 min_size=1, max_size=60).map(" ".join)
CHARACTERS = st.text(st.characters(), max_size=12)      # of all of Unicode, lone surrogates too
MARKS = st.text(st.sampled_from("🦏🐘é\u200d'\"’“.!-_ \t"), max_size=30)
CLASS_NAMES = st.lists(WORDS | CHARACTERS | TEXTS | MARKS, min_size=1, max_size=3)


def ids(text):
    """Its tokens; None where it cannot be encoded at all."""
    with contextlib.suppress(UnicodeEncodeError):
        return TOKENIZER.encode(text)


@cases(100)
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
@given(CLASS_NAMES, st.integers(1, 3),
       st.sampled_from(["of", "none", "🦏", "", " ", "because of"]))
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
def test_class_names_with_an_anchor_behind_them(names, n_anchor):
    """Tab. 8's "after class token": [SOS] V_1..V_4, name, anchor, "." and [EOT] must fit."""
    def fits_one(name):
        most = max(len(ids(name + ".")), len(ids(name)) + 1)    # "!." is one token, "!", "." two
        return 1 + 4 + most + n_anchor + 1 <= 77
    fits = all(ids(name) and fits_one(name) for name in names)
    torch.manual_seed(0)
    anchor_tokens = torch.randn(n_anchor, 64)
    template = prompts.AnchorTemplate(MODEL, 4, anchor_tokens, "after-class")
    try:
        with torch.no_grad():
            features = prompts.CoOp(MODEL, names, template).text_features()
    except ValueError as error:
        assert not fits and str(error)
        return
    assert fits
    expected = encode_77(MODEL, template.soft_tokens, names, inside=anchor_tokens)
    assert relative(features, expected) < 1e-4


@cases(60)
@given(CLASS_NAMES)
def test_class_names_in_zero_shot_prompts(names):
    prompt = "a photo of a {}, {{}} 🦏."
    texts = [prompt.format(name) for name in names]
    fits = all(ids(text) and len(ids(text)) <= 75 for text in texts)
    try:
        features = prompts.ZeroShot(MODEL, names, prompt).text_features()
    except ValueError as error:
        assert not fits and str(error)
        return
    assert fits
    sentences = [text.removesuffix(".") for text in texts]          # encode_77 ends them with "."
    assert relative(features, encode_77(MODEL, torch.zeros(0, 64), sentences)) < 1e-4


# ------------------------------------------------------------------------------------- split files

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
            assert all(isinstance(name, str) for name in dataset.class_names)
            assert dataset.train and dataset.test
            for item in dataset.train + dataset.val + dataset.test:
                assert 0 <= item.label < len(dataset.class_names)
                assert data.load_image(item.source).mode == "RGB"
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


# -------------------------------------------------------------------------------- description files

@pytest.fixture(scope="module")
def sentences():
    return {"banded": ["A banded texture has bands.", "It is 🦏 banded.", "."],
            "(chy) blot": ["Blots."], "Éclair": ["Sweet", "long"]}


def check_descriptions(tmp_path, content, aliases=None):
    file = tmp_path / "descriptions.json"
    file.write_bytes(content)
    if aliases is not None:
        (tmp_path / "aliases.json").write_text(json.dumps(aliases))
        aliases = tmp_path / "aliases.json"

    def call():
        names, notes = ["banded", "blot chy", "éclair"], []
        found = data.load_descriptions(file, names, 2, aliases, notes)
        features = stage1.description_features(MODEL, found, names)
        assert [len(feature) for feature in features] == [len(own) for own in found]
        assert all(1 <= len(own) <= 2 for own in found)
        assert all(isinstance(note, str) for note in notes)
    return survives(call, file)


def test_description_files_and_aliases(tmp_path, sentences, monkeypatch):
    monkeypatch.chdir(tmp_path)                         # where an aliases file to fill is written
    whole = json.dumps(sentences).encode()
    assert check_descriptions(tmp_path, whole)
    check_descriptions(tmp_path, b"[" * 100_000)
    for size in range(len(whole)):
        assert not check_descriptions(tmp_path, whole[:size])

    @cases(150)
    @given(mutated(sentences, JSON), st.booleans())
    def parts(changed, ascii_only):
        text = json.dumps(changed, ensure_ascii=ascii_only)
        check_descriptions(tmp_path, text.encode(errors="surrogatepass"))

    @cases(60)
    @given(mutated({"banded": "Éclair", "éclair": "banded", "blot chy": ""}, JSON))
    def other_names(aliases):
        check_descriptions(tmp_path, whole, aliases)

    @cases(100)
    @given(damaged(whole))
    def bytes_changed(content):
        check_descriptions(tmp_path, content)
    parts(), other_names(), bytes_changed()


# ---------------------------------------------------------------------------- results

LISTINGS = ([], ["--table", "1", "--on", "toy"], ["--table", "9", "--on", "toy"],
            ["--table", "S1", "--csv"], ["--summary", "final"], ["--figure", "4"])


def check_results(folder, content, *options):
    file = folder / "toy" / "coop-anchoropt" / "seed1" / "results.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    if "--figure" in options:
        options = [*options, "--output", folder / "figure.png"]
    return main_survives(evaluation, "eval.py", [folder, *options], file)[0]


def draw_quickly(panels, path, n_anchor):
    """In place of a picture: what drawing does first with each W."""
    for W in panels.values():
        rows, columns = torch.as_tensor(W, dtype=torch.float32).shape
        assert rows == columns
    pathlib.Path(path).write_text("picture")


def test_results_files(tmp_path, world, monkeypatch):
    monkeypatch.setattr(evaluation, "plot_position_matrix", draw_quickly)
    content = json.loads(file_of(world, "results.json").read_text())
    content |= {"dataset": "toy", "settings": stage1.default_settings("toy", "coop", "anchoropt")}
    whole = json.dumps(content).encode()
    assert all(check_results(tmp_path, whole, *options) for options in LISTINGS)
    assert not check_results(tmp_path, b"[" * 100_000)
    for size in cut_sizes(whole):
        assert not check_results(tmp_path, whole[:size])

    @cases(250)
    @given(mutated(content, JSON), st.sampled_from(LISTINGS))
    def parts(changed, options):
        check_results(tmp_path, json.dumps(changed).encode(), *options)

    @cases(100)
    @given(damaged(whole), st.sampled_from(LISTINGS))
    def bytes_changed(content, options):
        check_results(tmp_path, content, *options)
    parts(), bytes_changed()


def test_files_of_evaluations(tmp_path, world):
    """eval-*.json, as Table 2 and a second evaluation read it."""
    row = evaluation.TRANSFER[2]
    run = json.loads(file_of(world, "results.json").read_text())
    run |= {"dataset": "imagenet", "settings": row.settings("imagenet"), "novel": None}
    folder = stage1.run_folder(tmp_path, run["settings"], 1)
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(run))
    file = folder / "eval-dtd.json"
    content = {"dataset": "imagenet", "target": "dtd", "seed": 1, "run": "coop-anchoropt",
               "classes": 4, "images": 8, "settings": run["settings"], "prompt": "0" * 8,
               "known": False,
               "accuracy": run["base"], "facts": {}, "notes": ["a note"], "comparable": False}

    def check(changed, *options):
        file.write_bytes(changed)
        return main_survives(evaluation, "eval.py", [tmp_path, "--table", "2", *options], file)
    whole = json.dumps(content).encode()
    worked, out = check(whole)
    assert worked and "a note (CoOp + AnchorOPT, dtd)" in out
    for size in cut_sizes(whole, 60):
        assert not check(whole[:size])[0]

    @cases(100)
    @given(mutated(content, JSON))
    def parts(changed):
        check(json.dumps(changed).encode(), "--csv")
    parts()


# ---------------------------------------------------------------------------- checkpoints

def check_checkpoints(path, content, call, n_parts, n_bytes, others=PLAIN | TENSORS | SPARSE):
    """`call()` reads `path`, a torch.save of `content`: parts changed, bytes changed, cut short."""
    whole = torch_bytes(content)
    path.write_bytes(whole)
    assert survives(call, path)

    def check(changed):
        path.write_bytes(changed)
        return survives(call, path)
    for size in cut_sizes(whole, max(1, len(whole) // 40)):
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
    wanted = stage1.default_settings("toy", "coop", "anchoropt")
    own = {key: wanted[key] for key in stage1.ANCHOR_SETTINGS}
    names, path = ["ant", "rhino"], tmp_path / "anchor.pt"
    save_anchor(path, torch.randn(1, 64), own | {"class_names": names})
    content = torch.load(path, weights_only=True)

    def call():
        tokens, saved = load_anchor(path)
        assert tokens.dtype == torch.float32 and tokens.dim() == 2 and torch.isfinite(tokens).all()
        stage1.check_anchor(path, tokens, saved, wanted, MODEL)
        anchor_features(MODEL, names, tokens, wanted["preposition"])
    check_checkpoints(path, content, call, 150, 120)


def test_released_anchor_files(tmp_path):
    path = tmp_path / "model.pth.tar"
    state = {"anchor_ctx_1": torch.zeros(1, 64).half(), "anchor_ctx_2": torch.ones(2, 64)}
    content = {"state_dict": state, "epoch": 3}
    check_checkpoints(path, content, lambda: load_anchor(path), 80, 60)


def test_prompt_files(tmp_path, world):
    path, clip_model = tmp_path / "prompt.pt", prompts.load_clip(str(world / "clip.pt"))

    def call():
        saved = evaluation.load_prompt(path)
        learner = evaluation.load_learner(path, saved, clip_model)
        classifier = evaluation.Classifier(learner, saved["settings"], saved["class_names"])
        classifier.set_classes(["ant", "rhino"])
        f = torch.zeros(1, 64)
        evaluation.infer(learner, f, None, classifier.f_anc, classifier.known)
    content = torch.load(file_of(world, "prompt.pt"), weights_only=True)
    check_checkpoints(path, content, call, 150, 60)


def test_the_file_that_stage_2_goes_on_from(tmp_path, world):
    path, clip_model = tmp_path / "last.pt", prompts.load_clip(str(world / "clip.pt"))
    saved = evaluation.load_prompt(file_of(world, "prompt.pt"))
    content = torch.load(file_of(world, "last.pt"), weights_only=True)
    assert len(content["log"]) == 2
    features = 2 * [(torch.ones(2, 64), None)]
    labels = torch.tensor([0, 1])

    def call():
        learner = evaluation.load_learner("prompt.pt", saved, clip_model)
        optimizer = stage1.sgd(learner.parameters(), 0.002)
        epochs = stage1.Epochs("stage II", 2, 1, [optimizer], path,
                               {"learner": learner, "optimizer": optimizer}, content["facts"])
        stage2.adapt(learner, epochs, features, labels, saved["settings"], 1)
    check_checkpoints_that_go_on(path, content, call, 80, 25)


def test_the_file_that_stage_1_goes_on_from(tmp_path, world):
    path = tmp_path / "last.pt"
    content = torch.load(file_of(world, "last.pt", "anchor"), weights_only=True)
    assert len(content["log"]) == 2

    def call():
        prompt = AnchorPrompt(MODEL, ["ant", "rhino"])
        optimizer = stage1.sgd([prompt.tokens], 0.002)
        epochs = stage1.Epochs("stage I", 2, 1, [optimizer], path,
                               {"prompt": prompt, "optimizer": optimizer}, content["facts"])
        stage1.learn_anchor(prompt, torch.zeros(2, 64), epochs, 1000)
    check_checkpoints_that_go_on(path, content, call, 80, 40)


def check_checkpoints_that_go_on(path, content, call, *counts):
    """As `check_checkpoints`, for files that training rewrites when it goes on.

    A file that is refused stays as it is, and the error names it.
    """
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
    items = tuple(data.load_dataset("dtd", tree).test)
    clip_settings = tuple((key, "default") for key in stage1.CLIP_SETTINGS)

    def features():
        evaluation.frozen_features.cache_clear()                    # as in another process
        return evaluation.frozen_features(MODEL, clip_settings, items, tmp_path, 0)
    expected = features()
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()

    def check(content):
        path.write_bytes(content)
        assert torch.equal(features(), expected)
        assert list(tmp_path.iterdir()) == [path]
    for size in cut_sizes(whole, 200):
        check(whole[:size])
    other = data.KeptFeatures(tmp_path / "other", ["another CLIP"], data.Images(items, None))
    other.write(0, torch.zeros_like(expected))                      # sound, and of something else
    other_content = other.path(0).read_bytes()
    shutil.rmtree(tmp_path / "other")
    check(other_content)
    cases(60)(given(damaged(whole))(check))()


def test_clip_checkpoints(tmp_path):
    """A loaded CLIP also takes a prompt: nothing about it may be found wrong later."""
    path, state = tmp_path / "clip.pt", dict(tiny_clip(layers=1, width=64).state_dict())
    state["token_embedding.weight"] = torch.zeros(1, 1).expand(49408, 64)   # one number on the disk

    def call():
        clip_model = prompts.load_clip(str(path))
        resolution = clip_model.visual.input_resolution
        with torch.no_grad():
            learner = prompts.CoOp(clip_model, ["ant"], prompts.PlainTemplate(clip_model, 4))
            text = learner.text_features()
            image = prompts.encode_image(clip_model, torch.zeros(1, 3, resolution, resolution))
        assert text.shape == image.shape
    check_checkpoints(path, state, call, 60, 20)
    for key, shape in (("token_embedding.weight", (100, 64)), ("positional_embedding", (5, 64)),
                       ("token_embedding.weight", (49408, 32)), ("text_projection", (64, 7))):
        path.write_bytes(torch_bytes(state | {key: torch.zeros(shape)}))
        assert not survives(call, path), key


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
    for path, script, name, argv in ((folder / "last.pt", stage2, "stage2.py", learn),
                                     (anchor, stage2, "stage2.py", learn),
                                     (folder / "prompt.pt", evaluation, "eval.py", carry)):
        whole = path.read_bytes()
        path.write_bytes(whole[:len(whole) // 2])
        call = functools.partial(script.main, [str(word) for word in argv])
        worked, _, err = answered(name, call, path)
        assert not worked and str(path) in err
        path.write_bytes(whole)
    assert main_survives(stage2, "stage2.py", learn)[0]
    assert main_survives(evaluation, "eval.py", carry)[0]


@pytest.mark.parametrize("option", [
    "--seeds -1", "--seeds 99999999999999999999", "--seeds 1.5", "--shots 0", "--epochs -1",
    "--batch-size 0", "--soft-tokens 0", "--anchor-length 0", "--max-descriptions 0", "--depth 0",
    "--lr 0", "--lr nan", "--anchor-lr inf", "--tau -1", "--temperature 0", "--lambda-1 -0.1",
    "--lambda-2 inf", "--w-cat nan", "--class-chunk -1", "--test-batch 0", "--workers -1",
    "--device meta", "--device gpu", "--dtype int8"])
def test_options_out_of_range_are_named(tmp_path, world, option):
    argv = [str(word) for word in ("--output", tmp_path / "o", *command(world))]
    code, _, err = outcome(lambda: stage2.main([*argv, *option.split()]))
    name, value = option.split()
    assert code == 2 and err.startswith("stage2.py: ")
    worlds.one_line(err, name if "device" not in name else f"device {value}")
    assert not list(tmp_path.rglob("*.pt"))                 # refused before anything is learnt


def test_anchors_of_others_end_stage2_in_its_table_or_one_line(tmp_path, world):
    path = tmp_path / "anchor.pt"
    argv = ["--output", tmp_path / "o", *command(world, False), "--anchor", path]
    argv[argv.index("--epochs") + 1] = "0"
    content = torch.load(file_of(world, "anchor.pt", "anchor"), weights_only=True)

    def check(changed):
        path.write_bytes(torch_bytes(changed))
        return main_survives(stage2, "stage2.py", argv, path)
    worked, out = check(content)
    assert worked and "| final" in out
    assert not check(content | {"anchor_tokens": torch.zeros(1, 63)})[0]

    @cases(12)
    @given(mutated(content, PLAIN | TENSORS))
    def parts(changed):
        check(changed)
    parts()
