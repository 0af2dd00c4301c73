"""Data: the field's fifteen datasets as they lie on everybody's disk, datasets of one's own,
few-shot subsets, descriptions, images; and what runs leave on the disk.

Paper S2.1 (datasets) and S2.2.1 (descriptions). The folder layout, the split files and the
few-shot picks are those of CoOp's data guide, so that `--root` points at what a lab already has;
nothing is ever written there.

    python data.py --root $DATA                  what is found, what is missing, and where to get it
    python data.py describe --dataset NAME ...   ask an LLM for a description file

What differs between datasets stands in one table, DATASETS; the readers below it know only kinds
of layout. They raise what is wrong and where; `load_dataset`, which calls them, adds where to get
it.
"""

import argparse
import collections
import contextlib
import csv
import difflib
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import random
import re
import sys
import urllib.parse
import uuid
from typing import NamedTuple

import filelock
import numpy as np
import PIL
import torch
import torchvision
from PIL import Image, ImageOps
from torchvision import transforms
from tqdm import tqdm

with contextlib.suppress(ImportError):          # iPhones' pictures, for who has it
    import pillow_heif
    pillow_heif.register_heif_opener()


class Item(NamedTuple):
    source: str                    # path of an image file
    label: int
    upright: bool = False          # one's own pictures are turned as their EXIF says; the field's
                                   # datasets are read as the field reads them, without


class Dataset(NamedTuple):
    class_names: list              # index = label; as CLIP reads them, see `read_name`
    train: list                    # of Item; train and val are empty for test-only sets
    val: list
    test: list
    notes: list = []               # why figures on it do not compare with published ones
    name: str = ""                 # a key of DATASETS, or the name of one's own folder
    folder: str = ""               # where it lies; paths of images are told from here


# ---------------------------------------------------------------------------- the table

ASSETS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets")
GUIDE = "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md"
# The guide's links to Stanford Cars and SUN397 are dead; the authors keep all but ImageNet here.
MIRROR = "HuggingFace dataset zhengli97/prompt_learning_dataset"
PHOTO = "a photo of a {}."


class Row(NamedTuple):
    folder: str                    # under the root
    images: tuple                  # under the folder; mirrors differ, see `images_folder`
    kind: str                      # which reader, see READERS
    split: str                     # the file that fixes classes or split
    classes: int                   # how many the full dataset has
    prompt: str                    # the field's hand-written zero-shot prompt
    source: str                    # where the images come from; GUIDE has the split files
    own_split: bool = False        # may a missing split file be replaced by one of our own?
    leave_out: tuple = ()          # own split: folders that are no class
    rename: dict = {}              # own split: folder -> class name


DATASETS = {
    "imagenet": Row(
        "imagenet", ("images",), "imagenet", "classnames.txt", 1000, PHOTO,
        "https://image-net.org"),
    "caltech101": Row(
        "caltech-101", ("101_ObjectCategories",), "json", "split_zhou_Caltech101.json", 100, PHOTO,
        "https://data.caltech.edu/records/mzrjq-6wc02", own_split=True,
        leave_out=("BACKGROUND_Google", "Faces_easy"),
        rename={"airplanes": "airplane", "Faces": "face", "Leopards": "leopard",
                "Motorbikes": "motorbike"}),
    "oxford_pets": Row(
        "oxford_pets", ("images",), "json", "split_zhou_OxfordPets.json", 37,
        "a photo of a {}, a type of pet.", "https://www.robots.ox.ac.uk/~vgg/data/pets/"),
    "stanford_cars": Row(
        "stanford_cars", ("",), "json", "split_zhou_StanfordCars.json", 196, PHOTO, MIRROR),
    "oxford_flowers": Row(
        "oxford_flowers", ("jpg",), "json", "split_zhou_OxfordFlowers.json", 102,
        "a photo of a {}, a type of flower.", "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"),
    "food101": Row(
        "food-101", ("images",), "json", "split_zhou_Food101.json", 101,
        "a photo of {}, a type of food.",
        "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
        own_split=True),
    "fgvc_aircraft": Row(
        "fgvc_aircraft", ("images",), "aircraft", "variants.txt", 100,
        "a photo of a {}, a type of aircraft.",
        "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/"),
    "sun397": Row("sun397", ("SUN397",), "json", "split_zhou_SUN397.json", 397, PHOTO, MIRROR),
    "dtd": Row(
        "dtd", ("images",), "json", "split_zhou_DescribableTextures.json", 47, "{} texture.",
        "https://www.robots.ox.ac.uk/~vgg/data/dtd/", own_split=True),
    "eurosat": Row(
        "eurosat", ("2750",), "json", "split_zhou_EuroSAT.json", 10,
        "a centered satellite photo of {}.",
        "https://github.com/phelber/EuroSAT", own_split=True,
        rename={"AnnualCrop": "Annual Crop Land",
                "HerbaceousVegetation": "Herbaceous Vegetation Land",
                "Highway": "Highway or Road", "Industrial": "Industrial Buildings",
                "Pasture": "Pasture Land", "PermanentCrop": "Permanent Crop Land",
                "Residential": "Residential Buildings", "SeaLake": "Sea or Lake"}),
    "ucf101": Row(
        "ucf101", ("UCF-101-midframes",), "json", "split_zhou_UCF101.json", 101,
        "a photo of a person doing {}.", MIRROR),

    # Test only: the four ImageNet variants of domain generalisation (Tab. 4).
    "imagenetv2": Row(
        "imagenetv2", ("imagenetv2-matched-frequency-format-val", "imagenetv2", ""), "numbered",
        "classnames.txt", 1000, PHOTO, "https://github.com/modestyachts/ImageNetV2"),
    "imagenet_sketch": Row(
        "imagenet-sketch", ("images", "sketch"), "wnids", "classnames.txt", 1000, PHOTO,
        "https://github.com/HaohanWang/ImageNet-Sketch"),
    "imagenet_a": Row(
        "imagenet-adversarial", ("imagenet-a",), "some wnids", "classnames.txt", 200, PHOTO,
        "https://github.com/hendrycks/natural-adv-examples"),
    "imagenet_r": Row(
        "imagenet-rendition", ("imagenet-r",), "some wnids", "classnames.txt", 200, PHOTO,
        "https://github.com/hendrycks/imagenet-r"),

    # Lies under assets/, not under the root.
    "toy": Row("toy", ("images",), "json", "split_toy.json", 48, PHOTO, "this repository"),
}


def squashed(text):
    """Lower case, without spaces, `-` and `_`: FGVC-Aircraft and fgvc_aircraft are one."""
    return re.sub(r"[\s_-]+", "", text).lower()


# Every way to name a dataset, squashed: its key, its folder, CoOp's class for it.
NAMES = {squashed(name): name for name in DATASETS}
NAMES |= {squashed(row.folder): name for name, row in DATASETS.items()}
NAMES |= {"describabletextures": "dtd", "flowers102": "oxford_flowers"}


def load_dataset(name, root=None):
    """Read a dataset: one of DATASETS under `root`, or a folder of one's own.

    name: a key of DATASETS in any spelling of NAMES; or an existing folder (see OWN_LAYOUT), which
    needs a path separator where a known dataset has the same name. root: the folder of the known
    ones (default: the environment's DATA, else ./data). Returns a Dataset. Raises ValueError for an
    unknown name or a file with the wrong content, and FileNotFoundError for what is missing; both
    say in one line what is wrong, where, and where to get it.
    """
    # A folder of one's own, an unknown name, or one of the fifteen?
    name = os.fspath(name)
    known = NAMES.get(squashed(name))
    if os.sep in name or "/" in name or (known is None and os.path.isdir(name)):
        folder = os.path.abspath(os.path.expanduser(name))
        known, advice, read = own_name(folder), OWN_LAYOUT, read_own
    elif known is None:
        near = difflib.get_close_matches(name.lower(), DATASETS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(DATASETS)}"
        raise ValueError(f"unknown dataset {name!r}, and no folder; {hint}")
    else:
        row = DATASETS[known]
        folder = os.path.join(ASSETS if known == "toy" else data_root(root), row.folder)
        advice = (f"give --root or set DATA to the folder of {row.folder}/; images come from "
                  f"{row.source}, split files and layout from {GUIDE}")
        read = functools.partial(READERS[row.kind], row)
    # The readers raise what is wrong and where; what to do about it is added here, once.
    try:
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"{folder} is missing")
        return completed(read(folder), known, folder)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{error}; {advice}") from None


def completed(dataset, name, folder):
    """What a reader has returned, with the dataset's name, its classes' as CLIP reads them, notes.

    Raises ValueError where a class has no image to learn or test on, or there is one class alone.
    """
    # Names as CLIP reads them, and pictures as they are to be turned.
    own = name not in DATASETS
    class_names = [read_name(each, own) for each in dataset.class_names]
    parts = []
    for items in (dataset.train, dataset.val, dataset.test):
        parts.append([item._replace(upright=own) for item in items])
    # A class without images would shift what accuracy means.
    for items in (parts[0], parts[2]):
        absent = set(range(len(class_names))) - {item.label for item in items}
        if len(class_names) < 2 or (items and absent):
            names = ", ".join(class_names[label] for label in sorted(absent))
            raise ValueError(f"{folder} needs an image of each class to learn on and one to test "
                             f"on, of two classes at least, and has none of {names or 'a second'}")

    # What a reader of the figures must know. Any of it: they do not compare with published ones.
    notes = list(dataset.notes)
    if own:
        notes += ["a dataset of one's own: its figures compare with nobody's", *left_out(dataset)]
    elif len(class_names) != DATASETS[name].classes:
        notes.append(f"{len(class_names)} classes found, the full dataset has "
                     f"{DATASETS[name].classes}: figures on it do not compare with published ones")
    nameless = [each for each in class_names if re.fullmatch(r"n?[\d\W_]+", each)]
    if own and nameless:
        notes.append(f"{len(nameless)} class names, such as {nameless[0]!r}, are numbers, which "
                     "tell CLIP nothing: name the folders by what they show")
    for same in group_by(str.lower, class_names).values():
        if len(same) > 1 and not name.startswith("imagenet"):       # ImageNet's pairs are known
            notes.append(f"{len(same)} classes have one name for CLIP, {same[0]!r}: only the first "
                         "of them can be right")
    notes = [f"{name}: {note}" for note in notes]
    return Dataset(class_names, *parts, notes, name, folder)


def read_name(name, own=True):
    """A class name as CLIP reads it: "001.Black_footed_Albatross" is "Black footed Albatross".

    Underscores are spaces. own: a number or a wnid in front, which fixes its place, is no name. The
    names of the field's datasets keep theirs ("2012 Acura RL Sedan").
    """
    if own:
        # "1 001.Black_footed_Albatross" (CUB's list), "n01440764 tench" (ImageNet's), "01_TUMOR"
        name = re.sub(r"^(\d+\s+(?=\d+[._]))?(n\d{8}[\s._-]+|\d+[._]+\s*)(?=\d*[^\W\d_])", "", name)
        return " ".join(name.replace("_", " ").split())
    return name.replace("_", " ")


def left_out(dataset):
    """A note on files beside the images that are not read as such, by ending; or none: a list."""
    endings = collections.Counter()
    for folder in {os.path.dirname(item.source) for item in dataset.train + dataset.test}:
        files = [file for file in pathlib.Path(folder).glob("[!.]*") if file.is_file()]
        endings.update(file.suffix.lower() or "without ending" for file in files)
    left = [f"{n} {ending}" for ending, n in endings.items() if ending not in EXTENSIONS]
    return [f"files that are no pictures to it were left out: {', '.join(left)}"] if left else []


def own_name(folder):
    """The folder's own name, safe as a folder's name, and never a known dataset's.

    images, train and the like are named with the folder that they are in.
    """
    path = pathlib.Path(folder)
    name = path.name
    if re.fullmatch("images?|imgs|pictures|photos|train(ing)?|data(set)?", name.lower()):
        name = f"{path.parent.name}-{name}"
    name = re.sub(r"[^\w.-]+", "-", name).strip(".-")[:100] or "own"
    return f"own-{name}" if squashed(name) in NAMES else name


def data_root(root=None):
    return os.path.expanduser(root or os.environ.get("DATA") or "data")


def missing(fact, path, folder):
    """The error for a missing `path`: the fact, and where in `folder` a file of that name lies."""
    name = os.path.basename(path)
    for place, folders, files in os.walk(folder):
        if name in files or name in folders:
            found = os.path.join(place, name)
            return FileNotFoundError(f"{fact}; one of that name lies at {found}")
    return FileNotFoundError(fact)


# -------------------------------------------------------------------------- readers: one per layout

# Each returns a Dataset that has no name yet.

def read_json_split(row, folder):
    """A `split_zhou_*.json`; where it is missing and the field's recipe will do, an own split."""
    images = images_folder(row, folder)
    file = os.path.join(folder, row.split)
    if os.path.isfile(file):
        return read_split_file(file, [images], folder)
    # Where the field has a recipe for the split and the file is nowhere, the recipe; else no guess.
    error = missing(f"{file} is missing", file, folder)
    if not row.own_split or "lies at" in str(error):
        raise error
    class_folders, parts = split_folders(images, row.leave_out)
    note = (f"{row.split} is missing, so an OWN SPLIT was made: figures on it do not compare with "
            f"published ones; the field's split file: {GUIDE}")
    class_names = [row.rename.get(name, name) for name in class_folders]
    return parts._replace(class_names=class_names, notes=[note])


def read_split_file(file, places, folder):
    """`{"train": [[path, label, class name], ...], "val": [...], "test": [...]}`.

    Paths are relative to the first of `places` that has some of them. folder: the dataset's.
    """
    split = read_json_object(file)
    names = names_of_split(split, file)

    # Some were written on Windows. A few paths tell which of the places they are relative to.
    rows = {part: [(path.replace("\\", "/"), label) for path, label, _ in split[part]]
            for part in SPLIT}
    images = places[-1]
    for place in reversed(places):
        found = [os.path.exists(os.path.join(place, path)) for path, _ in rows["train"][:20]]
        if any(found):
            images = place
    parts, sources = [], []
    for part in SPLIT:
        items = [Item(os.path.join(images, path), label) for path, label in rows[part]]
        parts.append(items)
        sources += [item.source for item in items]
    check_images(sources, file, folder)
    return Dataset([names[label] for label in range(len(names))], *parts)


SPLIT = ("train", "val", "test")


def names_of_split(split, file):
    """dict label -> class name. ValueError where `split` has not the form of `read_split_file`."""
    names = {}
    try:
        for part in SPLIT:
            for path, label, class_name in split[part]:
                if names.setdefault(label, class_name) != class_name or not path + class_name:
                    raise ValueError(f"label {label} is called both {names[label]!r} and "
                                     f"{class_name!r}")
        if sorted(names) != list(range(len(names))) or not split["train"] or not split["test"]:
            raise ValueError("train or test is empty, or labels do not run from 0 without a gap")
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{file} must have three lists, train, val and test, of [path, label, "
                         f"class name] ({error})") from None
    return names


def split_folders(images, leave_out=()):
    """The field's recipe for folder-per-class sets: 50 % train, 20 % val, the rest test.

    Classes are sorted by folder, their sorted images shuffled with `random.Random(1)`: one split
    for all seeds, as a split file is one. Returns the class folders' names and a Dataset.
    """
    # One stream for all classes, in their order: the field's recipe, to the pick.
    rng = random.Random(1)
    class_folders = [name for name in subfolders(images) if name not in leave_out]
    if not class_folders:
        raise FileNotFoundError(f"{images} has no class folders")
    train, val, test = [], [], []
    for label, class_folder in enumerate(class_folders):
        folder = os.path.join(images, class_folder)
        items = [Item(path, label) for path in image_files(folder)]
        if len(items) < 4:
            raise ValueError(f"{folder}: {len(items)} images are too few to split into train, val "
                             "and test (at least 4)")
        # 50, 20 and 30 %, rounded.
        rng.shuffle(items)
        n_train = round(0.5 * len(items))
        n_val = round(0.2 * len(items))
        train += items[:n_train]
        val += items[n_train:n_train + n_val]
        test += items[n_train + n_val:]
    return class_folders, Dataset(class_folders, train, val, test)


def read_aircraft(row, folder):
    """variants.txt: class names, line order = label; images_variant_<part>.txt: `id variant`."""
    images = images_folder(row, folder)
    class_names = read_lines(os.path.join(folder, row.split), folder)
    labels = {class_name: label for label, class_name in enumerate(class_names)}
    parts = []
    for part in SPLIT:
        file = os.path.join(folder, f"images_variant_{part}.txt")
        items = []
        for line in read_lines(file, folder):
            image_id, _, variant = line.partition(" ")
            if variant not in labels:
                raise ValueError(f"{file}: variant {variant!r} of image {image_id} is not in "
                                 f"{row.split}")
            items.append(Item(os.path.join(images, image_id + ".jpg"), labels[variant]))
        check_images([item.source for item in items], file, folder)
        parts.append(items)
    return Dataset(class_names, *parts)


def read_imagenet(row, folder):
    """images/{train,val}/<wnid>/; label = place among classnames.txt's sorted wnids; test = val."""
    images = images_folder(row, folder)
    names, notes = read_classnames(row, folder)
    wnids = sorted(names)                   # the file's own order says nothing
    train = read_class_folders(os.path.join(images, "train"), wnids, names, folder)
    test = read_class_folders(os.path.join(images, "val"), wnids, names, folder)
    return Dataset([names[wnid] for wnid in wnids], train, [], test, notes)


def read_variant(row, folder):
    """The test-only ImageNet variants: a folder per wnid (all, or 200) or number (ImageNetV2)."""
    images = images_folder(row, folder)
    names, notes = read_classnames(row, folder)
    if row.kind == "wnids":
        class_folders = sorted(names)
    elif row.kind == "numbered":                            # label = line of classnames.txt
        names = {str(label): class_name for label, class_name in enumerate(names.values())}
        class_folders = list(names)
    else:                               # labels 0..199 among the wnids that are there
        class_folders = [wnid for wnid in subfolders(images) if wnid in names]
        if not class_folders:
            raise FileNotFoundError(f"{images} has no class folders")
    test = read_class_folders(images, class_folders, names, folder)
    return Dataset([names[name] for name in class_folders], [], [], test, notes)


READERS = {"json": read_json_split, "aircraft": read_aircraft, "imagenet": read_imagenet,
           "wnids": read_variant, "some wnids": read_variant, "numbered": read_variant}

# Names that only ImageNet's old list has; the field's is CLIP's (rooster, American robin, ...).
OLD_NAMES = ("cock", "robin", "water ouzel", "european fire salamander", "common newt", "eft",
             "bullfrog", "loggerhead", "common iguana", "american chameleon", "drake", "maillot")


def read_classnames(row, folder):
    """classnames.txt, `wnid name with spaces` a line: dict wnid -> name, in file order; and notes.

    Two classes may share a name (missile, sunglasses): labels come from wnids, never from names.
    """
    file = os.path.join(folder, row.split)
    if not os.path.isfile(file):
        shared = os.path.join(os.path.dirname(folder), "imagenet", row.split)
        if os.path.isfile(shared):                          # the guide copies it from there
            file = shared
    names, notes = {}, []
    for line in read_lines(file, folder):
        wnid, _, class_name = line.partition(" ")
        if not class_name.strip() or wnid in names:
            raise ValueError(f"{file}: line {line!r} has no class name or repeats a wnid")
        names[wnid] = class_name.strip()
    old = [name for name in names.values() if name.split(",")[0].lower() in OLD_NAMES]
    if old:
        notes.append(f"{file} has ImageNet's old class names, such as {old[0]!r}, where CLIP's "
                     "list has others: figures on it do not compare with published ones; CLIP's: "
                     f"{GUIDE}")
    return names, notes


def read_class_folders(images, class_folders, names, folder):
    """Items of one part, label = index in class_folders.

    No class may be missing, nor a folder unknown: labels would shift. names: class folder -> class
    name, of all that there are. folder: the dataset's.
    """
    # Every class has its folder, and every folder its class.
    present = subfolders(images)
    absent = [name for name in class_folders if name not in present]
    if absent:
        fact = (f"{images}: {len(absent)} of {len(class_folders)} class folders are missing, the "
                f"first: {absent[0]} ({names[absent[0]]})")
        raise missing(fact, absent[0], images)
    unknown = [name for name in present if name not in names]
    if unknown:
        raise ValueError(f"{images}: {unknown[0]} is the folder of no known class")
    items = []
    for label, name in enumerate(class_folders):
        items += [Item(path, label) for path in image_files(os.path.join(images, name))]
    return items


OWN_LAYOUT = ("a dataset of your own is a folder per class; or train/ and test/ (and val/) with a "
              "folder per class each; or images and one *split*.json in the field's format")
PARTS = {"train": "train", "training": "train", "test": "test", "testing": "test", "val": "val",
         "valid": "val", "validation": "val"}


def read_own(folder):
    """A dataset of one's own, in any of the layouts of OWN_LAYOUT."""
    # The field's: a split file, and images in one of three places.
    splits = sorted(str(file) for file in pathlib.Path(folder).glob("*split*.json"))
    if len(splits) > 1:
        raise ValueError(f"{folder} has {len(splits)} split files: leave one of "
                         f"{', '.join(map(os.path.basename, splits))}")
    if splits:
        own = os.path.join(folder, os.path.basename(folder))
        return read_split_file(splits[0], [os.path.join(folder, "images"), own, folder], folder)

    # train/ and test/, by any of their names.
    inside = subfolders(folder)
    parts = {PARTS[name.lower()]: os.path.join(folder, name) for name in inside
             if name.lower() in PARTS}
    if "train" in parts and subfolders(parts["train"]):
        return read_own_parts(parts, folder)

    # A folder per class.
    if not inside or all(name.lower() in PARTS for name in inside):
        raise FileNotFoundError(f"{folder} has no class folders"
                                f"{' in train/' if parts else ''}")
    if len(inside) == 1:
        raise ValueError(f"{folder} has one folder alone, {inside[0]}: if the classes lie in it, "
                         f"give --dataset {os.path.join(folder, inside[0])}")
    _, dataset = split_folders(folder)
    note = "an own split was made: half of each class's images train, 20 % val, the rest test"
    return dataset._replace(notes=[note])


def read_own_parts(parts, folder):
    """train/ and test/ (and val/), with the same folder per class each."""
    notes = []
    if "test" not in parts:
        if "val" not in parts:
            raise FileNotFoundError(f"{folder} has train/, but no test/")
        parts["test"] = parts.pop("val")
        notes.append("it has no test/, so it is tested on its validation images")
    class_folders = subfolders(parts["train"])
    names = dict(zip(class_folders, class_folders))
    items = {part: read_class_folders(images, class_folders, names, folder)
             for part, images in parts.items()}
    return Dataset(class_folders, items["train"], items.get("val", []), items["test"], notes)


# ---------------------------------------------------------------------------- files and folders

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm",
              ".pgm", ".gif", ".avif", ".jp2", ".heic", ".heif")


def images_folder(row, folder):
    """The first of the row's images folders that is there (and has folders, where mirrors differ).

    Where none is, the first: what is missing in it is found out, and told, by who reads it.
    """
    candidates = [os.path.join(folder, name) if name else folder for name in row.images]
    for path in candidates:
        if os.path.isdir(path) and (len(candidates) == 1 or subfolders(path)):
            return path
    return candidates[0]


def subfolders(folder):
    """Sorted names of the folders in `folder`, without hidden ones (.git, __MACOSX).

    FileNotFoundError where there is no such folder.
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder} is missing")
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries
                      if not entry.name.startswith((".", "__")) and entry.is_dir())


def image_files(folder, deep=False):
    """Sorted paths of the images in a folder, without hidden ones (._x.jpg).

    deep: those in its subfolders as well. FileNotFoundError where there are none.
    """
    found = sorted(path for path in pathlib.Path(folder).glob("**/[!.]*" if deep else "[!.]*")
                   if path.suffix.lower() in EXTENSIONS)
    if not found:
        raise FileNotFoundError(f"folder {folder} holds no images")
    return [str(path) for path in found]


def check_images(paths, file, folder):
    """FileNotFoundError unless all `paths`, named by the split file `file`, are there.

    One listing a folder: asking for each file is slow over a network. folder: the dataset's.
    """
    # folder -> the names in it; a path is there if its folder lists it.
    listings, absent = {}, []
    for path in paths:
        place, name = os.path.split(path)
        if place not in listings:
            listings[place] = set(os.listdir(place)) if os.path.isdir(place) else set()
        if name not in listings[place]:
            absent.append(path)
    if absent:
        fact = (f"{file} names {len(paths)} images, {len(absent)} are missing, the first: "
                f"{absent[0]}")
        raise missing(fact, absent[0], folder)


def read_lines(file, folder):
    """The lines of a text file, without blank ones. folder: the dataset's."""
    if not os.path.isfile(file):
        raise missing(f"{file} is missing", file, folder)
    try:
        text = pathlib.Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason})") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{file} is empty")
    return lines


def read_json_object(file):
    """A JSON object as a dict. ValueError for anything else."""
    try:
        with open(file, encoding="utf-8-sig") as f:
            value = json.load(f)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, a million brackets
        raise ValueError(f"{file} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a {type(value).__name__}, not a JSON object")
    return value


# ------------------------------------------------------------------------- few-shot, base and novel

def few_shot(train, val, shots=16, seed=1):
    """CoOp's own picks for this seed: `shots` train and min(shots, 4) val items of every class.

    Do it over all classes, before base and novel are cut apart: both draw from one stream, in the
    order in which labels first appear. A class with fewer images gives all it has. Returns (train
    items, val items).
    """
    if shots < 1:
        raise ValueError(f"shots must be at least 1, not {shots}")
    # Train first, then val, from one stream; labels in the order of their first appearance.
    rng = random.Random(seed)                               # the stream of random.seed(seed)
    picked_train, picked_val = [], []
    for items, n, picked in ((train, shots, picked_train), (val, min(shots, 4), picked_val)):
        for same_label in group_by(lambda item: item.label, items).values():
            if len(same_label) >= n:
                same_label = rng.sample(same_label, n)
            picked += same_label
    return picked_train, picked_val


def split_base_novel(class_names):
    """Labels of the base classes (the first half, rounded up) and of the novel ones: two lists."""
    half = math.ceil(len(class_names) / 2)
    return list(range(half)), list(range(half, len(class_names)))


def take(items, labels):
    """The items that have one of `labels`, relabelled from 0 in the order of `labels`."""
    new = {label: i for i, label in enumerate(labels)}
    return [item._replace(label=new[item.label]) for item in items if item.label in new]


class Task(NamedTuple):
    """What a run learns on and is tested on. Labels count from 0 on each side."""
    base_names: list               # the classes that are learnt on
    novel_names: list              # [] where all classes are learnt on
    train: list                    # of Item: the few-shot images of the base classes
    test_base: list                # of Item
    test_novel: list               # of Item
    notes: list                    # of str: what a reader of the figures must know
    comparable: bool               # may its figures stand beside published ones?


def few_shot_task(dataset, classes="base", shots=16, seed=1):
    """The `Task` of CoOp's picks of this seed, cut into base and novel classes.

    classes: "base", to learn on the first half; or "all", where none are novel. Raises ValueError
    for shots < 1, and where one side would have one class alone.
    """
    # Which classes are learnt on, and which are novel?
    names = dataset.class_names
    base, novel = list(range(len(names))), []
    if classes == "base":
        base, novel = split_base_novel(names)
        if len(novel) < 2:
            raise ValueError(f"{dataset.name} has {len(names)} classes, and one side of base and "
                             "novel would have one alone, which is no choice: --classes all")
    # The picks are drawn over all classes, as CoOp draws them; then the base classes' are kept.
    picked, _ = few_shot(dataset.train, dataset.val, shots, seed)
    train = take(picked, base)
    notes = list(dataset.notes)
    counts = collections.Counter(item.label for item in train)
    scarce = [label for label in range(len(base)) if counts[label] < shots]
    if train and scarce:
        notes.append(f"{len(scarce)} of {len(base)} classes have fewer than {shots} training "
                     "images")
    base_names = [names[label] for label in base]
    novel_names = [names[label] for label in novel]
    return Task(base_names, novel_names, train, take(dataset.test, base), take(dataset.test, novel),
                notes, comparable=not dataset.notes)


def digests(dataset, task):
    """What a result depends on, in short: a digest each of class names, training and test images.

    An image counts by its path below the dataset's folder and its label.
    """
    # Paths below the folder: a dataset may be moved as a whole.
    images = []
    for items in (task.train, task.test_base, task.test_novel):
        rows = []
        for item in items:
            path = os.path.relpath(item.source, dataset.folder)
            rows.append((pathlib.Path(path).as_posix(), item.label))
        images.append(digest(rows))
    return {"class names": digest([task.base_names, task.novel_names]),
            "training images": images[0],
            "test images": digest(images[1:])}


def digest(value):
    """16 hexadecimal digits that stand for a value of lists, strings and numbers."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def group_by(function, values):
    """dict function(value) -> list of those values."""
    groups = {}
    for value in values:
        groups.setdefault(function(value), []).append(value)
    return groups


# ---------------------------------------------------------------------------- descriptions

SHIPPED = os.path.join(ASSETS, "descriptions")
# Twelve classes go by other names in CuPL's files.
CUPL_NAMES = {
    "face": "off-center face", "car side": "side of a car", "cougar body": "body of a cougar cat",
    "cougar face": "face of a cougar cat", "crocodile head": "head of a crocodile",
    "flamingo head": "head of a flamingo", "snoopy": "snoopy (cartoon beagle)",
    "yin yang": "yin and yang symbol", "2012 Ram C/V Cargo Van Minivan":
    "Ram CV Cargo Van Minivan 2012", "pink-yellow dahlia": "pink and yellow dahlia",
    "ball moss": "air plant", "Handstand Pushups": "Hand Stand Pushups"}


def default_descriptions(name):
    """Path of the description file that comes with the project; FileNotFoundError for none."""
    path = os.path.join(SHIPPED, f"{name}.json")
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"no descriptions come with {name}: make some with `python data.py describe --dataset "
            "PATH --model M`, and give the file with --descriptions FILE (JSON, class -> "
            "sentences); --template plain and atprompt need none")
    return path


def load_descriptions(path, class_names, max_descriptions=10):
    """Sentences that answer "What does a {Class} look like?", from JSON: class name -> sentences.

    A class's key is the one with the same words, whatever their case, order and the signs between
    them, or the one of CUPL_NAMES. The first `max_descriptions` sentences in file order are taken,
    fewer where a class has fewer; those without a letter or digit do not count. Keys of no class
    are ignored. Returns a list (C) of lists of str. Raises ValueError naming the file and all
    classes that it has nothing for.
    """
    found = read_json_object(path)
    keys = group_by(words, found)
    keys.pop((), None)                          # "//" is no class's
    # All classes are gone through before anything is raised: one run names all that is wrong.
    chosen, wrong = {}, []
    for name in dict.fromkeys(class_names):
        own = keys.get(words(name)) or keys.get(words(CUPL_NAMES.get(name, "-"))) or []
        sentences = found[own[0]] if own else None
        if not own:
            near = difflib.get_close_matches(name, found, 2)
            wrong.append(f"{name} has no key" + (f" (closest: {', '.join(near)})" if near else ""))
        elif len(own) > 1:
            wrong.append(f"{' and '.join(map(repr, own))} are one name")
        elif not isinstance(sentences, list) or not any(map(is_sentence, sentences)):
            wrong.append(f"{own[0]} has no list of sentences")
        else:
            read = [" ".join(each.split()) for each in sentences if is_sentence(each)]
            chosen[name] = read[:max_descriptions]
    if wrong:
        more = f"; and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise ValueError(f"{path}: {len(wrong)} of {len(set(class_names))} classes have no "
                         f"description: {'; '.join(wrong[:10])}{more}")
    return [chosen[name] for name in class_names]


def is_sentence(value):
    return isinstance(value, str) and any(map(str.isalnum, value))


def words(text):
    """Its words and numbers in lower case, sorted: "apse (indoor)" has those of "indoor apse"."""
    return tuple(sorted(re.findall(r"[^\W_]+", text.lower())))


# ---------------------------------------------------------------------------- images

def train_transform(preprocess):
    """PIL RGB -> crop (3, H, W), uint8: random resized crop and horizontal flip (S2.2).

    preprocess: see `prompts.preprocess_of`.
    """
    # As in the field's training code: 8 to 100 % of the picture, then a flip for every other.
    how = transforms.InterpolationMode(preprocess["interpolation"])
    crop = transforms.RandomResizedCrop(preprocess["size"], scale=(0.08, 1.0), interpolation=how)
    return transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.PILToTensor()])


def test_transform(preprocess):
    """PIL RGB -> crop (3, H, W), uint8: the shorter edge to size, center crop, as OpenAI's CLIP.

    Some other CLIPs squash the picture to size.
    """
    how, size = transforms.InterpolationMode(preprocess["interpolation"]), preprocess["size"]
    to = size if preprocess["resize_mode"] == "squash" else min(size)
    return transforms.Compose([transforms.Resize(to, how), transforms.CenterCrop(size),
                               transforms.PILToTensor()])


def normalize(crops, preprocess, device=None):
    """Crops (..., 3, H, W) uint8 -> what CLIP reads: float32, by its training images' mean and std.

    device: where they go first, still uint8, a quarter of the memory (default: they stay).
    """
    if device is not None:
        crops = crops.to(device, non_blocking=True)
    mean, std = _mean_and_std(tuple(preprocess["mean"]), tuple(preprocess["std"]), crops.device)
    return (crops.float() / 255 - mean) / std


@functools.lru_cache(maxsize=8)                 # so that no training step waits for the GPU
def _mean_and_std(mean, std, device):
    """(3, 1, 1) each. (torchvision's normalize reads a value back from the GPU.)"""
    return [torch.tensor(values, device=device).view(3, 1, 1) for values in (mean, std)]


class BadImage(ValueError):
    """An image that cannot be read. One line, also where a worker wraps it in its traceback."""

    def __init__(self, message):
        super().__init__(message.strip().splitlines()[-1].split("BadImage: ")[-1])


Image.init()
# What a file may hold, whatever its ending says: no EPS, for which Pillow starts another program.
FORMATS = [name for name in ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM", "GIF", "AVIF", "JPEG2000",
                             "HEIF") if name in Image.OPEN]


def load_image(path, upright=False):
    """An image file as PIL RGB, whatever its mode on disk (gray, CMYK, palette). upright: as EXIF.

    Raises BadImage, a ValueError, for a missing, corrupt or truncated file, never skipped, since
    that would change the few-shot set; and for more than 8 bits a channel, whose range nobody knows
    who did not take the picture.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.mode[0] in "IF" or re.search(r";(16[BLN]|32)", str(image.tile)):
                raise ValueError(f"it has more than 8 bits a channel, mode {image.mode}, and CLIP "
                                 "needs 8: scale it by its own range")
            if upright:
                image = ImageOps.exif_transpose(image)
            return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:                  # decoders have many words for a broken file
        raise BadImage(f"image {path} cannot be read ({' '.join(str(error).split())})") from None


def check_pictures(items):
    """Opens every image file. Raises BadImage that names all those that cannot be read."""
    bad = []
    for item in tqdm(items, desc="opening pictures", unit="image", leave=False, disable=None):
        try:
            load_image(item.source, item.upright)
        except BadImage as error:
            bad.append(str(error))
    if bad:
        raise BadImage(f"{len(bad)} pictures cannot be read; mend or remove them: {'; '.join(bad)}")


class Images(torch.utils.data.Dataset):
    """images[epoch, i] -> (crop (3, H, W) uint8, label) of item i.

    seed: an int; the augmentation then depends on (seed, epoch, i) alone, not on workers or
    order, and the global generator stays as it was. None: for a transform without chance.
    """

    def __init__(self, items, transform, seed=None):
        self.items = items
        self.transform = transform
        self.seed = seed

    def __len__(self):
        return len(self.items)

    def __getitem__(self, epoch_and_i):
        epoch, i = epoch_and_i
        item = self.items[i]
        image = load_image(item.source, item.upright)
        if self.seed is None:
            return self.transform(image), item.label
        # One number from three, well mixed: seeds, epochs and items side by side are not alike.
        mixed = int(np.random.SeedSequence((self.seed, epoch, i)).generate_state(1)[0])
        # torchvision's transforms draw from the global generator; torch.manual_seed would reseed
        # CUDA's as well.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mixed)
            return self.transform(image), item.label


ENCODE_BATCH = 256                  # images that go through the frozen image tower at a time


def loader(images, epochs=(0,), batch_size=ENCODE_BATCH, workers=0):
    """Batches of crops (B, 3, H, W) uint8 and labels (B,), in item order, an epoch after the other.

    One DataLoader, and so one set of worker processes, for the whole run: where there are workers
    they read on into the next epoch while the steps of this one run. To go through once. No batch
    spans two epochs. Going through it raises BadImage.
    """
    # A generator: DataLoader draws from it as its workers become free.
    n = len(images)
    batches = ([(epoch, i) for i in range(start, min(start + batch_size, n))]
               for epoch in epochs for start in range(0, n, batch_size))
    return torch.utils.data.DataLoader(
        images, batch_sampler=batches, num_workers=workers, pin_memory=torch.cuda.is_available(),
        generator=torch.Generator())                        # leaves the global one alone


def epoch_features(images, epochs, encode, kept=None, keep_crops=False, workers=0):
    """f_I(x) of each epoch's crops, by the frozen image tower, which is the same for every method.

    Yields for each of `epochs`, a sequence of numbers, f (n, d) as encode gives it but in float32,
    or None; and crops (n, 3, H, W), uint8 on the CPU, or None. Both are in item order.

    images: an `Images`. encode: a function crops (B, 3, H, W) uint8 -> (B, d), not normalised; or
    None where nobody needs f. kept: a `KeptFeatures`, or None; the f of an epoch that is there is
    read, and its images are opened for their crops alone. keep_crops: whether the crops are needed
    (MaPLe). Raises BadImage.
    """
    # Which epochs' images must be opened? One loader for them all, from which each takes its own.
    to_load = [epoch for epoch in epochs if keep_crops or kept is None or not kept.has(epoch)]
    n_batches = math.ceil(len(images) / ENCODE_BATCH)
    if to_load:
        batches = iter(loader(images, to_load, workers=workers))
    for epoch in epochs:
        f = kept.read(epoch) if kept is not None else None
        own = ()                                            # the batches of this epoch
        if epoch in to_load:
            own = itertools.islice(batches, n_batches)
        elif f is None:                                     # what was kept turns out damaged
            own = loader(images, [epoch], workers=workers)
        nothing = True if own == () else None               # None: only where there is a terminal
        bar = tqdm(own, total=n_batches, desc="images", leave=False, disable=nothing)

        # The frozen tower, in large batches; its crops are kept only where the method prompts it.
        crops, new = [], []
        for crop, _ in bar:
            if keep_crops:
                crops.append(crop)
            if f is None and encode is not None:
                with torch.no_grad():
                    new.append(encode(crop))                # (B, d)
        if new:
            f = torch.cat(new)
            if kept is not None:
                kept.write(epoch, f)
        f = f if f is None else f.float()
        yield f, torch.cat(crops) if crops else None


class KeptFeatures:
    """Image features in a folder, for the next run with the same CLIP, images and seed.

    A file an epoch, about 1 kB an image in float16 and 2 kB in float32. Its name is a digest of
    all that the features depend on: of `what` (CLIP, precision), the transform and the versions of
    the libraries that carry it out, the seed, the epoch, and path, size and time of every image. A
    file that is damaged is computed anew.
    """

    def __init__(self, folder, what, images):
        self.folder = pathlib.Path(folder)
        self.n = len(images)
        # A picture that was changed in place has another size or time.
        rows = []
        for item in images.items:
            stat = os.stat(item.source)
            rows.append([str(item.source), item.upright, stat.st_size, stat.st_mtime_ns])
        versions = [PIL.__version__, torchvision.__version__]       # two Pillows, two crops
        self.what = digest([what, repr(images.transform), versions, images.seed, rows])

    def path(self, epoch):
        return self.folder / f"{digest([self.what, epoch])}.npz"

    def has(self, epoch):
        """Is there a file for this epoch? (`read` says whether it is sound.)"""
        return self.path(epoch).is_file()

    def read(self, epoch):
        """(n, d) float32, or None where there is no sound file."""
        try:
            # A zip: it checks its checksums.
            with np.load(self.path(epoch), allow_pickle=False) as file:
                features = torch.from_numpy(file["features"])
        except Exception:                       # numpy has many words for a flipped bit
            return None
        return features.float() if len(features) == self.n else None

    def write(self, epoch, features):
        """Keeps f (n, d) of this epoch."""
        if features.dtype == torch.bfloat16:                                # numpy has none
            features = features.float()
        with written_aside(self.path(epoch)) as aside, open(aside, "wb") as file:
            np.savez(file, features=features.cpu().numpy())


# ---------------------------------------------------------------------------- what runs write

@contextlib.contextmanager
def written_aside(path):
    """Gives a name beside `path` to write to, and renames it at the end: nobody sees half a file.

    It is on the disk before it gets its name. On any failure the old file stays as it was. A device
    or a pipe is written to directly, and a link is followed. Raises OSError saying what could not
    be written.
    """
    path = pathlib.Path(path)
    if path.exists() and not path.is_file():
        yield path
        return
    path = pathlib.Path(os.path.realpath(path))
    aside = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:12]}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())                         # else a power cut leaves it empty
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        reason = " ".join(str(error).split())
        raise OSError(f"could not write {path} ({reason}); what was finished before is kept: make "
                      "room or choose another place, then run the same command again") from error
    finally:
        with contextlib.suppress(OSError):                  # there may be no such folder
            aside.unlink()


def save_json(path, value):
    """A value of dicts, lists, strings and numbers as JSON, in UTF-8."""
    with written_aside(path) as aside:
        aside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def save_csv(path, rows):
    """Rows (dicts with the same keys) as CSV, in UTF-8."""
    with written_aside(path) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


class Changed(ValueError):
    """A file was made with other settings or data than there are now."""


def check_unchanged(path, saved, now, advice):
    """Raises Changed where settings or digests `now` are not those a file was made with."""
    changed = [name for name, value in now.items() if saved.get(name) != value]
    if changed:
        raise Changed(f"{path} was made with other {' and '.join(changed)} than there are now; "
                      f"{advice}")


def folder_name(kind, changed):
    """`coop-anchoropt,epochs=1,tau=0.5`: every setting that is off its default, sorted by name.

    No two settings share a name: values are %-escaped as in a URL, and what would be too long for a
    file system ends in a digest of the whole.
    """
    parts = [kind]
    for key, value in sorted(changed.items()):
        values = value if isinstance(value, list) else [value]
        text = "+".join(urllib.parse.quote(str(each), safe="") for each in values)
        parts.append(f"{key}={text}")
    name = ",".join(parts)
    return name if len(name) <= 200 else f"{name[:180]},{digest(name)}"


def run_folder(run, kind, changed):
    """output/<dataset>/<kind>[,changed settings]/seed<k> of a `stage1.Run`."""
    name = folder_name(kind, changed)
    return pathlib.Path(run.args.output, run.settings["dataset"], name, f"seed{run.seed}")


@contextlib.contextmanager
def only_process(folder, wait, what):
    """Holds a folder for this process alone, as long as the process lives.

    wait: another process that holds it is waited for; else BlockingIOError says that it is at work.
    Raises OSError where the folder cannot be written to: before anything is learnt.
    """
    # The operating system holds the lock: it goes with the process, however that ends.
    lock = filelock.FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            print(f"{what}: another process is at work on it in {folder}", flush=True)
            lock.acquire(timeout=-1 if wait else 0)
    except filelock.Timeout:
        raise BlockingIOError(f"wait for the process that is at work on {what} in {folder}, or "
                              "choose another --output") from None
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"cannot write to {folder} ({reason}); choose another --output") from error
    try:
        # What processes have left that were killed while they wrote.
        for litter in folder.glob(".*.part*"):
            litter.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


# ---------------------------------------------------------------------- command line: what is there

def inventory(root):
    """Prints a line per dataset: found, or what is missing."""
    for name in DATASETS:
        try:
            dataset = load_dataset(name, root)
            base, novel = split_base_novel(dataset.class_names)
            line = (f"found  {len(base):4} base, {len(novel):4} novel classes  "
                    f"{len(dataset.train):7} train, {len(dataset.test):6} test images  "
                    f"{'; '.join(dataset.notes)}")
        except (ValueError, OSError) as error:
            line = f"-      {error}"
        print(f"{name:16}{' '.join(line.splitlines())}", flush=True)


# --------------------------------------------------------------------------- command line: describe

QUERY = "What does a {} look like?"                         # the paper's, after CuPL
FORM = """\
Answer the question as {n} different people would who each look at typical pictures of it: \
{n} different sentences, one a line, without numbering, and nothing else.
Each sentence alone answers the question. It has 8 to 30 words of plain English, names the thing \
and says what is seen: its shape, parts, colours, surface and surroundings; of a scene or an \
action, what is in the picture.
The sentences differ in their words and in what they stress, not in their subject: what marks the \
thing comes back in most of them.
Say nothing that cannot be seen (history, price, use, behaviour over time), nothing that may or \
may not be so, and no detail that you are not sure of.
What you say must be true of this thing and not of these, from which it has to be told apart: \
{neighbours}."""


def describe(args):
    """S2.2.1: asks an OpenAI-compatible server for sentences on every class that the file lacks.

    args: dataset, root, model, base_url, output, per_class. The file is written after each class,
    so a run that was stopped goes on. The key comes from the environment's OPENAI_API_KEY and is
    never written or printed. Raises ValueError and OSError.
    """
    try:
        import openai
    except ImportError:
        raise ValueError("describe needs the openai client: pip install openai") from None
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key and not args.base_url:
        raise ValueError("set OPENAI_API_KEY, or give --base-url of a server that needs no key")
    client = openai.OpenAI(api_key=key or "none", base_url=args.base_url, timeout=120)

    # Which classes does the file lack?
    dataset = load_dataset(args.dataset, args.root)
    output = args.output or f"descriptions-{dataset.name}.json"
    found = read_json_object(output) if os.path.isfile(output) else {}
    found = {name: sentences for name, sentences in found.items() if sentences}
    done = set(map(words, found))
    every = list(dict.fromkeys(dataset.class_names))
    wanted = [name for name in every if words(name) not in done]
    for name in tqdm(wanted, desc=f"describing {dataset.name}", unit="class"):
        # The paper's question, and a word on the answer's form that names what it must differ from.
        form = FORM.format(n=args.per_class, neighbours=", ".join(neighbours(name, every)))
        sentences = []
        for _ in range(3):                                  # a model may give fewer than asked for
            try:
                answer = client.chat.completions.create(model=args.model, messages=[
                    {"role": "system", "content": form},
                    {"role": "user", "content": QUERY.format(name)}])
                sentences += read_answer(answer.choices[0].message.content)
            except Exception as error:                      # servers answer in many strange ways
                reason = " ".join(str(error).split()).replace(key or "\n", "***")
                raise ValueError(f"{name}: no answer of {args.base_url or 'OpenAI'} can be read "
                                 f"({reason[:200]}); the same command goes on from here, {output} "
                                 "keeps what is done") from None
            sentences = list(dict.fromkeys(sentences))[:args.per_class]
            if len(sentences) == args.per_class:
                break
        if not sentences:
            raise ValueError(f"{name}: {args.model} gave no sentence in three answers; try another "
                             "--model, and see that --base-url is the API's (mostly .../v1)")
        found[name] = sentences
        save_json(output, found)
    print(f"{output}: {len(found)} classes, {len(wanted)} of them new")


def neighbours(class_name, class_names, n=6):
    """Up to n other classes it may be taken for: those that share words, then those beside it."""
    own, at = set(words(class_name)), class_names.index(class_name)
    others = [name for name in class_names if name != class_name]
    by_distance = sorted(others, key=lambda name: abs(class_names.index(name) - at))
    by_distance.sort(key=lambda name: -len(own & set(words(name))))     # a stable sort
    return by_distance[:n]


def read_answer(text):
    """The sentences of an answer, one a line, without a model's thoughts, numbering, headings."""
    # A chat template may hold the <think> already; an answer that was cut off has no </think>.
    text = text.rpartition("</think>")[2].partition("<think>")[0]
    sentences = []
    for line in text.splitlines():
        line = re.sub(r"^\s*(?:[-*\u2022]|\d+[.)])\s+", "", line)
        line = line.strip().strip('"*').strip()
        if len(line.split()) > 2 and not line.endswith(":"):
            sentences.append(line)
    return sentences


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="What is under the data root; or make a description file.")
    root = {"metavar": "DIR", "help": "folder that holds the datasets (default: the environment's "
                                      "DATA, else ./data)"}
    parser.add_argument("--root", **root)
    command = parser.add_subparsers(dest="command").add_parser(
        "describe", help="make a description file",
        description="Make a description file with an OpenAI-compatible server; its key comes from "
                    "the environment's OPENAI_API_KEY.")
    command.add_argument("--dataset", required=True, metavar="NAME",
                         help="whose classes to describe; or the folder of a dataset of your own")
    command.add_argument("--root", **root | {"default": argparse.SUPPRESS})
    command.add_argument("--model", required=True, help="the server's name of the model")
    command.add_argument("--base-url", default=os.environ.get("OPENAI_BASE_URL"),
                         help="e.g. http://localhost:8000/v1 (default: the environment's "
                              "OPENAI_BASE_URL, else OpenAI)")
    command.add_argument("--output", metavar="FILE",
                         help="file to write, or to complete: classes that it has are kept "
                              "(default: descriptions-NAME.json)")
    command.add_argument("--per-class", type=int, default=10, metavar="D",
                         help="sentences for each class that the file has not yet (default: 10)")
    args = parser.parse_args(argv)
    try:
        if args.command == "describe":
            describe(args)
        else:
            inventory(args.root)
        return 0
    except KeyboardInterrupt:
        print("data.py: stopped; what is finished is kept", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"data.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
