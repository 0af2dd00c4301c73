"""data.py against the fifteen layouts (worlds.py), CoOp's few-shot picks, and troubles of disks."""

import json
import os
import pathlib
import random
import re
import shutil
import traceback
import types

import clip.clip
import numpy as np
import PIL.EpsImagePlugin
import pytest
import torch
from PIL import Image

import data
import prompts
import worlds
from worlds import one_line

JSON_SETS = list(worlds.LAYOUTS)
OWN_SPLIT_SETS = ["caltech101", "dtd", "eurosat", "food101"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """All fifteen trees under one root, where nothing is written: (root, name -> class names)."""
    root = tmp_path_factory.mktemp("data")
    names = {name: tree(root, per_class=8, **({"classes": 10} if name == "caltech101" else {}))
             for name, tree in worlds.TREES.items()}
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    yield str(root), names
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def failure(function, *arguments, kind=ValueError):
    """The one line of the error that a call ends in."""
    with pytest.raises(kind) as error:
        function(*arguments)
    return one_line(error)


def refused(name, root, *parts):
    """The one line that loading a dataset ends in; it holds all `parts`."""
    return one_line(failure(data.load_dataset, name, root), *parts)


def counts(dataset):
    """Images of each class in train, val and test."""
    return [np.bincount([item.label for item in items], minlength=len(dataset.class_names)).tolist()
            for items in (dataset.train, dataset.val, dataset.test)]


# ---------------------------------------------------------------------------- the fifteen layouts

def test_there_are_the_fifteen_datasets_and_toy_which_needs_no_root(world, monkeypatch):
    assert set(data.DATASETS) == set(worlds.TREES) | {"toy"}
    assert all(row.prompt.count("{}") == 1 for row in data.DATASETS.values())
    dataset = data.load_dataset("toy", "/nowhere")
    assert len(dataset.class_names) == 48 and dataset.notes == []
    assert dataset.test[0].source.startswith(os.path.join(data.ASSETS, "toy", "images"))
    monkeypatch.setenv("DATA", world[0])
    assert len(data.load_dataset("eurosat").class_names) == 10


@pytest.mark.parametrize("name", worlds.TREES)
def test_layout_is_read_with_the_right_counts_and_names(world, name):
    root, names = world
    dataset = data.load_dataset(name, root)
    assert (dataset.name, dataset.class_names) == (name, names[name])
    if name == "imagenet_a":                                # 200 of the wnids, sorted
        assert names[name] == ["goldfish", "pug", "jack-o'-lantern", "missile", "sunglasses"]
    assert dataset.folder == os.path.join(root, data.DATASETS[name].folder)
    test_only = (0, 0, 8)
    a_class = {"imagenet": (8, 0, 4), "imagenetv2": test_only, "imagenet_sketch": test_only,
               "imagenet_a": test_only, "imagenet_r": test_only}.get(name, (4, 2, 2))
    assert counts(dataset) == [[n] * len(names[name]) for n in a_class]
    items = dataset.train + dataset.val + dataset.test
    sources = {item.source for item in items}
    assert len(sources) == len(items) and all(map(os.path.isfile, sources))
    assert not any(item.upright for item in items)
    for item in items:                                      # colours tell the classes, see worlds
        with Image.open(item.source) as image:
            if image.mode == "RGB":
                expected = np.array([37, 91, 151]) * item.label % 200 + 27.5
                assert np.abs(np.asarray(image, float).mean((0, 1)) - expected).max() < 9, item
    if name == "eurosat":                                   # the one tree that is whole
        assert dataset.notes == []
    else:
        (note,) = dataset.notes
        one_line(note, f"{len(names[name])} classes found", data.DATASETS[name].classes)


@pytest.mark.parametrize("name, images", [("imagenetv2", "imagenetv2"), ("imagenetv2", ""),
                                          ("imagenet_sketch", "sketch")])
def test_mirrors_with_other_folders_and_without_classnames_are_read(tmp_path, name, images):
    names = worlds.TREES[name](tmp_path, images=images)
    worlds.imagenet_tree(tmp_path)
    (tmp_path / data.DATASETS[name].folder / "classnames.txt").unlink()
    assert data.load_dataset(name, tmp_path).class_names == names


@pytest.mark.parametrize("said, name", [
    ("FGVCAircraft", "fgvc_aircraft"), ("ImageNet-Adversarial", "imagenet_a"),
    ("DescribableTextures", "dtd")])
def test_a_dataset_may_be_named_as_the_field_names_it(world, said, name):
    assert data.load_dataset(said, world[0]).name == name


# ---------------------------------------------------------- few-shot picks, base and novel halves

def coop_picks(items, shots, seed):
    """CoOp's procedure in a few lines of our own: the global generator, one walk, all classes."""
    random.seed(seed)
    chosen = []
    for label in dict.fromkeys(item[1] for item in items):
        group = [item for item in items if item[1] == label]
        chosen.extend(random.sample(group, shots) if len(group) >= shots else group)
    return chosen


@pytest.mark.parametrize("name", JSON_SETS)
def test_few_shot_picks_are_coops(world, name):
    row = data.DATASETS[name]
    folder = pathlib.Path(world[0], row.folder)
    rows = json.loads((folder / row.split).read_text())["train"]
    train = data.load_dataset(name, world[0]).train
    for seed in (1, 2, 3):
        for shots in (1, 3, 16):
            expected = [(str(folder / row.images[0] / path), label)
                        for path, label, *_ in coop_picks(rows, shots, seed)]
            before = random.getstate()
            picks = data.few_shot(train, shots, seed)
            assert [(item.source, item.label) for item in picks] == expected
            assert random.getstate() == before              # the global generator stays


@pytest.fixture
def zoo():
    """Five classes with three pictures each to learn on and two to test on; fox has one."""
    names = ["cat", "dog", "emu", "fox", "gnu"]
    train, test = ([data.Item(f"/zoo/{name}/{part}{i}.png", label) for i in range(n)
                    for label, name in enumerate(names) if name != "fox" or i == 0]
                   for part, n in (("a", 3), ("b", 2)))
    return data.Dataset(names, train, [], test, [], "zoo", "/zoo")


def test_a_task_is_picked_over_all_classes_and_then_cut(zoo):
    task = data.few_shot_task(zoo, "base", shots=2, seed=3)
    picked = data.few_shot(zoo.train, 2, 3)
    assert task.base_names == ["cat", "dog", "emu"] and task.novel_names == ["fox", "gnu"]
    assert task.train == [item for item in picked if item.label < 3]
    assert task.test_base == [item for item in zoo.test if item.label < 3]
    assert task.test_novel == [item._replace(label=item.label - 3)
                               for item in zoo.test if item.label >= 3]
    assert task.notes == []

    task = data.few_shot_task(zoo, "all", shots=2, seed=3)
    assert (task.base_names, task.novel_names) == (zoo.class_names, [])
    assert (task.train, task.test_base, task.test_novel) == (picked, zoo.test, [])
    one_line(*task.notes, "1 of 5", "fewer than 2")         # fox
    assert data.few_shot_task(zoo._replace(notes=["x"])).notes[0] == "x"

    one_line(failure(data.few_shot_task, zoo._replace(class_names=["cat", "dog", "emu"])),
             "zoo", "3 classes", "--classes all")           # the novel side would have one alone
    assert [len(side) for side in data.split_base_novel(["x"] * 47)] == [24, 23]


def test_digests_know_names_labels_and_paths_below_the_folder_and_nothing_else(zoo):
    def digests(dataset, **how):
        found = data.digests(dataset, data.few_shot_task(dataset, shots=3, **how))
        return [found[key] for key in ("class names", "training images", "test images")]
    names, train, test = digests(zoo)
    elsewhere = {part: [item._replace(source="/new" + item.source) for item in getattr(zoo, part)]
                 for part in ("train", "test")}
    assert digests(zoo._replace(folder="/new/zoo", **elsewhere)) == [names, train, test]
    assert digests(zoo, seed=2)[0::2] == [names, test] and digests(zoo, seed=2)[1] != train
    for tested in ([zoo.test[0]._replace(label=1), *zoo.test[1:]],                  # base, novel
                   [*zoo.test[:-1], zoo.test[-1]._replace(source="/zoo/gnu/other.png")]):
        other = zoo._replace(test=tested)
        assert digests(other)[:2] == [names, train] and digests(other)[2] != test
    other = zoo._replace(class_names=["cat", "dog", "emu", "fox", "cow"])
    assert digests(other)[1:] == [train, test] and digests(other)[0] != names


# ------------------------------------------------------------------------------- splits of our own

def split_by_the_recipe(images, leave_out):
    """Lists of train, val and test files: half, a fifth, the rest, by Python's shuffle of seed 1.

    https://github.com/KaiyangZhou/CoOp/blob/main/datasets/dtd.py: read_and_split_data
    """
    rng, parts = random.Random(1), ([], [], [])
    for folder in sorted(path for path in images.iterdir() if path.is_dir()):
        if folder.name not in leave_out:
            files = sorted(map(str, folder.glob("[!.]*.jpg")))
            rng.shuffle(files)
            train, val = round(len(files) / 2), round(len(files) / 5)
            parts[0].extend(files[:train])
            parts[1].extend(files[train:train + val])
            parts[2].extend(files[train + val:])
    return parts


@pytest.mark.parametrize("name", OWN_SPLIT_SETS)
def test_missing_split_is_made_by_the_fields_recipe_and_says_so(tmp_path, name):
    names = worlds.TREES[name](tmp_path, per_class=11, classes=6)
    row = data.DATASETS[name]
    (tmp_path / row.folder / row.split).unlink()
    before = sorted(tmp_path.rglob("*"))
    dataset = data.load_dataset(name, tmp_path)
    assert sorted(tmp_path.rglob("*")) == before            # nothing is written there
    assert dataset.class_names == names                     # renamed, and without two folders
    one_line(dataset.notes[0], "OWN SPLIT", row.split, data.GUIDE)
    expected = split_by_the_recipe(tmp_path / row.folder / row.images[0],
                                   ("BACKGROUND_Google", "Faces_easy"))
    assert counts(dataset) == [[6] * 6, [2] * 6, [3] * 6]   # of 11: round(5.5), round(2.2)
    for items, part in zip((dataset.train, dataset.val, dataset.test), expected):
        assert [item.source for item in items] == part


# ------------------------------------------------------------------------- data that is not right

@pytest.mark.parametrize("name", worlds.TREES)
def test_what_is_missing_is_named_with_where_to_get_it(tmp_path, name):
    row = data.DATASETS[name]
    root = tmp_path / "data"
    line = refused(name, root, root / row.folder, "--root", row.source, data.GUIDE)
    assert line.count(data.GUIDE) == 1
    worlds.TREES[name](root)
    if name not in OWN_SPLIT_SETS:                          # no split is guessed for these
        (root / row.folder / row.split).rename(tmp_path / "away")
        refused(name, root, root / row.folder / row.split, row.source)
        (tmp_path / "away").rename(root / row.folder / row.split)
    if row.images[0]:
        (root / row.folder / row.images[0]).rename(tmp_path / "moved away")
        assert "lies at" not in refused(name, root, root / row.folder)
    refused("caltech", root, "unknown dataset 'caltech'", name)


def test_missing_images_are_counted_and_those_that_lie_elsewhere_are_found(tmp_path):
    worlds.TREES["food101"](tmp_path)
    train = data.load_dataset("food101", tmp_path).train
    for item in train[3:8:4]:
        os.remove(item.source)
    refused("food101", tmp_path, "2 are missing", train[3].source)
    worlds.fgvc_aircraft_tree(tmp_path)
    file = tmp_path / "fgvc_aircraft" / "variants.txt"
    (file.parent / "data").mkdir()
    file.rename(file.parent / "data" / file.name)
    refused("fgvc_aircraft", tmp_path, file, f"lies at {file.parent / 'data' / file.name}")


GOOD_SPLIT = {"train": [["a.jpg", 0, "a"], ["b.jpg", 1, "b"]], "val": [],
              "test": [["a2.jpg", 0, "a"], ["b2.jpg", 1, "b"]]}


@pytest.mark.parametrize("split, said", [
    (b"<!DOCTYPE html>", "JSON"), (b"\x80\x04\x95\xff", "JSON"), (b"[1, 2]", "list"),
    ({"val": None}, "train, val and test"), ({"val": [["a.jpg", 0]]}, "train, val and test"),
    ({"train": []}, "train, val and test"), ({"val": [["a.jpg", 0, "c"]]}, "one name each"),
    ({"test": []}, "none of ['a', 'b']"), ({"val": [[7, 0, "a"]]}, "1 are missing")])
def test_broken_split_json_is_refused_in_one_line(tmp_path, split, said):
    folder = tmp_path / "stanford_cars"
    for path, label, _ in GOOD_SPLIT["train"] + GOOD_SPLIT["test"]:
        worlds.write_image(folder / path, label, 0)
    file = folder / "split_zhou_StanfordCars.json"
    file.write_text(json.dumps(GOOD_SPLIT))
    assert data.load_dataset("stanford_cars", tmp_path).class_names == ["a", "b"]
    if isinstance(split, dict):
        split = json.dumps(GOOD_SPLIT | split).encode()
    file.write_bytes(split)
    refused("stanford_cars", tmp_path, folder, said)


@pytest.mark.parametrize("name, images", [
    ("imagenet", "images/train"), ("imagenetv2", "imagenetv2-matched-frequency-format-val"),
    ("imagenet_a", "imagenet-a")])
def test_a_missing_empty_or_unknown_class_folder_never_shifts_labels(tmp_path, name, images):
    names = worlds.TREES[name](tmp_path)
    images = tmp_path / data.DATASETS[name].folder / images
    victim, stranger = ("3", "10") if name == "imagenetv2" else ("n02110958", "n99999999")
    (images / "__MACOSX").mkdir()
    (images / victim).rename(tmp_path / "away")
    if name == "imagenet_a":                                # the classes are those that are there
        dataset = data.load_dataset(name, tmp_path)
        assert dataset.class_names == [each for each in names if each != "pug"]
        assert f"{len(names) - 1} classes found" in dataset.notes[0]
    else:
        refused(name, tmp_path, "1 class folders are missing", f"the first: {victim}")
    (images / victim).mkdir()
    (images / victim / ".DS_Store").write_text("")
    refused(name, tmp_path, images / victim, "no images")
    shutil.rmtree(images / victim)
    (tmp_path / "away").rename(images / victim)
    (images / stranger).mkdir()
    refused(name, tmp_path, images, stranger)


@pytest.mark.parametrize("name, file, change, said", [
    ("imagenet", "classnames.txt", lambda text: "", "is empty"),
    ("imagenet", "classnames.txt", lambda text: text + "n9 caf\udce9\n", "UTF-8"),      # latin-1
    ("fgvc_aircraft", "images_variant_val.txt", lambda text: "1025000 Zeppelin NT\n" + text,
     "'Zeppelin NT' is not in"),
    ("fgvc_aircraft", "images_variant_train.txt",
     lambda text: re.sub(r".* F/A-18\n", "", text), "none of ['F/A-18']")])
def test_broken_lists_of_classes_and_images_are_refused_in_one_line(tmp_path, name, file, change,
                                                                    said):
    worlds.TREES[name](tmp_path)
    path = tmp_path / data.DATASETS[name].folder / file
    path.write_text(change(path.read_text()), encoding="utf-8", errors="surrogateescape")
    refused(name, tmp_path, f"{name}: ", said)


# ------------------------------------------------------------------------- a dataset of one's own

@pytest.mark.parametrize("train, test, val", [
    ("Train", "TEST", "Valid"), ("training", "testing", "validation"),
    ("train", "valid", None)])                              # without test it is tested on val
def test_parts_in_any_spelling_are_a_dataset(tmp_path, train, test, val):
    names = worlds.own_parts_tree(tmp_path / "birds", 3, [train, test] + [val] * bool(val))
    dataset = data.load_dataset(tmp_path / "birds")
    assert dataset.class_names == names
    assert counts(dataset) == [[3] * 4, [3 if val else 0] * 4, [3] * 4]
    for items, part in ((dataset.train, train), (dataset.val, val), (dataset.test, test)):
        assert {pathlib.Path(item.source).parts[-3] for item in items} == ({part} - {None})
    assert any("no test/" in note for note in dataset.notes) == (test == "valid")


@pytest.mark.parametrize("images, file", [("images", "split.json"), ("birds", "my_split.json"),
                                          ("", "split_zhou_birds.json")])
def test_images_with_one_split_json_are_a_dataset(tmp_path, images, file):
    """The images lie in images/, in a folder of the dataset's own name, or beside the file."""
    folder = tmp_path / "birds"
    names = worlds.own_split_tree(folder, images=images)
    split = (folder / "split.json").read_text()
    (folder / "split.json").unlink()
    (folder / file).write_text(split.replace("/", "\\\\"), "utf-8-sig")    # as Windows writes it
    dataset = data.load_dataset(folder)
    assert dataset.class_names == names and counts(dataset) == [[2] * 4, [1] * 4, [1] * 4]
    places = {os.path.dirname(os.path.dirname(item.source)) for item in dataset.test}
    assert places == {str(folder / images)}
    (folder / "other_split.json").write_text("{}")
    refused(folder, None, "2 split files", "other_split.json", file)


@pytest.mark.parametrize("folder, name", [
    ("Birds 2.0 (mine)", "Birds-2.0-mine"), ("vögel", "vögel"), ("?", "own"), ("DTD", "own-DTD"),
    ("caltech-101", "own-caltech-101"), ("birds/images", "images")])
def test_a_dataset_of_ones_own_is_named_after_its_folder_and_never_as_a_known_one(
        tmp_path, folder, name):
    worlds.own_folders_tree(tmp_path / folder, per_class=4)
    dataset = data.load_dataset(str(tmp_path / folder))
    assert (dataset.name, dataset.folder) == (name, str(tmp_path / folder))
    assert "an own split" in dataset.notes[0] and "compare with nobody's" in dataset.notes[1]


def test_a_known_name_wins_over_a_folder_but_not_over_a_path(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    worlds.own_folders_tree("eurosat")
    worlds.own_folders_tree("birds")
    assert data.load_dataset("eurosat", world[0]).name == "eurosat"
    assert data.load_dataset("./eurosat", world[0]).name == "own-eurosat"
    assert data.load_dataset("birds", world[0]).name == "birds"


@pytest.mark.parametrize("name, read", [
    ("001.Black_footed_Albatross", "Black footed Albatross"),       # CUB's folders
    ("1 001.Black_footed_Albatross", "Black footed Albatross"),     # CUB's list
    ("n01440764 tench", "tench"), ("n01440764_tench", "tench"), ("01_TUMOR", "TUMOR"),
    ("10.3D bird's", "3D bird's"), ("  two   spaces ", "two spaces"),
    # These numbers are names.
    ("707-320", "707-320"), ("3D", "3D"), ("2012 Acura RL Sedan", "2012 Acura RL Sedan"),
    ("n01440764", "n01440764"), ("0_1", "0 1"), ("7", "7")])
def test_own_class_names_are_read_without_the_number_that_fixes_their_place(name, read):
    assert data.read_name(name) == read
    assert data.read_name(name, own=False) == " ".join(name.replace("_", " ").split())


def test_what_clip_cannot_tell_apart_or_read_is_noted(tmp_path):
    for label, name in enumerate(["001.cat", "002.Cat", "house_dog", "dog_house", "7", "emu"]):
        for i in range(4):
            worlds.write_image(tmp_path / "zoo" / name / f"{i}.png", label, i)
    (tmp_path / "zoo" / "emu" / ".hidden.txt").write_text("")
    for name in ("scan.dcm", "scan.DCM", "photo.raw"):
        (tmp_path / "zoo" / "emu" / name).write_text("")
    dataset = data.load_dataset(tmp_path / "zoo")
    notes = "\n".join(dataset.notes)
    assert "2 classes have one name for CLIP, 'cat'" in notes
    assert "house dog" not in notes                         # CLIP reads words in their order
    assert "class names that are numbers, such as '7'" in notes
    assert "left out: .dcm, .raw" in notes
    assert all(note.startswith("zoo: ") for note in dataset.notes)


@pytest.mark.parametrize("files, said", [
    (["1.jpg", "2.jpg"], "two classes"), (["cat/1.jpg"], "two classes"),
    (["train/1.jpg", "test/1.jpg"], "two classes"),
    (["train/cat/1.jpg", "train/dog/1.jpg"], "none of ['cat', 'dog']"),
    (["train/cat/1.jpg", "train/dog/1.jpg", "test/cat/1.jpg"], "the first: dog"),
    (["train/cat/1.jpg", "train/dog/1.jpg", "test/cat/1.jpg", "test/dog/1.jpg", "test/cow/1.jpg"],
     "the first: cow"),
    (["cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "dog/2.jpg", "cow/1.jpg"], "none of ['cow']")])
def test_what_is_no_dataset_is_refused_in_one_line(tmp_path, files, said):
    folder = tmp_path / "pets"
    for i, file in enumerate(files):
        worlds.write_image(folder / file, 0, i)
    refused(folder, None, said, "folder per class")
    refused(tmp_path / "none", None, tmp_path / "none")


# ----------------------------------------------------------------------------------- descriptions

@pytest.fixture
def description_file(tmp_path):
    def write(value):
        path = tmp_path / "descriptions.json"
        path.write_text(json.dumps(value))
        return str(path)
    return write


def test_descriptions_are_the_first_sentences_in_file_order(description_file):
    path = description_file({"unused": [], "lamp": [f"s{i}" for i in range(14)],
                             "wok": [".", "A\n wok. ", " ", 3, "...", "7", "Une poêle", "é"]})
    ten = [f"s{i}" for i in range(10)]
    assert data.load_descriptions(path, ["wok", "lamp", "wok"]) == [
        ["A wok.", "7", "Une poêle", "é"], ten, ["A wok.", "7", "Une poêle", "é"]]
    assert data.load_descriptions(path, ["lamp", "wok"], 2) == [["s0", "s1"], ["A wok.", "7"]]


@pytest.mark.parametrize("name, key", [
    ("car_side", "Car-Side"), ("F/A-18", "18, f/a"), ("indoor apse", "apse (indoor)"),
    ("Éclair au café", "café au éclair"), ("car side", "side of a car")])      # CuPL's own name
def test_a_key_is_of_the_class_with_the_same_words_or_with_cupls_name_for_it(
        description_file, name, key):
    path = description_file({"sushi bar": ["Another."], key: ["Its own."]})
    assert data.load_descriptions(path, [name, "sushi bar", name]) == [
        ["Its own."], ["Another."], ["Its own."]]


def test_all_classes_that_have_nothing_are_named_at_once(description_file):
    path = description_file({"water lily": ["a"], "lamp": ["c"], "wok": [" . "], "pan": "A pan.",
                             "house indoor": ["d"], "House (indoor)": ["e"], "//": ["By hand."]})
    names = ["water lilly", "lamp", "wok", "pan", "indoor house", "bar"]
    line = failure(data.load_descriptions, path, names)
    one_line(line, path, "5 of 6", "water lilly (keys: ['water lily'])", "wok", "pan",
             "indoor house (keys: ['house indoor', 'House (indoor)'])", "bar (keys: [])")
    assert "lamp" not in line.partition(path)[2]


@pytest.mark.parametrize("name", ["imagenet", *JSON_SETS, "fgvc_aircraft"])
def test_shipped_descriptions_are_ten_different_sentences_a_class_that_clip_can_read(name):
    described = data.read_json_object(data.default_descriptions(name))
    twice = 2 if name == "imagenet" else 0              # two names stand for two classes each
    assert len(described) == data.DATASETS[name].classes - twice
    flat = sum(described.values(), [])
    assert len({sentence.lower() for sentence in flat}) == len(flat) == 10 * len(described)
    assert all(re.fullmatch(r"[^\s].* .*\.", sentence) for sentence in flat)
    clip.tokenize(flat)                                 # raises where one is longer than 77 tokens


def test_where_no_descriptions_are_shipped_it_says_how_to_get_some():
    one_line(failure(data.default_descriptions, "birds", kind=FileNotFoundError),
             "birds", "--descriptions FILE", "data.py describe", "--template plain")


# ----------------------------------------------------------------------------------------- images

def saved(path, picture, format, **options):
    picture.save(path, format=format, **options)
    return str(path)


def test_pictures_are_found_by_ending_and_read_by_what_they_are(tmp_path):
    paths = []
    for i, mode in enumerate(("RGB", "L", "CMYK", "P", "RGBA", "LA")):
        paths.append(str(tmp_path / f"{i}.{('jpg', 'JPEG', 'PNG')[i % 3]}"))
        worlds.write_image(paths[-1], 3, 1, mode, size=(40, 30))
        image = data.load_image(paths[-1])
        assert image.mode == "RGB" and image.size == (40, 30)
    paths.append(saved(tmp_path / "webp.jpg", image, "WEBP"))
    assert data.load_image(paths[-1]).size == (40, 30)
    for name in ("1.eps", "notes.txt", "clip.mp4", ".1.jpg"):
        (tmp_path / name).write_text("")
    assert data.image_files(tmp_path) == paths


def test_no_file_makes_pillow_start_another_program(tmp_path, monkeypatch):
    """Ghostscript would draw this one."""
    path = saved(tmp_path / "drawing.jpg", Image.new("RGB", (8, 8)), "EPS")
    started = []
    monkeypatch.setattr(PIL.EpsImagePlugin, "Ghostscript", lambda *_, **__: started.append(path))
    assert path in failure(data.load_image, path, kind=data.BadImage) and not started


@pytest.mark.parametrize("mode, dtype, ending", [("I;16", "<u2", "png"), ("I;16B", ">u2", "tif"),
                                                 ("F", "<f4", "tif")])
def test_more_than_8_bits_a_channel_are_refused(tmp_path, mode, dtype, ending):
    pixels = np.arange(64).astype(dtype).tobytes()
    path = saved(tmp_path / f"x-ray.{ending}", Image.frombytes(mode, (8, 8), pixels), None)
    one_line(failure(data.load_image, path, kind=data.BadImage), path, "8 bits")


def test_own_pictures_are_turned_as_their_exif_says_and_the_fields_are_not(tmp_path):
    worlds.own_folders_tree(tmp_path / "birds")
    worlds.eurosat_tree(tmp_path)
    exif, wide = Image.Exif(), (20, 40, 3)
    exif[0x0112] = 6                                        # to be turned by 90 degrees
    for name, shape in ((tmp_path / "birds", (40, 20, 3)), ("eurosat", wide)):
        items = data.load_dataset(name, tmp_path).test
        saved(pathlib.Path(items[0].source), noise(40, 20), "JPEG", exif=exif)
        assert data.Images(items, np.asarray)[0, 0][0].shape == shape


def test_unreadable_images_are_named_all_at_once_and_stop_a_loader_with_one_line(tmp_path):
    worlds.write_image(tmp_path / "good.jpg", 0, 0, size=(200, 200))
    good = (tmp_path / "good.jpg").read_bytes()
    for name, content in (("cut.jpg", good[:-400]), ("text.jpg", b"<html>")):
        (tmp_path / name).write_bytes(content)
    items = [data.Item(str(tmp_path / name), 0)
             for name in ("cut.jpg", "good.jpg", "text.jpg", "gone.jpg")]
    bad = [item.source for item in items if "good" not in item.source]
    line = failure(data.check_pictures, items, kind=data.BadImage)
    one_line(line, "3 pictures", *bad)
    assert "good.jpg" not in line
    data.check_pictures(items[1:2])
    with pytest.raises(data.BadImage) as error:
        list(data.loader(data.Images(items, data.test_transform(PREPROCESS)), workers=2))
    one_line(error, bad[0])
    # Else the failed loader waits for the garbage collector, then 5 s.
    traceback.clear_frames(error.value.__traceback__)


# ---------------------------------------------------------------------------- crops

PREPROCESS = prompts.OPENAI_PREPROCESS | {"size": (24, 24)}


def noise(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", [(401, 300), (300, 401), (224, 224), (90, 50)])
@pytest.mark.parametrize("resolution", [224, 32])
def test_test_transform_and_normalize_are_clips_preprocessing(size, resolution):
    preprocess = PREPROCESS | {"size": (resolution, resolution)}
    crop = data.test_transform(preprocess)(noise(*size))
    assert crop.dtype == torch.uint8
    clips = clip.clip._transform(resolution)(noise(*size))
    for ours in (data.normalize(crop, preprocess),
                 data.normalize(crop[None], preprocess, "cpu")[0]):
        assert ours.dtype == clips.dtype == torch.float32
        assert torch.allclose(ours, clips, atol=1e-6)


def test_some_clips_squash_and_have_numbers_of_their_own():
    preprocess = {"size": (16, 24), "mean": (0.5, 0.25, 0.75), "std": (0.5, 0.25, 0.125),
                  "interpolation": "bilinear", "resize_mode": "squash"}
    crop = data.test_transform(preprocess)(noise(60, 40))
    expected = noise(60, 40).resize((24, 16), Image.BILINEAR)
    assert torch.equal(crop, torch.from_numpy(np.array(expected)).permute(2, 0, 1))
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1)
    found = data.normalize(pixels, preprocess).flatten()
    assert torch.allclose(found, torch.tensor([-1.0, -0.2, 2.0]))
    assert data.train_transform(preprocess)(noise(60, 40)).shape == (3, 16, 24)


def test_train_transform_is_the_fields_random_crop_and_flip():
    crop, flip, _ = data.train_transform(PREPROCESS).transforms
    assert (crop.scale, crop.size, crop.interpolation.value) == ((0.08, 1.0), (24, 24), "bicubic")
    assert flip.p == 0.5
    assert data.train_transform(PREPROCESS)(noise(60, 40)).dtype == torch.uint8


@pytest.fixture
def items(world):
    return data.load_dataset("dtd", world[0]).train[:10]


def images_of(items, seed=7, transform=data.train_transform):
    return data.Images(items, transform(PREPROCESS), seed=seed)


def crops_of(images, epochs=(1,), **options):
    """(epochs, n, 3, R, R): what the loader gives, an epoch after the other."""
    pixels, labels = zip(*data.loader(images, epochs, batch_size=4, **options))
    pixels, labels = torch.cat(pixels), torch.cat(labels)
    assert labels.tolist() == [item.label for item in images.items] * len(epochs)
    return pixels.reshape(len(epochs), len(images), *pixels.shape[1:])


def test_a_crop_depends_on_seed_epoch_and_index_alone(items):
    images = images_of(items)
    first = crops_of(images, (1, 2))
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert torch.equal(images[2, 3][0], first[1, 3]) and images[2, 3][1] == items[3].label
    assert torch.equal(crops_of(images, (2,))[0], first[1])
    assert torch.equal(before, torch.get_rng_state())           # the global generator stays
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(crops_of(images_of(items, 8))[0], first[0])
    same = crops_of(images_of([items[0]] * 2))[0]
    assert not torch.equal(same[0], same[1])                    # one image twice gets two crops


# -------------------------------------------------------------- features of an epoch, kept or not

class Tower:
    """Stands for CLIP's image tower: a fixed projection that counts what it was asked for."""
    images = 0
    weight = torch.randn(3 * 24 * 24, 8, generator=torch.Generator().manual_seed(0)) / 40

    def __call__(self, crops):
        assert crops.dtype == torch.uint8 and not torch.is_grad_enabled()
        self.images += len(crops)
        return (crops.flatten(1) / 255 @ self.weight).half()


def features_of(images, tower, epochs=(1, 2), **options):
    """f of each epoch, one after the other: (epochs, n, d)."""
    return torch.stack([f for f, _ in data.epoch_features(images, list(epochs), tower, **options)])


@pytest.fixture
def many(items):
    """Some more images than the tower takes at a time."""
    return images_of((items * 26)[:data.ENCODE_BATCH + 3])


def test_epoch_features_are_the_towers_of_each_epochs_crops(many):
    found = features_of(many, Tower(), workers=1)           # which serves both epochs
    with torch.no_grad():
        expected = torch.stack([Tower()(epoch) for epoch in crops_of(many, (1, 2))])
    assert found.dtype == torch.float32 and torch.allclose(found, expected.float(), atol=1e-2)
    features = data.epoch_features(many, [1, 2], None, keep_crops=True)     # crops alone
    for expected, (f, crops) in zip(crops_of(many, (1, 2)), features, strict=True):
        assert f is None and torch.equal(crops, expected)


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(path.read_bytes()[:-30]),
    lambda path: path.write_bytes(path.read_bytes()[:-300] + b"\xff" + path.read_bytes()[-299:]),
    lambda path: np.savez(path, features=np.array([print] * 10))])      # a pickle: not unpacked
def test_a_damaged_or_foreign_kept_file_is_made_again(items, tmp_path, damage):
    images, tower = images_of(items), Tower()
    kept = data.KeptFeatures(tmp_path, ["tiny"], images)
    expected = features_of(images, tower, kept=kept)
    damage(kept.path(2))
    assert torch.equal(features_of(images, tower, kept=kept), expected) and tower.images == 30
    with np.load(kept.path(2)) as file:
        assert np.array_equal(file["features"], expected[1].numpy())


def test_kept_features_of_anything_else_are_not_found(items, tmp_path, monkeypatch):
    path = tmp_path / "copy.jpg"
    worlds.write_image(path, 1, 1)
    images = images_of([*items, data.Item(str(path), 1)])
    data.KeptFeatures(tmp_path, ["tiny"], images).write(1, torch.zeros(11, 8))

    def found(images, what="tiny", epoch=1):
        return data.KeptFeatures(tmp_path, [what], images).read(epoch) is not None
    assert found(images) and not found(images, epoch=2) and not found(images, "large")
    for other in (images_of(images.items, 8), images_of(images.items[::-1]),
                  images_of([item._replace(upright=True) for item in images.items]),
                  images_of(images.items, transform=data.test_transform)):
        assert not found(other)
    with monkeypatch.context() as patch:                        # two Pillows, two crops
        patch.setattr(data.PIL, "__version__", "0.0")
        assert not found(images)
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))     # or was the picture changed?
    assert not found(images)


# ---------------------------------------------------------------------------- what runs write

def test_what_is_saved_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, order = tmp_path / "new" / "café.json", []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (order.append("fsync"), fsync(f)))
    monkeypatch.setattr(os, "replace", lambda *names: (order.append(path.exists()),
                                                       replace(*names)))
    data.save_json(path, {"é": [1, None]})
    assert order == ["fsync", False]
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": [1, None]}
    data.save_csv(path.with_suffix(".csv"), [{"a": 1, "b": "é,"}, {"a": 2, "b": ""}])
    assert path.with_suffix(".csv").read_bytes().decode() == 'a,b\r\n1,"é,"\r\n2,\r\n'
    assert sorted(each.name for each in path.parent.iterdir()) == ["café.csv", "café.json"]


@pytest.mark.parametrize("trouble, raised", [
    (OSError(28, "No space left"), OSError), (RuntimeError("PytorchStreamWriter failed"), OSError),
    (KeyboardInterrupt(), KeyboardInterrupt)])
def test_whatever_happens_the_old_file_stays_and_no_half_one(tmp_path, trouble, raised):
    path, link = tmp_path / "last.pt", tmp_path / "link.pt"
    path.write_text("old")
    link.symlink_to(path)                                       # which is followed
    with pytest.raises(raised) as error:
        with data.written_aside(link) as aside:
            pathlib.Path(aside).write_text("half")
            raise trouble
    assert path.read_text() == "old" and sorted(tmp_path.iterdir()) == [path, link]
    if raised is OSError:
        one_line(error, path, trouble.args[-1])


def test_devices_and_pipes_are_written_to_directly(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    data.save_json(tmp_path / "pipe", 1)
    assert os.read(reader, 100) == b"1\n"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
    assert [each.name for each in tmp_path.iterdir()] == ["pipe"]


def test_no_two_settings_share_a_folders_name():
    assert data.folder_name("coop", {"tau": 0.5, "epochs": 1}) == "coop,epochs=1,tau=0.5"
    settings = [{"a": "x,b=y"}, {"a": "x", "b": "y"}, {"a": ["x", "y"]}, {"a": ["x+y"]},
                {"a": "%2F"}, {"a": "/"}, {"a": "x" * 300}, {"a": "x" * 299 + "y"}, {"a": "é" * 99}]
    names = {data.folder_name("coop", each) for each in settings}
    assert len(names) == len(settings)
    assert all(len(name.encode()) < 250 and not set(name) & set('/\\:*?"<>|') for name in names)


# ----------------------------------------------------------------------------------- command line

def test_inventory_has_a_line_per_dataset(world, capsys, tmp_path):
    data.main(["--root", world[0]])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert list(lines) == list(data.DATASETS)
    assert re.findall(r"\d+", lines["eurosat"]) == ["10", "40", "20"]      # classes, train, test

    data.main(["--root", str(tmp_path)])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert str(tmp_path / "sun397") in lines["sun397"] and "toy" in lines


def good_answer(question):
    thing = question.removeprefix("What does a ").removesuffix(" look like?")
    lines = [f"{i + 1}. A {thing} looks like pattern {i}." for i in range(4)]
    return "\n".join(["<think>", "Hm, let me see.", "</think>", "Here are the sentences:", "",
                      *lines, lines[0]])


URL = "http://127.0.0.1:1/v1"


@pytest.fixture
def server(monkeypatch, tmp_path):
    """What a server was asked through openai's package: (client, model, messages); its answer."""
    openai = pytest.importorskip("openai")
    server = types.SimpleNamespace(requests=[], answer=good_answer)

    def create(completions, model, messages):
        server.requests.append((completions._client, model, messages))
        text = server.answer(messages[-1]["content"])
        message = types.SimpleNamespace(content=text)
        return types.SimpleNamespace(choices=[types.SimpleNamespace(message=message)])
    monkeypatch.setattr(openai.resources.chat.completions.Completions, "create", create)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return server


def describe(world, output, *more):
    data.main(["describe", "--dataset", "dtd", "--root", world[0], "--model", "m1",
               "--base-url", URL, "--output", str(output), *more])


def refusal(capsys, *arguments):
    """The one line that `describe` ends in."""
    with pytest.raises(SystemExit) as stop:
        describe(*arguments)
    assert stop.value.code == 2
    return one_line(capsys.readouterr().err.strip().splitlines()[-1])


def test_describe_makes_a_file_that_loads(world, server, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", " sk-secret\n")
    output = tmp_path / "new" / "dtd.json"
    describe(world, output, "--per-class", "4")
    names = world[1]["dtd"]
    assert data.load_descriptions(output, names) == [
        [f"A {name} looks like pattern {i}." for i in range(4)] for name in names]
    client, model, messages = server.requests[1]
    assert str(client.base_url).startswith(URL)
    assert (client.api_key, model) == ("sk-secret", "m1")
    form, question = (message["content"] for message in messages)
    assert question == f"What does a {names[1]} look like?"
    neighbours = form.rpartition("told apart:")[2]
    assert "4 different sentences" in form and "8 to 30 words" in form
    assert names[0] in neighbours and names[2] in neighbours and names[1] not in neighbours
    out = capsys.readouterr()
    assert "sk-secret" not in out.out + out.err + output.read_text()
    server.requests.clear()
    describe(world, output)
    assert server.requests == []                            # nothing left to do


def test_describe_goes_on_after_a_failure(world, server, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    names, output = world[1]["dtd"], tmp_path / "dtd.json"
    output.write_text(json.dumps({names[1].upper(): ["Mine."], names[0]: []}))
    def answer_some(question):
        if names[3] in question:
            raise RuntimeError("sk-secret is\nout of money")
        return good_answer(question)
    server.answer = answer_some
    line = refusal(capsys, world, output, "--per-class", "2")
    one_line(line, names[3], URL, "is", "out of money", output)
    assert "sk-secret" not in line
    assert set(json.loads(output.read_text())) == {names[0], names[1].upper(), names[2]}
    server.answer = good_answer
    server.requests.clear()
    describe(world, output, "--per-class", "2")
    assert len(server.requests) == 2
    assert list(map(len, data.load_descriptions(output, names))) == [2, 1, 2, 2, 2]


def test_describe_takes_a_dataset_of_ones_own_and_a_server_without_a_key(server, tmp_path):
    names = worlds.own_folders_tree(tmp_path / "my birds")
    data.main(["describe", "--dataset", str(tmp_path / "my birds"), "--model", "m",
               "--base-url", URL, "--per-class", "2"])
    assert len(data.load_descriptions(tmp_path / "descriptions-my-birds.json", names)) == 4


def test_an_answer_without_a_sentence_is_one_line_and_exit_code_2(world, server, tmp_path, capsys):
    server.answer = lambda question: "Sure:"
    one_line(refusal(capsys, world, tmp_path / "x.json"), "banded", "m1", URL)
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize("text, sentences", [
    ("Okay, the user wants a lamp.\n</think>\nA lamp has a shade.", ["A lamp has a shade."]),
    ("<think>\nA lamp, then.\n</think>\nA lamp has a shade.\n<think>\nIs that all there is?",
     ["A lamp has a shade."]),
    ("<think>\nThe user asks for a lamp.", []),             # it was cut off
    ("Here are two sentences:\n\n1. A lamp is tall.\n2) \"A lamp is bright.\"\n- **It is red.**\n",
     ["A lamp is tall.", "A lamp is bright.", "It is red."]),
    ("3 lamps are there.\nLamp", ["3 lamps are there."])])
def test_sentences_are_read_without_thoughts_numbers_and_headings(text, sentences):
    assert data.read_answer(text) == sentences
