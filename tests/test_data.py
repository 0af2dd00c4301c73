"""data.py against the fifteen layouts (worlds.py), CoOp's few-shot procedure, and the troubles of real disks."""

import http.server
import json
import os
import pathlib
import random
import stat
import subprocess
import sys
import threading
import traceback
import types

import numpy as np
import pytest
import torch
from PIL import Image

import data
import prompts
import worlds

ROOT = pathlib.Path(data.__file__).resolve().parent
SHARED = ROOT.parent / "shared" / "descriptions"
JSON_SETS = ["caltech101", "oxford_pets", "stanford_cars", "oxford_flowers", "food101", "sun397", "dtd", "eurosat", "ucf101"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """All fifteen trees under one read-only root: (root, dict name -> class names)."""
    root = tmp_path_factory.mktemp("data")
    names = {name: tree(root, per_class=8, **({"classes": 10} if name == "caltech101" else {}))
             for name, tree in worlds.TREES.items()}
    folders = [root, *(path for path in root.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    before = sorted(map(str, root.rglob("*")))
    yield str(root), names
    for folder in folders:
        folder.chmod(stat.S_IRWXU)
    assert sorted(map(str, root.rglob("*"))) == before          # root ignores modes, so look as well


def one_line(error, *parts):
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message
    return message


# ------------------------------------------------------------------------------------ the fifteen layouts

def test_table_has_the_fifteen_datasets_and_toy():
    assert set(data.DATASETS) == set(worlds.TREES) | {"toy"}
    assert all(row.prompt.count("{}") == 1 for row in data.DATASETS.values())


@pytest.mark.parametrize("name", worlds.TREES)
def test_layout_is_read_with_the_right_counts_and_names(world, name):
    root, names = world
    dataset = data.load_dataset(name, root)
    n = len(names[name])
    assert dataset.name == name and dataset.class_names == names[name]
    sizes = {"imagenet": (8, 0, 4), "imagenetv2": (0, 0, 8), "imagenet_sketch": (0, 0, 8), "imagenet_a": (0, 0, 8),
             "imagenet_r": (0, 0, 8)}.get(name, (4, 2, 2))
    for items, per_class in zip((dataset.train, dataset.val, dataset.test), sizes):
        assert np.bincount([item.label for item in items], minlength=n).tolist() == [per_class] * n
    sources = [item.source for items in dataset[2:5] for item in items]
    assert len(set(sources)) == len(sources) and all(os.path.isfile(source) for source in sources)
    assert not any(os.path.basename(source).startswith(".") for source in sources)
    full = {"eurosat": 10}.get(name)
    assert all("classes found" in note for note in dataset.notes) and len(dataset.notes) == (0 if full else 1)


def test_labels_follow_the_images_not_the_names(world):
    """The generated images carry their label in their colour: every dataset's items must agree with it."""
    root, names = world
    for name in worlds.TREES:
        for item in data.load_dataset(name, root).test:
            mean = np.asarray(data.load_image(item.source), float).mean((0, 1))
            with Image.open(item.source) as image:
                if image.mode == "RGB":
                    expected = (np.array([37, 91, 151]) * item.label) % 200 + 27.5
                    assert np.abs(mean - expected).max() < 9, (name, item)


def test_class_names_are_those_worked_out_by_hand(world):
    root, _ = world
    names = {name: data.load_dataset(name, root).class_names for name in worlds.TREES}
    assert names["caltech101"] == ["face", "leopard", "motorbike", "accordion", "airplane", "anchor", "ant", "barrel",
                                   "bass", "beaver"]
    assert names["stanford_cars"][2] == "2012 Ram C/V Cargo Van Minivan"
    assert names["oxford_flowers"][2] == "colt's foot"
    assert names["fgvc_aircraft"] == ["707-320", "A300B4", "Cessna 172", "DC-10", "F-16A/B", "F/A-18", "Tu-154"]
    assert names["sun397"][1:4] == ["airplane cabin", "outdoor apartment building", "indoor bazaar"]
    assert names["ucf101"] == ["Apply Eye Makeup", "Apply Lipstick", "Archery", "Baby Crawling", "Yo Yo"]
    by_wnid = ["tench", "goldfish", "kite (bird of prey)", "pug", "chain", "jack-o'-lantern", "missile", "missile",
               "sunglasses", "sunglasses"]
    assert names["imagenet"] == names["imagenet_sketch"] == by_wnid
    assert names["imagenetv2"][:4] == ["tench", "missile", "goldfish", "missile"]             # line order
    assert names["imagenet_a"] == ["goldfish", "pug", "jack-o'-lantern", "missile", "sunglasses"]
    assert names["imagenet_r"] == ["tench", "kite (bird of prey)", "chain", "missile", "sunglasses"]


def test_two_imagenet_classes_of_one_name_stay_two(world):
    root, _ = world
    dataset = data.load_dataset("imagenet", root)
    folders = {item.label: os.path.basename(os.path.dirname(item.source)) for item in dataset.train}
    assert folders[6] == "n03773504" and folders[7] == "n04008634"
    assert [folders[label] for label in range(10)] == sorted(worlds.IMAGENET)


@pytest.mark.parametrize("tree, images", [(worlds.imagenetv2_tree, "imagenetv2"), (worlds.imagenetv2_tree, ""),
                                          (worlds.imagenet_sketch_tree, "sketch")])
def test_mirrors_with_other_folder_names_are_read(tmp_path, tree, images):
    names = tree(tmp_path, images=images)
    assert data.load_dataset(tree.__name__.removesuffix("_tree"), tmp_path).class_names == names


def test_variants_borrow_imagenets_classnames(tmp_path):
    worlds.imagenet_tree(tmp_path)
    names = worlds.imagenet_sketch_tree(tmp_path)
    (tmp_path / "imagenet-sketch" / "classnames.txt").unlink()
    assert data.load_dataset("imagenet_sketch", tmp_path).class_names == names


def test_the_hundred_caltech101_classes(tmp_path):
    names = worlds.caltech101_tree(tmp_path, per_class=4)
    dataset = data.load_dataset("caltech101", str(tmp_path))
    assert dataset.class_names == names and len(set(names)) == 100 and dataset.notes == []
    base, novel = data.split_base_novel(names)
    assert len(base) == len(novel) == 50 and names[base[0]] == "face" and names[novel[-1]] == "yin yang"


def test_toy_needs_no_root():
    dataset = data.load_dataset("toy", "/nowhere")
    base, novel = data.split_base_novel(dataset.class_names)
    assert min(len(base), len(novel)) >= 20 and dataset.train and dataset.val and dataset.test
    assert data.load_image(dataset.test[0].source).mode == "RGB"


def test_root_comes_from_the_environment_by_default(world, monkeypatch):
    monkeypatch.setenv("DATA", world[0])
    assert len(data.load_dataset("eurosat").class_names) == 10


# ----------------------------------------------------------------- few-shot picks, base and novel halves

def coop_picks(rows, shots, val_rows, seed):
    """CoOp's procedure in a few lines of our own: the global generator, one walk, all classes."""
    random.seed(seed)
    out = []
    for split, n in ((rows, shots), (val_rows, min(shots, 4))):
        labels = []
        for row in split:
            if row[1] not in labels:
                labels.append(row[1])
        chosen = []
        for label in labels:
            group = [row for row in split if row[1] == label]
            chosen.extend(random.sample(group, n) if len(group) >= n else group)
        out.append([(row[0], row[1]) for row in chosen])
    return out


@pytest.mark.parametrize("name", JSON_SETS + ["fgvc_aircraft"])
@pytest.mark.parametrize("shots", [1, 3, 16])
def test_few_shot_picks_are_coops(world, name, shots):
    root, _ = world
    row = data.DATASETS[name]
    folder, images = pathlib.Path(root, row.folder), pathlib.Path(root, row.folder, row.images[0])
    if name == "fgvc_aircraft":
        variants = (folder / "variants.txt").read_text().split("\n")
        lines = {part: (folder / f"images_variant_{part}.txt").read_text().splitlines() for part in ("train", "val")}
        split = {part: [[f"{line[:7]}.jpg", variants.index(line[8:])] for line in lines[part]] for part in lines}
    else:
        split = json.loads((folder / row.split).read_text())
    dataset = data.load_dataset(name, root)
    for seed in (1, 2, 3):
        picks = data.few_shot(dataset.train, dataset.val, shots, seed)
        expected = coop_picks(split["train"], shots, split["val"], seed)
        assert [[(item.source, item.label) for item in items] for items in picks] == [
            [(str(images / path), label) for path, label in rows] for rows in expected]


def test_few_shot_leaves_the_global_generator_alone_and_has_no_val_for_imagenet(world):
    dataset = data.load_dataset("imagenet", world[0])
    random.seed(5)
    expected = random.random()
    random.seed(5)
    train, val = data.few_shot(dataset.train, dataset.val, 4, 1)
    assert random.random() == expected
    assert len(train) == 40 and val == []
    with pytest.raises(ValueError, match="at least 1"):
        data.few_shot(train, val, 0)


@pytest.mark.parametrize("n, n_base", [(1, 1), (37, 19), (47, 24), (100, 50), (397, 199)])
def test_base_is_the_first_half_rounded_up(n, n_base):
    base, novel = data.split_base_novel(["x"] * n)
    assert base == list(range(n_base)) and novel == list(range(n_base, n))


def test_take_relabels_in_the_order_of_labels():
    items = [data.Item(f"{label}.jpg", label) for label in (3, 0, 4, 1, 3)]
    assert data.take(items, [3, 4]) == [("3.jpg", 0), ("4.jpg", 1), ("3.jpg", 0)]
    assert data.take(items, [4, 3]) == [("3.jpg", 1), ("4.jpg", 0), ("3.jpg", 1)]


# ------------------------------------------------------------------------------- splits of our own

@pytest.mark.parametrize("name", ["caltech101", "dtd", "eurosat", "food101"])
def test_missing_split_is_made_by_the_fields_recipe_and_says_so(tmp_path, name):
    names = worlds.TREES[name](tmp_path, per_class=11, classes=6)
    row = data.DATASETS[name]
    (tmp_path / row.folder / row.split).unlink()
    before = sorted(tmp_path.rglob("*"))
    dataset = data.load_dataset(name, str(tmp_path), seed=2)
    assert sorted(tmp_path.rglob("*")) == before
    assert dataset.class_names == names                         # without BACKGROUND_Google and Faces_easy, renamed
    assert "OWN SPLIT" in dataset.notes[0] and "not compare" in dataset.notes[0] and row.split in dataset.notes[0]
    rng, images = random.Random(2), tmp_path / row.folder / row.images[0]
    for label, folder in enumerate(sorted(f.name for f in images.iterdir()
                                          if f.is_dir() and f.name not in ("BACKGROUND_Google", "Faces_easy"))):
        files = sorted(str(f) for f in (images / folder).iterdir() if f.suffix == ".jpg" and f.name[0] != ".")
        rng.shuffle(files)
        for items, expected in zip(dataset[2:5], (files[:6], files[6:8], files[8:])):    # of 11: round(5.5), round(2.2)
            assert [item.source for item in items if item.label == label] == expected
    assert data.load_dataset(name, str(tmp_path), seed=3).train != dataset.train


@pytest.mark.parametrize("name", ["oxford_pets", "stanford_cars", "oxford_flowers", "sun397", "ucf101",
                                  "fgvc_aircraft", "imagenet"])
def test_no_split_is_guessed_for_the_others(tmp_path, name):
    worlds.TREES[name](tmp_path)
    row = data.DATASETS[name]
    (tmp_path / row.folder / row.split).unlink()
    with pytest.raises(FileNotFoundError) as error:
        data.load_dataset(name, str(tmp_path))
    one_line(error, tmp_path / row.folder / row.split, data.GUIDE)


def test_own_split_names_an_empty_class_folder(tmp_path):
    worlds.dtd_tree(tmp_path)
    (tmp_path / "dtd" / "split_zhou_DescribableTextures.json").unlink()
    (tmp_path / "dtd" / "images" / "empty").mkdir()
    with pytest.raises(FileNotFoundError) as error:
        data.load_dataset("dtd", str(tmp_path))
    one_line(error, tmp_path / "dtd" / "images" / "empty", "no images")


# ----------------------------------------------------------------------------------------- bad input

def test_unknown_dataset_names_the_nearest():
    with pytest.raises(ValueError) as error:
        data.load_dataset("caltech", "/nowhere")
    one_line(error, "caltech101")
    with pytest.raises(ValueError) as error:
        data.load_dataset("zzz", "/nowhere")
    one_line(error, "eurosat", "toy")


@pytest.mark.parametrize("name", worlds.TREES)
def test_missing_root_folder_and_images_are_named(tmp_path, name):
    row = data.DATASETS[name]
    with pytest.raises(FileNotFoundError) as error:
        data.load_dataset(name, str(tmp_path / "none"))
    one_line(error, tmp_path / "none", "--root")
    with pytest.raises(FileNotFoundError) as error:
        data.load_dataset(name, str(tmp_path))
    one_line(error, tmp_path / row.folder, "http")
    worlds.TREES[name](tmp_path)
    if row.images[0]:                                           # stanford_cars: the folder itself
        (tmp_path / row.folder / row.images[0]).rename(tmp_path / "moved away")
        with pytest.raises(FileNotFoundError) as error:
            data.load_dataset(name, str(tmp_path))
        one_line(error, tmp_path / row.folder / row.images[0], "http")


def good_split():
    return {"train": [["a.jpg", 0, "a"], ["b.jpg", 1, "b"]], "val": [], "test": [["a2.jpg", 0, "a"], ["b2.jpg", 1, "b"]]}


def broken_splits():
    rows = good_split()
    yield "<!DOCTYPE html>", "not JSON"
    yield "[1, 2]", "not a JSON object"
    yield {"train": rows["train"], "test": rows["test"]}, "train, val and test"
    yield {**rows, "val": {}}, "train, val and test"
    yield {**rows, "val": [["a.jpg", "0", "a"]]}, "row 0 of val"
    yield {**rows, "val": [["a.jpg", True, "a"]]}, "row 0 of val"
    yield {**rows, "val": [["a.jpg", 0]]}, "row 0 of val"
    yield {**rows, "val": [None]}, "row 0 of val"
    yield {**rows, "val": [["a.jpg", 0, "c"]]}, "label 0 is called both 'a' and 'c'"
    yield {**rows, "val": [["a.jpg", 3, "c"]]}, "label 2"
    yield {**rows, "val": [["a.jpg", -1, "c"]]}, "label 2"
    yield {**rows, "val": [["a.jpg", 2, "c"]]}, "no train image of c"
    yield {**rows, "test": []}, "empty"
    yield {"train": [], "val": [], "test": []}, "empty"


@pytest.mark.parametrize("split, expected", list(broken_splits()))
def test_broken_split_json_is_refused_in_one_line(tmp_path, split, expected):
    folder = tmp_path / "stanford_cars"
    for path, label, _ in sum(good_split().values(), []):
        worlds.write_image(str(folder / path), label, 0)
    file = folder / "split_zhou_StanfordCars.json"
    file.write_text(json.dumps(good_split()))
    assert data.load_dataset("stanford_cars", str(tmp_path)).class_names == ["a", "b"]
    file.write_text(split if isinstance(split, str) else json.dumps(split))
    with pytest.raises(ValueError) as error:
        data.load_dataset("stanford_cars", str(tmp_path))
    one_line(error, file, expected)


def test_binary_split_is_refused(tmp_path):
    worlds.dtd_tree(tmp_path)
    (tmp_path / "dtd" / "split_zhou_DescribableTextures.json").write_bytes(b"\x80\x04\x95\xff")
    with pytest.raises(ValueError, match="not JSON"):
        data.load_dataset("dtd", str(tmp_path))


@pytest.mark.parametrize("name", ["food101", "fgvc_aircraft"])
def test_split_with_missing_images_counts_them_and_names_the_first(tmp_path, name):
    worlds.TREES[name](tmp_path)
    dataset = data.load_dataset(name, str(tmp_path))
    os.remove(dataset.train[3].source)
    os.remove(dataset.train[6].source)
    with pytest.raises(FileNotFoundError) as error:
        data.load_dataset(name, str(tmp_path))
    one_line(error, "2 of them missing", dataset.train[3].source)


def test_check_of_a_large_split_lists_folders_instead_of_asking_for_each_file(tmp_path, monkeypatch):
    worlds.eurosat_tree(tmp_path, per_class=12)
    calls = []
    monkeypatch.setattr(data.os, "listdir", lambda path, listdir=os.listdir: calls.append(path) or listdir(path))
    monkeypatch.setattr(data.os.path, "isfile", lambda path, isfile=os.path.isfile: calls.append(path) or isfile(path))
    data.load_dataset("eurosat", str(tmp_path))
    assert len(calls) == 10 + 1                                 # ten folders, and the split file


@pytest.mark.parametrize("name, images", [("imagenet", "images/train"), ("imagenet", "images/val"),
                                          ("imagenet_sketch", "images"),
                                          ("imagenetv2", "imagenetv2-matched-frequency-format-val")])
def test_missing_empty_or_unknown_class_folder_never_shifts_labels(tmp_path, name, images):
    worlds.TREES[name](tmp_path)
    row = data.DATASETS[name]
    images = tmp_path / row.folder / images
    victim = images / ("3" if name == "imagenetv2" else "n02110958")
    victim.rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError) as error:
        data.load_dataset(name, str(tmp_path))
    one_line(error, images, victim.name, "missing" if name == "imagenetv2" else "pug")
    victim.mkdir()
    (victim / ".DS_Store").write_text("")
    with pytest.raises(FileNotFoundError) as error:
        data.load_dataset(name, str(tmp_path))
    one_line(error, victim, "no images")
    (victim / ".DS_Store").unlink()
    (tmp_path / "away").rename(victim)
    (images / ("10" if name == "imagenetv2" else "n99999999")).mkdir()
    with pytest.raises(ValueError) as error:
        data.load_dataset(name, str(tmp_path))
    one_line(error, "is not in classnames.txt")


def test_imagenet_a_skips_foreign_files_but_not_an_empty_or_unknown_class(tmp_path):
    worlds.imagenet_a_tree(tmp_path)
    images = tmp_path / "imagenet-adversarial" / "imagenet-a"
    (images / "__MACOSX").mkdir()
    assert len(data.load_dataset("imagenet_a", str(tmp_path)).class_names) == 5
    (images / "n99999999").mkdir()
    with pytest.raises(ValueError, match="n99999999"):
        data.load_dataset("imagenet_a", str(tmp_path))
    (images / "n99999999").rename(images / "n01440764")          # tench: known, but without images
    with pytest.raises(FileNotFoundError, match="n01440764 holds no images"):
        data.load_dataset("imagenet_a", str(tmp_path))


@pytest.mark.parametrize("text", ["", "n01440764\n", "n01440764 tench\nn01440764 goldfish\n"])
def test_broken_classnames_are_refused(tmp_path, text):
    worlds.imagenet_tree(tmp_path)
    (tmp_path / "imagenet" / "classnames.txt").write_text(text)
    with pytest.raises(ValueError) as error:
        data.load_dataset("imagenet", str(tmp_path))
    one_line(error, tmp_path / "imagenet" / "classnames.txt")


def test_unknown_aircraft_variant_is_refused(tmp_path):
    worlds.fgvc_aircraft_tree(tmp_path)
    with open(tmp_path / "fgvc_aircraft" / "images_variant_val.txt", "a") as f:
        f.write("1025000 Zeppelin NT\n")
    with pytest.raises(ValueError) as error:
        data.load_dataset("fgvc_aircraft", str(tmp_path))
    one_line(error, "Zeppelin NT", "1025000")


def test_class_without_train_image_is_named(tmp_path):
    worlds.fgvc_aircraft_tree(tmp_path)
    file = tmp_path / "fgvc_aircraft" / "images_variant_train.txt"
    file.write_text("".join(line + "\n" for line in file.read_text().splitlines() if not line.endswith("F/A-18")))
    with pytest.raises(ValueError) as error:
        data.load_dataset("fgvc_aircraft", str(tmp_path))
    one_line(error, "no train image of F/A-18")


# -------------------------------------------------------------------------------------- descriptions

@pytest.fixture
def description_file(tmp_path):
    def write(value):
        path = tmp_path / "descriptions.json"
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        return str(path)
    return write


def test_descriptions_match_names_and_keep_file_order(description_file):
    path = description_file({"unused": [], "Car-Side": [f"s{i}" for i in range(14)], "yin  YANG": ["one\ntwo", " "],
                             "f/a 18": ["x"], "colt's foot": ["y", "z"]})
    names = ["yin yang", "car_side", "F/A-18", "colt's foot", "car side"]
    assert data.load_descriptions(path, names) == [["one two"], [f"s{i}" for i in range(10)], ["x"], ["y", "z"],
                                                   [f"s{i}" for i in range(10)]]
    assert data.load_descriptions(path, ["car side"], max_descriptions=3) == [["s0", "s1", "s2"]]
    with pytest.raises(ValueError, match="max-descriptions"):
        data.load_descriptions(path, names, max_descriptions=0)


def test_all_classes_without_description_come_in_one_message_and_aliases_help(description_file, tmp_path):
    path = description_file({"side of a car": ["a"], "off-center face": ["b"], "lamp": ["c"], "water lily": ["d"]})
    names = ["face", "lamp", "car side", "water lilly", "qqq"]
    with pytest.raises(ValueError) as error:
        data.load_descriptions(path, names)
    one_line(error, path, "4 of 5", "car side (closest: side of a car)", "face (closest: off center face)",
             "water lilly (closest: water lily)", "qqq;", "--aliases")
    aliases = {"car_side": "side of a car", "Face": "off-center face", "water lilly": "Water_Lily", "qqq": "lamp"}
    assert data.load_descriptions(path, names, aliases=aliases) == [["b"], ["c"], ["a"], ["d"], ["c"]]
    (tmp_path / "aliases.json").write_text(json.dumps(aliases))
    assert data.load_descriptions(path, names, aliases=str(tmp_path / "aliases.json"))[2] == ["a"]
    with pytest.raises(ValueError) as error:                    # an alias whose key the file lacks
        data.load_descriptions(path, ["lamp"], aliases={"lamp": "lantern"})
    one_line(error, "lamp")


@pytest.mark.parametrize("value, expected", [
    ("{", "not JSON"), ("[]", "list"), ({"lamp": []}, "'lamp' is empty"), ({"lamp": ["", " "]}, "'lamp' is empty"),
    ({"lamp": ["a", 3]}, "'lamp'"), ({"lamp": "a lamp"}, "'lamp'"), ({"lamp": {"a": 1}}, "'lamp'"),
    ({"lamp": None}, "'lamp'")])
def test_broken_descriptions_are_refused_in_one_line(description_file, value, expected):
    path = description_file(value)
    with pytest.raises(ValueError) as error:
        data.load_descriptions(path, ["lamp"])
    one_line(error, path, expected)


def test_wrong_file_for_a_thousand_classes_is_refused_quickly(description_file):
    path = description_file({f"thing number {i}": ["x"] for i in range(1000)})
    with pytest.raises(ValueError) as error:
        data.load_descriptions(path, [f"class of {i} items" for i in range(1000)])
    one_line(error, "1000 of 1000", "class of 999 items")


def test_missing_description_files_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        data.default_descriptions("stanford_cars")
    one_line(error, "--descriptions FILE", "data.py describe --dataset stanford_cars")
    assert data.default_descriptions("toy") == str(ROOT / "assets" / "descriptions" / "toy.json")
    with pytest.raises(FileNotFoundError):
        data.load_descriptions(str(tmp_path / "none.json"), ["a"])


@pytest.mark.skipif(not SHARED.is_dir(), reason="the sample files lie beside the repository")
def test_real_description_files_load(tmp_path):
    names = worlds.caltech101_tree(tmp_path)
    sentences = data.load_descriptions(str(SHARED / "caltech101_llm.json"), names)
    assert len(sentences) == 100 and all(len(s) == 10 for s in sentences)
    names = worlds.eurosat_tree(tmp_path)
    assert len(data.load_descriptions(str(SHARED / "eurosat_llm.json"), names, 25)[9]) == 25
    with pytest.raises(ValueError) as error:
        data.load_descriptions(str(SHARED / "eurosat_llm.json"), names + ["sea lake", "highway"])
    one_line(error, "2 of 12", "sea lake", "highway (closest: highway or road")


# -------------------------------------------------------------------------------------------- images

@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "RGBA", "LA"])
def test_images_of_every_mode_become_rgb(tmp_path, mode):
    path = str(tmp_path / "image.jpg")
    worlds.write_image(path, 3, 1, mode, size=(40, 30))
    image = data.load_image(path)
    assert image.mode == "RGB" and image.size == (40, 30)
    assert data.test_transform(16)(image).shape == (3, 16, 16)


def test_unreadable_images_are_named(tmp_path):
    good = tmp_path / "good.jpg"
    worlds.write_image(str(good), 0, 0, size=(200, 200))
    cut, text, gone, empty = (tmp_path / f"{name}.jpg" for name in ("cut", "text", "gone", "empty"))
    cut.write_bytes(good.read_bytes()[:-400])
    text.write_text("<html>")
    empty.write_bytes(b"")
    png = tmp_path / "broken.png"
    worlds.write_image(str(png), 0, 0, mode="P", size=(80, 80))
    png.write_bytes(png.read_bytes()[:60] + b"garbage" + png.read_bytes()[67:])
    for path in (cut, text, gone, empty, png):
        with pytest.raises(ValueError) as error:
            data.load_image(str(path))
        one_line(error, path)


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_image_stops_a_loader_with_one_line(tmp_path, workers):
    path = tmp_path / "bad.jpg"
    path.write_text("no image")
    images = data.Images([data.Item(str(path), 0)], data.test_transform(8))

    try:
        message = str(list(data.batches(images, [0], 1, workers)))
    except ValueError as error:
        message = str(error)
        traceback.clear_frames(error.__traceback__)     # else the failed loader waits for the garbage collector, then 5 s
    assert str(path) in message and "not skipped" in message and "\n" not in message


def test_test_transform_is_clips():
    """Shorter edge to 224 bicubic, centre crop, CLIP's mean and std, against the steps written out."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 401, 3), dtype=np.uint8))
    resized = image.resize((int(224 * 401 / 300), 224), Image.BICUBIC)
    left = round((resized.width - 224) / 2)
    pixels = np.asarray(resized.crop((left, 0, left + 224, 224)), np.float32).transpose(2, 0, 1) / 255
    mean, std = np.array(data.CLIP_MEAN)[:, None, None], np.array(data.CLIP_STD)[:, None, None]
    assert np.allclose(data.test_transform(224)(image).numpy(), (pixels - mean) / std, atol=1e-5)


def test_train_transform_crops_and_flips():
    ramp = np.tile(np.linspace(0, 255, 256)[None, :, None], (64, 1, 3)).astype(np.uint8)
    crop = data.train_transform(32).transforms[0]
    assert crop.scale == (0.08, 1.0) and crop.interpolation.value == "bicubic"
    torch.manual_seed(0)
    pictures = [data.train_transform(32)(Image.fromarray(ramp)) for _ in range(60)]
    slopes = [float(x[0, 16, -1] - x[0, 16, 0]) for x in pictures]
    assert 15 < sum(slope < 0 for slope in slopes) < 45         # half of them flipped
    assert min(map(abs, slopes)) < 0.6 * max(map(abs, slopes))  # crops of different widths


def epoch(items, workers=0, order=None, seed=7, decoded=None, **loader):
    images = data.Images(items, data.train_transform(24), seed=seed, decoded=decoded)
    order = list(range(len(items))) if order is None else order
    found = {}
    for pixels, labels in data.batches(images, order, 4, workers, **loader):
        assert pixels.shape[1:] == (3, 24, 24) and labels.dtype == torch.int64
        for x, y in zip(pixels, labels):
            i = order[len(found)]
            assert y == items[i].label
            found[i] = x
    return torch.stack([found[i] for i in sorted(found)])


def test_augmentation_depends_on_seed_and_index_alone(world):
    items = data.load_dataset("dtd", world[0]).train[:10]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = epoch(items)
    assert torch.equal(before, torch.get_rng_state())           # the caller's generator is not disturbed
    torch.manual_seed(99)
    assert torch.equal(first, epoch(items, order=list(reversed(range(10)))))
    assert torch.equal(first, epoch(items, decoded=data.decode_all(items, 10**9, 2)))
    assert torch.equal(first, epoch(items, workers=2, order=torch.randperm(10).tolist()))
    assert not torch.equal(first, epoch(items, seed=8))
    assert not torch.equal(epoch(items, seed=(7, 1)), epoch(items, seed=(7, 2)))
    same = epoch([items[0]] * 4)
    assert not torch.equal(same[0], same[1])                    # one image twice gets two crops


def test_workers_started_by_spawn_give_the_same(world):
    items = data.load_dataset("dtd", world[0]).train[:4]
    images = data.Images(items, data.train_transform(16), seed=3, decoded=data.decode_all(items[:2], 10**9, 1))
    spawning = data.batches(images, range(4), 2, workers=1)
    spawning.multiprocessing_context = "spawn"
    a, b = (torch.cat([x for x, _ in loader]) for loader in (data.batches(images, range(4), 2), spawning))
    assert torch.equal(a, b)


def test_decoding_stops_at_the_byte_limit_and_decodes_each_source_once(tmp_path, monkeypatch):
    items = []
    for i in range(40):
        worlds.write_image(str(tmp_path / f"{i}.jpg"), i, 0, size=(10, 10))              # 400 bytes in memory
        items += [data.Item(str(tmp_path / f"{i}.jpg"), i)] * 2
    calls = []
    monkeypatch.setattr(data, "load_image", lambda source, load=data.load_image: calls.append(source) or load(source))
    decoded = data.decode_all(items, 10**6, workers=2)
    assert list(decoded) == [item.source for item in items[::2]] and len(calls) == 40
    assert list(data.decode_all(items, 2000, workers=1)) == [item.source for item in items[:10:2]]
    assert data.decode_all(items, 0, workers=0) == {} and len(calls) < 60
    bad = tmp_path / "bad.jpg"
    bad.write_text("")
    with pytest.raises(ValueError, match="bad.jpg"):
        data.decode_all([data.Item(str(bad), 0)], 10**6, workers=2)


# -------------------------------------------------------------------------------------- command line

def test_inventory_has_a_line_per_dataset(world, capsys):
    root, _ = world
    assert data.main(["--root", root]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert list(lines) == list(data.DATASETS)
    assert "10 classes (5 base, 5 novel)" in lines["eurosat"] and "40 train" in lines["eurosat"]
    assert "no descriptions" in lines["ucf101"] and "descriptions found" in lines["toy"]
    assert "test only" in lines["imagenet_r"]


def test_inventory_says_what_is_missing(tmp_path, capsys):
    worlds.oxford_pets_tree(tmp_path)
    (tmp_path / "oxford_pets" / "split_zhou_OxfordPets.json").unlink()
    assert data.main(["--root", str(tmp_path)]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "split_zhou_OxfordPets.json is missing" in lines["oxford_pets"] and "sun397 is missing" in lines["sun397"]
    assert data.main(["--root", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_data_py_runs_as_a_script(tmp_path):
    run = subprocess.run([sys.executable, str(ROOT / "data.py"), "--root", str(tmp_path / "none")],
                         capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "Traceback" not in run.stderr


# A small server that speaks the chat-completions protocol.

class Server(http.server.BaseHTTPRequestHandler):
    requests, answer = [], None

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).requests.append((self.path, self.headers["Authorization"], body))
        status, text = type(self).answer(body["messages"][-1]["content"])
        reply = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [
            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}]}
        reply = json.dumps(reply if status == 200 else {"error": {"message": text}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *args):
        pass


def good_answer(question):
    thing = question.removeprefix("What does a ").removesuffix(" look like?")
    lines = [f"{i + 1}. A {thing} looks like pattern {i}." for i in range(4)]
    return 200, "<think>\nHm, let me see.\n</think>\nHere are the sentences:\n\n" + "\n".join(lines) + "\n" + lines[0]


class FakeOpenAI:
    """Where the optional client is not installed: the two calls that data.py makes, over urllib."""

    class OpenAIError(Exception):
        pass

    def __init__(self, api_key, base_url, timeout):
        self.key, self.url = api_key, base_url
        self.chat = types.SimpleNamespace(completions=self)

    def create(self, **body):
        import urllib.error
        import urllib.request
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(),
                                         {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"})
        try:
            reply = json.load(urllib.request.urlopen(request))
        except urllib.error.HTTPError as error:
            raise self.OpenAIError(error.read().decode()) from None
        except urllib.error.URLError as error:
            raise self.OpenAIError(f"Connection error: {error}") from None
        return types.SimpleNamespace(choices=[types.SimpleNamespace(message=types.SimpleNamespace(
            content=choice["message"]["content"])) for choice in reply["choices"]])


FAKE_MODULE = types.SimpleNamespace(OpenAI=FakeOpenAI, OpenAIError=FakeOpenAI.OpenAIError)


@pytest.fixture(params=["openai", "fake"])
def client(request, monkeypatch):
    if request.param == "openai":
        pytest.importorskip("openai")
    else:
        monkeypatch.setitem(sys.modules, "openai", FAKE_MODULE)


@pytest.fixture
def server(monkeypatch):
    """Yields its base URL; Server.requests and Server.answer are fresh."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    Server.requests, Server.answer = [], staticmethod(good_answer)
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}/v1"
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def describe(world, server, output, *more):
    return data.main(["describe", "--dataset", "dtd", "--root", world[0], "--model", "m1", "--base-url", server,
                      "--output", str(output), *more])


def test_describe_makes_a_file_that_loads(world, client, server, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    output = tmp_path / "new" / "dtd.json"
    assert describe(world, server, output, "--per-class", "4") == 0
    names = data.load_dataset("dtd", world[0]).class_names
    loaded = data.load_descriptions(str(output), names)
    assert loaded == [[f"A {name} looks like pattern {i}." for i in range(4)] for name in names]
    path, key, body = Server.requests[0]
    assert path == "/v1/chat/completions" and key == "Bearer sk-secret" and body["model"] == "m1"
    asked = [body["messages"][-1]["content"] for _, _, body in Server.requests]
    assert asked == [f"What does a {name} look like?" for name in names]
    out = capsys.readouterr()
    assert "sk-secret" not in out.out + out.err + output.read_text()
    assert [f.name for f in output.parent.iterdir()] == ["dtd.json"]                       # no temporary file is left
    Server.requests.clear()
    assert describe(world, server, output) == 0 and Server.requests == []                  # nothing left to do


def test_describe_resumes_after_a_failure(world, client, server, tmp_path, capsys):
    names, output = data.load_dataset("dtd", world[0]).class_names, tmp_path / "dtd.json"
    output.write_text(json.dumps({names[1].upper(): ["Mine."], names[0].upper(): []}))
    Server.answer = staticmethod(lambda q: (400, "out of\nmemory") if names[3] in q else good_answer(q))
    assert describe(world, server, output, "--per-class", "2") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert names[3] in message and "out of" in message and str(output) in message and "resume" in message
    assert set(json.loads(output.read_text())) == {names[0], names[1].upper(), names[2]}
    assert Server.requests[0][1] in ("Bearer none", "Bearer ")                             # no key: a dummy one
    Server.answer, Server.requests = staticmethod(good_answer), []
    assert describe(world, server, output, "--per-class", "2") == 0
    assert len(Server.requests) == 2
    loaded = data.load_descriptions(str(output), names)
    assert loaded[1] == ["Mine."] and all(len(s) == 2 for i, s in enumerate(loaded) if i != 1)


def test_describe_asks_again_for_more_and_gives_up_on_silence(world, client, server, tmp_path, capsys):
    count = iter(range(100))
    Server.answer = staticmethod(lambda q: (200, f"- A thing seen {next(count)} times."))
    output = tmp_path / "dtd.json"
    assert describe(world, server, output, "--per-class", "2") == 0
    assert len(Server.requests) == 10 and json.loads(output.read_text())["banded"] == ["A thing seen 0 times.",
                                                                                       "A thing seen 1 times."]
    assert describe(world, server, output, "--per-class", "0") == 2 and "--per-class" in capsys.readouterr().err
    Server.answer = staticmethod(lambda q: (200, "Sure:"))
    assert describe(world, server, tmp_path / "other.json") == 2
    assert "banded: m1 gave no sentence" in capsys.readouterr().err and not (tmp_path / "other.json").exists()


def test_describe_survives_a_base_url_that_answers_with_a_web_page(world, tmp_path, capsys, monkeypatch):
    page = types.SimpleNamespace(chat=types.SimpleNamespace(completions=types.SimpleNamespace(create=lambda **_: "<html>")))
    monkeypatch.setitem(sys.modules, "openai", types.SimpleNamespace(OpenAI=lambda **_: page, OpenAIError=KeyError))
    assert describe(world, "http://x", tmp_path / "dtd.json") == 2
    assert "/v1" in capsys.readouterr().err.splitlines()[-1]


def test_describe_without_key_client_or_server_says_so(world, server, tmp_path, capsys, monkeypatch):
    arguments = ["describe", "--dataset", "dtd", "--root", world[0], "--model", "m", "--output", str(tmp_path / "x.json")]
    monkeypatch.setitem(sys.modules, "openai", FAKE_MODULE)
    assert data.main(arguments) == 2 and "OPENAI_API_KEY" in capsys.readouterr().err
    assert data.main([*arguments, "--base-url", "http://127.0.0.1:9/v1"]) == 2
    assert "http://127.0.0.1:9/v1" in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "x.json").write_text("[]")
    assert data.main([*arguments, "--base-url", server]) == 2 and "x.json" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "openai", None)
    assert data.main(arguments) == 2 and "pip install openai" in capsys.readouterr().err
    assert Server.requests == []


# --------------------------------------------------------------------------- the descriptions that are shipped

@pytest.mark.parametrize("name, classes", [("caltech101", 100), ("oxford_pets", 37), ("dtd", 47), ("eurosat", 10)])
def test_shipped_descriptions_are_whole_distinct_and_short_enough_for_clip(name, classes):
    sentences = json.loads(pathlib.Path(data.default_descriptions(name)).read_text(encoding="utf-8"))
    assert len(sentences) == classes and min(map(len, sentences.values())) >= 5
    flat = [sentence.lower() for listed in sentences.values() for sentence in listed]
    assert len(set(flat)) == len(flat)
    prompts.clip.tokenize(flat)                                              # raises where one is longer than 77 tokens


def test_shipped_descriptions_fit_the_splits_class_names():
    eurosat = list(data.DATASETS["eurosat"].rename.values()) + ["Forest", "River"]
    for name, classes in [("caltech101", worlds.CALTECH101_NAMES), ("eurosat", eurosat)]:
        assert len(data.load_descriptions(data.default_descriptions(name), classes)) == len(classes)
