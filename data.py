"""Data: the field's fifteen datasets as they lie on everybody's disk, datasets of one's own,
few-shot subsets, descriptions, images.

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
import uuid
from typing import NamedTuple

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from torchvision import transforms as T
from tqdm import tqdm


class Item(NamedTuple):
    source: str                    # path of an image file
    label: int


class Dataset(NamedTuple):
    class_names: list              # index = label; as CLIP reads them, without underscores
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


def load_dataset(name, root=None, seed=1):
    """Read a dataset: one of DATASETS under `root`, or a folder of one's own.

    name: a key of DATASETS in any spelling of NAMES; or an existing folder (`read_own`), which
    needs a path separator where a known dataset has the same name. root: the folder of the known
    ones (default: the environment's DATA, else ./data). seed: only for a split made here
    (`split_folders`). Returns a Dataset. Raises ValueError for an unknown name or a file with the
    wrong content, and FileNotFoundError for what is missing; both say in one line what to do.
    """
    name = os.fspath(name)
    known = NAMES.get(squashed(name))
    is_path = os.sep in name or "/" in name
    if is_path or (known is None and os.path.isdir(name)):
        return load_own(name, seed)
    if known is None:
        raise ValueError(unknown_name(name, root))

    row = DATASETS[known]
    root = ASSETS if known == "toy" else data_root(root)
    if not os.path.isdir(root):
        raise FileNotFoundError(f"data root {root} is missing; "
                                f"give --root or set DATA to the folder of {row.folder}/")
    folder = os.path.join(root, row.folder)
    with advised(f"images come from {row.source}, split files and layout from {GUIDE}"):
        if not os.path.isdir(folder):
            raise missing_dataset(known, root, folder)
        dataset = READERS[row.kind](row, folder, seed)
        notes = list(dataset.notes)
        if len(dataset.class_names) != row.classes:
            notes.append(f"{len(dataset.class_names)} classes found, the full dataset has "
                         f"{row.classes}: figures on it do not compare with published ones")
        return completed(dataset, known, folder, notes, os.path.join(folder, row.split))


def load_own(path, seed):
    """A dataset of one's own, from its folder: see `load_dataset` and `read_own`."""
    folder = os.path.abspath(os.path.expanduser(path))
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"the dataset's folder {path} does not exist")
    with advised(OWN_LAYOUT):
        dataset = read_own(folder, seed)
        notes = ["a dataset of one's own: its figures compare with nobody's", *dataset.notes]
        return completed(dataset, own_name(folder), folder, notes, folder)


def own_name(folder):
    """The folder's own name, safe as a folder's name, and never a known dataset's."""
    name = re.sub(r"[^\w.-]+", "-", os.path.basename(folder)).strip(".-")[:100]
    if not name:
        return "own"
    if squashed(name) in NAMES:
        return f"own-{name}"
    return name


def completed(dataset, name, folder, notes, split):
    """What a reader has returned, with names: the dataset's, and the classes' as CLIP reads them.

    ValueError, naming the file or folder `split`, where a class has no image to learn or test on,
    or there is one class alone.
    """
    class_names = [class_name.replace("_", " ") for class_name in dataset.class_names]
    if len(class_names) < 2:
        raise ValueError(f"{split} has one class alone, {class_names[0]!r}")
    for part, items in (("train", dataset.train), ("test", dataset.test)):
        present = {item.label for item in items}
        absent = [name for label, name in enumerate(class_names) if label not in present]
        if items and absent:
            raise ValueError(f"{split} has no {part} image of {', '.join(absent)}")
    return dataset._replace(class_names=class_names, name=name, folder=folder,
                            notes=[f"{name}: {note}" for note in notes])


def unknown_name(name, root):
    inside = os.path.join(data_root(root), name)
    if os.path.isdir(inside):
        return (f"unknown dataset {name!r}; for a dataset of your own give its folder: "
                f"--dataset {inside}")
    near = difflib.get_close_matches(name.lower(), DATASETS, n=3, cutoff=0.4)
    if near:
        return f"unknown dataset {name!r}; did you mean {' or '.join(near)}?"
    return f"unknown dataset {name!r}, and no folder; known: {', '.join(DATASETS)}"


def missing_dataset(name, root, folder):
    """The error for a dataset's folder that is not there, or has another of its names."""
    for other in subfolders(root):
        if NAMES.get(squashed(other)) == name:
            found = os.path.join(root, other)
            return Misplaced(f"{folder} is missing, but {found} is there: rename it to "
                             f"{os.path.basename(folder)}")
    return FileNotFoundError(f"{folder} is missing")


def data_root(root=None):
    return os.path.expanduser(root or os.environ.get("DATA") or "data")


class Misplaced(FileNotFoundError):
    """A file that is not where it belongs. The message says what to move: nothing is to be got."""


@contextlib.contextmanager
def advised(advice):
    """Adds to what a reader raises, the fact alone, what to do about it."""
    try:
        yield
    except Misplaced:
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; {advice}") from None
    except ValueError as error:
        raise ValueError(f"{error}; {advice}") from None


# -------------------------------------------------------------------------- readers: one per layout

# Each returns a Dataset that has no name yet.

def read_json_split(row, folder, seed):
    """A `split_zhou_*.json`; where it is missing and the field's recipe will do, an own split."""
    images = images_folder(row, folder)
    file = os.path.join(folder, row.split)
    if os.path.isfile(file):
        return read_split_file(file, [images], os.path.dirname(folder))
    error = not_there(f"{file} is missing", file, os.path.dirname(folder))
    if isinstance(error, Misplaced) or not row.own_split:
        raise error
    if not os.path.isdir(images):
        raise missing_images(images)
    class_folders, parts = split_folders(images, row.leave_out, seed)
    note = (f"{row.split} is missing, so an OWN SPLIT was made (seed {seed}): figures on it do not "
            f"compare with published ones; the field's split file: {GUIDE}")
    class_names = [row.rename.get(name, name) for name in class_folders]
    return parts._replace(class_names=class_names, notes=[note])


def read_split_file(file, folders, top):
    """`{"train": [[path, label, class name], ...], "val": [...], "test": [...]}`.

    Paths are relative to the first of `folders` that has some of them. top: where to look for
    images that are not there.
    """
    split = read_json_object(file)
    names = names_of_split(split, file)

    # Some were written on Windows.
    paths = {part: [row[0].replace("\\", "/") for row in split[part]] for part in SPLIT}
    images = folders[-1]
    for folder in reversed(folders):
        if any(os.path.exists(os.path.join(folder, path)) for path in paths["train"][:20]):
            images = folder
    prefix, first = "", paths["train"][0]
    if not os.path.exists(os.path.join(images, first)):
        prefix = needless_prefix(first, images)
    parts = {part: [] for part in SPLIT}
    for part in SPLIT:
        for path, (_, label, _) in zip(paths[part], split[part]):
            source = os.path.join(images, path.removeprefix(prefix))
            parts[part].append(Item(source, label))
    check_images([item.source for part in SPLIT for item in parts[part]], file, top)
    return Dataset([names[label] for label in range(len(names))], **parts)


SPLIT = ("train", "val", "test")


def names_of_split(split, file):
    """dict label -> class name. ValueError where `split` has not the form of `read_split_file`."""
    names = {}
    for part in SPLIT:
        if not isinstance(split.get(part), list):
            raise ValueError(f"{file} must have three lists: train, val and test")
        for i, row in enumerate(split[part]):
            if not isinstance(row, list) or [type(value) for value in row] != [str, int, str]:
                raise ValueError(f"{file}: row {i} of {part} is {str(row)[:80]}, "
                                 "expected [path, label, class name]")
            _, label, class_name = row
            known = names.setdefault(label, class_name)
            if known != class_name:
                raise ValueError(f"{file}: label {label} is called both {known!r} and "
                                 f"{class_name!r}")
    if not split["train"] or not split["test"]:
        raise ValueError(f"{file}: train or test is empty")
    for label in range(len(names)):
        if label not in names:
            raise ValueError(f"{file}: labels must run from 0 to {len(names) - 1} without a gap, "
                             f"label {label} is not there")
    return names


def needless_prefix(path, images):
    """What stands before the paths of a split that name the images folder themselves, else "".

    "data/eurosat/2750/River/River_7.jpg", for images in .../2750, gives "data/eurosat/2750/".
    """
    before, folder, _ = path.rpartition(f"{os.path.basename(images)}/")
    return before + folder


def split_folders(images, leave_out, seed):
    """The field's recipe for folder-per-class sets: 50 % train, 20 % val, the rest test.

    Classes are sorted by folder, their sorted images shuffled with `random.Random(seed)`. Returns
    the class folders' names and a Dataset.
    """
    rng = random.Random(seed)
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
        rng.shuffle(items)
        n_train = round(0.5 * len(items))
        n_val = round(0.2 * len(items))
        train += items[:n_train]
        val += items[n_train:n_train + n_val]
        test += items[n_train + n_val:]
    return class_folders, Dataset(class_folders, train, val, test)


def read_aircraft(row, folder, seed):
    """variants.txt: class names, line order = label; images_variant_<part>.txt: `id variant`."""
    images, top = images_folder(row, folder), os.path.dirname(folder)
    class_names = read_lines(os.path.join(folder, row.split), top)
    labels = {class_name: label for label, class_name in enumerate(class_names)}
    parts = []
    for part in ("train", "val", "test"):
        file = os.path.join(folder, f"images_variant_{part}.txt")
        items = []
        for line in read_lines(file, top):
            image_id, _, variant = line.partition(" ")
            if variant not in labels:
                raise ValueError(f"{file}: variant {variant!r} of image {image_id} is not in "
                                 f"{row.split}")
            items.append(Item(os.path.join(images, image_id + ".jpg"), labels[variant]))
        check_images([item.source for item in items], file, top)
        parts.append(items)
    return Dataset(class_names, *parts)


def read_imagenet(row, folder, seed):
    """images/{train,val}/<wnid>/; label = place among classnames.txt's sorted wnids; test = val."""
    images = images_folder(row, folder)
    names, notes = read_classnames(row, folder)
    wnids = sorted(names)
    top = os.path.dirname(folder)
    train = read_class_folders(os.path.join(images, "train"), wnids, names, row.split, top)
    test = read_class_folders(os.path.join(images, "val"), wnids, names, row.split, top)
    return Dataset([names[wnid] for wnid in wnids], train, [], test, notes)


def read_variant(row, folder, seed):
    """The test-only ImageNet variants: a folder per wnid (all, or 200) or number (ImageNetV2)."""
    images = images_folder(row, folder)
    names, notes = read_classnames(row, folder)
    if row.kind == "wnids":
        class_folders = sorted(names)
    elif row.kind == "numbered":                            # label = line of classnames.txt
        names = {str(label): class_name for label, class_name in enumerate(names.values())}
        class_folders = list(names)
    else:  # labels 0..199 among the wnids that are there
        if not os.path.isdir(images):
            raise missing_images(images)
        class_folders = [wnid for wnid in subfolders(images) if wnid in names]
        if not class_folders:
            raise FileNotFoundError(f"{images} has no class folders")
    test = read_class_folders(images, class_folders, names, row.split, os.path.dirname(folder))
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
    for line in read_lines(file, os.path.dirname(folder)):
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


VALPREP = "https://raw.githubusercontent.com/soumith/imagenetloader.torch/master/valprep.sh"


def read_class_folders(images, class_folders, names, listed_in, top, named=()):
    """Items of one part, label = index in class_folders.

    No class may be missing, nor a wnid or number unknown: labels would shift. names: class folder
    -> class name, of all that `listed_in` has. top, named: as in `not_there`.
    """
    present = []
    if os.path.isdir(images):
        present = subfolders(images)
        if not present and list_images(images):
            raise Misplaced(f"{images} is flat: its images lie there without class folders; sort "
                            "them into one folder per class (for ImageNet's val run there: "
                            f"{VALPREP})")
    missing = [name for name in class_folders if name not in present]
    if missing:
        fact = (f"{images}: {len(missing)} of {len(class_folders)} class folders are missing, the "
                f"first: {missing[0]} ({names[missing[0]]})")
        raise not_there(fact, os.path.join(images, missing[0]), top, named)
    unknown = [name for name in present if name not in names and re.fullmatch(r"n?\d+", name)]
    if unknown:
        raise ValueError(f"{images}: class folder {unknown[0]} is not in {listed_in}")
    items = []
    for label, name in enumerate(class_folders):
        items += [Item(path, label) for path in image_files(os.path.join(images, name))]
    return items


# --------------------------------------------------------------------------- a dataset of one's own

OWN_LAYOUT = ("a dataset of your own is a folder per class; or train/ and test/ (and val/) with a "
              "folder per class each; or images and a split.json in the field's format")
OWN_PARTS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


def read_own(folder, seed):
    """Any of the layouts of OWN_LAYOUT."""
    split = os.path.join(folder, "split.json")
    if os.path.isfile(split):
        folders = [os.path.join(folder, "images"), folder]
        return read_split_file(split, folders, os.path.dirname(folder))
    inside = subfolders(folder)
    parts = own_parts(folder, inside)
    if parts:
        return read_own_parts(parts, folder)
    if not inside and list_images(folder):
        raise ValueError(f"{folder} has images without class folders")
    if inside and set(inside) <= set(itertools.chain(*OWN_PARTS.values())):
        raise ValueError(f"{folder} has {' and '.join(inside)}, but no class folders in train/")
    if len(inside) == 1:
        only = os.path.join(folder, inside[0])
        if subfolders(only):
            raise Misplaced(f"{folder} has one folder alone, {inside[0]}: if the classes lie in "
                            f"it, give --dataset {only}")
        raise ValueError(f"{folder} has one class folder alone, {inside[0]}: two are the least")
    class_folders, parts = split_folders(folder, (), seed)
    note = (f"an own split was made (seed {seed}): half of each class's images train, 20 % val, "
            "the rest test")
    class_names = [own_class_name(name) for name in class_folders]
    return parts._replace(class_names=class_names, notes=[note])


def own_class_name(folder):
    """A class folder's name without the number that fixes its place: 001.Black_footed_Albatross."""
    return re.sub(r"^(\d{3,}\.|\d+\.(?=\D))\s*(?=.)", "", folder)


def own_parts(folder, inside):
    """dict "train", "val", "test" -> folder, where a train/ has class folders; else {}."""
    parts = {}
    for part, names in OWN_PARTS.items():
        for name in names:
            if name in inside:
                parts.setdefault(part, os.path.join(folder, name))
    if "train" not in parts or not subfolders(parts["train"]):
        return {}
    return parts


def read_own_parts(parts, folder):
    """train/ and test/ (and val/), with the same folder per class each."""
    notes = []
    if "test" not in parts:
        if "val" not in parts:
            raise FileNotFoundError(f"{folder} has train/, but no test/")
        parts = {"train": parts["train"], "test": parts["val"]}
        notes.append("it has no test/, so it is tested on its validation images")
    class_folders = subfolders(parts["train"])
    names = {name: own_class_name(name) for name in class_folders}
    items = {"val": []}
    for part, images in parts.items():
        unknown = sorted(set(subfolders(images)) - set(names))
        if unknown:
            raise ValueError(f"{images}: class folder {unknown[0]} is not in {parts['train']}")
        items[part] = read_class_folders(images, class_folders, names, "train/",
                                         os.path.dirname(folder), parts.values())
    return Dataset(list(names.values()), items["train"], items["val"], items["test"], notes)


# ---------------------------------------------------------------------------- files and folders

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")


def images_folder(row, folder):
    """The first of the row's images folders that is there (and has folders, where mirrors differ).

    Where none is, the first: what is missing in it is found out, and told, by who reads it.
    """
    candidates = [os.path.join(folder, name) if name else folder for name in row.images]
    for path in candidates:
        if os.path.isdir(path) and (len(candidates) == 1 or subfolders(path)):
            return path
    return candidates[0]


def missing_images(images):
    """The error for a missing images folder, where no file says what should lie in it."""
    folder = os.path.dirname(images)
    others = subfolders(folder)
    if len(others) != 1:
        return FileNotFoundError(f"{images} is missing")
    other = os.path.join(folder, others[0])
    return Misplaced(f"{images} is missing, but {other} is there: if it holds the images, "
                     f"rename it to {os.path.basename(images)}")


def subfolders(folder):
    """Sorted names of the folders in `folder`, without hidden ones (.git, __MACOSX)."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries
                      if not entry.name.startswith((".", "__")) and entry.is_dir())


def list_images(folder):
    """Sorted names of the images in a folder, without hidden ones (._x.jpg)."""
    return sorted(name for name in os.listdir(folder)
                  if name.lower().endswith(EXTENSIONS) and not name.startswith("."))


def image_files(folder):
    """Sorted paths of the images in a folder. FileNotFoundError where there are none."""
    names = list_images(folder)
    if not names:
        raise FileNotFoundError(f"folder {folder} holds no images")
    return [os.path.join(folder, name) for name in names]


def pictures_in(path):
    """The image files that a path names, sorted: itself, or those in a folder.

    FileNotFoundError for none.
    """
    if os.path.isdir(path):
        return image_files(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} does not exist")
    return [path]


def check_images(paths, file, top):
    """FileNotFoundError unless all `paths`, named by the split file `file`, are there.

    One listing a folder: asking for each file is slow over a network. top: where to look for them
    instead.
    """
    listings, missing = {}, []
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in listings:
            listings[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in listings[folder]:
            missing.append(path)
    if missing:
        fact = (f"{file} names {len(paths)} images, {len(missing)} of them missing, the first: "
                f"{missing[0]}")
        raise not_there(fact, missing[0], top, set(listings))


def read_lines(file, top):
    """The lines of a text file, without blank ones. top: where to look if it is not there."""
    if not os.path.isfile(file):
        raise not_there(f"{file} is missing", file, top)
    try:
        with open(file, encoding="utf-8-sig") as f:
            lines = [line.strip() for line in f if line.strip()]
    except UnicodeDecodeError as error:
        reason = f"{error.reason} at byte {error.start}"
        raise ValueError(f"{file} is not UTF-8 text ({reason})") from None
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


# What is missing is often there, one folder off: Kaggle's Stanford Cars has cars_train/cars_train/,
# some have EuroSAT_RGB/ for 2750/, or .JPG for .jpg. Then nothing is to be unpacked again.

LOOSE = 2       # parts of a path, the dataset's folder and the images', that may have any name


def not_there(fact, path, top, named=()):
    """The error for a missing `path`: Misplaced where it is near, else FileNotFoundError.

    Looks in the folder `top` and below. named: folders that belong where they are, so that none
    is taken for the missing one under another name.
    """
    try:
        parts = pathlib.Path(path).relative_to(top).parts
    except ValueError:                                      # not below top
        parts = ()
    if ".." in parts:                                       # out of it again
        parts = ()
    for i, part in enumerate(parts):
        here = os.path.join(top, *parts[:i])
        if not os.path.isdir(here):
            break
        loose = i < LOOSE < len(parts) and not has_named(here, part, named)
        move = near(here, part, parts[i + 1:], loose)
        if move:
            return Misplaced(f"{fact}; {move}")
    return FileNotFoundError(fact)


def has_named(here, part, named):
    """Does `here` have one of the `named` folders, beside the one that is called `part`?"""
    for folder in named:
        if not str(folder).startswith(os.path.join(here, "")):
            continue
        child = pathlib.Path(folder).relative_to(here).parts[0]
        if child != part and os.path.isdir(os.path.join(here, child)):
            return True
    return False


def near(here, part, rest, loose):
    """How here/part/rest could come to be there, where `part` alone is amiss; None for not at all.

    rest: the parts behind it, () where `part` is the file's own name. loose: any other name will
    do. A class's folder must only differ in case and the like: its neighbour has files of the same
    names.
    """
    wanted = os.path.join(here, part)
    folders = [name for name in subfolders(here) if name != part]
    alike = [name for name in sorted(os.listdir(here))
             if name != part and same_but_case(name, part, rest)]
    if loose and rest:
        alike += folders
    for other in alike:                         # Images/ for images/, x.JPG for x.jpg
        found = os.path.join(here, other)
        if os.path.exists(os.path.join(found, *rest)):
            return rename(found, wanted, rest)
    for other in folders:                       # cars_train/cars_train/
        found = os.path.join(here, other)
        if os.path.exists(os.path.join(found, part, *rest)):
            return f"it is one folder deeper: move what is in {found} up into {here}"
    if loose and rest and os.path.exists(os.path.join(here, *rest)):
        found = os.path.join(here, rest[0])
        return f"it is one folder higher: move {found}, and what belongs beside it, into {wanted}"
    return None


def same_but_case(name, other, rest):
    """Do two names differ in case, `-`, `_`, spaces alone; or two images' in the extension too?"""
    if squashed(name) == squashed(other):
        return True
    stem, extension = os.path.splitext(name)
    other_stem, other_extension = os.path.splitext(other)
    both_images = extension.lower() in EXTENSIONS and other_extension.lower() in EXTENSIONS
    return not rest and both_images and squashed(stem) == squashed(other_stem)


def rename(found, wanted, rest):
    if os.path.isdir(wanted):
        return f"it is in {found}: move what is in there into {wanted}"
    name = os.path.basename(wanted)
    if rest or not name.lower().endswith(EXTENSIONS):
        return f"{found} is there: rename it to {name}"
    return f"{found} is there: rename it to {name}, and the others like it"


# ------------------------------------------------------------------------- few-shot, base and novel

def few_shot(train, val, shots=16, seed=1):
    """CoOp's own picks for this seed: `shots` train and min(shots, 4) val items of every class.

    Do it over all classes, before base and novel are cut apart: both draw from one stream, in the
    order in which labels first appear. A class with fewer images gives all it has. Returns (train
    items, val items).
    """
    if shots < 1:
        raise ValueError(f"shots must be at least 1, not {shots}")
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
    return [Item(item.source, new[item.label]) for item in items if item.label in new]


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
    names = dataset.class_names
    base, novel = list(range(len(names))), []
    if classes == "base":
        base, novel = split_base_novel(names)
        if len(novel) < 2:
            raise ValueError(f"{dataset.name} has {len(names)} classes, and one side of base and "
                             "novel would have one alone, which is no choice: --classes all")
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


# ---------------------------------------------------------------------------- descriptions

SHIPPED = os.path.join(ASSETS, "descriptions")


def default_descriptions(name):
    """Path of the description file that comes with the project; FileNotFoundError for none."""
    path = os.path.join(SHIPPED, f"{name}.json")
    if not os.path.isfile(path):
        dataset = name if name in DATASETS else "PATH"
        raise FileNotFoundError(
            f"no descriptions come with {name}: make some with `python data.py describe --dataset "
            f"{dataset} --model M`, and give the file with --descriptions FILE (JSON, class -> "
            "sentences); --template plain and atprompt need none")
    return path


def load_descriptions(path, class_names, max_descriptions=10, aliases=None, notes=None,
                      write_aliases=True):
    """Sentences that answer "What does a {Class} look like?", from JSON: class name -> sentences.

    A class's key is the one that `match_keys` finds. The first `max_descriptions` sentences in
    file order are taken, fewer where a class has fewer; those without a letter or digit do not
    count. Keys of no class are ignored. aliases: class -> key of the file, for names that do not
    match; a dict, or the path of such a JSON file. notes: a list that gets what a user should
    know; None where nobody wants it. write_aliases: whether an aliases file to fill is written
    for what does not match, see `aliases_to_fill`. Returns a list (C) of lists of str. Raises
    ValueError naming the file and the class.
    """
    if max_descriptions < 1:
        raise ValueError(f"--max-descriptions must be at least 1, not {max_descriptions}")
    with advised("expected class name -> list of sentences"):
        found = read_json_object(path)
    given = {} if aliases is None else read_aliases(aliases)
    chosen, by_words = match_keys(class_names, found, given, path)
    missing = [name for name in dict.fromkeys(class_names) if name not in chosen]
    if missing:
        raise unmatched(path, missing, class_names, given, found, write_aliases)

    sentences, skipped = {}, 0
    for key in dict.fromkeys(chosen.values()):
        sentences[key], without_words = sentences_of(found[key], key, path)
        skipped += without_words
    if notes is not None and skipped:
        notes.append(f"{path}: {skipped} sentences without a letter or digit were skipped")
    if notes is not None and by_words:
        notes.append(f"{path}: {by_words} of {len(class_names)} class names were matched by their "
                     "words, in another order or with other signs between them")
    return [sentences[chosen[name]][:max_descriptions] for name in class_names]


def unmatched(path, missing, class_names, given, keys, write_aliases):
    """The error for classes without a key: the first ten, how many more, and what to do."""
    listed = []
    for name in missing[:10]:
        near = closest(name, keys)
        listed.append(f"{name} (closest: {', '.join(near)})" if near else name)
    if len(missing) > 10:
        listed.append(f"and {len(missing) - 10} more")
    todo = None
    if write_aliases:
        todo = aliases_to_fill(path, missing, given, keys)
    if todo is None:
        todo = "add them, or give --aliases FILE with {class: key of the description file}"
    return ValueError(f"{path}: no description of {len(missing)} of {len(class_names)} classes: "
                      f"{'; '.join(listed)}; {todo}")


def sentences_of(value, key, path):
    """The sentences of a class, in one line each; and how many were left out as none at all."""
    if not isinstance(value, list) or not all(isinstance(sentence, str) for sentence in value):
        raise ValueError(f"{path}: {key!r} must have a list of sentences, not "
                         f"{json.dumps(value)[:60]}")
    kept = [" ".join(sentence.split()) for sentence in value if any(map(str.isalnum, sentence))]
    if not kept:
        raise ValueError(f"{path}: the list of {key!r} is empty; write a sentence that answers "
                         f"\"What does a {key} look like?\"")
    return kept, len(value) - len(kept)


def plain(name):
    """A name as it is compared: in lower case, with `_`, `-` and spaces alike."""
    return re.sub(r"[\s_-]+", " ", str(name)).strip().lower()


@functools.lru_cache(maxsize=10_000)            # all names are compared with all keys
def words(text):
    """Its words and numbers in lower case, sorted: "apse (indoor)" has those of "indoor apse"."""
    return tuple(sorted(re.findall(r"[^\W_]+", text.lower())))


def joined_words(text):
    """The same, with what signs part as one word: "Ram C/V" and "Ram CV" have the same."""
    return words(re.sub(r"[^\w\s-]", "", text))


def match_keys(class_names, found, aliases, path):
    """Which key of a description file is whose: dict class name -> key, of the names that match.

    A key is a class's if the class's alias names it; else if it is the same as `plain` sees it;
    else if it alone has the same words, and no other class has. Two classes of one name
    (ImageNet's missiles) share a key. Returns the dict, and how many names matched by their
    words.
    """
    keys = {}
    for key in found:
        keys.setdefault(plain(key), key)
    chosen = {}
    for name in dict.fromkeys(class_names):
        alias = aliases.get(plain(name))
        if alias is not None and plain(alias) not in keys:
            raise ValueError(f"{path} has no key {alias!r}, which the aliases give for {name!r}")
        key = keys.get(plain(name if alias is None else alias))
        if key is not None:
            chosen[name] = key
    by_name = len(chosen)
    if by_name < len(set(class_names)):
        for form in (words, joined_words):
            chosen |= match_form(form, class_names, keys, chosen)
    return chosen, len(chosen) - by_name


def match_form(form, class_names, keys, chosen):
    """dict name -> key, for names without one whose `form` one free key has, and no other name."""
    taken = set(chosen.values())
    keys_of = group_by(form, keys.values())
    names_of = group_by(form, {plain(name): name for name in class_names}.values())
    matched = {}
    for name in class_names:
        own = keys_of.get(form(name), [])
        alone = form(name) and len(own) == 1 and len(names_of[form(name)]) == 1
        if name not in chosen and alone and own[0] not in taken:
            matched[name] = own[0]
    return matched


def group_by(function, values):
    """dict function(value) -> list of those values."""
    groups = {}
    for value in values:
        groups.setdefault(function(value), []).append(value)
    return groups


def read_aliases(aliases):
    """dict plain class name -> key, without those still empty. aliases: see `load_descriptions`."""
    if not isinstance(aliases, dict):
        path = aliases
        with advised("expected class name -> key of the description file"):
            aliases = read_json_object(path)
            for class_name, key in aliases.items():
                if not isinstance(key, str):
                    raise ValueError(f"{path}: {class_name!r} has {json.dumps(key)[:60]}, "
                                     "not a key")
    return {plain(class_name): key for class_name, key in aliases.items() if key.strip()}


def closest(name, keys, cutoff=0.6):
    """Up to two keys that resemble a class name: by more than half of its words, or by spelling.

    cutoff: how much alike a spelling must be, up to 1 for the same; None: by words alone, which is
    quick.
    """
    own = set(words(name))
    near = [key for key in keys if len(own.intersection(words(key))) > len(own) / 2]
    if len(near) < 2 and cutoff is not None:
        spelt = {plain(key): key for key in keys}
        near += [spelt[key] for key in difflib.get_close_matches(plain(name), spelt, 2, cutoff)]
    return list(dict.fromkeys(near))[:2]


def aliases_to_fill(path, missing, given, keys):
    """Writes aliases-<description file's name>.json to the current directory, for a user to fill.

    missing: class names, which get the closest of the keys or "". given: the aliases of this run,
    which go in as well. A file that is there already stays as it is. Returns what to do, as text;
    None where nothing can be written here.
    """
    file = pathlib.Path(f"aliases-{pathlib.Path(path).stem}.json")
    if file.exists():
        return (f"fill {file}, which is there already (class -> key of the description file; "
                f"remove it to have it written anew), and give --aliases {file}")
    content = dict(given)
    for i, name in enumerate(missing):
        cutoff = 0.8 if i < 50 else None                    # accordion is no scorpion
        near = closest(name, keys, cutoff)
        content[name] = near[0] if near else ""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    try:
        with written_aside(file) as aside:
            aside.write_text(text, encoding="utf-8", errors="backslashreplace")
    except (OSError, ValueError):                           # the other advice is better than none
        return None
    return (f"{file} was written with all of them and the closest keys: correct it, fill it, and "
            f"give --aliases {file}")


# ---------------------------------------------------------------------------- images

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def train_transform(resolution):
    """PIL RGB -> crop (3, R, R), uint8: random resized crop and horizontal flip (S2.2)."""
    bicubic = T.InterpolationMode.BICUBIC
    return T.Compose([T.RandomResizedCrop(resolution, scale=(0.08, 1.0), interpolation=bicubic),
                      T.RandomHorizontalFlip(), T.PILToTensor()])


def test_transform(resolution):
    """PIL RGB -> crop (3, R, R), uint8: shorter edge to R, centre crop."""
    return T.Compose([T.Resize(resolution, interpolation=T.InterpolationMode.BICUBIC),
                      T.CenterCrop(resolution), T.PILToTensor()])


def normalize(crops, device=None):
    """Crops (..., 3, R, R) uint8 -> what CLIP reads: float32, by its training images' mean and std.

    device: where they go first, still uint8, a quarter of the memory (default: they stay).
    """
    if device is not None:
        crops = crops.to(device, non_blocking=True)
    mean, std = _mean_and_std(crops.device)
    return (crops.float() / 255 - mean) / std


@functools.lru_cache(maxsize=8)                 # so that no training step waits for the GPU
def _mean_and_std(device):
    """CLIP's, (3, 1, 1) each. (torchvision's normalize reads a value back from the GPU.)"""
    return [torch.tensor(values, device=device).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD)]


class BadImage(ValueError):
    """An image that cannot be read. One line, also where a worker wraps it in its traceback."""

    def __init__(self, message):
        super().__init__(message.strip().splitlines()[-1].split("BadImage: ")[-1])


def load_image(path):
    """An image file as PIL RGB, whatever its mode on disk (grey of 8 or 16 bits, CMYK, palette).

    Raises BadImage, a ValueError, for a missing, corrupt or truncated file: never skipped, since
    that would change the few-shot set.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # I;16, I;16B, I: PIL would clip them to white
                image = from_16_bits(image)
            return image.convert("RGB")
    # SyntaxError: a broken PNG
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise BadImage(f"image {path} cannot be read ({reason}); mend it or unpack it again, it is "
                       "not skipped") from None


def from_16_bits(image):
    """A grey PIL image of 16 bits, also where PIL keeps them in 32, scaled to 8."""
    grey = np.asarray(image).astype(np.int64).clip(0, 65535)
    return Image.fromarray((grey // 256).astype(np.uint8))


class Images(torch.utils.data.Dataset):
    """images[epoch, i] -> (crop (3, R, R) uint8, label) of item i.

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
        path, label = self.items[i]
        image = load_image(path)
        if self.seed is None:
            return self.transform(image), label
        mixed = int(np.random.SeedSequence((self.seed, epoch, i)).generate_state(1)[0])
        # torchvision's transforms draw from the global generator; torch.manual_seed would reseed
        # CUDA's as well.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mixed)
            return self.transform(image), label


ENCODE_BATCH = 256                  # images that go through the frozen image tower at a time


def loader(images, epochs=(0,), batch_size=ENCODE_BATCH, workers=0, device="cpu"):
    """Batches of crops (B, 3, R, R) uint8 and labels (B,), in item order, an epoch after the other.

    One DataLoader, and so one set of worker processes, for the whole run: where there are workers
    they read on into the next epoch while the steps of this one run. To go through once. No batch
    spans two epochs. workers: None: 8 or fewer where device, where the crops go, is a GPU of CUDA,
    else none. Going through it raises BadImage.
    """
    on_cuda = torch.device(device).type == "cuda"
    if workers is None:
        workers = min(8, os.cpu_count() or 1) if on_cuda else 0
    n = len(images)
    batches = ([(epoch, i) for i in range(start, min(start + batch_size, n))]
               for epoch in epochs for start in range(0, n, batch_size))
    return torch.utils.data.DataLoader(
        images, batch_sampler=batches, num_workers=workers, pin_memory=on_cuda,
        generator=torch.Generator())                        # leaves the global one alone


def epoch_features(images, epochs, encode, device, keep_crops=False, kept=None, workers=None):
    """f_I(x) of each epoch's crops, by the frozen image tower, which is the same for every method.

    Yields for each of `epochs`, a sequence of numbers, f (n, d), as encode gives it but in float32,
    or None; and crops (n, 3, R, R), uint8 on the CPU, or None. Both are in item order.

    images: an `Images`. encode: a function normalised images (B, 3, R, R) on `device`, CLIP's ->
    (B, d), not normalised; or None where nobody needs f. keep_crops: whether the crops are needed
    (MaPLe). kept: a `KeptFeatures`, or None; the f of an epoch that stands there is read, and its
    images are opened for their crops alone. workers: see `loader`. Raises BadImage.
    """
    to_load = [epoch for epoch in epochs if keep_crops or kept is None or not kept.has(epoch)]
    if to_load:
        batches = iter(loader(images, to_load, workers=workers, device=device))
    for epoch in epochs:
        f = kept.read(epoch) if kept is not None else None
        own = []                                            # the batches of this epoch
        if epoch in to_load:
            own = itertools.islice(batches, math.ceil(len(images) / ENCODE_BATCH))
        elif f is None:                                     # what was kept turns out damaged
            own = loader(images, [epoch], workers=workers, device=device)

        new, crops = through_tower(own, encode if f is None else None, device, keep_crops)
        if new is not None:
            f = new
            if kept is not None:
                kept.write(epoch, f)
        if f is not None:
            f = f.to(device).float()
        yield f, crops


@torch.no_grad()
def through_tower(batches, encode, device, keep_crops):
    """encode of the crops of these batches, (n, d), or None without it; and the crops, or None."""
    features, crops = [], []
    for crop, _ in batches:
        if keep_crops:
            crops.append(crop)
        if encode is not None:
            features.append(encode(normalize(crop, device)))
    features = torch.cat(features) if features else None
    crops = torch.cat(crops) if crops else None
    return features, crops


class KeptFeatures:
    """Image features in a folder, for who comes next with the same CLIP, images and seed.

    A file an epoch, about 1 kB an image in float16 and 2 kB in float32. Its name is a digest of
    all that the features depend on: of `what` (CLIP, precision), the transform and the versions of
    the libraries that carry it out, the seed, the epoch, and path, size and time of every image. A
    file that is damaged or of something else is not believed.
    """

    def __init__(self, folder, what, images):
        self.folder = pathlib.Path(folder)
        stats = [os.stat(item.source) for item in images.items]
        rows = [[str(item.source), stat.st_size, stat.st_mtime_ns]
                for item, stat in zip(images.items, stats)]
        versions = [PIL.__version__, torchvision.__version__]       # two Pillows, two crops
        self.what = digest([what, repr(images.transform), versions, images.seed, rows])
        self.n = len(rows)

    def path(self, epoch):
        return self.folder / f"{digest([self.what, epoch])}.npz"

    def has(self, epoch):
        return self.path(epoch).is_file()

    def read(self, epoch):
        """(n, d) float32, or None where there is no sound file."""
        try:
            # A zip: it checks its checksums.
            with np.load(self.path(epoch), allow_pickle=False) as file:
                features, what = torch.from_numpy(file["features"]), str(file["what"])
        except Exception:                       # numpy has many words for a flipped bit
            return None
        if what != self.path(epoch).stem or features.dim() != 2 or len(features) != self.n:
            return None
        return features.float()

    def write(self, epoch, features):
        features = features.cpu()
        if features.dtype == torch.bfloat16:                                # numpy has none
            features = features.float()
        with written_aside(self.path(epoch)) as aside, open(aside, "wb") as file:
            np.savez(file, features=features.numpy(), what=self.path(epoch).stem)


# ---------------------------------------------------------------------------- writing

@contextlib.contextmanager
def written_aside(path):
    """Gives a name beside `path` to write to, and renames it at the end: nobody sees half a file.

    On any failure the old file stays as it was. Raises OSError saying what could not be written.
    """
    path = pathlib.Path(path)
    aside = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:12]}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        reason = " ".join(str(error).split())
        raise OSError(f"could not write {path} ({reason}); what was finished before is kept: make "
                      "room or choose another place, then run the same command again") from error
    finally:
        with contextlib.suppress(OSError):                  # there may be no such folder
            aside.unlink()


# ---------------------------------------------------------------------- command line: what is there

def inventory(root):
    """Prints a line per dataset: found, or what is missing."""
    if not os.path.isdir(root):
        raise FileNotFoundError(f"data root {root} is missing; "
                                "give --root or set DATA to the folder of the datasets")
    for name in DATASETS:
        try:
            line = found_line(load_dataset(name, root))
        except (ValueError, OSError) as error:
            line = "-      " + " ".join(str(error).split())
        print(f"{name:16}{line}", flush=True)


def found_line(dataset):
    names = dataset.class_names
    base, novel = split_base_novel(names)
    line = (f"found  {len(names):4} classes ({len(base)} base, {len(novel)} novel)  "
            f"{len(dataset.train):7} train  {len(dataset.test):6} test images  "
            f"{described(dataset)}")
    for note in dataset.notes:
        line += f" [{note.removeprefix(dataset.name + ': ')}]"
    return " ".join(line.splitlines())


def described(dataset):
    """In words, whether the project has descriptions of a dataset's classes."""
    if not dataset.train:
        return "test only"
    try:
        file = default_descriptions(dataset.name)
        load_descriptions(file, dataset.class_names, write_aliases=False)
        return "descriptions found"
    except FileNotFoundError:
        return "no descriptions"
    except (ValueError, OSError) as error:
        return " ".join(str(error).split())


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


def describe(name, root, model, base_url=None, output=None, per_class=10):
    """Ask an OpenAI-compatible server for `per_class` sentences a class; write after each class.

    name: as `load_dataset` takes it. output: the file; default: where `default_descriptions`
    looks, and descriptions-NAME.json in the current directory for a dataset of one's own. Classes
    that the file already has are kept, so an interrupted run resumes. The key comes from the
    environment's OPENAI_API_KEY and is never written or printed. Raises ValueError, OSError.
    """
    client = openai_client(base_url)
    if per_class < 1:
        raise ValueError(f"--per-class must be at least 1, not {per_class}")
    dataset = load_dataset(name, root)
    if output is None:
        output = f"descriptions-{dataset.name}.json"
        if dataset.name in DATASETS:
            output = os.path.join(SHIPPED, f"{dataset.name}.json")

    found = {}
    if os.path.isfile(output):
        with advised("expected class name -> list of sentences"):
            found = read_json_object(output)
    found = {class_name: sentences for class_name, sentences in found.items() if sentences}
    done = {plain(class_name) for class_name in found}
    every = list(dict.fromkeys(dataset.class_names))
    wanted = [class_name for class_name in every if plain(class_name) not in done]
    bar = tqdm(wanted, desc=f"describing {dataset.name}", unit="class")
    for class_name in bar:
        bar.set_postfix_str(class_name)
        form = FORM.format(n=per_class, neighbours=", ".join(neighbours(class_name, every)))
        try:
            found[class_name] = ask(client, model, class_name, form, per_class)
        except ValueError as error:
            raise ValueError(f"{class_name}: {error} (at {base_url or 'OpenAI'}); start again to "
                             f"resume, {output} keeps what is done") from None
        with written_aside(output) as aside:
            aside.write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
    print(f"{output}: {len(found)} classes, {len(wanted)} of them new")


def openai_client(base_url):
    """A client of the server at `base_url` (None: OpenAI's). ValueError where something lacks."""
    try:
        import openai
    except ImportError:
        raise ValueError("describe needs the openai client: pip install openai") from None
    key = api_key()
    if not key and not base_url:
        raise ValueError("set OPENAI_API_KEY, or give --base-url of a server that needs no key")
    return openai.OpenAI(api_key=key or "none", base_url=base_url, timeout=120)


def api_key():
    return os.environ.get("OPENAI_API_KEY", "").strip()


def neighbours(class_name, class_names, n=6):
    """Up to n other classes it may be taken for: those that share words, then those beside it."""
    own, at = set(words(class_name)), class_names.index(class_name)
    others = [name for name in class_names if name != class_name]
    by_distance = sorted(others, key=lambda name: abs(class_names.index(name) - at))
    by_distance.sort(key=lambda name: -len(own & set(words(name))))     # a stable sort
    return by_distance[:n]


def ask(client, model, class_name, form, per_class):
    """Up to `per_class` sentences on a class. ValueError where no answer, or no sentence, comes."""
    import openai

    sentences = []
    for _ in range(3):                                      # a model may give fewer than asked for
        try:
            answer = client.chat.completions.create(model=model, messages=[
                {"role": "system", "content": form},
                {"role": "user", "content": QUERY.format(class_name)}])
        except openai.OpenAIError as error:
            reason = " ".join(str(error).split())
            if api_key():
                reason = reason.replace(api_key(), "***")
            raise ValueError(f"the server does not answer ({reason})") from None
        choices = getattr(answer, "choices", None)  # a server's web page comes back as a str
        text = choices[0].message.content if choices else ""
        sentences += read_answer(text or "")
        sentences = list(dict.fromkeys(sentences))[:per_class]
        if len(sentences) == per_class:
            break
    if not sentences:
        raise ValueError(f"{model} gave no sentence in three answers; try another --model, and see "
                         "that --base-url is the API's (it mostly ends in /v1)")
    return sentences


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


def parse(argv):
    parser = argparse.ArgumentParser(
        description="What is under the data root; or make a description file.")
    parser.add_argument(
        "--root",
        help="folder that holds the datasets (default: the environment's DATA, else ./data)")
    command = parser.add_subparsers(dest="command").add_parser(
        "describe", help="make a description file",
        description="Make a description file with an OpenAI-compatible server; its key comes from "
                    "the environment's OPENAI_API_KEY.")
    command.add_argument(
        "--dataset", required=True, metavar="NAME",
        help="whose classes to describe; or the folder of a dataset of your own")
    command.add_argument(
        "--root", default=argparse.SUPPRESS,
        help="folder that holds the datasets (default: the environment's DATA, else ./data)")
    command.add_argument("--model", required=True, help="the server's name of the model")
    command.add_argument(
        "--base-url", default=os.environ.get("OPENAI_BASE_URL"),
        help="e.g. http://localhost:8000/v1 (default: the environment's OPENAI_BASE_URL, else "
             "OpenAI)")
    command.add_argument(
        "--output",
        help="file to write, or to complete: classes that it has are kept (default: "
             "assets/descriptions/DATASET.json; of a dataset of your own: descriptions-NAME.json)")
    command.add_argument(
        "--per-class", type=int, default=10,
        help="sentences for each class that the file has not yet (default: 10)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    try:
        if args.command == "describe":
            describe(args.dataset, args.root, args.model, args.base_url, args.output,
                     args.per_class)
        else:
            inventory(data_root(args.root))
        return 0
    except KeyboardInterrupt:
        print("data.py: stopped; what is finished is kept", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"data.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
