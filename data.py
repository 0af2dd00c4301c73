"""Data: the field's fifteen datasets as they lie on everybody's disk, few-shot subsets, descriptions, images.

Paper S2.1 (datasets) and S2.2.1 (descriptions). The folder layout, the split files and the
few-shot picks are those of CoOp's data guide, so that `--root` points at what a lab already has; nothing
is ever written there.

    python data.py --root $DATA                  what is found, what is missing, and where to get it
    python data.py describe --dataset NAME ...   ask an LLM for a description file

What differs between datasets stands in one table, DATASETS; the readers below it know only kinds of layout.
"""

import argparse
import collections
import contextlib
import difflib
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
import zipfile
import zlib
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision import transforms as T
from tqdm import tqdm


class Item(NamedTuple):
    source: str                    # path of an image file
    label: int


class Dataset(NamedTuple):
    name: str
    folder: str                    # where it lies; paths of images are told from here
    class_names: list              # index = label; as CLIP reads them, without underscores
    train: list                    # of Item; train and val are empty for test-only sets
    val: list
    test: list
    notes: list                    # why figures on it do not compare with published ones; [] where they do


# ------------------------------------------------------------------------------------------ the table

ASSETS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets")
GUIDE = "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md"


class Row(NamedTuple):
    folder: str                    # under the root
    images: tuple                  # under the folder; the first that exists (mirrors differ)
    kind: str                      # which reader, see READERS
    split: str                     # the file that fixes classes or split
    classes: int                   # how many the full dataset has
    prompt: str                    # the field's hand-written zero-shot prompt
    source: str                    # where the images come from; GUIDE has the split files
    own_split: bool = False        # may a missing split file be replaced by one of our own?
    leave_out: tuple = ()          # own split: folders that are no class
    rename: dict = {}              # own split: folder -> class name


PHOTO = "a photo of a {}."
DATASETS = {
    "imagenet": Row("imagenet", ("images",), "imagenet", "classnames.txt", 1000, PHOTO, "https://image-net.org"),
    "caltech101": Row(
        "caltech-101", ("101_ObjectCategories",), "json", "split_zhou_Caltech101.json", 100, PHOTO,
        "https://data.caltech.edu/records/mzrjq-6wc02", own_split=True, leave_out=("BACKGROUND_Google", "Faces_easy"),
        rename={"airplanes": "airplane", "Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike"}),
    "oxford_pets": Row(
        "oxford_pets", ("images",), "json", "split_zhou_OxfordPets.json", 37, "a photo of a {}, a type of pet.",
        "https://www.robots.ox.ac.uk/~vgg/data/pets/"),
    "stanford_cars": Row("stanford_cars", ("",), "json", "split_zhou_StanfordCars.json", 196, PHOTO, GUIDE),
    "oxford_flowers": Row(
        "oxford_flowers", ("jpg",), "json", "split_zhou_OxfordFlowers.json", 102, "a photo of a {}, a type of flower.",
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"),
    "food101": Row(
        "food-101", ("images",), "json", "split_zhou_Food101.json", 101, "a photo of {}, a type of food.",
        "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/", own_split=True),
    "fgvc_aircraft": Row(
        "fgvc_aircraft", ("images",), "aircraft", "variants.txt", 100, "a photo of a {}, a type of aircraft.",
        "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/"),
    "sun397": Row(
        "sun397", ("SUN397",), "json", "split_zhou_SUN397.json", 397, PHOTO,
        "https://vision.princeton.edu/projects/2010/SUN/"),
    "dtd": Row(
        "dtd", ("images",), "json", "split_zhou_DescribableTextures.json", 47, "{} texture.",
        "https://www.robots.ox.ac.uk/~vgg/data/dtd/", own_split=True),
    "eurosat": Row(
        "eurosat", ("2750",), "json", "split_zhou_EuroSAT.json", 10, "a centered satellite photo of {}.",
        "https://github.com/phelber/EuroSAT", own_split=True,
        rename={"AnnualCrop": "Annual Crop Land", "HerbaceousVegetation": "Herbaceous Vegetation Land",
                "Highway": "Highway or Road", "Industrial": "Industrial Buildings", "Pasture": "Pasture Land",
                "PermanentCrop": "Permanent Crop Land", "Residential": "Residential Buildings", "SeaLake": "Sea or Lake"}),
    "ucf101": Row(
        "ucf101", ("UCF-101-midframes",), "json", "split_zhou_UCF101.json", 101, "a photo of a person doing {}.", GUIDE),
    # Test only: the four ImageNet variants of domain generalisation (Tab. 4).
    "imagenetv2": Row(
        "imagenetv2", ("imagenetv2-matched-frequency-format-val", "imagenetv2", ""), "numbered", "classnames.txt", 1000,
        PHOTO, "https://github.com/modestyachts/ImageNetV2"),
    "imagenet_sketch": Row(
        "imagenet-sketch", ("images", "sketch"), "wnids", "classnames.txt", 1000, PHOTO,
        "https://github.com/HaohanWang/ImageNet-Sketch"),
    "imagenet_a": Row(
        "imagenet-adversarial", ("imagenet-a",), "some wnids", "classnames.txt", 200, PHOTO,
        "https://github.com/hendrycks/natural-adv-examples"),
    "imagenet_r": Row(
        "imagenet-rendition", ("imagenet-r",), "some wnids", "classnames.txt", 200, PHOTO,
        "https://github.com/hendrycks/imagenet-r"),
    "toy": Row("toy", ("images",), "json", "split_toy.json", 48, PHOTO, "this repository"),     # under assets/
}


def load_dataset(name, root=None, seed=1):
    """Read dataset `name` (a key of DATASETS) under `root` (default: the environment's DATA, else ./data).

    seed: only for a split made here because the field's split file is missing (see `own_split`).
    Returns a Dataset. Raises ValueError for an unknown name or a file with the wrong content, and
    FileNotFoundError for what is missing; both say in one line what to do.
    """
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=3, cutoff=0.4)
        raise ValueError(f"unknown dataset {name!r}; " + (f"did you mean {' or '.join(near)}?" if near else
                                                          f"known: {', '.join(DATASETS)}"))
    row = DATASETS[name]
    root = ASSETS if name == "toy" else data_root(root)
    folder = os.path.join(root, row.folder)
    if not os.path.isdir(root):
        raise FileNotFoundError(f"data root {root} is missing; give --root or set DATA to the folder of {row.folder}/")
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder} is missing; images from {row.source}, laid out as in {GUIDE}")
    class_names, train, val, test, notes = READERS[row.kind](row, folder, seed)
    class_names = [class_name.replace("_", " ") for class_name in class_names]
    untrained = sorted(set(range(len(class_names))) - {item.label for item in train}) if train else []
    if untrained:
        raise ValueError(f"{os.path.join(folder, row.split)}: no train image of "
                         f"{', '.join(class_names[label] for label in untrained)}; get the split again as {GUIDE} says")
    if len(class_names) != row.classes:
        notes.append(f"{len(class_names)} classes found, the full dataset has {row.classes}: "
                     "figures on it do not compare with published ones")
    return Dataset(name, folder, class_names, train, val, test, [f"{name}: {note}" for note in notes])


def data_root(root=None):
    return os.path.expanduser(root or os.environ.get("DATA") or "data")


# ---------------------------------------------------------------- readers: one per kind of layout
# Each takes (row, folder, seed) and returns class names, train, val, test and notes.

def read_json_split(row, folder, seed):
    """`{"train": [[path, label, class name], ...], "val": [...], "test": [...]}`, paths relative to the images."""
    images = images_folder(row, folder)
    file = os.path.join(folder, row.split)
    if not os.path.isfile(file):
        if not row.own_split:
            raise FileNotFoundError(f"{file} is missing; download it as {GUIDE} says (no split is made up for this dataset)")
        return own_split(row, images, seed)
    again = f"download it again as {GUIDE} says"
    split = read_json_object(file, again)
    if not all(isinstance(split.get(part), list) for part in ("train", "val", "test")):
        raise ValueError(f"{file} must have three lists: train, val and test; {again}")
    names, parts = {}, []
    for part in ("train", "val", "test"):
        items = []
        for i, entry in enumerate(split[part]):
            if not isinstance(entry, list) or [type(value) for value in entry] != [str, int, str]:
                raise ValueError(f"{file}: row {i} of {part} is {str(entry)[:80]}, expected [path, label, class name]")
            path, label, class_name = entry
            if names.setdefault(label, class_name) != class_name:
                raise ValueError(f"{file}: label {label} is called both {names[label]!r} and {class_name!r}")
            items.append(Item(os.path.join(images, path), label))
        parts.append(items)
    if not parts[0] or not parts[2]:
        raise ValueError(f"{file}: train or test is empty; {again}")
    if sorted(names) != list(range(len(names))):
        gap = next(label for label in range(len(names)) if label not in names)
        raise ValueError(f"{file}: labels must run from 0 to {len(names) - 1} without a gap, label {gap} is not there")
    check_images([item.source for items in parts for item in items], file, row)
    return [names[label] for label in range(len(names))], *parts, []


def own_split(row, images, seed):
    """The field's recipe for folder-per-class sets: classes sorted by folder, 50% train, 20% val, the rest test."""
    rng = random.Random(seed)
    class_folders = [name for name in subfolders(images) if name not in row.leave_out]
    train, val, test = [], [], []
    for label, class_folder in enumerate(class_folders):
        items = [Item(path, label) for path in image_files(os.path.join(images, class_folder))]
        if len(items) < 4:
            raise ValueError(f"{os.path.join(images, class_folder)}: {len(items)} images are too few to split into "
                             f"train, val and test; unpack it again from {row.source}")
        rng.shuffle(items)
        n_train, n_val = round(0.5 * len(items)), round(0.2 * len(items))
        train += items[:n_train]
        val += items[n_train:n_train + n_val]
        test += items[n_train + n_val:]
    if not class_folders:
        raise FileNotFoundError(f"{images} has no class folders; unpack the images from {row.source}")
    note = (f"{row.split} is missing, so an OWN SPLIT was made (seed {seed}): figures on it do not compare with "
            f"published ones; the field's split file: {GUIDE}")
    return [row.rename.get(name, name) for name in class_folders], train, val, test, [note]


def read_aircraft(row, folder, seed):
    """variants.txt: class names, line order = label; images_variant_{train,val,test}.txt: `<id> <variant>`."""
    images = images_folder(row, folder)
    class_names = read_lines(os.path.join(folder, row.split), row)
    labels = {class_name: label for label, class_name in enumerate(class_names)}
    parts = []
    for part in ("train", "val", "test"):
        file, items = os.path.join(folder, f"images_variant_{part}.txt"), []
        for line in read_lines(file, row):
            image_id, _, variant = line.partition(" ")
            if variant not in labels:
                raise ValueError(f"{file}: variant {variant!r} of image {image_id} is not in {row.split}")
            items.append(Item(os.path.join(images, image_id + ".jpg"), labels[variant]))
        check_images([item.source for item in items], file, row)
        parts.append(items)
    return class_names, *parts, []


def read_imagenet(row, folder, seed):
    """images/{train,val}/<wnid>/; label = place among the sorted wnids of classnames.txt; test = val, no val."""
    images, names = images_folder(row, folder), read_classnames(row, folder)
    train, test = (read_class_folders(row, os.path.join(images, part), sorted(names), names) for part in ("train", "val"))
    return [names[wnid] for wnid in sorted(names)], train, [], test, []


def read_variant(row, folder, seed):
    """The test-only ImageNet variants: a folder per wnid (all, or 200 of them) or per number (ImageNetV2)."""
    images, names = images_folder(row, folder), read_classnames(row, folder)
    class_folders = sorted(names)                              # "wnids"
    if row.kind == "numbered":                                 # label = line of classnames.txt
        names = {str(label): class_name for label, class_name in enumerate(names.values())}
        class_folders = list(names)
    elif row.kind == "some wnids":                             # labels 0..199 among the wnids that are there
        class_folders = [wnid for wnid in subfolders(images) if wnid in names]
        if not class_folders:
            raise FileNotFoundError(f"{images} has no class folders; unpack the images from {row.source}")
    return [names[name] for name in class_folders], [], [], read_class_folders(row, images, class_folders, names), []


def pictures_in(path):
    """The image files that a path names: itself, or those in a folder, sorted. FileNotFoundError for none."""
    if os.path.isdir(path):
        return image_files(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} does not exist")
    return [path]


READERS = {"json": read_json_split, "aircraft": read_aircraft, "imagenet": read_imagenet,
           "wnids": read_variant, "some wnids": read_variant, "numbered": read_variant}


def read_classnames(row, folder):
    """classnames.txt, `wnid name with spaces` a line. Returns dict wnid -> name, in file order.

    Two classes may share a name (missile, sunglasses): labels come from wnids, never from names.
    """
    file = os.path.join(folder, row.split)
    shared = os.path.join(os.path.dirname(folder), "imagenet", row.split)      # the guide copies it from there
    file = shared if os.path.isfile(shared) and not os.path.isfile(file) else file
    names = {}
    for line in read_lines(file, row):
        wnid, _, class_name = line.partition(" ")
        if not class_name.strip() or wnid in names:
            raise ValueError(f"{file}: line {line!r} has no class name or repeats a wnid; download it again as {GUIDE} says")
        names[wnid] = class_name.strip()
    return names


def read_class_folders(row, images, class_folders, names):
    """Items of one part, label = index in class_folders. No class may be missing or unknown: labels would shift."""
    if not os.path.isdir(images):
        raise FileNotFoundError(f"{images} is missing; images from {row.source}, laid out as in {GUIDE}")
    present = set(subfolders(images))
    missing = [name for name in class_folders if name not in present]
    if missing:
        raise FileNotFoundError(
            f"{images}: {len(missing)} of {len(class_folders)} class folders are missing, the first: {missing[0]} "
            f"({names[missing[0]]}); unpack the images from {row.source}, one folder per class as in {GUIDE}")
    unknown = sorted(name for name in present - set(names) if re.fullmatch(r"n?\d+", name))
    if unknown:
        raise ValueError(f"{images}: class folder {unknown[0]} is not in {row.split}; get {row.split} again as {GUIDE} says")
    return [Item(path, label) for label, name in enumerate(class_folders)
            for path in image_files(os.path.join(images, name))]


# --------------------------------------------------------------------------- files and folders

def images_folder(row, folder):
    candidates = [os.path.join(folder, name) if name else folder for name in row.images]
    for path in candidates:
        if os.path.isdir(path) and (len(candidates) == 1 or subfolders(path)):
            return path
    raise FileNotFoundError(f"{candidates[0]} is missing; unpack the images from {row.source} there, as in {GUIDE}")


def subfolders(folder):
    """Sorted names of the folders in `folder`, without hidden ones (.git, __MACOSX)."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if not e.name.startswith((".", "__")) and e.is_dir())


def image_files(folder):
    """Sorted paths of the images in a class folder: other and hidden files (.DS_Store, ._x.jpg) left out."""
    extensions = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
    files = [f for f in sorted(os.listdir(folder)) if f.lower().endswith(extensions) and not f.startswith(".")]
    if not files:
        raise FileNotFoundError(f"folder {folder} holds no images; unpack it again")
    return [os.path.join(folder, f) for f in files]


def check_images(paths, file, row):
    """Are all `paths`, named by the split file `file`, there? One listing a folder: a stat each is slow over NFS."""
    listings, missing = {}, []
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in listings:
            listings[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in listings[folder]:
            missing.append(path)
    if missing:
        raise FileNotFoundError(f"{file} names {len(paths)} images, {len(missing)} of them missing, the first: "
                                f"{missing[0]}; unpack the images again from {row.source}")


def read_lines(file, row):
    if not os.path.isfile(file):
        raise FileNotFoundError(f"{file} is missing; get it from {row.source} or as {GUIDE} says")
    with open(file, encoding="utf-8-sig") as f:
        lines = [line.strip() for line in f if line.strip()]
    if not lines:
        raise ValueError(f"{file} is empty; get it again from {row.source} or as {GUIDE} says")
    return lines


def read_json_object(file, advice):
    try:
        with open(file, encoding="utf-8-sig") as f:
            value = json.load(f)
    except (ValueError, RecursionError) as error:              # JSONDecodeError, UnicodeDecodeError, a million brackets
        raise ValueError(f"{file} is not JSON ({error}); {advice}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a {type(value).__name__}, not a JSON object; {advice}")
    return value


# ------------------------------------------------------------- few-shot subsets, base and novel classes

def few_shot(train, val, shots=16, seed=1):
    """CoOp's own picks for this seed: `shots` train and min(shots, 4) val items of every class.

    Do it over all classes, before base and novel are cut apart: both draw from one stream, in the order in
    which labels first appear. A class with fewer images gives all it has. Returns (train items, val items).
    """
    if shots < 1:
        raise ValueError(f"shots must be at least 1, not {shots}")
    rng = random.Random(seed)                                  # the stream of random.seed(seed)

    def pick(items, n):
        by_label, picked = {}, []
        for item in items:
            by_label.setdefault(item.label, []).append(item)
        for same_label in by_label.values():
            picked += rng.sample(same_label, n) if len(same_label) >= n else same_label
        return picked

    return pick(train, shots), pick(val, min(shots, 4))


def split_base_novel(class_names):
    """Labels of the base classes (the first half, rounded up) and of the novel ones: two lists of int."""
    half = -(-len(class_names) // 2)
    return list(range(half)), list(range(half, len(class_names)))


def take(items, labels):
    """The items that have one of `labels`, relabelled from 0 in the order of `labels`."""
    new = {label: i for i, label in enumerate(labels)}
    return [Item(item.source, new[item.label]) for item in items if item.label in new]


# -------------------------------------------------------------------------------------- descriptions

def load_descriptions(path, class_names, max_descriptions=10, aliases=None, notes=None):
    """Sentences that answer "What does a {Class} look like?", from a JSON object: class name -> list of sentences.

    Names match in lower case, with `_`, `-` and spaces alike; keys of no class are ignored; the first
    `max_descriptions` sentences in file order are taken (blank ones do not count), fewer where a class has fewer.
    aliases: class -> key of the file, for names that do not match; a dict, or the path of such a JSON object.
    Returns a list (C) of lists of str. Raises ValueError naming the file and the class, and all the classes
    without a description at once.
    """
    if max_descriptions < 1:
        raise ValueError(f"--max-descriptions must be at least 1, not {max_descriptions}")
    found = read_json_object(path, "expected class name -> list of sentences")
    if aliases is not None and not isinstance(aliases, dict):
        aliases = read_json_object(aliases, "expected class name -> key of the description file")
    aliases = {plain(class_name): key for class_name, key in (aliases or {}).items()}
    keys = {}
    for key in found:
        keys.setdefault(plain(key), key)
    chosen = [keys.get(plain(aliases.get(plain(class_name), class_name))) for class_name in class_names]
    missing = list(dict.fromkeys(name for name, key in zip(class_names, chosen) if key is None))
    if missing:
        raise ValueError(f"{path}: no description of {len(missing)} of {len(class_names)} classes: "
                         + "; ".join(name + (closest(name, keys) if i < 30 else "") for i, name in enumerate(missing))
                         + "; add them, or give --aliases FILE with {class: key of the description file}")
    descriptions = []
    for key in chosen:
        sentences = found[key]
        if not isinstance(sentences, list) or not all(isinstance(sentence, str) for sentence in sentences):
            raise ValueError(f"{path}: {key!r} must have a list of sentences, not {json.dumps(sentences)[:60]}")
        sentences = [" ".join(sentence.split()) for sentence in sentences if sentence.strip()]
        if not sentences:
            raise ValueError(f"{path}: the list of {key!r} is empty; write a sentence that answers "
                             f"\"What does a {key} look like?\"")
        descriptions.append(sentences[:max_descriptions])
    return descriptions


SHIPPED = os.path.join(ASSETS, "descriptions")


def default_descriptions(name):
    """Path of the description file that comes with the project. Raises FileNotFoundError where there is none."""
    path = os.path.join(SHIPPED, f"{name}.json")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no descriptions for {name}: give --descriptions FILE (JSON, class -> sentences), or make "
                                f"{path} with `python data.py describe --dataset {name} --root $DATA --model M`")
    return path


def plain(name):
    return re.sub(r"[\s_-]+", " ", str(name)).strip().lower()


def closest(name, keys):
    """ " (closest: a, b)": up to two of the plain `keys`, by spelling or by the words they share."""
    words = set(plain(name).split())
    shared = [key for key in keys if len(words & set(key.split())) > len(words) / 2]
    near = list(dict.fromkeys(shared + difflib.get_close_matches(plain(name), keys, n=2, cutoff=0.6)))[:2]
    return f" (closest: {', '.join(near)})" if near else ""


# ---------------------------------------------------------------------------- few-shot tasks

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
    """CoOp's picks of this seed, cut into base and novel classes. classes: "base", or "all" for no novel ones."""
    everything = list(range(len(dataset.class_names)))
    base, novel = split_base_novel(dataset.class_names) if classes == "base" else (everything, [])
    picked, _ = few_shot(dataset.train, dataset.val, shots, seed)
    train = take(picked, base)
    notes = list(dataset.notes)
    counts = collections.Counter(item.label for item in train)
    scarce = [label for label in range(len(base)) if counts[label] < shots]
    if train and scarce:
        notes.append(f"{len(scarce)} of {len(base)} classes have fewer than {shots} training images")
    return Task([dataset.class_names[label] for label in base], [dataset.class_names[label] for label in novel],
                train, take(dataset.test, base), take(dataset.test, novel), notes, not dataset.notes)


def digests(dataset, task):
    """What a result depends on, in short: a digest each of class names, training and test images.

    An image counts by its path below the dataset's folder and its label. For `Kept` facts in results.
    """
    def images(items):
        rows = [(pathlib.Path(os.path.relpath(item.source, dataset.folder)).as_posix(), item.label)
                for item in items]
        return digest(rows)
    return {"class names": digest([task.base_names, task.novel_names]), "training images": images(task.train),
            "test images": digest([images(task.test_base), images(task.test_novel)])}


def digest(value):
    """16 hexadecimal digits that stand for a value of lists, strings and numbers."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------- images

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def train_transform(resolution):
    """PIL RGB -> crop (3, R, R), uint8: random resized crop and horizontal flip (S2.2)."""
    return T.Compose([T.RandomResizedCrop(resolution, scale=(0.08, 1.0), interpolation=T.InterpolationMode.BICUBIC),
                      T.RandomHorizontalFlip(), T.PILToTensor()])


def test_transform(resolution):
    """PIL RGB -> crop (3, R, R), uint8: shorter edge to R, centre crop."""
    return T.Compose([T.Resize(resolution, interpolation=T.InterpolationMode.BICUBIC),
                      T.CenterCrop(resolution), T.PILToTensor()])


def normalize(crops):
    """Crops (..., 3, R, R) uint8 -> what CLIP reads: float32, by the mean and std of its training images.

    Crops stay uint8 until here: a quarter of the memory, and of the way to the GPU.
    """
    return T.functional.normalize(crops.float() / 255, CLIP_MEAN, CLIP_STD)


class BadImage(ValueError):
    """An image that cannot be read. One line, also when a DataLoader worker wraps it in its traceback."""

    def __init__(self, message):
        super().__init__(message.strip().splitlines()[-1].split("BadImage: ")[-1])


def load_image(path):
    """An image file as PIL RGB, whatever its mode on disk (grayscale of 8 or 16 bits, CMYK, palette, alpha).

    Raises BadImage, a ValueError, for a missing, corrupt or truncated file: never skipped, since that would
    change the few-shot set.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):                          # 16 bits: PIL would clip them to white
                image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:   # SyntaxError: broken PNG
        reason = " ".join(str(error).split())
        raise BadImage(f"image {path} cannot be read ({reason}); unpack it again, it is not skipped") from None


class Images(torch.utils.data.Dataset):
    """images[epoch, i] -> (crop (3, R, R) uint8, label) of item i.

    seed: an int; the augmentation then depends on (seed, epoch, i) alone, not on workers or order, and the
    global generator stays as it was. None: for a transform without chance.
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
        with torch.random.fork_rng(devices=[]):             # torchvision's transforms draw from the global one
            torch.default_generator.manual_seed(mixed)      # torch.manual_seed would reseed CUDA as well
            return self.transform(image), label


class EpochBatches:
    """The batches of a run, in item order: lists of (epoch, i). No batch spans two epochs."""

    def __init__(self, n, epochs, batch_size):
        self.n = n
        self.epochs = epochs
        self.batch_size = batch_size

    def __iter__(self):
        for epoch in self.epochs:
            for start in range(0, self.n, self.batch_size):
                yield [(epoch, i) for i in range(start, min(start + self.batch_size, self.n))]


ENCODE_BATCH = 256                  # images that go through the frozen image tower at a time


def loader(images, epochs=(0,), batch_size=ENCODE_BATCH, workers=0):
    """Batches of crops (B, 3, R, R) uint8 and labels (B,), in item order, an epoch after the other.

    One DataLoader, and so one set of worker processes, for the whole run: it reads on into the next epoch
    while the steps of this one run.
    """
    return torch.utils.data.DataLoader(
        images, batch_sampler=EpochBatches(len(images), epochs, batch_size), num_workers=workers,
        pin_memory=torch.cuda.is_available(), generator=torch.Generator())      # leaves the global one alone


class EpochFeatures:
    """f_I(x) of each epoch's crops, by the frozen image tower, which is the same for every method.

    features[epoch] -> (f (n, d) float32 on CLIP's device, or None; crops (n, 3, R, R) uint8, or None), both
    in item order. Epochs are asked for in the order of `epochs`.

    encode: a function normalised images (B, 3, R, R) -> (B, d), or None where nobody needs f.
    keep_crops: whether the crops are needed (MaPLe). kept: a `KeptFeatures`, or None; what stands there is
    read, and no image is opened for it.
    """

    def __init__(self, images, epochs, encode, device, keep_crops=False, kept=None, workers=0):
        self.images = images
        self.encode = encode
        self.device = device
        self.keep_crops = keep_crops
        self.kept = kept if encode is not None else None
        self.workers = workers
        self.to_load = [epoch for epoch in epochs
                        if keep_crops or self.kept is None or not self.kept.has(epoch)]
        self.batches = iter(loader(images, list(self.to_load), workers=workers))

    def __getitem__(self, epoch):
        f = self.kept.read(epoch) if self.kept is not None else None
        if f is not None:
            f = f.to(self.device)
        if f is not None and epoch not in self.to_load:
            return f, None
        parts, crops, n = [], [], 0
        for crop, _ in self._batches_of(epoch):
            if self.keep_crops:
                crops.append(crop)
            if self.encode is not None and f is None:
                x = normalize(crop.to(self.device, non_blocking=True))
                with torch.no_grad():
                    parts.append(self.encode(x))
        if parts:
            f = torch.cat(parts)
            if self.kept is not None:
                self.kept.write(epoch, f)
            f = f.float()
        return f, torch.cat(crops) if crops else None

    def _batches_of(self, epoch):
        if self.to_load and self.to_load[0] == epoch:
            self.to_load.pop(0)
            return itertools.islice(self.batches, math.ceil(len(self.images) / ENCODE_BATCH))
        return loader(self.images, [epoch], workers=self.workers)        # its kept file turned out damaged


class KeptFeatures:
    """Image features in a folder, for whoever comes next with the same CLIP, images, seed (--feature-cache).

    A file an epoch, about 1 kB an image in float16 and 2 kB in float32. Its name is a digest of all that the
    features depend on: of `what` (CLIP, precision), the transform, the seed, the epoch, and path, size and time of
    every image. A file that is damaged or of something else is not believed.
    """

    def __init__(self, folder, what, images):
        self.folder = pathlib.Path(folder)
        stats = [os.stat(item.source) for item in images.items]
        rows = [[str(item.source), stat.st_size, stat.st_mtime_ns] for item, stat in zip(images.items, stats)]
        self.what = digest([what, repr(images.transform), images.seed, rows])
        self.n = len(rows)

    def path(self, epoch):
        return self.folder / f"{digest([self.what, epoch])}.npz"

    def has(self, epoch):
        return self.path(epoch).is_file()

    def read(self, epoch):
        """(n, d) float32, or None where there is no sound file."""
        try:
            with np.load(self.path(epoch), allow_pickle=False) as file:     # a zip: it checks its checksums
                features, what = file["features"], str(file["what"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            return None
        if what != self.what or features.ndim != 2 or len(features) != self.n:
            return None
        return torch.from_numpy(features).float()

    def write(self, epoch, features):
        features = features.cpu()
        if features.dtype == torch.bfloat16:                                # numpy has none
            features = features.float()
        with written_aside(self.path(epoch)) as aside, open(aside, "wb") as file:
            np.savez(file, features=features.numpy(), what=self.what)


# -------------------------------------------------------------------------------------- command line

def inventory(root):
    """One line per dataset: found or what is missing."""
    if not os.path.isdir(root):
        raise FileNotFoundError(f"data root {root} is missing; give --root or set DATA to the folder of the datasets")
    for name in DATASETS:
        try:
            _, _, class_names, train, _, test, notes = load_dataset(name, root)
        except (ValueError, OSError) as error:
            print(f"{name:16}-      {' '.join(str(error).split())}", flush=True)
            continue
        described = "descriptions found" if train else "test only"
        try:
            if train:
                load_descriptions(default_descriptions(name), class_names)
        except (ValueError, OSError) as error:
            described = "no descriptions" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())
        base, novel = split_base_novel(class_names)
        print(f"{name:16}found  {len(class_names):4} classes ({len(base)} base, {len(novel)} novel)  {len(train):7} train  "
              f"{len(test):6} test images  {described}", *(f" [{note.split(': ', 1)[1]}]" for note in notes), flush=True)


QUERY = "What does a {} look like?"                            # the paper's, after CuPL
FORM = ("Answer with {} different sentences, one a line, no numbering and nothing else. Each sentence describes what "
        "is seen in a photo of it (shape, colour, parts, texture, surroundings), names it, and has at most 30 words.")


def describe(name, root, model, base_url=None, output=None, per_class=10):
    """Ask an OpenAI-compatible server for `per_class` sentences a class; write them to `output` after each class.

    Classes that the file already has are kept, so an interrupted run resumes. The key comes from the
    environment's OPENAI_API_KEY and is never written or printed. Raises ValueError, OSError.
    """
    try:
        import openai
    except ImportError:
        raise ValueError("describe needs the openai client: pip install openai") from None
    if per_class < 1:
        raise ValueError(f"--per-class must be at least 1, not {per_class}")
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key and not base_url:
        raise ValueError("set OPENAI_API_KEY, or give --base-url of a server that needs no key")
    output = output or os.path.join(SHIPPED, f"{name}.json")
    found = read_json_object(output, "expected class name -> list of sentences") if os.path.isfile(output) else {}
    found = {class_name: sentences for class_name, sentences in found.items() if sentences}
    done = {plain(class_name) for class_name in found}
    wanted = [c for c in dict.fromkeys(load_dataset(name, root).class_names) if plain(c) not in done]
    client = openai.OpenAI(api_key=key or "none", base_url=base_url, timeout=120)
    for class_name in (bar := tqdm(wanted, desc=f"describing {name}", unit="class")):
        bar.set_postfix_str(class_name)
        sentences = []
        for _ in range(3):                                     # a model may give fewer than asked for
            try:
                answer = client.chat.completions.create(model=model, messages=[
                    {"role": "system", "content": FORM.format(per_class)},
                    {"role": "user", "content": QUERY.format(class_name)}])
            except openai.OpenAIError as error:
                reason = " ".join(str(error).split()).replace(key or "\0", "***")
                raise ValueError(f"{class_name}: {base_url or 'the server'} does not answer ({reason}); "
                                 f"start again to resume, {output} keeps what is done") from None
            choices = getattr(answer, "choices", None)         # a server's web page comes back as a str
            text = choices[0].message.content or "" if choices else ""
            sentences = list(dict.fromkeys(sentences + read_answer(text)))[:per_class]
            if len(sentences) == per_class:
                break
        if not sentences:
            raise ValueError(f"{class_name}: {model} gave no sentence in three answers; try another --model, "
                             "and see that --base-url is the API's (it mostly ends in /v1)")
        found[class_name] = sentences
        with written_aside(output) as aside:
            aside.write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
    print(f"{output}: {len(found)} classes, {len(wanted)} of them new")


def read_answer(text):
    """The sentences of an answer, one a line, without a reasoning model's thoughts, numbering, marks and headings."""
    lines = re.sub(r"<think>.*?</think>", "", text, flags=re.S).splitlines()
    lines = [re.sub(r"^\s*(?:[-*\u2022]|\d+[.)])\s+", "", line).strip().strip('"*').strip() for line in lines]
    return [line for line in lines if len(line.split()) > 2 and not line.endswith(":")]


@contextlib.contextmanager
def written_aside(path):
    """Gives a name beside `path` to write to, and renames it at the end: nobody ever sees half a file.

    On any failure the old file stays as it was. Raises OSError saying what could not be written.
    """
    path = pathlib.Path(path)
    aside = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:12]}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:             # torch.save reports a full disk as a RuntimeError
        reason = " ".join(str(error).split())
        raise OSError(f"could not write {path} ({reason}); what was finished before is kept: make room or choose another "
                      "--output, then run the same command again") from error
    finally:
        aside.unlink(missing_ok=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description="What is under the data root; or make a description file.")
    parser.add_argument("--root", help="folder that holds the datasets (default: the environment's DATA, else ./data)")
    command = parser.add_subparsers(dest="command").add_parser(
        "describe", help="make a description file", description="Make a description file with an OpenAI-compatible server.")
    command.add_argument("--dataset", required=True, help="whose classes to describe")
    command.add_argument("--root", default=argparse.SUPPRESS, help="as above")
    command.add_argument("--model", required=True, help="the server's name of the model")
    command.add_argument("--base-url", default=os.environ.get("OPENAI_BASE_URL"),
                         help="e.g. http://localhost:8000/v1 (default: the environment's OPENAI_BASE_URL, else OpenAI)")
    command.add_argument("--output", help="file to write or resume (default: assets/descriptions/DATASET.json)")
    command.add_argument("--per-class", type=int, default=10, help="sentences a class (default: 10)")
    args = parser.parse_args(argv)
    try:
        if args.command == "describe":
            describe(args.dataset, args.root, args.model, args.base_url, args.output, args.per_class)
        else:
            inventory(data_root(args.root))
    except (ValueError, OSError) as error:
        print(f"data.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
