"""Small trees in the true layouts of the fifteen datasets, with the oddities that real disks have.

TREES: name -> a function that writes generated images under `root` (what a user passes as --root)
and returns the class names in label order, as CLIP should see them. `own_*_tree(folder)` are
datasets of one's own. per_class: images of a class: half train, a quarter val, the rest test.
"""

import functools
import json
import os
from typing import NamedTuple

import numpy as np
from PIL import Image


def one_line(error, *parts):
    """The text of an error: one clear line, which holds all `parts`.

    error: text such as a script's stderr, an exception, or what pytest.raises gives.
    """
    text = error if isinstance(error, str) else str(getattr(error, "value", error))
    assert text.strip() and "\n" not in text.strip() and "\r" not in text, text
    assert "Traceback" not in text, text
    for part in parts:
        assert str(part) in text, (part, text)
    return text


# ---------------------------------------------------------------------------- files

def write_text(path, text):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as f:
        f.write(text)


def write_image(path, label, index, mode="RGB", size=None):
    """An image whose mean colour tells its class, in a mode that the file's name may not admit."""
    rng = np.random.default_rng((label, index))
    width, height = size or (34 + index % 5, 30 + label % 7)
    colour = np.array([37 * label, 91 * label, 151 * label]) % 200
    pixels = (colour + rng.integers(0, 56, (height, width, 3))).astype(np.uint8)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    kind = "PNG" if mode in ("P", "RGBA", "LA") else "JPEG"
    Image.fromarray(pixels).convert(mode).save(path, format=kind)


MODES = ["RGB", "L", "RGB", "CMYK", "RGB", "P", "RGB", "RGBA"]


def write_images(folder, paths_and_labels):
    """Images at folder/path, in all MODES, and what operating systems and archives leave behind."""
    for i, (path, label) in enumerate(paths_and_labels):
        path = os.path.join(folder, path)
        write_image(path, label, i, MODES[i % len(MODES)])
        if i % 5 == 0:
            for stray in (".DS_Store", "._" + os.path.basename(path), "README.txt"):
                write_text(os.path.join(os.path.dirname(path), stray), "not an image\n")


def write_descriptions(path, class_names):
    """A description file for `class_names`, for tests that do not care what it says."""
    sentences = {name: [f"A {name} is small.", f"A {name} is red."] for name in class_names}
    write_text(path, json.dumps(sentences))


def sizes(per_class):
    """(train, val, test) images of a class, where a class has `per_class` of them."""
    n_val = per_class // 4
    return per_class // 2, n_val, per_class - per_class // 2 - n_val


# ---------------------------------------------------------------------- nine with a split file

# Of the datasets' classes: folder -> name, or names alone.
CALTECH101 = {
    "Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike", "accordion": "accordion",
    "airplanes": "airplane", "ant": "ant", "car_side": "car_side", "sea_horse": "sea_horse",
    "water_lilly": "water_lilly", "yin_yang": "yin_yang"}
EUROSAT = {
    "AnnualCrop": "Annual Crop Land", "Forest": "Forest",
    "HerbaceousVegetation": "Herbaceous Vegetation Land", "Highway": "Highway or Road",
    "Industrial": "Industrial Buildings", "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land", "Residential": "Residential Buildings",
    "River": "River", "SeaLake": "Sea or Lake"}
SCENES = {
    "a/abbey": "abbey", "a/airplane_cabin": "airplane_cabin",
    "a/apartment_building/outdoor": "outdoor apartment_building",
    "b/bazaar/indoor": "indoor bazaar", "c/corn_field": "corn_field"}
PETS = ["abyssinian", "american_bulldog", "american_pit_bull_terrier", "basset_hound", "beagle",
        "bengal", "birman"]
CARS = ["2000 AM General Hummer SUV", "2012 Mercedes-Benz C-Class Sedan",
        "2012 Ram C/V Cargo Van Minivan", "2007 Chevrolet Corvette Ron Fellows Edition Z06",
        "1998 Nissan 240SX Coupe", "2012 smart fortwo Convertible"]
FLOWERS = ["pink primrose", "hard-leaved pocket orchid", "colt's foot", "bird of paradise",
           "king protea", "canna lily"]
FOODS = ["apple_pie", "baby_back_ribs", "baklava", "beef_carpaccio", "beef_tartare", "beet_salad",
         "beignets"]
TEXTURES = ["banded", "blotchy", "braided", "bubbly", "bumpy", "chequered", "cobwebbed"]
ACTIONS = ["Apply_Eye_Makeup", "Apply_Lipstick", "Archery", "Baby_Crawling", "Yo_Yo"]


class Layout(NamedTuple):
    folder: str             # under the root
    images: str             # under the folder
    split: str              # split_zhou_<split>.json
    names: object           # of the classes, or a dict: their folder -> their name in the split
    path: str               # of an image, under `images`
    classes: int = 5        # of a tree, if not said otherwise


LAYOUTS = {
    "caltech101": Layout("caltech-101", "101_ObjectCategories", "Caltech101", CALTECH101,
                         "{folder}/image_{i:04d}.jpg"),
    "oxford_pets": Layout("oxford_pets", "images", "OxfordPets", PETS, "{folder}_{i}.jpg"),
    "stanford_cars": Layout("stanford_cars", "", "StanfordCars", CARS,
                            "cars_{half}/{number:05d}.jpg"),
    "oxford_flowers": Layout("oxford_flowers", "jpg", "OxfordFlowers", FLOWERS,
                             "image_{number:05d}.jpg"),
    "food101": Layout("food-101", "images", "Food101", FOODS, "{folder}/{i:07d}.jpg"),
    "sun397": Layout("sun397", "SUN397", "SUN397", SCENES, "{folder}/sun_{label:04d}{i:04d}.jpg"),
    "dtd": Layout("dtd", "images", "DescribableTextures", TEXTURES,
                  "{folder}/{folder}_{i:04d}.jpg"),
    "eurosat": Layout("eurosat", "2750", "EuroSAT", EUROSAT, "{folder}/{folder}_{i}.jpg", 10),
    "ucf101": Layout("ucf101", "UCF-101-midframes", "UCF101", ACTIONS,
                     "{folder}/v_{folder}_g{i:02d}_c01.jpg"),
}


def json_tree(folder, images, split_file, classes, per_class, path):
    """A tree with a split file. classes: folder -> name; path: of an image, as in `Layout`."""
    split = {"train": [], "val": [], "test": []}
    for label, (class_folder, name) in enumerate(classes.items()):
        i = 0
        for part, n in zip(split, sizes(per_class)):
            for _ in range(n):
                i += 1
                half = "test" if part == "test" else "train"
                where = path.format(folder=class_folder, label=label, i=i, half=half,
                                    number=100 * label + i)
                split[part].append([where, label, name])

    # Not grouped by class: the order decides the few-shot picks.
    for part, rows in split.items():
        order = np.random.default_rng(len(part)).permutation(len(rows))
        split[part] = [rows[i] for i in order]
    rows = split["train"] + split["val"] + split["test"]
    write_images(os.path.join(folder, images), [(where, label) for where, label, _ in rows])
    write_text(os.path.join(folder, split_file), json.dumps(split))
    write_text(os.path.join(folder, ".DS_Store"), "\0\1")
    return [name.replace("_", " ") for name in classes.values()]


def field_tree(name, root, per_class=4, classes=None):
    """One of LAYOUTS. classes: how many."""
    layout = LAYOUTS[name]
    names = layout.names
    if not isinstance(names, dict):
        names = dict(zip(names, names))
    folder = os.path.join(root, layout.folder)
    if name == "caltech101":                                # two folders that are no class
        for no_class in ("BACKGROUND_Google", "Faces_easy"):
            for i in (1, 2):
                write_image(f"{folder}/{layout.images}/{no_class}/image_{i:04d}.jpg", 99, i)
    return json_tree(folder, layout.images, f"split_zhou_{layout.split}.json",
                     dict(list(names.items())[:classes or layout.classes]), per_class, layout.path)


# ---------------------------------------------------------------------------- the six others

AIRCRAFT = ["707-320", "A300B4", "Cessna 172", "DC-10", "F-16A/B", "F/A-18", "Tu-154"]
# Not sorted here, so that a reader that forgets to sort classnames.txt is caught; two names stand
# for two classes each.
IMAGENET = {
    "n01440764": "tench", "n03773504": "missile", "n01443537": "goldfish", "n04008634": "missile",
    "n01608432": "kite (bird of prey)", "n03590841": "jack-o'-lantern", "n04355933": "sunglasses",
    "n04356056": "sunglasses", "n02999410": "chain", "n02110958": "pug"}


def fgvc_aircraft_tree(root, per_class=4, classes=7):
    """Not a JSON: variants.txt and images_variant_{train,val,test}.txt."""
    folder, names = os.path.join(root, "fgvc_aircraft"), AIRCRAFT[:classes]
    number, images = 1025794, []
    for part, n in zip(("train", "val", "test"), sizes(per_class)):
        lines = []
        for label in list(reversed(range(classes))) * n:
            number += 1
            lines.append(f"{number:07d} {names[label]}\n")
            images.append((f"{number:07d}.jpg", label))
        write_text(os.path.join(folder, f"images_variant_{part}.txt"), "".join(lines))
    write_text(os.path.join(folder, "variants.txt"), "".join(name + "\n" for name in names))
    write_images(os.path.join(folder, "images"), images)
    return [name.replace("_", " ") for name in names]


def write_classnames(folder, classes=10):
    """classnames.txt. Returns dict wnid -> name, in the order of the file."""
    names = dict(list(IMAGENET.items())[:classes])
    lines = [f"{wnid} {name}\n" for wnid, name in names.items()]
    write_text(os.path.join(folder, "classnames.txt"), "".join(lines))
    return names


def imagenet_tree(root, per_class=4, classes=10):
    """images/train has `per_class` images a class, images/val half as many."""
    folder = os.path.join(root, "imagenet")
    names = write_classnames(folder, classes)
    for part, n in (("train", per_class), ("val", max(1, per_class // 2))):
        images = os.path.join(folder, "images", part)
        write_images(images, [(f"{wnid}/{part}_{i:08d}.JPEG", label)
                              for label, wnid in enumerate(sorted(names)) for i in range(n)])
        write_text(os.path.join(images, ".DS_Store"), "\0")
    return [names[wnid] for wnid in sorted(names)]


def imagenetv2_tree(root, per_class=2, classes=10,
                    images="imagenetv2-matched-frequency-format-val"):
    """Folders are numbers: label = line of classnames.txt, which is not sorted by wnid here."""
    folder = os.path.join(root, "imagenetv2")
    names = write_classnames(folder, classes)
    write_images(os.path.join(folder, images), [(f"{label}/{i:040x}.jpeg", label)
                                                for label in range(classes)
                                                for i in range(per_class)])
    return list(names.values())


def variant_tree(folder, part, root, per_class=2, *, images):
    """A part of the ten wnids in classnames.txt (of the real ones: 200 of 1,000, or all)."""
    folder = os.path.join(root, folder)
    names = write_classnames(folder)
    wnids, images = sorted(names)[part], os.path.join(folder, images)
    write_images(images, [(f"{wnid}/{wnid}_{i}.JPEG", label)
                          for label, wnid in enumerate(wnids) for i in range(per_class)])
    write_text(os.path.join(images, "README.txt"), "no class\n")
    return [names[wnid] for wnid in wnids]


partial = functools.partial
TREES = {"imagenet": imagenet_tree,
         **{name: partial(field_tree, name) for name in LAYOUTS},
         "fgvc_aircraft": fgvc_aircraft_tree, "imagenetv2": imagenetv2_tree,
         "imagenet_sketch": partial(variant_tree, "imagenet-sketch", slice(None), images="images"),
         "imagenet_a": partial(variant_tree, "imagenet-adversarial", slice(1, None, 2),
                               images="imagenet-a"),
         "imagenet_r": partial(variant_tree, "imagenet-rendition", slice(0, None, 2),
                               images="imagenet-r")}
dtd_tree, eurosat_tree = TREES["dtd"], TREES["eurosat"]


# ---------------------------------------------------------------------------- of one's own

# Accents, digits, brackets and numbers in front.
BIRDS = {"001.Black_footed_Albatross": "Black footed Albatross", "002.Café_owl": "Café owl",
         "003.Finch_(zebra)": "Finch (zebra)", "010.3D bird's": "3D bird's"}


def own_folders_tree(folder, per_class=8):
    """A folder per class. Returns the class names, as all `own_*_tree` do."""
    write_images(folder, [(f"{name}/Photo {i}.JPG", label)
                          for label, name in enumerate(BIRDS) for i in range(per_class)])
    write_text(os.path.join(folder, "README.txt"), "my birds\n")
    return list(BIRDS.values())


def own_parts_tree(folder, per_class=4, parts=("train", "val", "test")):
    """train/, test/ and val/, with a folder per class each."""
    for part in parts:
        own_folders_tree(os.path.join(folder, part), per_class)
    return list(BIRDS.values())


def own_split_tree(folder, per_class=4, images="images"):
    """A split.json in the field's format, images beside it or in a folder of their own."""
    json_tree(folder, images, "split.json", BIRDS, per_class, "{folder}/{i}.jpg")
    return list(BIRDS.values())
