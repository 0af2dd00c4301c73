"""data.py against the fifteen layouts (worlds.py), CoOp's few-shot picks, and troubles of disks."""

import http.server
import json
import os
import multiprocessing
import pathlib
import re
import pickle
import random
import stat
import shutil
import subprocess
import sys
import threading
import traceback
import types

import clip.clip
import numpy as np
import pytest
import torch
from PIL import Image

import data
import prompts
import worlds
from worlds import one_line

ROOT = pathlib.Path(data.__file__).resolve().parent
SHARED = ROOT.parent / "shared" / "descriptions"
CLASS_NAMES = ROOT.parent / "shared" / "class_names"
JSON_SETS = ["caltech101", "oxford_pets", "stanford_cars", "oxford_flowers", "food101", "sun397",
             "dtd", "eurosat", "ucf101"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Aliases files are written to the current directory: not into the repository."""
    monkeypatch.chdir(tmp_path)


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
    assert sorted(map(str, root.rglob("*"))) == before  # root ignores modes, so look as well


# ---------------------------------------------------------------------------- the fifteen layouts

def test_table_has_the_fifteen_datasets_and_toy():
    assert set(data.DATASETS) == set(worlds.TREES) | {"toy"}
    assert all(row.prompt.count("{}") == 1 for row in data.DATASETS.values())


@pytest.mark.parametrize("name", worlds.TREES)
def test_layout_is_read_with_the_right_counts_and_names(world, name):
    root, names = world
    dataset = data.load_dataset(name, root)
    n = len(names[name])
    assert dataset.name == name and dataset.class_names == names[name]
    sizes = {
        "imagenet": (8, 0, 4),
        "imagenetv2": (0, 0, 8),
        "imagenet_sketch": (0, 0, 8),
        "imagenet_a": (0, 0, 8),
        "imagenet_r": (0, 0, 8),
    }.get(name, (4, 2, 2))
    for items, per_class in zip((dataset.train, dataset.val, dataset.test), sizes):
        assert (
            np.bincount([item.label for item in items], minlength=n).tolist() == [per_class] * n
        )
    sources = [
        item.source for items in (dataset.train, dataset.val, dataset.test) for item in items
    ]
    assert len(set(sources)) == len(sources) and all(os.path.isfile(source) for source in sources)
    assert not any(os.path.basename(source).startswith(".") for source in sources)
    full = {"eurosat": 10}.get(name)
    assert all("classes found" in note for note in dataset.notes) and len(dataset.notes) == (
        0 if full else 1
    )


def test_labels_follow_the_images_not_the_names(world):
    """The generated images carry their label in their colour: every item must agree with it."""
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
    assert names["caltech101"] == [
        "face",
        "leopard",
        "motorbike",
        "accordion",
        "airplane",
        "anchor",
        "ant",
        "barrel",
        "bass",
        "beaver",
    ]
    assert names["stanford_cars"][2] == "2012 Ram C/V Cargo Van Minivan"
    assert names["oxford_flowers"][2] == "colt's foot"
    assert names["fgvc_aircraft"] == [
        "707-320",
        "A300B4",
        "Cessna 172",
        "DC-10",
        "F-16A/B",
        "F/A-18",
        "Tu-154",
    ]
    assert names["sun397"][1:4] == [
        "airplane cabin",
        "outdoor apartment building",
        "indoor bazaar",
    ]
    assert names["ucf101"] == [
        "Apply Eye Makeup",
        "Apply Lipstick",
        "Archery",
        "Baby Crawling",
        "Yo Yo",
    ]
    by_wnid = [
        "tench",
        "goldfish",
        "kite (bird of prey)",
        "pug",
        "chain",
        "jack-o'-lantern",
        "missile",
        "missile",
        "sunglasses",
        "sunglasses",
    ]
    assert names["imagenet"] == names["imagenet_sketch"] == by_wnid
    assert names["imagenetv2"][:4] == ["tench", "missile", "goldfish", "missile"]  # line order
    assert names["imagenet_a"] == ["goldfish", "pug", "jack-o'-lantern", "missile", "sunglasses"]
    assert names["imagenet_r"] == ["tench", "kite (bird of prey)", "chain", "missile", "sunglasses"]


def test_two_imagenet_classes_of_one_name_stay_two(world):
    root, _ = world
    dataset = data.load_dataset("imagenet", root)
    folders = {item.label: os.path.basename(os.path.dirname(item.source)) for item in dataset.train}
    assert folders[6] == "n03773504" and folders[7] == "n04008634"
    assert [folders[label] for label in range(10)] == sorted(worlds.IMAGENET)


@pytest.mark.parametrize(
    "tree, images",
    [
        (worlds.imagenetv2_tree, "imagenetv2"),
        (worlds.imagenetv2_tree, ""),
        (worlds.imagenet_sketch_tree, "sketch"),
    ],
)
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
    assert (
        len(base) == len(novel) == 50
        and names[base[0]] == "face"
        and names[novel[-1]] == "yin yang"
    )


def test_toy_needs_no_root():
    dataset = data.load_dataset("toy", "/nowhere")
    base, novel = data.split_base_novel(dataset.class_names)
    assert min(len(base), len(novel)) >= 20 and dataset.train and dataset.val and dataset.test
    assert data.load_image(dataset.test[0].source).mode == "RGB" and dataset.notes == []
    assert os.path.dirname(dataset.test[0].source).startswith(os.path.join(data.ASSETS, "toy"))


def test_root_comes_from_the_environment_by_default(world, monkeypatch):
    monkeypatch.setenv("DATA", world[0])
    assert len(data.load_dataset("eurosat").class_names) == 10


# ---------------------------------------------------------- few-shot picks, base and novel halves

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
        lines = {
            part: (folder / f"images_variant_{part}.txt").read_text().splitlines()
            for part in ("train", "val")
        }
        split = {
            part: [[f"{line[:7]}.jpg", variants.index(line[8:])] for line in lines[part]]
            for part in lines
        }
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
    assert dataset.class_names == names  # without BACKGROUND_Google and Faces_easy, renamed
    assert (
        "OWN SPLIT" in dataset.notes[0]
        and "not compare" in dataset.notes[0]
        and row.split in dataset.notes[0]
    )
    rng, images = random.Random(2), tmp_path / row.folder / row.images[0]
    for label, folder in enumerate(
        sorted(
            f.name
            for f in images.iterdir()
            if f.is_dir() and f.name not in ("BACKGROUND_Google", "Faces_easy")
        )
    ):
        files = sorted(
            str(f) for f in (images / folder).iterdir() if f.suffix == ".jpg" and f.name[0] != "."
        )
        rng.shuffle(files)
        for items, expected in zip(
            (dataset.train, dataset.val, dataset.test), (files[:6], files[6:8], files[8:])
        ):  # of 11: round(5.5), round(2.2)
            assert [item.source for item in items if item.label == label] == expected
    assert data.load_dataset(name, str(tmp_path), seed=3).train != dataset.train


@pytest.mark.parametrize(
    "name",
    [
        "oxford_pets",
        "stanford_cars",
        "oxford_flowers",
        "sun397",
        "ucf101",
        "fgvc_aircraft",
        "imagenet",
    ],
)
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


# -------------------------------------------------------------------------------------- bad input

def test_unknown_dataset_names_the_nearest():
    with pytest.raises(ValueError) as error:
        data.load_dataset("caltech", "/nowhere")
    one_line(error, "caltech101")
    with pytest.raises(ValueError) as error:
        data.load_dataset("zzz", "/nowhere")
    one_line(error, "eurosat", "toy")


@pytest.mark.parametrize("name", worlds.TREES)
def test_missing_root_and_folder_are_named(tmp_path, name):
    row = data.DATASETS[name]
    with pytest.raises(FileNotFoundError) as error:
        data.load_dataset(name, str(tmp_path / "none"))
    one_line(error, tmp_path / "none", "--root")
    with pytest.raises(FileNotFoundError) as error:
        data.load_dataset(name, str(tmp_path))
    one_line(error, tmp_path / row.folder, row.source, data.GUIDE)


@pytest.mark.parametrize("name", [name for name in worlds.TREES if data.DATASETS[name].images[0]])
def test_missing_images_are_named_with_where_to_get_them(tmp_path, name):
    row = data.DATASETS[name]
    worlds.TREES[name](tmp_path / "data")
    images = tmp_path / "data" / row.folder / row.images[0]
    images.rename(tmp_path / "moved away")
    with pytest.raises(FileNotFoundError) as error:
        data.load_dataset(name, str(tmp_path / "data"))
    message = one_line(error, images, row.source, data.GUIDE)
    assert message.count(data.GUIDE) == 1 and "move" not in message


@pytest.mark.parametrize("name", ["stanford_cars", "sun397"])
def test_where_the_guides_links_are_dead_the_authors_mirror_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError) as error:
        data.load_dataset(name, str(tmp_path))
    one_line(error, "HuggingFace dataset zhengli97/prompt_learning_dataset")


def good_split():
    return {
        "train": [["a.jpg", 0, "a"], ["b.jpg", 1, "b"]],
        "val": [],
        "test": [["a2.jpg", 0, "a"], ["b2.jpg", 1, "b"]],
    }


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


def test_check_of_a_large_split_lists_folders_instead_of_asking_for_each_file(
    tmp_path, monkeypatch
):
    worlds.eurosat_tree(tmp_path, per_class=12)
    calls = []
    monkeypatch.setattr(
        data.os, "listdir", lambda path, listdir=os.listdir: calls.append(path) or listdir(path)
    )
    monkeypatch.setattr(
        data.os.path,
        "isfile",
        lambda path, isfile=os.path.isfile: calls.append(path) or isfile(path),
    )
    data.load_dataset("eurosat", str(tmp_path))
    assert len(calls) <= 10 + 2                                 # ten folders, and the split file


@pytest.mark.parametrize(
    "name, images",
    [
        ("imagenet", "images/train"),
        ("imagenet", "images/val"),
        ("imagenet_sketch", "images"),
        ("imagenetv2", "imagenetv2-matched-frequency-format-val"),
    ],
)
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
    file.write_text(
        "".join(
            line + "\n" for line in file.read_text().splitlines() if not line.endswith("F/A-18")
        )
    )
    with pytest.raises(ValueError) as error:
        data.load_dataset("fgvc_aircraft", str(tmp_path))
    one_line(error, "no train image of F/A-18")


# ---------------------------------------------------------------------- data that is nearly right

def refused(name, root, kind=FileNotFoundError):
    """The one line that loading ends in."""
    with pytest.raises(kind) as error:
        data.load_dataset(name, str(root))
    return one_line(error)


def is_no_download(message):
    return "http" not in message and "HuggingFace" not in message


@pytest.mark.parametrize(
    "name", ["Caltech-101", "caltech 101", "CALTECH101", "caltech-101", "Caltech_101"]
)
def test_a_dataset_may_be_named_in_any_case_and_with_any_sign(world, name):
    assert data.load_dataset(name, world[0]).name == "caltech101"


@pytest.mark.parametrize(
    "coop, name",
    [
        ("ImageNet", "imagenet"),
        ("Caltech101", "caltech101"),
        ("OxfordPets", "oxford_pets"),
        ("StanfordCars", "stanford_cars"),
        ("OxfordFlowers", "oxford_flowers"),
        ("Food101", "food101"),
        ("FGVCAircraft", "fgvc_aircraft"),
        ("SUN397", "sun397"),
        ("DescribableTextures", "dtd"),
        ("EuroSAT", "eurosat"),
        ("UCF101", "ucf101"),
        ("ImageNetV2", "imagenetv2"),
        ("ImageNetSketch", "imagenet_sketch"),
        ("ImageNetA", "imagenet_a"),
        ("ImageNetR", "imagenet_r"),
    ],
)
def test_a_dataset_may_be_named_as_coops_class(world, coop, name):
    assert data.load_dataset(coop, world[0]).name == name


def test_kaggles_stanford_cars_are_one_folder_too_deep(tmp_path):
    worlds.stanford_cars_tree(tmp_path)
    train = tmp_path / "stanford_cars" / "cars_train"
    train.rename(tmp_path / "inner")
    train.mkdir()
    (tmp_path / "inner").rename(train / "cars_train")
    message = refused("stanford_cars", tmp_path)
    assert f"move what is in {train / 'cars_train'} up into {train}" in message
    assert is_no_download(message)


@pytest.mark.parametrize("own_split", [False, True])
def test_eurosats_images_under_their_archives_name_are_to_be_renamed(tmp_path, own_split):
    worlds.eurosat_tree(tmp_path)
    folder = tmp_path / "eurosat"
    if own_split:
        (folder / "split_zhou_EuroSAT.json").unlink()
    (folder / "2750").rename(folder / "EuroSAT_RGB")
    message = refused("eurosat", tmp_path)
    assert f"{folder / 'EuroSAT_RGB'} is there" in message and "rename it to 2750" in message
    assert is_no_download(message)


@pytest.mark.parametrize(
    "name, images", [("eurosat", "2750"), ("oxford_pets", "images"), ("dtd", "images")]
)
def test_images_one_folder_higher_are_to_be_moved_down(tmp_path, name, images):
    worlds.TREES[name](tmp_path)
    folder = tmp_path / data.DATASETS[name].folder
    for path in (folder / images).iterdir():
        path.rename(folder / path.name) if path.name not in (".DS_Store", "README.txt") else None
    message = refused(name, tmp_path)
    assert "one folder higher: move" in message and f"into {folder / images}" in message
    assert is_no_download(message)


@pytest.mark.parametrize(
    "name, images",
    [
        ("oxford_flowers", "jpg"),
        ("fgvc_aircraft", "images"),
        ("ucf101", "UCF-101-midframes"),
        ("imagenet", "images/val"),
        ("imagenet_sketch", "images"),
    ],
)
def test_images_one_folder_deeper_are_to_be_moved_up(tmp_path, name, images):
    worlds.TREES[name](tmp_path)
    images = tmp_path / data.DATASETS[name].folder / images
    images.rename(tmp_path / "inner")
    images.mkdir()
    (tmp_path / "inner").rename(images / "unpacked")
    message = refused(name, tmp_path)
    assert f"move what is in {images / 'unpacked'} up into {images}" in message
    assert is_no_download(message)


def test_images_in_another_case_are_to_be_renamed(tmp_path):
    worlds.oxford_pets_tree(tmp_path)
    images = tmp_path / "oxford_pets" / "images"
    for path in images.glob("*.jpg"):
        path.rename(path.with_suffix(".JPG"))
    message = refused("oxford_pets", tmp_path)
    assert ".JPG is there: rename it to" in message and "and the others like it" in message
    assert is_no_download(message)


@pytest.mark.parametrize(
    "name, inside, other",
    [
        ("food101", "images", "Images"),
        ("sun397", "SUN397", "sun397"),
        ("ucf101", "UCF-101-midframes/Apply_Lipstick", "UCF-101-midframes/ApplyLipstick"),
    ],
)
def test_folders_in_another_case_are_to_be_renamed(tmp_path, name, inside, other):
    worlds.TREES[name](tmp_path)
    folder = tmp_path / data.DATASETS[name].folder
    (folder / inside).rename(folder / other)
    message = refused(name, tmp_path)
    assert f"{folder / other} is there: rename it to {pathlib.Path(inside).name}" in message
    assert is_no_download(message)


@pytest.mark.parametrize("name, other", [("caltech101", "caltech101"), ("eurosat", "EuroSAT"),
                                         ("imagenet_r", "imagenet-r"), ("dtd", "DTD")])
def test_a_datasets_folder_under_another_name_is_to_be_renamed(tmp_path, name, other):
    worlds.TREES[name](tmp_path)
    folder = tmp_path / data.DATASETS[name].folder
    folder.rename(tmp_path / other)
    message = refused(name, tmp_path)
    assert (
        f"{tmp_path / other} is there: rename it to {folder.name}" in message
        and is_no_download(message)
    )


def test_a_missing_class_is_never_taken_for_its_neighbour(tmp_path):
    """All of Caltech101's class folders have an image_0001.jpg; BACKGROUND_Google is no class."""
    worlds.caltech101_tree(tmp_path / "data", classes=5)
    images = tmp_path / "data" / "caltech-101" / "101_ObjectCategories"
    for folder in ("Faces", "accordion"):
        (images / folder).rename(tmp_path / folder)
        message = refused("caltech101", tmp_path / "data")
        assert "rename" not in message and "move" not in message and data.GUIDE in message
        (tmp_path / folder).rename(images / folder)


def test_a_missing_half_of_the_cars_is_never_taken_for_the_other(tmp_path):
    worlds.stanford_cars_tree(tmp_path / "data")
    cars = tmp_path / "data" / "stanford_cars"
    for path in list((cars / "cars_train").glob("*.jpg")):  # the real numbers start at 1 in both
        path.with_name(path.name).rename(tmp_path / path.name)
        worlds.write_image(str(cars / "cars_test" / path.name), 0, 0)
    (cars / "cars_train").rename(tmp_path / "away")
    assert "rename" not in refused("stanford_cars", tmp_path / "data")


@pytest.mark.parametrize(
    "name, other",
    [
        ("oxford_pets", "split_zhou_oxfordpets.json"),
        ("eurosat", "split_zhou_eurosat.json"),
        ("fgvc_aircraft", "Variants.txt"),
        ("imagenet", "ClassNames.txt"),
    ],
)
def test_a_split_file_in_another_case_is_named(tmp_path, name, other):
    worlds.TREES[name](tmp_path)
    row = data.DATASETS[name]
    folder = tmp_path / row.folder
    (folder / row.split).rename(folder / other)
    message = refused(name, tmp_path)
    assert f"{folder / other} is there: rename it to {row.split}" in message and is_no_download(
        message
    )


def rewritten(root, name, change):
    """Changes every path of a split file."""
    row = data.DATASETS[name]
    file = pathlib.Path(root, row.folder, row.split)
    split = json.loads(file.read_text())
    for part in split.values():
        for entry in part:
            entry[0] = change(entry[0])
    file.write_text(json.dumps(split))


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.replace("/", "\\"),
        lambda path: "SUN397/" + path,
        lambda path: "sun397/SUN397/" + path,
        lambda path: "D:\\data\\sun397\\SUN397\\" + path.replace("/", "\\"),
        lambda path: "/home/zhou/data/sun397/SUN397/" + path,
    ],
)
def test_backslashes_and_a_leading_images_folder_in_split_paths_are_read(tmp_path, change):
    worlds.sun397_tree(tmp_path)
    expected = data.load_dataset("sun397", str(tmp_path))
    rewritten(tmp_path, "sun397", change)
    assert data.load_dataset("sun397", str(tmp_path)) == expected


def test_a_flat_val_folder_of_imagenet_is_called_flat(tmp_path):
    worlds.imagenet_tree(tmp_path)
    val = tmp_path / "imagenet" / "images" / "val"
    for path in list(val.rglob("*.JPEG")):
        if not path.name.startswith("."):
            path.rename(val / f"{path.parent.name}{path.name}")
    for folder in [path for path in val.iterdir() if path.is_dir()]:
        shutil.rmtree(folder)
    message = refused("imagenet", tmp_path)
    assert (
        f"{val} is flat" in message
        and "one folder per class" in message
        and "valprep.sh" in message
    )


def test_class_names_that_are_not_utf8_name_the_file(tmp_path):
    worlds.imagenet_tree(tmp_path)
    file = tmp_path / "imagenet" / "classnames.txt"
    file.write_bytes(file.read_bytes() + "n99999999 café".encode("latin-1"))
    assert f"{file} is not UTF-8" in refused("imagenet", tmp_path, ValueError)


@pytest.mark.parametrize(
    "old", ["cock", "water ouzel", "American chameleon, anole, Anolis carolinensis"]
)
def test_imagenets_old_class_names_leave_a_note(tmp_path, old):
    worlds.imagenet_tree(tmp_path)
    file = tmp_path / "imagenet" / "classnames.txt"
    file.write_text(file.read_text().replace("goldfish", old))
    dataset = data.load_dataset("imagenet", str(tmp_path))
    assert any(repr(old) in note and "do not compare" in note for note in dataset.notes)
    assert not data.few_shot_task(dataset).comparable


@pytest.mark.skipif(
    not CLASS_NAMES.is_dir(), reason="the real class names lie beside the repository"
)
def test_none_of_clips_class_names_of_imagenet_counts_as_old():
    names = json.loads((CLASS_NAMES / "imagenet.json").read_text())
    assert len(names) == 1000 and not {name.lower() for name in names} & set(data.OLD_NAMES)


# ------------------------------------------------------------------------- a dataset of one's own

def counts(dataset):
    """Images of each class in train, val and test."""
    labels = range(len(dataset.class_names))
    return [[sum(item.label == label for item in items) for label in labels]
            for items in (dataset.train, dataset.val, dataset.test)]


def test_a_folder_per_class_is_a_dataset_with_an_own_split(tmp_path):
    names = worlds.own_folders_tree(tmp_path / "birds", per_class=8)
    dataset = data.load_dataset(tmp_path / "birds")
    assert dataset.name == "birds" and dataset.folder == str(tmp_path / "birds")
    assert dataset.class_names == names and counts(dataset) == [[4] * 4, [2] * 4, [2] * 4]
    assert data.load_dataset(str(tmp_path / "birds"), seed=2).train != dataset.train
    one_line(dataset.notes[0], "birds: a dataset of one's own", "compare with nobody's")
    one_line(dataset.notes[1], "own split", "seed 1")
    assert not data.few_shot_task(dataset).comparable


def test_train_and_test_folders_with_a_folder_per_class_are_a_dataset(tmp_path):
    names = worlds.own_parts_tree(tmp_path / "birds", per_class=3)
    dataset = data.load_dataset(tmp_path / "birds")
    assert (
        dataset.class_names == names
        and counts(dataset) == [[3] * 4] * 3
        and len(dataset.notes) == 1
    )
    assert {pathlib.Path(item.source).parts[-3] for item in dataset.test} == {"test"}


def test_a_dataset_of_ones_own_without_test_is_tested_on_val(tmp_path):
    worlds.own_parts_tree(tmp_path / "birds", per_class=3, parts=("train", "valid"))
    dataset = data.load_dataset(tmp_path / "birds")
    assert counts(dataset) == [[3] * 4, [0] * 4, [3] * 4] and "no test/" in dataset.notes[1]


def test_pictures_that_lie_flat_in_train_and_test_are_no_classes(tmp_path):
    for part in ("train", "test"):
        for i in range(6):
            worlds.write_image(str(tmp_path / "birds" / part / f"{i}.jpg"), 1, i)
    with pytest.raises(ValueError) as error:
        data.load_dataset(tmp_path / "birds")
    one_line(error, "has test and train, but no class folders in train/", "train/ and test/")


def test_a_class_without_test_images_is_named_before_anything_is_learnt(tmp_path):
    worlds.own_split_tree(tmp_path / "birds")
    file = tmp_path / "birds" / "split.json"
    split = json.loads(file.read_text())
    split["test"] = [row for row in split["test"] if row[1] != 2]
    file.write_text(json.dumps(split))
    with pytest.raises(ValueError) as error:
        data.load_dataset(tmp_path / "birds")
    one_line(error, "has no test image of Finch (zebra)")


def test_kept_features_are_of_the_same_libraries(tmp_path, monkeypatch):
    worlds.own_split_tree(tmp_path / "birds")
    images = data.Images(data.load_dataset(tmp_path / "birds").train, data.train_transform(32), 1)
    before = data.KeptFeatures(tmp_path, ["a CLIP"], images).path(1)
    assert data.KeptFeatures(tmp_path, ["a CLIP"], images).path(1) == before
    monkeypatch.setattr(data.PIL, "__version__", "0.0")
    assert data.KeptFeatures(tmp_path, ["a CLIP"], images).path(1) != before


@pytest.mark.parametrize("text", [
    "Okay, the user wants a lamp.\n</think>\nA lamp has a shade.",
    "<think>\nOkay, a lamp.\n</think>\nA lamp has a shade.\n<think>\nIs that all there is?",
    "A lamp has a shade."])
def test_thoughts_of_a_model_are_no_sentences(text):
    assert data.read_answer(text) == ["A lamp has a shade."]
    assert data.read_answer("<think>\nThe user asks for a lamp.") == []


@pytest.mark.parametrize("images", ["images", ""])
def test_images_with_a_split_json_are_a_dataset(tmp_path, images):
    names = worlds.own_split_tree(tmp_path / "birds", images=images)
    dataset = data.load_dataset(tmp_path / "birds")
    assert dataset.class_names == names and counts(dataset) == [[2] * 4, [1] * 4, [1] * 4]
    assert all(os.path.isfile(item.source) for item in dataset.test) and len(dataset.notes) == 1


def test_split_json_paths_may_begin_with_images(tmp_path):
    worlds.own_split_tree(tmp_path / "birds")
    file = tmp_path / "birds" / "split.json"
    expected = data.load_dataset(tmp_path / "birds")
    file.write_text(file.read_text().replace('[["', '[["images/').replace('], ["', '], ["images/'))
    assert data.load_dataset(tmp_path / "birds") == expected


@pytest.mark.parametrize(
    "folder, name",
    [
        ("birds", "birds"),
        ("Birds 2.0 (mine)", "Birds-2.0-mine"),
        ("DTD", "own-DTD"),
        ("toy", "own-toy"),
        ("caltech-101", "own-caltech-101"),
        ("Flowers102", "own-Flowers102"),
        ("vögel", "vögel"),
        ("?", "own"),
    ],
)
def test_a_dataset_of_ones_own_never_takes_a_known_name(tmp_path, folder, name):
    worlds.own_folders_tree(tmp_path / folder, per_class=4)
    assert data.load_dataset(str(tmp_path / folder)).name == name


def test_a_known_name_wins_over_a_folder_but_not_over_a_path(world, tmp_path):
    worlds.own_folders_tree(tmp_path / "eurosat")               # the current directory
    worlds.own_folders_tree(tmp_path / "birds")
    assert data.load_dataset("eurosat", world[0]).name == "eurosat"
    assert data.load_dataset("./eurosat", world[0]).name == "own-eurosat"
    assert data.load_dataset("birds", world[0]).name == "birds"


def test_a_folder_of_ones_own_under_the_root_is_named_with_its_path(tmp_path):
    worlds.own_folders_tree(tmp_path / "data" / "birds")
    assert f"--dataset {tmp_path / 'data' / 'birds'}" in refused(
        "birds", tmp_path / "data", ValueError
    )


@pytest.mark.parametrize(
    "files, expected",
    [
        (["1.jpg", "2.jpg"], "has images without class folders"),
        (["cat/1.jpg", "cat/2.jpg"], "one class folder alone, cat"),
        (["images/cat/1.jpg", "images/dog/1.jpg"], "--dataset {}/images"),
        ([], "has no class folders"),
        (["train/cat/1.jpg", "train/dog/1.jpg"], "has train/, but no test/"),
        (["train/cat/1.jpg", "train/dog/1.jpg", "test/cat/1.jpg"], "the first: dog"),
        (
            [
                "train/cat/1.jpg",
                "train/dog/1.jpg",
                "test/cat/1.jpg",
                "test/dog/1.jpg",
                "test/cow/1.jpg",
            ],
            "cow",
        ),
        (["train/cat/1.jpg", "train/dog/1.jpg", "test/1.jpg"], "{}/test is flat"),
        (["train/cat/1.jpg", "test/cat/1.jpg"], "one class alone, 'cat'"),
        (["cat/1.jpg", "dog/1.jpg"], "{}/cat: 1 images are too few"),
    ],
)
def test_what_is_no_dataset_is_refused_in_one_line(tmp_path, files, expected):
    folder = tmp_path / "pets"
    folder.mkdir()
    for i, file in enumerate(files):
        worlds.write_image(str(folder / file), 0, i)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        data.load_dataset(folder)
    one_line(error, expected.format(folder))


def test_a_folder_that_does_not_exist_is_named():
    with pytest.raises(FileNotFoundError) as error:
        data.load_dataset("no/such/folder")
    one_line(error, "no/such/folder does not exist")


def test_one_class_on_a_side_is_no_choice(tmp_path):
    for label, name in enumerate(("cat", "dog")):
        for i in range(4):
            worlds.write_image(str(tmp_path / "pets" / name / f"{i}.png"), label, i)
    dataset = data.load_dataset(tmp_path / "pets")
    with pytest.raises(ValueError) as error:
        data.few_shot_task(dataset, shots=2)
    worlds.one_line(error, "pets has 2 classes", "--classes all")
    task = data.few_shot_task(dataset, "all", shots=2)
    assert task.base_names == ["cat", "dog"] and not task.novel_names and len(task.train) == 4
    for n in (3, 4):
        names = ["cat", "dog", "emu", "fox"][:n]
        items = [data.Item(f"{name}.png", label) for label, name in enumerate(names)]
        zoo = data.Dataset(names, items, [], items, folder=".")
        if n == 3:
            with pytest.raises(ValueError, match="one alone"):
                data.few_shot_task(zoo)
        else:
            assert data.few_shot_task(zoo).novel_names == ["emu", "fox"]


def test_a_path_that_leads_out_of_the_root_gets_no_advice_to_move_it(tmp_path):
    folder = tmp_path / "data" / "birds"
    worlds.own_split_tree(folder)
    split = json.loads((folder / "split.json").read_text())
    for row in split["train"]:
        row[0] = "../x.jpg"
    worlds.write_image(str(tmp_path / "x.jpg"), 1, 1)       # one folder above what the row names
    (folder / "split.json").write_text(json.dumps(split))
    with pytest.raises(FileNotFoundError) as error:
        data.load_dataset(folder)
    line = worlds.one_line(error, "split.json names")
    assert "move" not in line and "rename" not in line


def test_one_class_alone_is_refused_in_any_dataset(tmp_path):
    worlds.eurosat_tree(str(tmp_path), classes=1)
    with pytest.raises(ValueError) as error:
        data.load_dataset("eurosat", tmp_path)
    worlds.one_line(error, "split_zhou_EuroSAT.json has one class alone, 'Annual Crop Land'")


# ----------------------------------------------------------------------------------- descriptions

@pytest.fixture
def description_file(tmp_path):
    def write(value):
        path = tmp_path / "descriptions.json"
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        return str(path)
    return write


def test_descriptions_match_names_and_keep_file_order(description_file):
    path = description_file(
        {
            "unused": [],
            "Car-Side": [f"s{i}" for i in range(14)],
            "yin  YANG": ["one\ntwo", " "],
            "f/a 18": ["x"],
            "colt's foot": ["y", "z"],
        }
    )
    names = ["yin yang", "car_side", "F/A-18", "colt's foot", "car side"]
    assert data.load_descriptions(path, names) == [
        ["one two"],
        [f"s{i}" for i in range(10)],
        ["x"],
        ["y", "z"],
        [f"s{i}" for i in range(10)],
    ]
    assert data.load_descriptions(path, ["car side"], max_descriptions=3) == [["s0", "s1", "s2"]]
    with pytest.raises(ValueError, match="max-descriptions"):
        data.load_descriptions(path, names, max_descriptions=0)


CUPL = {"side of a car": ["a"], "off-center face": ["b"], "lamp": ["c"], "water lily": ["d"]}
CALTECH = ["face", "lamp", "car side", "water lilly", "snoopy"]


def test_all_classes_without_description_come_in_one_message(description_file):
    path = description_file(CUPL)
    with pytest.raises(ValueError) as error:
        data.load_descriptions(path, CALTECH)
    one_line(error, path, "4 of 5", "car side (closest: side of a car)",
             "face (closest: off-center face)", "water lilly (closest: water lily)", "snoopy;",
             "--aliases aliases-descriptions.json")


def test_aliases_name_the_keys_of_classes_that_do_not_match(description_file, tmp_path):
    path = description_file(CUPL)
    aliases = {"car_side": "side of a car", "Face": "off-center face", "water lilly": "Water_Lily",
               "snoopy": "lamp"}
    expected = [["b"], ["c"], ["a"], ["d"], ["c"]]
    assert data.load_descriptions(path, CALTECH, aliases=aliases) == expected
    (tmp_path / "own.json").write_text(json.dumps(aliases))
    assert data.load_descriptions(path, CALTECH, aliases=str(tmp_path / "own.json")) == expected


def test_an_alias_whose_key_the_file_lacks_is_named(description_file):
    path = description_file(CUPL)
    with pytest.raises(ValueError) as error:
        data.load_descriptions(path, ["lamp"], aliases={"lamp": "lantern"})
    one_line(error, path, "lamp", "lantern")


@pytest.mark.parametrize("text, expected", [("[]", "list"), ('{"face": 3}', "face"), ("{", "JSON")])
def test_a_broken_aliases_file_is_named(description_file, tmp_path, text, expected):
    (tmp_path / "own.json").write_text(text)
    with pytest.raises(ValueError) as error:
        data.load_descriptions(description_file(CUPL), CALTECH, aliases=str(tmp_path / "own.json"))
    one_line(error, tmp_path / "own.json", expected)


def test_what_does_not_match_is_written_as_an_aliases_file_to_fill(description_file, tmp_path):
    path, file = description_file(CUPL), tmp_path / "aliases-descriptions.json"
    with pytest.raises(ValueError):
        data.load_descriptions(path, CALTECH)
    filled = json.loads(file.read_text())
    assert filled == {"face": "off-center face", "car side": "side of a car",
                      "water lilly": "water lily", "snoopy": ""}
    with pytest.raises(ValueError, match=r"no description of 1 of 5 classes: snoopy"):
        data.load_descriptions(path, CALTECH, aliases=str(file))        # "": not filled in yet
    assert json.loads(file.read_text()) == filled
    file.write_text(json.dumps(filled | {"snoopy": "lamp"}))
    assert data.load_descriptions(path, CALTECH, aliases=str(file))[4] == ["c"]


def test_a_filled_aliases_file_is_never_written_over(description_file, tmp_path):
    path, file = description_file(CUPL), tmp_path / "aliases-descriptions.json"
    file.write_text('{"face": "off-center face"}')
    with pytest.raises(ValueError) as error:
        data.load_descriptions(path, CALTECH)
    one_line(error, "aliases-descriptions.json, which is there already")
    assert file.read_text() == '{"face": "off-center face"}'


def test_no_aliases_file_is_no_reason_to_lose_the_message(description_file, monkeypatch):
    def refuse(path):
        raise OSError("read-only")
    monkeypatch.setattr(data, "written_aside", refuse)
    with pytest.raises(ValueError) as error:
        data.load_descriptions(description_file(CUPL), CALTECH)
    one_line(error, "4 of 5", "give --aliases FILE")


def test_more_than_ten_classes_without_description_are_counted(description_file, tmp_path):
    path = description_file({"nothing": ["x"]})
    with pytest.raises(ValueError) as error:
        data.load_descriptions(path, [f"class {chr(97 + i)}" for i in range(26)])
    message = one_line(error, "26 of 26", "class j; and 16 more")
    assert "class k" not in message
    assert len(json.loads((tmp_path / "aliases-descriptions.json").read_text())) == 26


@pytest.mark.parametrize("name, key", [
    ("2000 AM General Hummer SUV", "AM General Hummer SUV 2000"), ("indoor apse", "apse (indoor)"),
    ("2012 Ram C/V Cargo Van Minivan", "Ram CV Cargo Van Minivan 2012"),
    ("colt's foot", "colts foot"), ("F/A-18", "18, F/A"), ("Éclair au café", "café au éclair")])
def test_a_key_with_the_same_words_matches_and_is_noted(description_file, name, key):
    notes, path = [], description_file({key: ["Its sentence."], "sushi bar": ["Another."]})
    loaded = data.load_descriptions(path, ["sushi bar", name], notes=notes)
    assert loaded == [["Another."], ["Its sentence."]]
    assert len(notes) == 1 and one_line(notes[0], path, "1 of 2 class names")


@pytest.mark.parametrize(
    "names, keys",
    [
        (["indoor apse"], ["apse (indoor)", "apse, indoor"]),  # which of the two?
        (["indoor house boat", "house boat indoor"], ["boat (indoor) house"]),
        (["boat house", "house boat"], ["house boat"]),  # it is the other class's
        (["indoor apse"], ["apse"]),
        (["indoor apse"], ["apse indoor indoor"]),
        (["?"], ["!"]),
    ],
)
def test_a_key_matches_by_words_only_where_nothing_else_could_be_meant(
    description_file, names, keys
):
    with pytest.raises(ValueError) as error:
        data.load_descriptions(description_file(dict.fromkeys(keys, ["x"])), names)
    one_line(error, "no description of")


def test_two_classes_of_one_name_share_a_key(description_file):
    notes = []
    path = description_file({"missile": ["m"], "Guard (coast)": ["g"]})
    names = ["missile", "coast guard", "missile", "coast guard"]
    assert data.load_descriptions(path, names, notes=notes) == [["m"], ["g"], ["m"], ["g"]]
    assert len(notes) == 1


def test_sentences_without_a_letter_or_digit_are_skipped_and_counted_once(description_file):
    notes = []
    path = description_file(
        {"wok": [".", "A wok.", " ", "...", "7"], "pan": ["-", "Une poêle", "é"], "unused": ["."]}
    )
    loaded = data.load_descriptions(path, ["wok", "pan", "wok"], max_descriptions=2, notes=notes)
    assert loaded == [["A wok.", "7"], ["Une poêle", "é"], ["A wok.", "7"]]
    assert notes == [f"{path}: 4 sentences without a letter or digit were skipped"]
    assert data.load_descriptions(path, ["pan"]) == [["Une poêle", "é"]]


def test_a_clean_description_file_leaves_no_notes(description_file):
    notes = []
    data.load_descriptions(description_file({"wok": ["A wok."]}), ["wok"], notes=notes)
    assert notes == []


@pytest.mark.parametrize(
    "value, expected",
    [
        ("{", "not JSON"),
        ("[]", "list"),
        ({"lamp": []}, "'lamp' is empty"),
        ({"lamp": ["", ". "]}, "'lamp' is empty"),
        ({"lamp": ["a", 3]}, "'lamp'"),
        ({"lamp": "a lamp"}, "'lamp'"),
        ({"lamp": {"a": 1}}, "'lamp'"),
        ({"lamp": None}, "'lamp'"),
    ],
)
def test_broken_descriptions_are_refused_in_one_line(description_file, value, expected):
    path = description_file(value)
    with pytest.raises(ValueError) as error:
        data.load_descriptions(path, ["lamp"])
    one_line(error, path, expected)


def test_wrong_file_for_a_thousand_classes_is_refused_quickly(description_file):
    path = description_file({f"thing number {i}": ["x"] for i in range(1000)})
    with pytest.raises(ValueError) as error:
        data.load_descriptions(path, [f"class of {i} items" for i in range(1000)])
    one_line(error, "1000 of 1000", "class of 9 items; and 990 more")


@pytest.mark.parametrize("name, dataset", [("stanford_cars", "stanford_cars"), ("birds", "PATH")])
def test_missing_descriptions_say_how_to_make_them(name, dataset, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "SHIPPED", str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        data.default_descriptions(name)
    one_line(error, name, "--descriptions FILE", f"data.py describe --dataset {dataset}",
             "--template plain and atprompt need none")


def test_descriptions_of_the_project_are_found():
    assert data.default_descriptions("toy") == str(ROOT / "assets" / "descriptions" / "toy.json")
    with pytest.raises(FileNotFoundError):
        data.load_descriptions("none.json", ["a"])


@pytest.mark.skipif(not SHARED.is_dir(), reason="the sample files lie beside the repository")
def test_real_description_files_load(tmp_path):
    names = worlds.caltech101_tree(tmp_path)
    sentences = data.load_descriptions(str(SHARED / "caltech101_llm.json"), names)
    assert len(sentences) == 100 and all(len(s) == 10 for s in sentences)
    names = worlds.eurosat_tree(tmp_path)
    assert len(data.load_descriptions(str(SHARED / "eurosat_llm.json"), names, 25)[9]) == 25
    with pytest.raises(ValueError) as error:
        data.load_descriptions(str(SHARED / "eurosat_llm.json"), names + ["sea lake", "highway"])
    one_line(error, "2 of 12", "sea lake", "highway (closest: Highway or Road")


# ----------------------------------------------------------------------------------------- images

@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "RGBA", "LA"])
def test_images_of_every_mode_become_rgb(tmp_path, mode):
    path = str(tmp_path / "image.jpg")
    worlds.write_image(path, 3, 1, mode, size=(40, 30))
    image = data.load_image(path)
    assert image.mode == "RGB" and image.size == (40, 30)
    assert data.test_transform(16)(image).shape == (3, 16, 16)


def ramp():
    return np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)


@pytest.mark.parametrize("mode, extension", [("I;16", "png"), ("I;16", "tif"), ("I;16B", "tif"),
                                             ("I", "tif")])
def test_grey_images_of_16_bits_are_scaled_and_not_clipped(tmp_path, mode, extension):
    stored = ramp().astype({"I;16": "<u2", "I;16B": ">u2", "I": np.int32}[mode])
    image = Image.frombytes(mode, (64, 64), stored.tobytes())
    path = tmp_path / f"x-ray.{extension}"
    image.save(path)
    with Image.open(path) as opened:
        assert opened.mode.startswith("I")
    pixels = np.asarray(data.load_image(str(path)))
    assert np.array_equal(pixels, np.repeat(ramp()[:, :, None] // 256, 3, 2))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I"])
def test_every_16_bit_mode_of_pillow_is_scaled(mode):
    stored = ramp().astype({"I;16B": ">u2", "I": np.int32}.get(mode, "<u2"))
    image = Image.frombytes(mode, (64, 64), stored.tobytes())
    assert np.array_equal(np.asarray(data.from_16_bits(image)), ramp() // 256)


def broken_images(folder):
    good = folder / "good.jpg"
    worlds.write_image(str(good), 0, 0, size=(200, 200))
    png = folder / "broken.png"
    worlds.write_image(str(png), 0, 0, mode="P", size=(80, 80))
    content = {"cut.jpg": good.read_bytes()[:-400], "text.jpg": b"<html>", "empty.jpg": b"",
               "broken.png": png.read_bytes()[:60] + b"garbage" + png.read_bytes()[67:]}
    for name, text in content.items():
        (folder / name).write_bytes(text)
    return [folder / name for name in (*content, "gone.jpg")]


def test_unreadable_images_are_named(tmp_path):
    for path in broken_images(tmp_path):
        with pytest.raises(ValueError) as error:
            data.load_image(str(path))
        one_line(error, path, "not skipped")


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_image_stops_a_loader_with_one_line(tmp_path, workers):
    path = tmp_path / "bad.jpg"
    path.write_text("no image")
    images = data.Images([data.Item(str(path), 0)], data.test_transform(8))

    try:
        message = str(list(data.loader(images, workers=workers)))
    except ValueError as error:
        message = str(error)
        traceback.clear_frames(
            error.__traceback__
        )  # else the failed loader waits for the garbage collector, then 5 s
    assert str(path) in message and "not skipped" in message and "\n" not in message


def test_mean_and_std_are_clips():
    assert data.CLIP_MEAN == (0.48145466, 0.4578275, 0.40821073)
    assert data.CLIP_STD == (0.26862954, 0.26130258, 0.27577711)


@pytest.mark.parametrize("size", [(401, 300), (300, 401), (224, 224), (90, 50)])
@pytest.mark.parametrize("resolution", [224, 32])
def test_test_transform_and_normalize_are_clips_preprocessing(size, resolution):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    ours = data.normalize(data.test_transform(resolution)(image))
    clips = clip.clip._transform(resolution)(image)
    assert ours.dtype == clips.dtype == torch.float32 and torch.allclose(ours, clips, atol=1e-6)


def test_normalize_takes_batches_of_training_crops_as_clip_takes_a_picture():
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    torch.manual_seed(0)
    crops = torch.stack([data.train_transform(32)(image) for _ in range(3)])
    assert crops.dtype == torch.uint8 and crops.shape == (3, 3, 32, 32)
    clips = clip.clip._transform(32)
    expected = torch.stack(
        [clips(Image.fromarray(crop.permute(1, 2, 0).numpy())) for crop in crops]
    )
    assert torch.allclose(data.normalize(crops), expected, atol=1e-6)


def test_train_transform_crops_and_flips():
    ramp = np.tile(np.linspace(0, 255, 256)[None, :, None], (64, 1, 3)).astype(np.uint8)
    crop = data.train_transform(32).transforms[0]
    assert crop.scale == (0.08, 1.0) and crop.interpolation.value == "bicubic"
    torch.manual_seed(0)
    pictures = [data.train_transform(32)(Image.fromarray(ramp)) for _ in range(60)]
    slopes = [int(x[0, 16, -1]) - int(x[0, 16, 0]) for x in pictures]
    assert 15 < sum(slope < 0 for slope in slopes) < 45         # half of them flipped
    assert min(map(abs, slopes)) < 0.6 * max(map(abs, slopes))  # crops of different widths


@pytest.fixture
def items(world):
    return data.load_dataset("dtd", world[0]).train[:10]


def crops_of(images, epochs=(1,), **options):
    """(epochs, n, 3, R, R): what the loader gives, an epoch after the other."""
    pixels, labels = zip(*data.loader(images, epochs, batch_size=4, **options))
    pixels, labels = torch.cat(pixels), torch.cat(labels)
    assert labels.tolist() == [item.label for item in images.items] * len(epochs)
    return pixels.reshape(len(epochs), len(images), *pixels.shape[1:])


def images_of(items, seed=7):
    return data.Images(items, data.train_transform(24), seed=seed)


def test_a_crop_depends_on_seed_epoch_and_index_alone(items):
    images = images_of(items)
    first = crops_of(images, (1, 2))
    torch.manual_seed(99)
    assert torch.equal(images[2, 3][0], first[1, 3]) and images[2, 3][1] == items[3].label
    assert torch.equal(crops_of(images, (2,))[0], first[1])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(crops_of(images_of(items, 8))[0], first[0])
    same = crops_of(images_of([items[0]] * 2))[0]
    assert not torch.equal(same[0], same[1])                    # one image twice gets two crops


def test_cropping_leaves_the_global_generator_alone(items):
    before = torch.get_rng_state()
    crops_of(images_of(items[:3]))
    assert torch.equal(before, torch.get_rng_state())


def test_worker_processes_give_the_same_crops(items):
    images = images_of(items)
    assert torch.equal(crops_of(images, (1, 2), workers=2), crops_of(images, (1, 2)))


def test_workers_started_by_spawn_get_the_same_images(items):
    images = images_of(items[:4])
    sent = pickle.loads(pickle.dumps(images))                   # which is how they get them
    assert torch.equal(crops_of(sent), crops_of(images))


def test_no_batch_spans_two_epochs():
    batches = list(data.loader(range(5), [2, 3], 2).batch_sampler)
    assert batches == [[(2, 0), (2, 1)], [(2, 2), (2, 3)], [(2, 4)],
                       [(3, 0), (3, 1)], [(3, 2), (3, 3)], [(3, 4)]]


# -------------------------------------------------------------- features of an epoch, kept or not

class Tower:
    """Stands for CLIP's image tower: a fixed projection that counts what it was asked for."""

    def __init__(self, dtype=torch.float32):
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(3 * 24 * 24, 8, generator=generator) / 40
        self.dtype = dtype
        self.images = 0

    def __call__(self, x):
        self.images += len(x)
        return (x.flatten(1) @ self.weight).to(self.dtype)


def features_of(images, tower, epochs=(1, 2), kept=None, **options):
    """f of each epoch, one after the other: (epochs, n, d)."""
    features = data.epoch_features(images, list(epochs), tower, "cpu", kept=kept, **options)
    return torch.stack([f for f, _ in features])


def test_epoch_features_are_the_towers_of_the_normalised_crops(items):
    images, tower = images_of(items), Tower()
    found = features_of(images, tower)
    crops = crops_of(images, (1, 2))
    expected = torch.stack([tower(data.normalize(epoch)) for epoch in crops])
    assert found.dtype == torch.float32 and torch.allclose(found, expected, atol=1e-6)


def test_epoch_features_have_crops_for_who_needs_them_and_f_for_who_needs_it(items):
    images = images_of(items)
    features = data.epoch_features(images, [1, 2], None, "cpu", keep_crops=True)
    for epoch, (f, crops) in zip((1, 2), features, strict=True):
        assert f is None and torch.equal(crops, crops_of(images, (epoch,))[0])
    (f, crops), = data.epoch_features(images, [1], Tower(), "cpu")
    assert crops is None and f.shape == (10, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kept_features_are_the_same_to_the_bit_and_no_image_is_opened(
    items, tmp_path, monkeypatch, dtype
):
    images, tower = images_of(items), Tower(dtype)
    expected = features_of(images, tower)
    kept = data.KeptFeatures(tmp_path / "cache", ["tiny", str(dtype)], images)
    assert torch.equal(features_of(images, tower, kept=kept), expected) and tower.images == 40
    assert len(list((tmp_path / "cache").iterdir())) == 2
    monkeypatch.setattr(data, "load_image", None)
    assert torch.equal(features_of(images, tower, kept=kept), expected) and tower.images == 40


def test_kept_features_spare_the_tower_where_crops_are_needed(items, tmp_path):
    images, tower = images_of(items), Tower()
    kept = data.KeptFeatures(tmp_path / "cache", ["tiny"], images)
    expected = features_of(images, tower, kept=kept)
    features = data.epoch_features(images, [1, 2], tower, "cpu", keep_crops=True, kept=kept)
    for i, (f, crops) in enumerate(features):
        epoch = (1, 2)[i]
        assert torch.equal(f, expected[i]) and torch.equal(crops, crops_of(images, (epoch,))[0])
    assert tower.images == 20


def damages():
    yield lambda path: path.write_bytes(b"")
    yield lambda path: path.write_bytes(path.read_bytes()[:-30])
    yield lambda path: path.write_bytes(path.read_bytes()[:150] + b"\xff" + path.read_bytes()[151:])
    yield lambda path: np.savez(path, features=np.zeros((10, 8), np.float32), what="another run's")
    yield lambda path: np.savez(path, features=np.zeros((10, 8), np.float32))


@pytest.mark.parametrize("damage", list(damages()))
def test_a_damaged_or_foreign_kept_file_is_made_again(items, tmp_path, damage):
    images, tower = images_of(items), Tower()
    kept = data.KeptFeatures(tmp_path, ["tiny"], images)
    expected = features_of(images, tower, kept=kept)
    whole = kept.path(2).read_bytes()
    damage(kept.path(2))
    assert torch.equal(features_of(images, tower, kept=kept), expected)
    with np.load(kept.path(2)) as file:
        assert np.array_equal(file["features"], expected[1].numpy())
    assert len(kept.path(2).read_bytes()) == len(whole)


def test_kept_features_of_other_images_seeds_crops_or_clips_are_not_found(items, tmp_path):
    path = tmp_path / "copy.jpg"
    worlds.write_image(str(path), 1, 1)
    images = images_of([*items, data.Item(str(path), 1)])
    kept = data.KeptFeatures(tmp_path, ["tiny"], images)
    kept.write(1, torch.zeros(11, 8))
    assert data.KeptFeatures(tmp_path, ["tiny"], images).has(1) and not kept.has(2)
    for other in (images_of(images.items, 8), images_of(images.items[::-1]),
                  data.Images(images.items, data.train_transform(25), 7),
                  data.Images(images.items, data.test_transform(24), 7)):
        assert not data.KeptFeatures(tmp_path, ["tiny"], other).has(1)
    assert not data.KeptFeatures(tmp_path, ["large"], images).has(1)
    worlds.write_image(str(path), 1, 2)
    assert not data.KeptFeatures(tmp_path, ["tiny"], images).has(1)


def test_one_set_of_workers_serves_all_epochs(items, monkeypatch):
    made = []

    def counted(*arguments, **options):
        made.append(loader(*arguments, **options))
        return made[-1]
    loader = data.loader
    monkeypatch.setattr(data, "loader", counted)
    images, tower = images_of(items), Tower()
    found = features_of(images, tower, (1, 2, 3), workers=1)
    assert len(made) == 1 and made[0].num_workers == 1
    monkeypatch.setattr(data, "loader", loader)
    assert torch.equal(found, features_of(images, tower, (1, 2, 3)))


def test_two_runs_may_fill_one_cache_at_once(items, tmp_path):
    """Both ask for the same epochs by turns, as processes would: each finds the other's files."""
    images, tower = images_of(items), Tower()
    expected = features_of(images, Tower(), (1, 2, 3))
    kept = [data.KeptFeatures(tmp_path, ["tiny"], images) for _ in range(2)]
    first, second = (data.epoch_features(images, [1, 2, 3], tower, "cpu", kept=own) for own in kept)
    for f_expected, (f_first, _), (f_second, _) in zip(expected, first, second, strict=True):
        assert torch.equal(f_first, f_expected) and torch.equal(f_second, f_expected)
    assert tower.images == 30 and len(list(tmp_path.iterdir())) == 3


def fill(folder, items, results):
    images = images_of(items)
    kept = data.KeptFeatures(folder, ["tiny"], images)
    results.put(features_of(images, Tower(), range(1, 9), kept).numpy())


def test_two_processes_may_fill_one_cache(items, tmp_path):
    fork = multiprocessing.get_context("fork")
    results = fork.SimpleQueue()
    both = [fork.Process(target=fill, args=(tmp_path / "cache", items, results)) for _ in range(2)]
    for process in both:
        process.start()
    found = [results.get() for _ in both]
    for process in both:
        process.join()
    expected = features_of(images_of(items), Tower(), range(1, 9)).numpy()
    assert np.array_equal(found[0], expected) and np.array_equal(found[1], expected)
    names = [path.name for path in (tmp_path / "cache").iterdir()]
    assert len(names) == 8 and not any("part" in name for name in names)


# ----------------------------------------------------------------------------------- command line

def test_inventory_has_a_line_per_dataset(world, capsys, monkeypatch, tmp_path):
    root, names = world
    monkeypatch.setattr(data, "SHIPPED", str(tmp_path))
    worlds.write_descriptions(str(tmp_path / "eurosat.json"), names["eurosat"])
    worlds.write_descriptions(str(tmp_path / "dtd.json"), names["dtd"][1:])
    assert data.main(["--root", root]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert list(lines) == list(data.DATASETS)
    assert "10 classes (5 base, 5 novel)" in lines["eurosat"] and "40 train" in lines["eurosat"]
    assert "no descriptions" in lines["ucf101"] and "descriptions found" in lines["eurosat"]
    assert "no description of 1 of 5 classes: banded" in lines["dtd"]
    assert not list(tmp_path.glob("aliases*"))                  # a look writes nothing
    assert "test only" in lines["imagenet_r"]


def test_inventory_says_what_is_missing(tmp_path, capsys):
    worlds.oxford_pets_tree(tmp_path)
    (tmp_path / "oxford_pets" / "split_zhou_OxfordPets.json").unlink()
    assert data.main(["--root", str(tmp_path)]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert (
        "split_zhou_OxfordPets.json is missing" in lines["oxford_pets"]
        and "sun397 is missing" in lines["sun397"]
    )
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
        reply = {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "stop",
                    "message": {"role": "assistant", "content": text},
                }
            ],
        }
        reply = json.dumps(reply if status == 200 else {"error": {"message": text}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *args):
        pass


def form_of(request):
    """What the server was told about the answer's form."""
    return request[2]["messages"][0]["content"]


def good_answer(question):
    thing = question.removeprefix("What does a ").removesuffix(" look like?")
    lines = [f"{i + 1}. A {thing} looks like pattern {i}." for i in range(4)]
    return 200, "<think>\nHm, let me see.\n</think>\nHere are the sentences:\n\n" + "\n".join(
        lines
    ) + "\n" + lines[0]


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

        request = urllib.request.Request(
            f"{self.url}/chat/completions",
            json.dumps(body).encode(),
            {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"},
        )
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
    return data.main(
        [
            "describe",
            "--dataset",
            "dtd",
            "--root",
            world[0],
            "--model",
            "m1",
            "--base-url",
            server,
            "--output",
            str(output),
            *more,
        ]
    )


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
    assert [f.name for f in output.parent.iterdir()] == ["dtd.json"]  # no temporary file is left
    Server.requests.clear()
    assert describe(world, server, output) == 0 and Server.requests == []  # nothing left to do


def test_describe_asks_for_what_the_shipped_descriptions_are(world, client, server, tmp_path):
    assert describe(world, server, tmp_path / "dtd.json", "--per-class", "4") == 0
    names = data.load_dataset("dtd", world[0]).class_names
    form = form_of(Server.requests[1])
    for wanted in ("4 different sentences", "one a line", "8 to 30 words", "names the thing",
                   "shape, parts, colours, surface", "scene or an action", "not in their subject",
                   "cannot be seen", "true of this thing and not of these", names[0], names[2]):
        assert wanted in form
    assert names[1] not in form


def test_describe_names_the_classes_that_a_class_is_taken_for():
    names = ["707-320", "737-300", "737-400", "747-400", "A310", "DC-10", "Tu-154", "737-500"]
    assert data.neighbours("737-400", names, 4) == ["737-300", "747-400", "737-500", "707-320"]
    assert data.neighbours("737-400", names[2:3]) == []


def test_describe_makes_descriptions_of_a_dataset_of_ones_own(client, server, tmp_path):
    worlds.own_folders_tree(tmp_path / "my birds")
    assert (
        data.main(
            [
                "describe",
                "--dataset",
                str(tmp_path / "my birds"),
                "--model",
                "m",
                "--base-url",
                server,
                "--per-class",
                "2",
            ]
        )
        == 0
    )
    names = data.load_dataset(tmp_path / "my birds").class_names
    assert len(data.load_descriptions("descriptions-my-birds.json", names)) == 4


def test_describe_resumes_after_a_failure(world, client, server, tmp_path, capsys):
    names, output = data.load_dataset("dtd", world[0]).class_names, tmp_path / "dtd.json"
    output.write_text(json.dumps({names[1].upper(): ["Mine."], names[0].upper(): []}))
    Server.answer = staticmethod(
        lambda q: (400, "out of\nmemory") if names[3] in q else good_answer(q)
    )
    assert describe(world, server, output, "--per-class", "2") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert (
        names[3] in message
        and "out of" in message
        and str(output) in message
        and "resume" in message
    )
    assert set(json.loads(output.read_text())) == {names[0], names[1].upper(), names[2]}
    assert Server.requests[0][1] in ("Bearer none", "Bearer ")  # no key: a dummy one
    Server.answer, Server.requests = staticmethod(good_answer), []
    assert describe(world, server, output, "--per-class", "2") == 0
    assert len(Server.requests) == 2
    loaded = data.load_descriptions(str(output), names)
    assert loaded[1] == ["Mine."] and all(len(s) == 2 for i, s in enumerate(loaded) if i != 1)


def test_describe_asks_again_for_more_and_gives_up_on_silence(
    world, client, server, tmp_path, capsys
):
    count = iter(range(100))
    Server.answer = staticmethod(lambda q: (200, f"- A thing seen {next(count)} times."))
    output = tmp_path / "dtd.json"
    assert describe(world, server, output, "--per-class", "2") == 0
    assert len(Server.requests) == 10 and json.loads(output.read_text())["banded"] == [
        "A thing seen 0 times.",
        "A thing seen 1 times.",
    ]
    assert (
        describe(world, server, output, "--per-class", "0") == 2
        and "--per-class" in capsys.readouterr().err
    )
    Server.answer = staticmethod(lambda q: (200, "Sure:"))
    assert describe(world, server, tmp_path / "other.json") == 2
    assert (
        "banded: m1 gave no sentence" in capsys.readouterr().err
        and not (tmp_path / "other.json").exists()
    )


def test_describe_survives_a_base_url_that_answers_with_a_web_page(
    world, tmp_path, capsys, monkeypatch
):
    page = types.SimpleNamespace(
        chat=types.SimpleNamespace(completions=types.SimpleNamespace(create=lambda **_: "<html>"))
    )
    monkeypatch.setitem(
        sys.modules,
        "openai",
        types.SimpleNamespace(OpenAI=lambda **_: page, OpenAIError=KeyError),
    )
    assert describe(world, "http://x", tmp_path / "dtd.json") == 2
    assert "/v1" in capsys.readouterr().err.splitlines()[-1]


def test_describe_without_key_client_or_server_says_so(
    world, server, tmp_path, capsys, monkeypatch
):
    arguments = [
        "describe",
        "--dataset",
        "dtd",
        "--root",
        world[0],
        "--model",
        "m",
        "--output",
        str(tmp_path / "x.json"),
    ]
    monkeypatch.setitem(sys.modules, "openai", FAKE_MODULE)
    assert data.main(arguments) == 2 and "OPENAI_API_KEY" in capsys.readouterr().err
    assert data.main([*arguments, "--base-url", "http://127.0.0.1:9/v1"]) == 2
    assert "http://127.0.0.1:9/v1" in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "x.json").write_text("[]")
    assert (
        data.main([*arguments, "--base-url", server]) == 2 and "x.json" in capsys.readouterr().err
    )
    monkeypatch.setitem(sys.modules, "openai", None)
    assert data.main(arguments) == 2 and "pip install openai" in capsys.readouterr().err
    assert Server.requests == []


# -------------------------------------------------------------- the descriptions that are shipped

SHIPPED = {"imagenet": 998, "caltech101": 100, "oxford_pets": 37, "stanford_cars": 196, "dtd": 47,
           "oxford_flowers": 102, "food101": 101, "fgvc_aircraft": 100, "sun397": 397,
           "eurosat": 10, "ucf101": 101}                # ImageNet: two names stand for two classes


def shipped(name):
    return json.loads(pathlib.Path(data.default_descriptions(name)).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_descriptions_are_ten_whole_sentences_a_class_that_name_it(name):
    sentences = shipped(name)
    assert len(sentences) == SHIPPED[name]
    named = 0
    for class_name, listed in sentences.items():
        assert len(set(listed)) == 10, class_name
        stems = [word.rstrip("s") for word in data.words(class_name)]
        for sentence in listed:
            assert 6 <= len(re.findall(r"[\w']+", sentence)) <= 32, sentence
            assert sentence == " ".join(sentence.split()) and sentence.endswith("."), sentence
            named += any(stem in sentence.lower() for stem in stems)
    assert named > 0.9 * 10 * len(sentences)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_descriptions_are_short_enough_for_clip_and_no_two_are_the_same(name):
    flat = [sentence for listed in shipped(name).values() for sentence in listed]
    assert len({sentence.lower() for sentence in flat}) == len(flat)
    prompts.clip.tokenize(flat)                         # raises where one is longer than 77 tokens


def test_shipped_descriptions_fit_the_fields_class_names():
    eurosat = list(data.DATASETS["eurosat"].rename.values()) + ["Forest", "River"]
    typed = {"caltech101": worlds.CALTECH101_NAMES, "eurosat": eurosat,
             "oxford_pets": worlds.PETS, "stanford_cars": worlds.CARS, "dtd": worlds.TEXTURES,
             "food101": worlds.FOODS, "fgvc_aircraft": worlds.AIRCRAFT, "ucf101": worlds.ACTIONS,
             "sun397": list(worlds.SCENES.values()), "oxford_flowers": worlds.FLOWERS,
             "imagenet": ["tench", "missile", "kite (bird of prey)", "sunglasses", "pug"]}
    for name, classes in typed.items():
        path = data.default_descriptions(name)
        notes = []
        assert len(data.load_descriptions(path, classes, notes=notes)) == len(classes)
        assert notes == [], name


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_descriptions_have_every_class_of_the_real_lists(name):
    real = pathlib.Path(data.ASSETS).parent.parent / "shared" / "class_names" / f"{name}.json"
    if not real.is_file():
        pytest.skip("the list of real class names is not beside the project")
    assert set(shipped(name)) == set(json.loads(real.read_text(encoding="utf-8")))
