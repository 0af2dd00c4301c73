"""data.py against the fifteen layouts (worlds.py), CoOp's few-shot picks, and troubles of disks."""

import http.server
import json
import os
import pathlib
import pickle
import random
import re
import shutil
import struct
import sys
import threading
import traceback
import zlib

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
    line = failure(data.load_dataset, name, root, kind=(ValueError, FileNotFoundError))
    return one_line(line, *parts)


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
    assert dataset.folder == os.path.join(root, data.DATASETS[name].folder)
    test_only = (0, 0, 8)
    a_class = {"imagenet": (8, 0, 4), "imagenetv2": test_only, "imagenet_sketch": test_only,
               "imagenet_a": test_only, "imagenet_r": test_only}.get(name, (4, 2, 2))
    assert counts(dataset) == [[n] * len(names[name]) for n in a_class]
    items = dataset.train + dataset.val + dataset.test
    sources = {item.source for item in items}
    assert len(sources) == len(items) and all(map(os.path.isfile, sources))
    assert not any(item.upright for item in items)
    if name == "eurosat":                                   # the one tree that is whole
        assert dataset.notes == []
    else:
        (note,) = dataset.notes
        one_line(note, f"{len(names[name])} classes found", data.DATASETS[name].classes)
    assert data.few_shot_task(dataset).comparable == (name == "eurosat")


def test_labels_follow_the_images_not_the_names(world):
    """The generated images carry their label in their colour: every item must agree with it."""
    for name in worlds.TREES:
        dataset = data.load_dataset(name, world[0])
        for item in dataset.train[::3] + dataset.test:
            with Image.open(item.source) as image:
                if image.mode == "RGB":
                    mean = np.asarray(image, float).mean((0, 1))
                    expected = (np.array([37, 91, 151]) * item.label) % 200 + 27.5
                    assert np.abs(mean - expected).max() < 9, (name, item)


def test_class_names_are_those_worked_out_by_hand(world):
    names = {name: data.load_dataset(name, world[0]).class_names for name in worlds.TREES}
    assert names["sun397"][1:4] == ["airplane cabin", "outdoor apartment building",
                                    "indoor bazaar"]
    by_wnid = ["tench", "goldfish", "kite (bird of prey)", "pug", "chain", "jack-o'-lantern",
               "missile", "missile", "sunglasses", "sunglasses"]
    assert names["imagenet"] == names["imagenet_sketch"] == by_wnid
    assert names["imagenetv2"][:4] == ["tench", "missile", "goldfish", "missile"]   # line order
    assert names["imagenet_a"] == ["goldfish", "pug", "jack-o'-lantern", "missile", "sunglasses"]
    assert names["imagenet_r"] == ["tench", "kite (bird of prey)", "chain", "missile", "sunglasses"]


@pytest.mark.parametrize("name, images", [("imagenetv2", "imagenetv2"), ("imagenetv2", ""),
                                          ("imagenet_sketch", "sketch")])
def test_mirrors_with_other_folders_and_without_classnames_are_read(tmp_path, name, images):
    names = worlds.TREES[name](tmp_path, images=images)
    assert data.load_dataset(name, tmp_path).class_names == names
    worlds.imagenet_tree(tmp_path)
    (tmp_path / data.DATASETS[name].folder / "classnames.txt").unlink()
    assert data.load_dataset(name, tmp_path).class_names == names


COOPS_CLASSES = """
    ImageNet Caltech101 OxfordPets StanfordCars OxfordFlowers Food101 FGVCAircraft SUN397
    DescribableTextures EuroSAT UCF101 ImageNetV2 ImageNetSketch ImageNetA ImageNetR""".split()


@pytest.mark.parametrize("said, name", [
    ("Caltech-101", "caltech101"), ("caltech 101", "caltech101"), ("Food_101", "food101"),
    *zip(COOPS_CLASSES, data.DATASETS)])
def test_a_dataset_may_be_named_as_the_field_names_it(world, said, name):
    assert data.load_dataset(said, world[0]).name == name


def test_split_files_that_were_written_on_windows_are_read(tmp_path):
    worlds.sun397_tree(tmp_path)
    expected = data.load_dataset("sun397", tmp_path)
    file = tmp_path / "sun397" / "split_zhou_SUN397.json"
    split = json.loads(file.read_text())
    for row in split["train"] + split["test"]:
        row[0] = row[0].replace("/", "\\")
    file.write_text(json.dumps(split), encoding="utf-8-sig")
    assert data.load_dataset("sun397", tmp_path) == expected


# ---------------------------------------------------------- few-shot picks, base and novel halves

def coop_picks(rows, shots, val_rows, seed):
    """CoOp's procedure in a few lines of our own: the global generator, one walk, all classes."""
    random.seed(seed)
    out = []
    for split, n in ((rows, shots), (val_rows, min(shots, 4))):
        chosen = []
        for label in dict.fromkeys(row[1] for row in split):
            group = [row for row in split if row[1] == label]
            chosen.extend(random.sample(group, n) if len(group) >= n else group)
        out.append([(row[0], row[1]) for row in chosen])
    return out


@pytest.mark.parametrize("name", [*JSON_SETS, "fgvc_aircraft"])
def test_few_shot_picks_are_coops(world, name):
    row = data.DATASETS[name]
    folder = pathlib.Path(world[0], row.folder)
    if name == "fgvc_aircraft":
        variants = (folder / "variants.txt").read_text().split("\n")
        split = {}
        for part in ("train", "val"):
            lines = (folder / f"images_variant_{part}.txt").read_text().splitlines()
            split[part] = [[f"{line[:7]}.jpg", variants.index(line[8:])] for line in lines]
    else:
        split = json.loads((folder / row.split).read_text())
    dataset = data.load_dataset(name, world[0])
    for seed in (1, 2, 3):
        for shots in (1, 3, 16):
            picks = data.few_shot(dataset.train, dataset.val, shots, seed)
            expected = coop_picks(split["train"], shots, split["val"], seed)
            assert [[(item.source, item.label) for item in items] for items in picks] == [
                [(str(folder / row.images[0] / path), label) for path, label in rows]
                for rows in expected]


def test_few_shot_has_four_to_validate_on_and_leaves_the_global_generator_alone():
    rows = [(f"{i}.jpg", i * i % 7, f"class {i * i % 7}") for i in range(70)]
    items = [data.Item(path, label) for path, label, _ in rows]
    for shots in (1, 3, 5, 16):
        expected = coop_picks(rows, shots, rows[::-1], 2)
        before = random.getstate()
        picks = data.few_shot(items, items[::-1], shots, 2)
        assert random.getstate() == before
        assert [[(item.source, item.label) for item in each] for each in picks] == expected
    assert data.few_shot(items, [], 5)[1] == []
    assert "at least 1" in failure(data.few_shot, items, items, 0)


@pytest.mark.parametrize("n, n_base", [(1, 1), (37, 19), (47, 24), (100, 50), (397, 199)])
def test_base_is_the_first_half_rounded_up(n, n_base):
    base, novel = data.split_base_novel(["x"] * n)
    assert base == list(range(n_base)) and novel == list(range(n_base, n))


def test_take_relabels_in_the_order_of_labels():
    items = [data.Item(f"{label}.jpg", label, True) for label in (3, 0, 4, 1, 3)]
    assert data.take(items, [3, 4]) == [("3.jpg", 0, True), ("4.jpg", 1, True), ("3.jpg", 0, True)]
    assert data.take(items, [4, 3]) == [("3.jpg", 1, True), ("4.jpg", 0, True), ("3.jpg", 1, True)]


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
    picked, _ = data.few_shot(zoo.train, [], 2, 3)
    assert task.base_names == ["cat", "dog", "emu"] and task.novel_names == ["fox", "gnu"]
    assert task.train == [item for item in picked if item.label < 3]
    assert task.test_base == [item for item in zoo.test if item.label < 3]
    assert task.test_novel == [item._replace(label=item.label - 3)
                               for item in zoo.test if item.label >= 3]
    assert task.notes == [] and task.comparable

    task = data.few_shot_task(zoo, "all", shots=2, seed=3)
    assert (task.base_names, task.novel_names) == (zoo.class_names, [])
    assert (task.train, task.test_base, task.test_novel) == (picked, zoo.test, [])
    one_line(*task.notes, "1 of 5", "fewer than 2")         # fox; said, but as in published runs
    assert task.comparable and not data.few_shot_task(zoo._replace(notes=["x"])).comparable


@pytest.mark.parametrize("n", [2, 3])
def test_one_class_on_a_side_is_no_choice(zoo, n):
    few = zoo._replace(class_names=zoo.class_names[:n])
    one_line(failure(data.few_shot_task, few), "zoo", f"{n} classes", "--classes all")
    assert data.few_shot_task(few, "all").novel_names == []


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
    assert not data.few_shot_task(dataset).comparable
    expected = split_by_the_recipe(tmp_path / row.folder / row.images[0],
                                   ("BACKGROUND_Google", "Faces_easy"))
    assert counts(dataset) == [[6] * 6, [2] * 6, [3] * 6]   # of 11: round(5.5), round(2.2)
    for items, part in zip((dataset.train, dataset.val, dataset.test), expected):
        assert [item.source for item in items] == part


@pytest.mark.parametrize("name", [name for name in worlds.TREES if name not in OWN_SPLIT_SETS])
def test_no_split_is_guessed_for_the_others(tmp_path, name):
    worlds.TREES[name](tmp_path)
    row = data.DATASETS[name]
    (tmp_path / row.folder / row.split).unlink()
    refused(name, tmp_path, tmp_path / row.folder / row.split, data.GUIDE)


def test_all_seeds_are_tested_on_one_split(tmp_path):
    worlds.own_folders_tree(tmp_path / "birds", per_class=16)
    dataset = data.load_dataset(tmp_path / "birds")
    one, two = (data.few_shot_task(dataset, "base", 2, seed) for seed in (1, 2))
    assert one.train != two.train
    assert (one.test_base, one.test_novel) == (two.test_base, two.test_novel)
    assert not {item.source for item in two.train} & {item.source for item in dataset.test}


# ------------------------------------------------------------------------- data that is not right

@pytest.mark.parametrize("name, near", [("caltech", ["caltech101"]), ("zzz", ["eurosat", "toy"])])
def test_an_unknown_dataset_names_the_nearest(name, near):
    refused(name, "/nowhere", name, *near)


@pytest.mark.parametrize("name", worlds.TREES)
def test_missing_folders_and_images_are_named_with_where_to_get_them(tmp_path, name):
    row = data.DATASETS[name]
    root = tmp_path / "data"
    line = refused(name, root, root / row.folder, "--root", row.source, data.GUIDE)
    assert line.count(data.GUIDE) == 1
    worlds.TREES[name](root)
    images = root / row.folder / row.images[0]
    if row.images[0]:
        images.rename(tmp_path / "moved away")
        assert "lies at" not in refused(name, root, images, row.source)


@pytest.mark.parametrize("name, moved, to", [
    ("eurosat", "2750", "EuroSAT_RGB"), ("oxford_flowers", "jpg", "flowers/jpg"),
    ("dtd", "split_zhou_DescribableTextures.json", "labels/split_zhou_DescribableTextures.json"),
    ("fgvc_aircraft", "variants.txt", "data/variants.txt"),
    ("imagenet", "images/val/n02110958", "images/val/val/n02110958")])
def test_what_lies_elsewhere_is_named_with_its_place(tmp_path, name, moved, to):
    """In the first two the first image is missed; dtd, whose split file is there, gets no other."""
    worlds.TREES[name](tmp_path)
    folder = tmp_path / data.DATASETS[name].folder
    (folder / to).parent.mkdir(exist_ok=True)
    (folder / moved).rename(folder / to)
    refused(name, tmp_path, (folder / moved).parent, f"lies at {folder / to}")


@pytest.mark.parametrize("name", ["food101", "fgvc_aircraft"])
def test_missing_images_are_counted_and_the_first_is_named(tmp_path, name):
    worlds.TREES[name](tmp_path)
    dataset = data.load_dataset(name, tmp_path)
    os.remove(dataset.train[3].source)
    os.remove(dataset.train[6].source)
    refused(name, tmp_path, "2 are missing", dataset.train[3].source)


GOOD_SPLIT = {"train": [["a.jpg", 0, "a"], ["b.jpg", 1, "b"]], "val": [],
              "test": [["a2.jpg", 0, "a"], ["b2.jpg", 1, "b"]]}


def with_val(*row):
    return json.dumps(GOOD_SPLIT | {"val": [list(row)]})


@pytest.mark.parametrize("split, said", [
    ("<!DOCTYPE html>", "JSON"), (b"\x80\x04\x95\xff", "JSON"), ("", "JSON"),
    ("[1, 2]", "list"), (json.dumps({"train": GOOD_SPLIT["train"], "test": []}), "val"),
    (json.dumps(GOOD_SPLIT | {"test": []}), "empty"),
    (json.dumps(GOOD_SPLIT | {"val": 3}), "train, val and test"),
    (json.dumps(GOOD_SPLIT | {"val": [None]}), "train, val and test"),
    (with_val("a.jpg", 0), "train, val and test"), (with_val(7, 0, "a"), "train, val and test"),
    (with_val("a.jpg", "0", "a"), "train, val and test"),
    (with_val("a.jpg", 0, "c"), "label 0 is called both 'a' and 'c'"),
    (with_val("a.jpg", 3, "c"), "without a gap"), (with_val("a.jpg", -1, "c"), "without a gap")])
def test_broken_split_json_is_refused_in_one_line(tmp_path, split, said):
    folder = tmp_path / "stanford_cars"
    for path, label, _ in GOOD_SPLIT["train"] + GOOD_SPLIT["test"]:
        worlds.write_image(folder / path, label, 0)
    file = folder / "split_zhou_StanfordCars.json"
    file.write_text(json.dumps(GOOD_SPLIT))
    assert data.load_dataset("stanford_cars", tmp_path).class_names == ["a", "b"]
    file.write_bytes(split if isinstance(split, bytes) else split.encode())
    refused("stanford_cars", tmp_path, file, said)


@pytest.mark.parametrize("name, images", [
    ("imagenet", "images/train"), ("imagenet", "images/val"), ("imagenet_sketch", "images"),
    ("imagenetv2", "imagenetv2-matched-frequency-format-val"), ("imagenet_a", "imagenet-a")])
def test_a_missing_empty_or_unknown_class_folder_never_shifts_labels(tmp_path, name, images):
    names = worlds.TREES[name](tmp_path)
    images = tmp_path / data.DATASETS[name].folder / images
    victim, stranger = ("3", "10") if name == "imagenetv2" else ("n02110958", "n99999999")
    (images / "__MACOSX").mkdir()
    (images / victim).rename(tmp_path / "away")
    if name == "imagenet_a":                                # the classes are those that are there
        assert data.load_dataset(name, tmp_path).class_names == [each for each in names
                                                                 if each != "pug"]
    else:
        refused(name, tmp_path, images, f"1 of 10 class folders are missing, the first: {victim} (")
    (images / victim).mkdir()
    (images / victim / ".DS_Store").write_text("")
    refused(name, tmp_path, images / victim, "no images")
    shutil.rmtree(images / victim)
    (tmp_path / "away").rename(images / victim)
    (images / stranger).mkdir()
    refused(name, tmp_path, images, stranger)


@pytest.mark.parametrize("name, file, change, said", [
    ("imagenet", "classnames.txt", lambda text: "", "empty"),
    ("imagenet", "classnames.txt", lambda text: text + "n99999999\n", "n99999999"),
    ("imagenet", "classnames.txt", lambda text: text + "n01440764 cat\n", "n01440764 cat"),
    ("imagenet", "classnames.txt", lambda text: text + "n9 caf\udce9\n", "UTF-8"),      # latin-1
    ("fgvc_aircraft", "images_variant_val.txt", lambda text: "1025000 Zeppelin NT\n" + text,
     "'Zeppelin NT' of image 1025000"),
    ("fgvc_aircraft", "images_variant_train.txt",
     lambda text: re.sub(r".* F/A-18\n", "", text), "none of F/A-18"),
    ("fgvc_aircraft", "images_variant_test.txt",
     lambda text: re.sub(r".* DC-10\n", "", text), "none of DC-10")])
def test_broken_lists_of_classes_and_images_are_refused_in_one_line(tmp_path, name, file, change,
                                                                    said):
    worlds.TREES[name](tmp_path)
    path = tmp_path / data.DATASETS[name].folder / file
    path.write_text(change(path.read_text()), encoding="utf-8", errors="surrogateescape")
    refused(name, tmp_path, path.parent, said)


@pytest.mark.parametrize("old", ["cock", "American chameleon, anole, Anolis carolinensis"])
def test_imagenets_old_class_names_leave_a_note(tmp_path, old):
    worlds.imagenet_tree(tmp_path)
    file = tmp_path / "imagenet" / "classnames.txt"
    file.write_text(file.read_text().replace("goldfish", old))
    dataset = data.load_dataset("imagenet", tmp_path)
    assert any(repr(old) in note and "do not compare" in note for note in dataset.notes)


# ------------------------------------------------------------------------- a dataset of one's own

def test_a_folder_per_class_is_a_dataset_with_an_own_split(tmp_path):
    names = worlds.own_folders_tree(tmp_path / "birds", per_class=8)
    dataset = data.load_dataset(tmp_path / "birds")
    assert (dataset.name, dataset.folder) == ("birds", str(tmp_path / "birds"))
    assert dataset.class_names == names and counts(dataset) == [[4] * 4, [2] * 4, [2] * 4]
    notes = " ".join(dataset.notes)
    assert "an own split" in notes and "compare with nobody's" in notes
    assert not data.few_shot_task(dataset).comparable


@pytest.mark.parametrize("train, test, val", [
    ("train", "test", "val"), ("Train", "TEST", "Valid"), ("training", "testing", "validation"),
    ("train", "valid", None)])                              # without test it is tested on val
def test_parts_in_any_spelling_are_a_dataset(tmp_path, train, test, val):
    names = worlds.own_parts_tree(tmp_path / "birds", 3, [train, test] + [val] * bool(val))
    dataset = data.load_dataset(tmp_path / "birds")
    assert dataset.class_names == names
    assert counts(dataset) == [[3] * 4, [3 if val else 0] * 4, [3] * 4]
    for items, part in ((dataset.train, train), (dataset.val, val), (dataset.test, test)):
        assert {pathlib.Path(item.source).parts[-3] for item in items} == ({part} - {None})
    assert any("no test/" in note for note in dataset.notes) == (test == "valid")


@pytest.mark.parametrize("images, file", [("images", "split.json"), ("birds", "my_Split.json"),
                                          ("", "split_zhou_Birds.json")])
def test_images_with_one_split_json_are_a_dataset(tmp_path, images, file):
    """The images lie in images/, in a folder of the dataset's own name, or beside the file."""
    names = worlds.own_split_tree(tmp_path / "birds", images=images)
    if file != "split.json":
        (tmp_path / "birds" / "split.json").rename(tmp_path / "birds" / file.lower())
    dataset = data.load_dataset(tmp_path / "birds")
    assert dataset.class_names == names and counts(dataset) == [[2] * 4, [1] * 4, [1] * 4]
    places = {os.path.dirname(os.path.dirname(item.source)) for item in dataset.test}
    assert places == {str(tmp_path / "birds" / images).rstrip("/")}
    if images:                                              # and the first place wins
        shutil.copytree(tmp_path / "birds" / images, tmp_path / "birds", dirs_exist_ok=True)
        assert data.load_dataset(tmp_path / "birds") == dataset
    (tmp_path / "birds" / "other_split.json").write_text("{}")
    refused(tmp_path / "birds", None, "2 split files", "other_split.json", file.lower())


@pytest.mark.parametrize("folder, name", [
    ("birds", "birds"), ("Birds 2.0 (mine)", "Birds-2.0-mine"), ("vögel", "vögel"), ("?", "own"),
    ("DTD", "own-DTD"), ("toy", "own-toy"), ("caltech-101", "own-caltech-101"),
    ("Flowers102", "own-Flowers102"), ("birds/images", "birds-images"),
    ("birds/Train", "birds-Train"), ("birds/dataset", "birds-dataset"), ("x" * 150, "x" * 100)])
def test_a_dataset_of_ones_own_is_named_after_its_folder_and_never_as_a_known_one(
        tmp_path, folder, name):
    worlds.own_folders_tree(tmp_path / folder, per_class=4)
    assert data.load_dataset(str(tmp_path / folder)).name == name


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
    assert data.read_name(name, own=False) == name.replace("_", " ")


def test_what_clip_cannot_tell_apart_or_read_is_noted(tmp_path):
    for label, name in enumerate(["001.cat", "002.Cat", "house_dog", "dog_house", "7", "emu"]):
        for i in range(4):
            worlds.write_image(tmp_path / "zoo" / name / f"{i}.png", label, i)
    (tmp_path / "zoo" / "emu" / ".hidden.txt").write_text("")
    for name in ("scan.dcm", "scan.DCM", "LICENSE"):
        (tmp_path / "zoo" / "emu" / name).write_text("")
    dataset = data.load_dataset(tmp_path / "zoo")
    notes = "\n".join(dataset.notes)
    assert "2 classes have one name for CLIP, 'cat'" in notes
    assert "house dog" not in notes                         # CLIP reads words in their order
    assert "1 class names, such as '7', are numbers" in notes
    assert "2 .dcm" in notes and "1 without ending" in notes and ".txt" not in notes
    assert all(note.startswith("zoo: ") for note in dataset.notes)


@pytest.mark.parametrize("files, said", [
    (["1.jpg", "2.jpg"], "no class folders"), ([], "no class folders"),
    (["train/1.jpg", "test/1.jpg"], "no class folders in train/"),
    (["cat/1.jpg", "cat/2.jpg"], "one folder alone, cat"),
    (["images/cat/1.jpg", "images/dog/1.jpg"], "--dataset {}/images"),
    (["train/cat/1.jpg", "train/dog/1.jpg"], "no test/"),
    (["train/cat/1.jpg", "train/dog/1.jpg", "test/cat/1.jpg"], "the first: dog"),
    (["train/cat/1.jpg", "train/dog/1.jpg", "test/cat/1.jpg", "test/dog/1.jpg", "test/cow/1.jpg"],
     "cow"),
    (["train/cat/1.jpg", "train/dog/1.jpg", "test/1.jpg"], "{}/test"),
    (["train/cat/1.jpg", "test/cat/1.jpg"], "two classes"),
    (["cat/1.jpg", "dog/1.jpg"], "{}/cat: 1 images are too few")])
def test_what_is_no_dataset_is_refused_in_one_line(tmp_path, files, said):
    folder = tmp_path / "pets"
    folder.mkdir()
    for i, file in enumerate(files):
        worlds.write_image(folder / file, 0, i)
    refused(folder, None, said.format(folder), "folder per class")
    refused(tmp_path / "none", None, tmp_path / "none")


# ----------------------------------------------------------------------------------- descriptions

@pytest.fixture
def description_file(tmp_path):
    def write(value):
        path = tmp_path / "descriptions.json"
        path.write_text(value if isinstance(value, str) else json.dumps(value))
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
    ("car_side", "Car-Side"), ("yin yang", "yin  YANG"), ("F/A-18", "18, f/a"),
    ("2000 AM General Hummer SUV", "AM General Hummer SUV 2000"), ("indoor apse", "apse (indoor)"),
    ("Éclair au café", "café au éclair"),
    # CuPL's own names
    ("face", "off-center face"), ("car side", "side of a car"), ("yin yang", "Yin and yang symbol"),
    ("cougar body", "body of a cougar cat"), ("cougar face", "face of a cougar cat"),
    ("crocodile head", "head of a crocodile"), ("flamingo head", "head of a flamingo"),
    ("snoopy", "snoopy (cartoon beagle)"), ("pink-yellow dahlia", "pink and yellow dahlia"),
    ("2012 Ram C/V Cargo Van Minivan", "Ram CV Cargo Van Minivan 2012"), ("ball moss", "air plant"),
    ("Handstand Pushups", "Hand Stand Pushups")])
def test_a_key_is_of_the_class_with_the_same_words_or_with_cupls_name_for_it(
        description_file, name, key):
    path = description_file({"sushi bar": ["Another."], key: ["Its own."]})
    assert data.load_descriptions(path, [name, "sushi bar", name]) == [
        ["Its own."], ["Another."], ["Its own."]]


def test_a_classs_own_name_comes_before_cupls(description_file):
    path = description_file({"off-center face": ["Theirs."], "face": ["Its own."]})
    assert data.load_descriptions(path, ["face"]) == [["Its own."]]


def test_all_classes_that_have_nothing_are_named_at_once(description_file):
    path = description_file({"water lily": ["a"], "lamp": ["c"], "wok": [" . "], "pan": "A pan.",
                             "house indoor": ["d"], "House (indoor)": ["e"], "pot": None,
                             "apse": ["f"], "bar bar": ["g"]})
    names = ["water lilly", "lamp", "wok", "pan", "indoor house", "pot", "indoor apse", "bar"]
    line = failure(data.load_descriptions, path, names)
    one_line(line, path, "7 of 8", "water lilly has no key (closest: water lily)", "wok", "pan",
             "'house indoor' and 'House (indoor)' are one name", "pot", "indoor apse", "bar")
    assert "lamp" not in line.partition(path)[2]
    line = failure(data.load_descriptions, path, [f"class {c}" for c in "abcdefghijklmnopqrs"])
    one_line(line, "19 of 19", "class j", "and 9 more")
    assert "class k" not in line


@pytest.mark.parametrize("key", ["", "//"])
def test_a_key_without_words_is_a_comment_and_no_classs(description_file, key):
    path = description_file({key: ["Made by hand."], "wok": ["A wok."]})
    one_line(failure(data.load_descriptions, path, ["wok", "lamp"]), "lamp", "1 of 2")


def test_descriptions_that_the_project_lacks_are_to_be_made():
    assert data.default_descriptions("toy") == os.path.join(data.ASSETS, "descriptions", "toy.json")
    line = failure(data.default_descriptions, "birds", kind=FileNotFoundError)
    one_line(line, "birds", "--descriptions FILE", "data.py describe", "--template plain")


SHIPPED = {"imagenet": 998, "caltech101": 100, "oxford_pets": 37, "stanford_cars": 196, "dtd": 47,
           "oxford_flowers": 102, "food101": 101, "fgvc_aircraft": 100, "sun397": 397,
           "eurosat": 10, "ucf101": 101}                # ImageNet: two names stand for two classes


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_descriptions_are_ten_whole_sentences_a_class_that_clip_can_read(name):
    described = data.read_json_object(data.default_descriptions(name))
    assert len(described) == SHIPPED[name]
    named = 0
    for class_name, sentences in described.items():
        assert len(sentences) == 10, class_name
        stems = [word.rstrip("s") for word in re.findall(r"[^\W_]+", class_name.lower())]
        for sentence in sentences:
            assert 6 <= len(re.findall(r"[\w']+", sentence)) <= 32, sentence
            assert sentence == " ".join(sentence.split()) and sentence.endswith("."), sentence
            named += any(stem in sentence.lower() for stem in stems)
    flat = [sentence for sentences in described.values() for sentence in sentences]
    assert len({sentence.lower() for sentence in flat}) == len(flat)
    assert named > 0.9 * len(flat)
    clip.tokenize(flat)                                 # raises where one is longer than 77 tokens


def test_shipped_descriptions_fit_the_fields_class_names():
    names = {name: layout.names for name, layout in worlds.LAYOUTS.items()}
    names |= {"fgvc_aircraft": worlds.AIRCRAFT, "imagenet": ["tench", "missile", "pug"]}
    for name, classes in names.items():
        typed = list(classes.values()) if isinstance(classes, dict) else classes
        assert len(data.load_descriptions(data.default_descriptions(name), typed)) == len(typed)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_descriptions_have_every_class_of_the_real_lists(name):
    real = pathlib.Path(data.ASSETS).parent.parent / "shared" / "class_names" / f"{name}.json"
    if not real.is_file():
        pytest.skip("the list of real class names is not beside the project")
    names = json.loads(real.read_text(encoding="utf-8"))
    assert set(data.read_json_object(data.default_descriptions(name))) == set(names)
    assert name != "imagenet" or not {each.lower() for each in names} & set(data.OLD_NAMES)


# ----------------------------------------------------------------------------------------- images

def saved(path, picture, format, **options):
    path.parent.mkdir(exist_ok=True)
    picture.save(path, format=format, **options)
    return str(path)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "RGBA", "LA"])
def test_images_of_every_mode_become_rgb(tmp_path, mode):
    worlds.write_image(tmp_path / "image.jpg", 3, 1, mode, size=(40, 30))
    image = data.load_image(tmp_path / "image.jpg")
    assert image.mode == "RGB" and image.size == (40, 30)


ENDINGS = {"jpg": "JPEG", "JPEG": "JPEG", "jpe": "JPEG", "jfif": "JPEG", "PNG": "PNG", "bmp": "BMP",
           "webp": "WEBP", "tif": "TIFF", "tiff": "TIFF", "ppm": "PPM", "pgm": "PPM", "gif": "GIF",
           "avif": "AVIF", "jp2": "JPEG2000", "heic": "HEIF", "heif": "HEIF"}


def test_pictures_are_found_by_ending_and_read_by_what_they_are(tmp_path):
    picture = Image.new("RGB", (48, 48), (200, 100, 50))
    folder = tmp_path / "pictures"
    paths = [saved(folder / f"1.{ending}", picture, format)
             for ending, format in ENDINGS.items() if format in data.FORMATS]
    for name in ("1.eps", "notes.txt", "clip.mp4", ".1.jpg"):
        (folder / name).write_text("")
    assert data.image_files(folder) == sorted(paths) and len(paths) >= 12
    for path in paths:
        assert np.abs(np.asarray(data.load_image(path), float) - (200, 100, 50)).max() < 60, path
    assert data.load_image(saved(folder / "webp.jpg", picture, "WEBP")).size == (48, 48)


def test_no_file_makes_pillow_start_another_program(tmp_path, monkeypatch):
    """Ghostscript would draw this one."""
    path = saved(tmp_path / "drawing.jpg", Image.new("RGB", (8, 8)), "EPS")
    started = []
    monkeypatch.setattr(PIL.EpsImagePlugin, "Ghostscript", lambda *_, **__: started.append(path))
    assert path in failure(data.load_image, path, kind=data.BadImage) and not started


def png_of_16_bits(path, channels):
    """Pillow writes no RGB of 16 bits, so: signature, IHDR, IDAT, IEND."""
    def chunk(kind, body):
        return (struct.pack(">I", len(body)) + kind + body
                + struct.pack(">I", zlib.crc32(kind + body)))
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    head = struct.pack(">IIBBBBB", 4, 4, 16, colour, 0, 0, 0)
    rows = b"".join(b"\0" + bytes(8 * channels) for _ in range(4))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
                     + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("kind", ["I;16 png", "I;16 tif", "I;16B tif", "I tif", "F tif", "P5 pgm",
                                  "1 channel", "2 channels", "3 channels", "4 channels"])
def test_more_than_8_bits_a_channel_are_refused(tmp_path, kind):
    what, ending = kind.split()
    path = tmp_path / f"x-ray.{ending}"
    if what == "P5":
        path.write_bytes(b"P5 8 8 65535\n" + bytes(128))
    elif what.isdigit():
        png_of_16_bits(path, int(what))
    else:
        dtype = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4", "F": "<f4"}[what]
        saved(path, Image.frombytes(what, (8, 8), np.arange(64).astype(dtype).tobytes()), None)
    one_line(failure(data.load_image, path, kind=data.BadImage), path, "8 bits")


def turned_picture(path):
    """A landscape, white on the left, that its camera says to turn by 90 degrees clockwise."""
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(path, Image.fromarray(pixels), "JPEG", exif=exif)


def test_own_pictures_are_turned_as_their_exif_says_and_the_fields_are_not(tmp_path):
    worlds.own_folders_tree(tmp_path / "birds")
    worlds.eurosat_tree(tmp_path)
    for name in (tmp_path / "birds", "eurosat"):
        items = data.load_dataset(name, tmp_path).test
        turned_picture(pathlib.Path(items[0].source))
        image, _ = data.Images(items, np.asarray)[0, 0]
        if name == "eurosat":
            assert image.shape == (20, 40, 3)
        else:
            assert image.shape == (40, 20, 3) and image[:15].min() > 200 and image[25:].max() < 50


def broken_images(folder):
    """Paths of files that are no pictures, each in its own way; the first says more in its name."""
    worlds.write_image(folder / "good.jpg", 0, 0, size=(200, 200))
    worlds.write_image(folder / "good.png", 0, 0, mode="P", size=(80, 80))
    good, png = (folder / "good.jpg").read_bytes(), (folder / "good.png").read_bytes()
    contents = {"cut.jpg": good[:-400], "text.jpg": b"<html>", "empty.jpg": b"",
                "broken.png": png[:60] + b"garbage" + png[67:]}
    for name, text in contents.items():
        (folder / name).write_bytes(text)
    return [str(folder / name) for name in (*contents, "gone.jpg")]


def test_unreadable_images_are_named_and_all_at_once(tmp_path):
    bad = broken_images(tmp_path)
    for path in bad:
        assert path in failure(data.load_image, path, kind=data.BadImage)
    items = [data.Item(path, 0) for path in (bad[0], str(tmp_path / "good.jpg"), *bad[1:])]
    line = failure(data.check_pictures, items, kind=data.BadImage)
    one_line(line, "5 pictures", *bad)
    assert "good.jpg" not in line
    data.check_pictures(items[1:2])


@pytest.mark.parametrize("format", ["PNG", "AVIF"])
def test_what_pillow_has_other_words_for_is_a_bad_image_too(tmp_path, format):
    """An EXIF record that was cut off; a picture of a good head and a body of noise."""
    if format not in data.FORMATS:
        pytest.skip("this Pillow reads no AVIF")
    path = tmp_path / "picture"
    saved(path, noise(48, 48), format, **({"exif": b"Exif\0\0MM\0*"} if format == "PNG" else {}))
    if format == "AVIF":
        at = path.read_bytes().index(b"mdat") + 4
        path.write_bytes(path.read_bytes()[:at] + b"\xff" * 20 + path.read_bytes()[at + 20:])
    items = [data.Item(str(path), 0, upright=True)]
    assert str(path) in failure(data.check_pictures, items, kind=data.BadImage)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_stops_a_loader_with_one_line(tmp_path, workers):
    path = tmp_path / "bad.jpg"
    path.write_text("no image")
    images = data.Images([data.Item(str(path), 0)], data.test_transform(PREPROCESS))
    with pytest.raises(data.BadImage) as error:
        list(data.loader(images, workers=workers))
    one_line(error, path)
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


def test_train_transform_crops_and_flips():
    ramp = np.tile(np.linspace(0, 255, 256)[None, :, None], (64, 1, 3)).astype(np.uint8)
    transform = data.train_transform(PREPROCESS)
    assert transform.transforms[0].scale == (0.08, 1.0)
    assert transform.transforms[0].interpolation.value == "bicubic"
    torch.manual_seed(0)
    pictures = [transform(Image.fromarray(ramp)) for _ in range(60)]
    slopes = [int(x[0, 12, -1]) - int(x[0, 12, 0]) for x in pictures]
    assert 15 < sum(slope < 0 for slope in slopes) < 45         # half of them flipped
    assert min(map(abs, slopes)) < 0.6 * max(map(abs, slopes))  # crops of different widths


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


def test_worker_processes_give_the_same_crops(items):
    images = images_of(items)
    sent = pickle.loads(pickle.dumps(images))                   # as spawned workers get them
    expected = crops_of(images, (1, 2))
    assert torch.equal(crops_of(sent, (1, 2), workers=2), expected)


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

    def __call__(self, crops):
        assert crops.dtype == torch.uint8 and not torch.is_grad_enabled()
        self.images += len(crops)
        return (crops.flatten(1) / 255 @ self.weight).to(self.dtype)


def features_of(images, tower, epochs=(1, 2), **options):
    """f of each epoch, one after the other: (epochs, n, d)."""
    return torch.stack([f for f, _ in data.epoch_features(images, list(epochs), tower, **options)])


@pytest.fixture
def many(items):
    """Some more images than the tower takes at a time."""
    return images_of((items * 26)[:data.ENCODE_BATCH + 3])


def test_epoch_features_are_the_towers_of_each_epochs_crops(many):
    found = features_of(many, Tower())
    with torch.no_grad():
        expected = torch.stack([Tower()(epoch) for epoch in crops_of(many, (1, 2))])
    assert found.dtype == torch.float32 and torch.allclose(found, expected, atol=1e-5)


def test_epoch_features_have_crops_for_who_needs_them_and_f_for_who_needs_it(many):
    features = data.epoch_features(many, [1, 2], None, keep_crops=True)
    for expected, (f, crops) in zip(crops_of(many, (1, 2)), features, strict=True):
        assert f is None and torch.equal(crops, expected)
    ((f, crops),) = data.epoch_features(many, [1], Tower())
    assert crops is None and f.shape == (len(many), 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kept_features_are_the_same_to_the_bit_and_no_image_is_opened(
        items, tmp_path, monkeypatch, dtype):
    images, tower = images_of(items), Tower(dtype)
    expected = features_of(images, tower)
    kept = data.KeptFeatures(tmp_path / "cache", ["tiny", str(dtype)], images)
    assert torch.equal(features_of(images, tower, kept=kept), expected) and tower.images == 40
    assert len(list((tmp_path / "cache").iterdir())) == 2
    monkeypatch.setattr(data, "load_image", None)
    found = features_of(images, tower, kept=kept)
    assert torch.equal(found, expected) and found.dtype == torch.float32 and tower.images == 40


def test_kept_features_spare_the_tower_where_crops_are_needed(items, tmp_path):
    images, tower = images_of(items), Tower()
    kept = data.KeptFeatures(tmp_path / "cache", ["tiny"], images)
    expected = features_of(images, tower, (1,), kept=kept)
    features = list(data.epoch_features(images, [1, 2], tower, kept=kept, keep_crops=True))
    for epoch, (f, crops) in zip((1, 2), features, strict=True):
        assert torch.equal(crops, crops_of(images, (epoch,))[0])
        assert torch.equal(f, features_of(images, Tower(), (epoch,))[0])
    assert torch.equal(features[0][0], expected[0]) and tower.images == 20


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(path.read_bytes()[:-30]),
    lambda path: path.write_bytes(path.read_bytes()[:-300] + b"\xff" + path.read_bytes()[-299:]),
    lambda path: np.savez(path, features=np.zeros((9, 8), np.float32)),
    lambda path: np.savez(path, features=np.array([print] * 10)),       # a pickle: not unpacked
    lambda path: np.savez(path, other=np.zeros((10, 8), np.float32))])
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
    kept = data.KeptFeatures(tmp_path, ["tiny"], images)
    kept.write(1, torch.zeros(11, 8))
    assert data.KeptFeatures(tmp_path, ["tiny"], images).has(1) and not kept.has(2)
    other_size = data.train_transform(PREPROCESS | {"size": (25, 24)})
    for other in (images_of(images.items, 8), images_of(images.items[::-1]),
                  images_of([item._replace(upright=True) for item in images.items]),
                  data.Images(images.items, other_size, 7),
                  images_of(images.items, transform=data.test_transform)):
        assert not data.KeptFeatures(tmp_path, ["tiny"], other).has(1)
    assert not data.KeptFeatures(tmp_path, ["large"], images).has(1)

    with monkeypatch.context() as patch:                        # two Pillows, two crops
        patch.setattr(data.PIL, "__version__", "0.0")
        assert not data.KeptFeatures(tmp_path, ["tiny"], images).has(1)
    before = path.stat()
    worlds.write_image(path, 1, 2)                              # another picture of the same time
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size != before.st_size
    assert not data.KeptFeatures(tmp_path, ["tiny"], images).has(1)
    worlds.write_image(path, 1, 1)                              # or of the same size, but later
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert not data.KeptFeatures(tmp_path, ["tiny"], images).has(1)


def test_one_set_of_workers_serves_all_epochs(items, monkeypatch):
    images, loaders, loader = images_of(items), [], data.loader
    expected = features_of(images, Tower(), (1, 2, 3))
    monkeypatch.setattr(data, "loader", lambda *arguments, **options: (
        loaders.append(loader(*arguments, **options)) or loaders[-1]))
    assert torch.equal(features_of(images, Tower(), (1, 2, 3), workers=1), expected)
    assert [each.num_workers for each in loaders] == [1]


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
    path = tmp_path / "last.pt"
    path.write_text("old")
    with pytest.raises(raised) as error:
        with data.written_aside(path) as aside:
            pathlib.Path(aside).write_text("half")
            raise trouble
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    if raised is OSError:
        one_line(error, path, trouble.args[-1])


def test_a_link_is_followed(tmp_path):
    file, link = tmp_path / "disk" / "results.json", tmp_path / "results.json"
    link.symlink_to(file)
    for value in (1, 2):                                        # made, then replaced
        data.save_json(link, value)
        assert link.is_symlink() and json.loads(file.read_text()) == value
    assert [each.name for each in file.parent.iterdir()] == ["results.json"]


def test_devices_and_pipes_are_written_to_directly(tmp_path):
    terminal, ours = os.openpty()
    data.save_json(os.ttyname(ours), 1)
    assert os.read(terminal, 100) == b"1\r\n"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    data.save_json(tmp_path / "pipe", 1)
    assert os.read(reader, 100) == b"1\n"
    for each in (terminal, ours, reader):
        os.close(each)
    assert (tmp_path / "pipe").is_fifo()
    assert [each.name for each in tmp_path.iterdir()] == ["pipe"]


def test_no_two_settings_share_a_folders_name():
    assert data.folder_name("coop", {}) == "coop"
    assert data.folder_name("coop", {"tau": 0.5, "epochs": 1}) == "coop,epochs=1,tau=0.5"
    settings = [{"a": "x,b=y"}, {"a": "x", "b": "y"}, {"a": ["x", "y"]}, {"a": ["x+y"]},
                {"a": "%2F"}, {"a": "/"}, {"a": "x" * 300}, {"a": "x" * 299 + "y"}, {"a": "é" * 99}]
    names = {data.folder_name("coop", each) for each in settings}
    assert len(names) == len(settings)
    assert all(len(name.encode()) < 250 and not set(name) & set('/\\:*?"<>|') for name in names)


def test_a_folder_is_one_processs_alone_and_cleared_of_what_killed_ones_left(tmp_path):
    def hold():
        with data.only_process(tmp_path, wait=False, what="seed 1"):
            return {each.name for each in tmp_path.iterdir()}
    with data.only_process(tmp_path, wait=False, what="seed 1"):
        one_line(failure(hold, kind=BlockingIOError), "seed 1", tmp_path)
    (tmp_path / ".last.0123.part.pt").write_text("half")
    (tmp_path / "last.pt").write_text("whole")
    assert hold() == {".lock", "last.pt"}


# ----------------------------------------------------------------------------------- command line

def test_inventory_has_a_line_per_dataset(world, capsys, tmp_path):
    assert data.main(["--root", world[0]]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert list(lines) == list(data.DATASETS)
    found = re.findall(r"\d+", lines["eurosat"])
    assert found == ["5", "5", "40", "20"]                  # base, novel; train, test images

    worlds.oxford_pets_tree(tmp_path)
    split = tmp_path / "oxford_pets" / "split_zhou_OxfordPets.json"
    split.unlink()
    assert data.main(["--root", str(tmp_path)]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert f"{split} is missing" in lines["oxford_pets"]
    assert f"{tmp_path / 'sun397'} is missing" in lines["sun397"]


# A small server that speaks the chat-completions protocol.

class Server(http.server.BaseHTTPRequestHandler):
    requests, answer = [], None

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).requests.append((self.path, self.headers["Authorization"], body))
        status, text = type(self).answer(body["messages"][-1]["content"])
        reply = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"],
                 "choices": [{"index": 0, "finish_reason": "stop",
                              "message": {"role": "assistant", "content": text}}]}
        reply = json.dumps(reply if status == 200 else {"error": {"message": text}})
        page = text.startswith("<html>")
        reply = (text if page else reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if page else "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *args):
        pass


def good_answer(question):
    thing = question.removeprefix("What does a ").removesuffix(" look like?")
    lines = [f"{i + 1}. A {thing} looks like pattern {i}." for i in range(4)]
    return 200, "\n".join(["<think>", "Hm, let me see.", "</think>", "Here are the sentences:", "",
                           *lines, lines[0]])


@pytest.fixture
def server(monkeypatch, tmp_path):
    """Yields its base URL; Server.requests and Server.answer are fresh."""
    pytest.importorskip("openai")
    monkeypatch.chdir(tmp_path)
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
    return data.main(["describe", "--dataset", "dtd", "--root", world[0], "--model", "m1",
                      "--base-url", server, "--output", str(output), *more])


def test_describe_makes_a_file_that_loads(world, server, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", " sk-secret\n")
    output = tmp_path / "new" / "dtd.json"
    assert describe(world, server, output, "--per-class", "4") == 0
    names = world[1]["dtd"]
    assert data.load_descriptions(output, names) == [
        [f"A {name} looks like pattern {i}." for i in range(4)] for name in names]
    path, key, body = Server.requests[1]
    assert path == "/v1/chat/completions" and key == "Bearer sk-secret" and body["model"] == "m1"
    form, question = (message["content"] for message in body["messages"])
    assert question == f"What does a {names[1]} look like?"
    neighbours = form.rpartition("told apart:")[2]
    assert "4 different sentences" in form and "8 to 30 words" in form
    assert names[0] in neighbours and names[2] in neighbours and names[1] not in neighbours
    out = capsys.readouterr()
    assert "sk-secret" not in out.out + out.err + output.read_text()
    Server.requests.clear()
    assert describe(world, server, output) == 0 and Server.requests == []   # nothing left to do


def test_describe_goes_on_after_a_failure(world, server, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    names, output = world[1]["dtd"], tmp_path / "dtd.json"
    output.write_text(json.dumps({names[1].upper(): ["Mine."], names[0]: []}))
    Server.answer = staticmethod(lambda question: (400, "sk-secret is\nout of money")
                                 if names[3] in question else good_answer(question))
    assert describe(world, server, output, "--per-class", "2") == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    one_line(line, names[3], server, "is out of money", output)
    assert "sk-secret" not in line
    assert set(json.loads(output.read_text())) == {names[0], names[1].upper(), names[2]}
    Server.answer, Server.requests = staticmethod(good_answer), []
    assert describe(world, server, output, "--per-class", "2") == 0 and len(Server.requests) == 2
    assert list(map(len, data.load_descriptions(output, names))) == [2, 1, 2, 2, 2]


def test_describe_asks_again_for_more_and_gives_up_on_silence(world, server, tmp_path, capsys):
    count = iter(range(100))
    Server.answer = staticmethod(lambda question: (200, f"- A thing seen {next(count)} times."))
    output = tmp_path / "dtd.json"
    assert describe(world, server, output, "--per-class", "2") == 0 and len(Server.requests) == 10
    assert json.loads(output.read_text())["banded"] == ["A thing seen 0 times.",
                                                        "A thing seen 1 times."]
    assert describe(world, server, tmp_path / "ten.json") == 0 and len(Server.requests) == 10 + 15
    Server.answer, Server.requests = staticmethod(lambda question: (200, "Sure:")), []
    assert describe(world, server, tmp_path / "none.json") == 2 and len(Server.requests) == 3
    one_line(capsys.readouterr().err.strip().splitlines()[-1], "banded", "m1")
    assert not (tmp_path / "none.json").exists()


def test_describe_takes_a_dataset_of_ones_own_and_a_server_without_a_key(server, tmp_path):
    names = worlds.own_folders_tree(tmp_path / "my birds")
    assert data.main(["describe", "--dataset", str(tmp_path / "my birds"), "--model", "m",
                      "--base-url", server, "--per-class", "2"]) == 0
    assert len(data.load_descriptions(tmp_path / "descriptions-my-birds.json", names)) == 4
    assert Server.requests[0][1] in ("Bearer none", "Bearer ")


def test_what_describe_cannot_do_is_one_line_and_exit_code_2(world, server, tmp_path, capsys,
                                                             monkeypatch):
    def said(base_url, output="x.json"):
        arguments = ["describe", "--dataset", "dtd", "--root", world[0], "--model", "m"]
        more = ["--base-url", base_url] if base_url else []
        assert data.main([*arguments, *more, "--output", output]) == 2
        return one_line(capsys.readouterr().err.strip().splitlines()[-1])
    assert "OPENAI_API_KEY" in said(None)
    assert "http://127.0.0.1:9/v1" in said("http://127.0.0.1:9/v1")         # nobody listens there
    (tmp_path / "list.json").write_text("[]")
    assert "list.json" in said(server, "list.json") and Server.requests == []
    Server.answer = staticmethod(lambda question: (200, "<html>A web page</html>"))
    assert server in said(server)
    monkeypatch.setitem(sys.modules, "openai", None)
    assert "pip install openai" in said(server) and not os.path.exists("x.json")


def test_neighbours_share_words_or_stand_beside():
    names = ["707-320", "737-300", "737-400", "747-400", "A310", "DC-10", "Tu-154", "737-500"]
    assert data.neighbours("737-400", names, 4) == ["737-300", "747-400", "737-500", "707-320"]
    assert data.neighbours("737-400", names[2:3]) == []


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
