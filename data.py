"""Data: the field's fifteen datasets as they lie on everybody's disk, datasets of one's own,
few-shot subsets, descriptions, images; and what runs leave on the disk.

Paper S2.1 (datasets) and S2.2.1 (descriptions). The folder layout, the split files and the
few-shot picks are those of CoOp's data guide, so that `--root` points at what a lab already has;
nothing is ever written there.

    python data.py --root $DATA                  what is found, what is missing, and where to get it
    python data.py describe --dataset NAME ...   ask an LLM for a description file

What differs between datasets stands in one table, DATASETS; the readers below it know only kinds
of layout. They raise the fact; `load_dataset`, which calls them, adds where to get what is missing.
"""

import argparse
import collections
import contextlib
import csv
import difflib
import errno
import functools
import glob
import hashlib
import itertools
import json
import math
import os
import pathlib
import random
import re
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

ASSETS = os.path.join(os.path.dirname(__file__), "assets")
GUIDE = "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md"
# The guide's links to Stanford Cars and SUN397 are dead; the authors keep all but ImageNet here.
MIRROR = "HuggingFace dataset zhengli97/prompt_learning_dataset"
PHOTO = "a photo of a {}."


class Row(NamedTuple):
    folder: str                    # under the root
    images: tuple                  # under the folder; where mirrors differ, several
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
        "imagenet", ("images/val",), "imagenet", "classnames.txt", 1000, PHOTO,
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
        "imagenetv2", ("imagenetv2-matched-frequency-format-val", "imagenetv2", ""), "imagenet",
        "classnames.txt", 1000, PHOTO, "https://github.com/modestyachts/ImageNetV2"),
    "imagenet_sketch": Row(
        "imagenet-sketch", ("images", "sketch"), "imagenet", "classnames.txt", 1000, PHOTO,
        "https://github.com/HaohanWang/ImageNet-Sketch"),
    "imagenet_a": Row(
        "imagenet-adversarial", ("imagenet-a",), "imagenet", "classnames.txt", 200, PHOTO,
        "https://github.com/hendrycks/natural-adv-examples"),
    "imagenet_r": Row(
        "imagenet-rendition", ("imagenet-r",), "imagenet", "classnames.txt", 200, PHOTO,
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
    ones (default: the environment's DATA, else ./data). Returns a Dataset. Raises ValueError, which
    says in one line what is wrong or missing, where, and where to get it.
    """
    # A folder of one's own, an unknown name, or one of the fifteen?
    name = str(name)
    known = NAMES.get(squashed(name))
    if os.path.dirname(name) or (known is None and os.path.isdir(name)):
        folder = pathlib.Path(os.path.abspath(os.path.expanduser(name)))
        known = own_name(folder)
        advice, read = OWN_LAYOUT, read_own
    elif known is None:
        raise ValueError(f"unknown dataset {name!r}, and no folder; known: {', '.join(DATASETS)}")
    else:
        row = DATASETS[known]
        root = ASSETS if known == "toy" else root or os.environ.get("DATA") or "data"
        folder = pathlib.Path(os.path.expanduser(root), row.folder)
        advice = (f"give --root or set DATA to the folder of {row.folder}/; images come from "
                  f"{row.source}, split files and layout from {GUIDE}")
        read = functools.partial(READERS[row.kind], row)
    # The readers, and the operating system, say what is wrong; what to do is added here, once.
    try:
        return completed(read(folder), known, folder)
    except (OSError, ValueError) as error:
        fact = str(error)
        if isinstance(error, FileNotFoundError):
            fact = f"{error.strerror}: {error.filename}"
            # Does a file of that name lie elsewhere in the folder?
            name = glob.escape(os.path.basename(error.filename))
            for found in itertools.islice(folder.rglob(name), 1):
                fact += f"; one of that name lies at {found}"
        raise ValueError(f"{known}: {fact}; {advice}") from None


def completed(dataset, name, folder):
    """What a reader has returned, with the dataset's name, its classes' as CLIP reads them, notes.

    Raises ValueError where a class has no image to learn or test on, or there is one class alone.
    """
    own = name not in DATASETS
    class_names = [read_name(each, own) for each in dataset.class_names]
    # A class without images would shift what accuracy means. Some datasets are for testing alone.
    for items in (dataset.train or dataset.test, dataset.test):
        absent = set(range(len(class_names))) - {item.label for item in items}
        if absent or len(class_names) < 2:
            names = [class_names[label] for label in absent]
            raise ValueError(f"{folder} needs two classes or more, and an image of each to learn "
                             f"on and one to test on; it has {len(class_names)}, none of {names}")

    # What a reader of the figures must know.
    notes = list(dataset.notes)
    if own:
        for items in dataset[1:4]:
            items[:] = [item._replace(upright=True) for item in items]
        notes.append("a dataset of one's own: its figures compare with nobody's")
        notes += notes_on_own(class_names, dataset.train + dataset.test)
    elif len(class_names) != DATASETS[name].classes:
        notes.append(f"{len(class_names)} classes found, the full dataset has "
                     f"{DATASETS[name].classes}: figures on it do not compare with published ones")
    notes = [f"{name}: {note}" for note in notes]
    return Dataset(class_names, *dataset[1:4], notes, name, str(folder))


def notes_on_own(class_names, items):
    """What may be wrong with a dataset of one's own: a list of str."""
    notes = []
    numbers = [name for name in class_names if re.fullmatch(r"n?[\d\W_]+", name)]
    if numbers:
        notes.append(f"class names that are numbers, such as {numbers[0]!r}, tell CLIP nothing: "
                     "name the folders by what they show")
    for name, n in collections.Counter(map(str.lower, class_names)).items():
        if n > 1:
            notes.append(f"{n} classes have one name for CLIP, {name!r}: only the first can be "
                         "right")
    # Files beside the images, by their ending.
    endings = set()
    for folder in {pathlib.Path(item.source).parent for item in items}:
        endings |= {file.suffix.lower() for file in folder.glob("[!.]*.*")}
    left = sorted(endings - set(EXTENSIONS))
    if left:
        notes.append(f"files that are no pictures to it were left out: {', '.join(left)}")
    return notes


def read_name(name, own=True):
    """A class name as CLIP reads it: "001.Black_footed_Albatross" is "Black footed Albatross".

    Underscores are spaces. own: a number or a wnid in front, which fixes its place, is no name. The
    names of the field's datasets keep theirs ("2012 Acura RL Sedan").
    """
    if own:
        # "1 001.Black_footed_Albatross" (CUB's list), "n01440764 tench" (ImageNet's), "01_TUMOR"
        name = re.sub(r"^(\d+\s+(?=\d+[._]))?(n\d{8}[\s._-]+|\d+[._]+\s*)(?=\d*[^\W\d_])", "", name)
    return " ".join(name.replace("_", " ").split())


def own_name(folder):
    """The folder's own name, safe as a folder's name, and never a known dataset's."""
    name = re.sub(r"[^\w.-]+", "-", folder.name).strip(".-") or "own"
    return f"own-{name}" if squashed(name) in NAMES else name


# -------------------------------------------------------------------------- readers: one per layout

# Each returns a Dataset that has no name yet. folder: a pathlib.Path, the dataset's.

def read_json_split(row, folder):
    """A `split_zhou_*.json`; where it is missing and the field's recipe will do, an own split."""
    images, file = folder / row.images[0], folder / row.split
    if file.is_file() or not row.own_split:
        return read_split_file(file, [images])
    dataset = split_folders(images, row.leave_out)
    note = (f"{row.split} is missing, so an OWN SPLIT was made: figures on it do not compare with "
            f"published ones; the field's split file: {GUIDE}")
    class_names = [row.rename.get(name, name) for name in dataset.class_names]
    return dataset._replace(class_names=class_names, notes=[note])


SPLIT = ("train", "val", "test")


def read_split_file(file, places):
    """`{"train": [[path, label, class name], ...], "val": [...], "test": [...]}`.

    Paths are relative to the first of `places` that has the first training image.
    """
    split = read_json_object(file)
    named, parts = set(), []
    try:
        for part in SPLIT:
            items = []
            for path, label, class_name in split[part]:
                items.append(Item(str(path).replace("\\", "/"), label))     # Windows' as well
                named.add((label, str(class_name)))
            parts.append(items)
        first = parts[0][0].source
        labels, class_names = zip(*sorted(named))
        if labels != tuple(range(len(labels))):
            raise ValueError("labels must count from 0 without a gap, with one name each")
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{file} must have three lists, train, val and test, of [path, label, "
                         f"class name] ({error})") from None

    images = next((place for place in places if os.path.exists(place / first)), places[-1])
    for items in parts:
        items[:] = [item._replace(source=str(images / item.source)) for item in items]
        check_images(items, file)
    return Dataset(class_names, *parts)


def split_folders(images, leave_out=()):
    """The field's recipe for folder-per-class sets: 50 % train, 20 % val, the rest test.

    Classes are sorted by folder, their sorted images shuffled with `random.Random(1)`: one split
    for all seeds, as a split file is one. Returns a Dataset whose classes are the folders.
    """
    # One stream for all classes, in their order: the field's recipe, to the pick.
    rng = random.Random(1)
    class_folders = sorted(set(subfolders(images)) - set(leave_out))
    train = []
    val = []
    test = []
    for label, class_folder in enumerate(class_folders):
        items = [Item(path, label) for path in image_files(images / class_folder)]
        rng.shuffle(items)
        # 50, 20 and 30 %, rounded.
        n_train = round(0.5 * len(items))
        n_val = round(0.2 * len(items))
        train += items[:n_train]
        val += items[n_train:n_train + n_val]
        test += items[n_train + n_val:]
    return Dataset(class_folders, train, val, test)


def read_aircraft(row, folder):
    """variants.txt: class names, line order = label; images_variant_<part>.txt: `id variant`."""
    class_names = read_lines(folder / row.split)
    parts = []
    for part in SPLIT:
        file = folder / f"images_variant_{part}.txt"
        items = []
        for line in read_lines(file):
            image_id, variant = line.split(maxsplit=1)
            path = folder / row.images[0] / f"{image_id}.jpg"
            items.append(Item(str(path), class_names.index(variant)))
        check_images(items, file)
        parts.append(items)
    return Dataset(class_names, *parts)


def read_imagenet(row, folder):
    """ImageNet, a folder per wnid in images/{train,val}/ (test = val); and its variants.

    The variants are for testing alone: a folder per wnid (all, or 200) or number (ImageNetV2).
    """
    places = [folder / name for name in row.images]
    images = next(filter(os.path.isdir, places), places[0])
    names, present = read_classnames(row, folder), subfolders(images)
    class_folders = sorted(names.keys() & present)          # the file's own order says nothing
    if "0" in present:                                      # label = line of classnames.txt
        names = {str(line): name for line, name in enumerate(names.values())}
        class_folders = list(names)
    test, train = read_class_folders(images, class_folders), []
    if row.folder == "imagenet":
        train = read_class_folders(images.with_name("train"), class_folders)
    return Dataset([names[each] for each in class_folders], train, [], test)


READERS = {"json": read_json_split, "aircraft": read_aircraft, "imagenet": read_imagenet}


def read_classnames(row, folder):
    """classnames.txt, `wnid name with spaces` a line: dict wnid -> name, in file order.

    Two classes may share a name (missile, sunglasses): labels come from wnids, never from names.
    """
    files = [folder / row.split, folder.parent / "imagenet" / row.split]   # one is a copy
    file = next(filter(os.path.isfile, files), files[0])
    return dict(line.split(maxsplit=1) for line in read_lines(file))


def read_class_folders(images, class_folders):
    """Items of one part, label = index in class_folders.

    No class may be missing, nor a folder unknown: labels would shift.
    """
    wrong = sorted(set(class_folders) ^ set(subfolders(images)))
    if wrong:
        raise ValueError(f"{images}: {len(wrong)} class folders are missing or of no known class, "
                         f"the first: {wrong[0]}")
    items = []
    for label, name in enumerate(class_folders):
        items += [Item(path, label) for path in image_files(images / name)]
    return items


OWN_LAYOUT = ("a dataset of your own is a folder per class; or train/ and test/ (and val/) with a "
              "folder per class each; or images and one *split*.json in the field's format")
PARTS = {"train": "train", "training": "train", "test": "test", "testing": "test", "val": "val",
         "valid": "val", "validation": "val"}


def read_own(folder):
    """A dataset of one's own, in any of the layouts of OWN_LAYOUT."""
    # The field's: a split file, and images in one of three places.
    splits = sorted(folder.glob("*split*.json"))
    if len(splits) > 1:
        raise ValueError(f"{len(splits)} split files, leave one: {', '.join(map(str, splits))}")
    if splits:
        return read_split_file(splits[0], [folder / "images", folder / folder.name, folder])

    # train/ and test/ (and val/), by any of their names, with the same folder per class each. (A
    # class may be called train.)
    parts = {PARTS.get(name.lower()): folder / name for name in subfolders(folder)}
    if "train" in parts and ("test" in parts or subfolders(parts["train"])):
        class_folders = subfolders(parts["train"])
        items = {"train": [], "val": [], "test": []}
        for part in items.keys() & parts.keys():
            items[part] = read_class_folders(parts[part], class_folders)
        if items["test"]:
            return Dataset(class_folders, *items.values())
        note = "it has no test/, so it is tested on its validation images"
        return Dataset(class_folders, items["train"], [], items["val"], [note])

    # A folder per class.
    note = "an own split was made: half of each class's images train, 20 % val, the rest test"
    return split_folders(folder)._replace(notes=[note])


# ---------------------------------------------------------------------------- files and folders

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm",
              ".pgm", ".gif", ".avif", ".jp2", ".heic", ".heif")


def subfolders(folder):
    """Sorted names of the folders in `folder`, without hidden ones (.git, __MACOSX)."""
    return sorted(path.name for path in folder.iterdir()
                  if not path.name.startswith((".", "__")) and path.is_dir())


def image_files(folder, deep=False):
    """Sorted paths of the images in a folder, without hidden ones (._x.jpg).

    deep: those in its subfolders as well. ValueError where there are none.
    """
    found = sorted(str(path) for path in pathlib.Path(folder).glob("**/[!.]*" if deep else "[!.]*")
                   if path.suffix.lower() in EXTENSIONS)
    if not found:
        raise ValueError(f"folder {folder} holds no images")
    return found


def check_images(items, file):
    """FileNotFoundError unless all images of `items`, named by the split file `file`, are there."""
    paths = [pathlib.Path(item.source) for item in items]
    # One listing a folder: asking for each file is slow over a network.
    there = set()
    for folder in {path.parent for path in paths}:
        there.update(folder.glob("*"))
    absent = [path for path in paths if path not in there]
    if absent:
        fact = f"{file} names {len(paths)} images, {len(absent)} are missing, the first"
        raise FileNotFoundError(errno.ENOENT, fact, absent[0])


def read_lines(file):
    """The lines of a text file, without blank ones. ValueError for none."""
    try:
        text = pathlib.Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason})") from None
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    if not lines:
        raise ValueError(f"{file} is empty")
    return lines


def read_json_object(file):
    """A JSON object as a dict. ValueError for anything else."""
    try:
        with open(file, encoding="utf-8-sig") as f:
            return {**json.load(f)}
    except (ValueError, TypeError, RecursionError) as error:    # not JSON, not UTF-8, no object
        raise ValueError(f"{file} is no JSON object ({error})") from None


# ------------------------------------------------------------------------- few-shot, base and novel

def few_shot(items, shots=16, seed=1):
    """CoOp's own picks for this seed: `shots` training items of every class, or all it has.

    Do it over all classes, before base and novel are cut apart: they draw from one stream, in the
    order in which labels first appear.
    """
    # CoOp's generate_fewshot_dataset: one sample a class, in the order of their first images.
    rng = random.Random(seed)                               # the stream of random.seed(seed)
    picked = []
    for same_label in group_by(lambda item: item.label, items).values():
        if len(same_label) >= shots:
            same_label = rng.sample(same_label, shots)
        picked += same_label
    return picked


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


def few_shot_task(dataset, classes="base", shots=16, seed=1):
    """The `Task` of CoOp's picks of this seed, cut into base and novel classes.

    classes: "base", to learn on the first half; or "all", where none are novel. Raises ValueError
    where one side would have one class alone.
    """
    # Which classes are learnt on, and which are novel?
    names = dataset.class_names
    base, novel = split_base_novel(names)
    if classes == "all":
        base, novel = base + novel, []
    elif len(novel) < 2:
        raise ValueError(f"{dataset.name} has {len(names)} classes, and one side of base and novel "
                         "would have one alone, which is no choice: --classes all")
    # The picks are drawn over all classes, as CoOp draws them; then the base classes' are kept.
    train = take(few_shot(dataset.train, shots, seed), base)
    notes = list(dataset.notes)
    counts = collections.Counter(item.label for item in train)
    scarce = sum(n < shots for n in counts.values())
    if scarce:
        notes.append(f"{scarce} of {len(base)} classes have fewer than {shots} training images")
    return Task(names[:len(base)], names[len(base):], train, take(dataset.test, base),
                take(dataset.test, novel), notes)


def digests(dataset, task):
    """What a result depends on, in short: a digest each of class names, training and test images.

    An image counts by its path below the dataset's folder, which may be moved, and its label.
    """
    def of(items):
        return digest([(os.path.relpath(item.source, dataset.folder), item.label)
                       for item in items])
    return {"class names": digest([task.base_names, task.novel_names]),
            "training images": of(task.train),
            "test images": digest([of(task.test_base), of(task.test_novel)])}


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
    are ignored. Returns a list (C) of lists of str. Raises ValueError naming the file and the
    classes that it has nothing for.
    """
    # Files differ in case, order and signs: "apse (indoor)", "indoor apse".
    found = read_json_object(path)
    keys = group_by(words, found)
    # All classes are gone through before anything is raised: one run names all that is wrong.
    chosen, wrong = [], []
    for name in class_names:
        own = keys.get(words(name)) or keys.get(words(CUPL_NAMES.get(name, name)), [])
        sentences = []
        if len(own) == 1 and isinstance(found[own[0]], list):
            given = [each for each in found[own[0]] if isinstance(each, str) and words(each)]
            sentences = [" ".join(each.split()) for each in given]
        if not sentences:
            wrong.append(f"{name} (keys: {own or difflib.get_close_matches(name, found, 2)})")
        chosen.append(sentences[:max_descriptions])
    if wrong:
        raise ValueError(f"{path}: {len(wrong)} of {len(chosen)} classes have no key, or not one "
                         f"alone, with a list of sentences: {'; '.join(wrong)}")
    return chosen


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
    crops = crops.to(device, non_blocking=True)
    mean, std = _mean_and_std(tuple(preprocess["mean"]), tuple(preprocess["std"]), crops.device)
    return (crops.float() / 255 - mean) / std


@functools.cache                                # so that no training step waits for the GPU
def _mean_and_std(mean, std, device):
    """(2, 3, 1, 1). (torchvision's normalize reads a value back from the GPU.)"""
    return torch.tensor([mean, std], device=device).view(2, 3, 1, 1)


class BadImage(ValueError):
    """An image that cannot be read. One line, also where a worker wraps it in its traceback."""

    def __init__(self, message):
        super().__init__(message.rpartition("BadImage: ")[2].strip())


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
    except Exception as error:                  # decoders have many words for a broken file
        raise BadImage(f"image {path} cannot be read ({error!r})") from None


def check_pictures(items):
    """Opens every image file. Raises BadImage that names all those that cannot be read."""
    bad = []
    for item in tqdm(items, "opening pictures", disable=None):
        try:
            load_image(item.source, item.upright)
        except BadImage as error:
            bad.append(str(error))
    if bad:
        raise BadImage(f"{len(bad)} pictures cannot be read; mend or remove them: {'; '.join(bad)}")


class Images(torch.utils.data.Dataset):
    """images[epoch, i] -> (crop (3, H, W) uint8, label) of item i.

    The augmentation depends on (seed, epoch, i) alone, not on workers or order, and the global
    generator stays as it was.
    """

    def __init__(self, items, transform, seed=0):
        self.items = items
        self.transform = transform
        self.seed = seed

    def __len__(self):
        return len(self.items)

    def __getitem__(self, epoch_and_i):
        epoch, i = epoch_and_i
        item = self.items[i]
        image = load_image(item.source, item.upright)
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
    # [(epoch, i), ...] of each batch: an image's chance comes from these two numbers alone.
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
    to_load = list(epochs)
    if kept and not keep_crops:
        to_load = [epoch for epoch in epochs if kept.read(epoch) is None]
    n_batches = math.ceil(len(images) / ENCODE_BATCH)
    if to_load:
        batches = iter(loader(images, to_load, workers=workers))
    for epoch in epochs:
        f = kept.read(epoch) if kept else None
        crops, new = [], []
        if epoch in to_load:
            own = itertools.islice(batches, n_batches)      # the batches of this epoch
            for crop, _ in tqdm(own, "images", n_batches, leave=False, disable=None):
                if keep_crops:
                    crops.append(crop)
                # The frozen tower, in large batches.
                if f is None and encode is not None:
                    with torch.no_grad():
                        new.append(encode(crop).float())    # (B, d)
        if new:
            f = torch.cat(new)
            if kept:
                kept.write(epoch, f)
        yield f, torch.cat(crops) if crops else None


class KeptFeatures:
    """Image features in a folder, for the next run with the same CLIP, images and seed.

    A file an epoch, 2 kB an image of 512 features. Its name is a digest of all that they depend on:
    `what` (CLIP, precision), the transform and the versions of the libraries that carry it out, the
    seed, the epoch, and path, size and time of every image. One that is damaged is made anew.
    """

    def __init__(self, folder, what, images):
        self.folder = pathlib.Path(folder)
        # A picture that was changed in place has another size or time.
        rows = []
        for item in images.items:
            stat = os.stat(item.source)
            rows.append([item.source, item.upright, stat.st_size, stat.st_mtime_ns])
        # Two Pillows, two crops.
        self.what = digest([what, PIL.__version__, torchvision.__version__,
                            repr(images.transform), images.seed, rows])

    def path(self, epoch):
        return self.folder / f"{digest([self.what, epoch])}.npz"

    def read(self, epoch):
        """(n, d) float32, or None where there is no sound file."""
        try:
            with np.load(self.path(epoch)) as file:         # a zip: it checks its checksums
                return torch.from_numpy(file["features"])
        except Exception:                       # numpy has many words for a flipped bit
            return None

    def write(self, epoch, features):
        """Keeps f (n, d) of this epoch."""
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
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.part{path.suffix}")
    try:
        yield aside
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())                         # else a power cut leaves it empty
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise OSError(f"could not write {path} ({error}); what was finished before is kept: make "
                      "room or choose another place, then run the same command again") from error
    finally:
        aside.unlink(missing_ok=True)


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


def check_unchanged(path, saved, now, advice):
    """Raises ValueError where settings or digests `now` are not those a file was made with."""
    changed = [name for name, value in now.items() if saved.get(name) != value]
    if changed:
        raise ValueError(f"{path} was made with other {' and '.join(changed)} than there are now; "
                         f"{advice}")


def folder_name(kind, changed):
    """`coop-anchoropt,epochs=1,tau=0.5`: every setting that is off its default, sorted by name.

    No two settings share a name: values are %-escaped as in a URL, and what would be too long for a
    file system ends in a digest of the whole.
    """
    # Where nothing is off its default, this is all of it.
    name = kind
    for key, value in sorted(changed.items()):
        name += f",{key}={urllib.parse.quote(str(value), safe='')}"
    return name if len(name) <= 200 else f"{name[:180]},{digest(name)}"


@contextlib.contextmanager
def only_process(folder, wait, what):
    """Holds a folder for this process alone, as long as the process lives.

    wait: another process that holds it is waited for; else BlockingIOError says that it is at work.
    Raises the operating system's OSError where the folder cannot be written to: before anything is
    learnt.
    """
    # The operating system holds the lock: it goes with the process, however that ends.
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock")
    try:
        held = lock.acquire(blocking=False)
    except filelock.Timeout:
        at_work = f"{what}: another process is at work on it in {folder}"
        if not wait:
            raise BlockingIOError(f"{at_work}; wait for it, or choose another --output") from None
        print(at_work, flush=True)
        held = lock.acquire()
    with held:
        # What processes have left that were killed while they wrote.
        for litter in folder.glob(".*.part*"):
            litter.unlink(missing_ok=True)
        yield


# ---------------------------------------------------------------------- command line: what is there

def inventory(root):
    """Prints a line per dataset: found, or what is missing."""
    for name in DATASETS:
        try:
            dataset = load_dataset(name, root)
            line = (f"{len(dataset.class_names):4} classes {len(dataset.train):7} train "
                    f"{len(dataset.test):6} test images  {'; '.join(dataset.notes)}")
        except ValueError as error:
            line = f"   - {error}"
        print(f"{name:16}{line}")


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
    never written or printed. Raises ValueError, OSError and ImportError.
    """
    import openai                   # pip install openai

    key = os.environ.get("OPENAI_API_KEY", "").strip() or "none"        # own servers need none
    client = openai.OpenAI(api_key=key, base_url=args.base_url)

    dataset = load_dataset(args.dataset, args.root)
    output = args.output or f"descriptions-{dataset.name}.json"
    found = read_json_object(output) if os.path.isfile(output) else {}
    for name in tqdm(dataset.class_names, output, unit="class"):
        if words(name) in map(words, filter(found.get, found)):     # an empty list is filled
            continue
        # The paper's question, and a word on the answer's form that names what it must differ from.
        others = set(dataset.class_names) - {name}
        neighbours = ", ".join(difflib.get_close_matches(name, others, 6, 0))
        form = FORM.format(n=args.per_class, neighbours=neighbours)
        try:
            answer = client.chat.completions.create(model=args.model, messages=[
                {"role": "system", "content": form},
                {"role": "user", "content": QUERY.format(name)}])
            sentences = read_answer(answer.choices[0].message.content)
            if not sentences:
                raise ValueError("no sentence in its answer")
        except Exception as error:                          # servers answer in many strange ways
            reason = str(error).replace(key, "***")[:200]
            raise ValueError(f"{name}: nothing from {args.model} at {client.base_url} "
                             f"({reason}); the key is read from OPENAI_API_KEY; the same command "
                             f"goes on from here, {output} keeps what is done") from None
        found[name] = sentences[:args.per_class]
        save_json(output, found)
    print(f"saved {output}")


def read_answer(text):
    """The sentences of an answer, one a line, without a model's thoughts, numbering, headings."""
    # A chat template may hold the <think> already; an answer that was cut off has no </think>.
    text = text.rpartition("</think>")[2].partition("<think>")[0]
    sentences = []
    for line in text.splitlines():
        line = re.sub(r"^\s*([-*\u2022]|\d+[.)])\s+", "", line).strip(' \t"*')
        if len(line.split()) > 2 and not line.endswith(":"):
            sentences.append(line)
    return sentences


def main(argv=None):
    parser = argparse.ArgumentParser(description="What is under the data root; or make a "
                                                 "description file.")
    parser.add_argument("command", nargs="?", choices=["describe"],
                        help="make a description file with an OpenAI-compatible server, whose key "
                             "is in the environment's OPENAI_API_KEY")
    parser.add_argument("--root", metavar="DIR", help="folder that holds the datasets (default: "
                                                      "the environment's DATA, else ./data)")
    parser.add_argument("--dataset", default="toy", metavar="NAME",
                        help="whose classes to describe; or the folder of a dataset of your own")
    parser.add_argument("--model", help="the server's name of the model")
    parser.add_argument("--base-url", default=os.environ.get("OPENAI_BASE_URL"),
                        help="e.g. http://localhost:8000/v1 (default: the environment's "
                             "OPENAI_BASE_URL, else OpenAI)")
    parser.add_argument("--output", help="file to write, or to complete: classes that it has "
                                           "are kept (default: descriptions-NAME.json)")
    parser.add_argument("--per-class", type=int, default=10,
                        help="sentences for each class that the file has not yet (default: 10)")
    args = parser.parse_args(argv)
    try:
        if args.command:
            describe(args)
        else:
            inventory(args.root)
    except KeyboardInterrupt:
        parser.exit(130, "data.py: stopped; what is finished is kept\n")
    except (ValueError, OSError, ImportError) as error:
        parser.exit(2, f"data.py: {' '.join(str(error).split())}\n")


if __name__ == "__main__":
    main()
