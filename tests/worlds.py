"""Small trees in the true layouts of the fifteen datasets, with the oddities that real disks have.

Every `<name>_tree(folder, per_class, classes)` writes generated JPEGs under `folder` (what a user
passes as --root) and returns the class names in label order, as CLIP should see them. TREES holds
them all by name. `own_*_tree(folder)` are datasets of one's own.

per_class: images of a class: half train, a quarter val, the rest test (so at least 4); `sizes`
counts them.
"""

import json
import os

import numpy as np
from PIL import Image

# The 100 classes of the field's Caltech101 split, by folder of the archive.
CALTECH101_FOLDERS = """
    Faces Leopards Motorbikes accordion airplanes anchor ant barrel bass beaver binocular bonsai
    brain brontosaurus buddha butterfly camera cannon car_side ceiling_fan cellphone chair
    chandelier cougar_body cougar_face crab crayfish crocodile crocodile_head cup dalmatian
    dollar_bill dolphin dragonfly electric_guitar elephant emu euphonium ewer ferry flamingo
    flamingo_head garfield gerenuk gramophone grand_piano hawksbill headphone hedgehog
    helicopter ibis inline_skate joshua_tree kangaroo ketch lamp laptop llama lobster lotus
    mandolin mayfly menorah metronome minaret nautilus octopus okapi pagoda panda pigeon pizza
    platypus pyramid revolver rhino rooster saxophone schooner scissors scorpion sea_horse
    snoopy soccer_ball stapler starfish stegosaurus stop_sign strawberry sunflower tick
    trilobite umbrella watch water_lilly wheelchair wild_cat windsor_chair wrench
    yin_yang""".split()
CALTECH101_RENAMED = {
    "Faces": "face",
    "Leopards": "leopard",
    "Motorbikes": "motorbike",
    "airplanes": "airplane",
}
CALTECH101_NAMES = [CALTECH101_RENAMED.get(name, name) for name in CALTECH101_FOLDERS]

EUROSAT = {
    "AnnualCrop": "Annual Crop Land",
    "Forest": "Forest",
    "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road",
    "Industrial": "Industrial Buildings",
    "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land",
    "Residential": "Residential Buildings",
    "River": "River",
    "SeaLake": "Sea or Lake",
}
PETS = [
    "abyssinian",
    "american_bulldog",
    "american_pit_bull_terrier",
    "basset_hound",
    "beagle",
    "bengal",
    "birman",
]
CARS = [
    "2000 AM General Hummer SUV",
    "2012 Mercedes-Benz C-Class Sedan",
    "2012 Ram C/V Cargo Van Minivan",
    "2007 Chevrolet Corvette Ron Fellows Edition Z06",
    "1998 Nissan 240SX Coupe",
    "2012 smart fortwo Convertible",
]
FLOWERS = [
    "pink primrose",
    "hard-leaved pocket orchid",
    "colt's foot",
    "bird of paradise",
    "king protea",
    "canna lily",
]
FOODS = [
    "apple_pie",
    "baby_back_ribs",
    "baklava",
    "beef_carpaccio",
    "beef_tartare",
    "beet_salad",
    "beignets",
]
AIRCRAFT = ["707-320", "A300B4", "Cessna 172", "DC-10", "F-16A/B", "F/A-18", "Tu-154"]
SCENES = {
    "a/abbey": "abbey",
    "a/airplane_cabin": "airplane_cabin",
    "a/apartment_building/outdoor": "outdoor apartment_building",
    "b/bazaar/indoor": "indoor bazaar",
    "c/corn_field": "corn_field",
}
TEXTURES = ["banded", "blotchy", "braided", "bubbly", "bumpy", "chequered", "cobwebbed"]
ACTIONS = ["Apply_Eye_Makeup", "Apply_Lipstick", "Archery", "Baby_Crawling", "Yo_Yo"]
# Not sorted here, so that a reader that forgets to sort classnames.txt is caught; two names stand
# for two classes each.
IMAGENET = {
    "n01440764": "tench",
    "n03773504": "missile",
    "n01443537": "goldfish",
    "n04008634": "missile",
    "n01608432": "kite (bird of prey)",
    "n03590841": "jack-o'-lantern",
    "n04355933": "sunglasses",
    "n04356056": "sunglasses",
    "n02999410": "chain",
    "n02110958": "pug",
}


def one_line(error, *parts):
    """The text of an error (or the text itself): one clear line, which holds all `parts`.

    error: text such as a script's stderr, an exception, or what pytest.raises gives.
    """
    text = error if isinstance(error, str) else str(getattr(error, "value", error))
    assert text.strip() and "\n" not in text.strip() and "\r" not in text, text
    assert "Traceback" not in text, text
    for part in parts:
        assert str(part) in text, (part, text)
    return text


def sizes(per_class):
    """(train, val, test) images of a class, where a class has `per_class` of them."""
    n_val = per_class // 4
    return per_class // 2, n_val, per_class - per_class // 2 - n_val


def write_image(path, label, index, mode="RGB", size=None):
    """An image whose mean colour tells its class, in a mode that the file's name may not admit."""
    rng = np.random.default_rng((label, index))
    width, height = size or (34 + index % 5, 30 + label % 7)
    colour = np.array([37 * label, 91 * label, 151 * label]) % 200
    image = Image.fromarray(
        (colour + rng.integers(0, 56, (height, width, 3))).astype(np.uint8)
    ).convert(mode)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    image.save(path, format="PNG" if mode in ("P", "RGBA", "LA") else "JPEG")


MODES = [
    "RGB",
    "L",
    "RGB",
    "CMYK",
    "RGB",
    "P",
    "RGB",
    "RGBA",
]  # by turns, over the images of a tree


def write_images(folder, paths_and_labels):
    """Images at folder/path, in all MODES, and what operating systems and archives leave behind."""
    for i, (path, label) in enumerate(paths_and_labels):
        path = os.path.join(folder, path)
        write_image(path, label, i, MODES[i % len(MODES)])
        if i % 5 == 0:
            for stray in (".DS_Store", "._" + os.path.basename(path), "README.txt"):
                write_text(os.path.join(os.path.dirname(path), stray), "not an image\n")


def write_text(path, text):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as f:
        f.write(text)


def many(names, n):
    """The first n names, with made-up ones after the real ones."""
    return [*names, *(f"made_up_class_{i:03d}" for i in range(n))][:n]


def json_tree(folder, images, split_file, class_names, per_class, path_of):
    """A tree with a split_zhou_*.json. path_of(label, index, part) -> path under `images`."""
    split = {"train": [], "val": [], "test": []}
    for label, class_name in enumerate(class_names):
        index = 0
        for part, n in zip(split, sizes(per_class)):
            for _ in range(n):
                index += 1
                split[part].append([path_of(label, index, part), label, class_name])
    for part, rows in split.items():  # not grouped by class: the order decides the few-shot picks
        order = np.random.default_rng(len(part)).permutation(len(rows))
        split[part] = [rows[i] for i in order]
    write_images(
        os.path.join(folder, images),
        [(path, label) for rows in split.values() for path, label, _ in rows],
    )
    write_text(os.path.join(folder, split_file), json.dumps(split))
    write_text(os.path.join(folder, ".DS_Store"), "\0\1")
    return [class_name.replace("_", " ") for class_name in class_names]


def caltech101_tree(root, per_class=4, classes=100):
    """caltech-101/: the real class and folder names; `classes` < 100 takes the first ones."""
    folders = CALTECH101_FOLDERS[:classes]
    folder = os.path.join(root, "caltech-101")
    names = json_tree(
        folder,
        "101_ObjectCategories",
        "split_zhou_Caltech101.json",
        CALTECH101_NAMES[:classes],
        per_class,
        lambda label, i, part: f"{folders[label]}/image_{i:04d}.jpg",
    )
    for no_class in ("BACKGROUND_Google", "Faces_easy"):
        for i in range(1, 3):
            write_image(
                os.path.join(folder, "101_ObjectCategories", no_class, f"image_{i:04d}.jpg"),
                99,
                i,
            )
    return names


def oxford_pets_tree(root, per_class=4, classes=5):
    names = many(PETS, classes)
    return json_tree(
        os.path.join(root, "oxford_pets"),
        "images",
        "split_zhou_OxfordPets.json",
        names,
        per_class,
        lambda label, i, part: f"{names[label]}_{i}.jpg",
    )


def stanford_cars_tree(root, per_class=4, classes=5):
    return json_tree(
        os.path.join(root, "stanford_cars"),
        "",
        "split_zhou_StanfordCars.json",
        many(CARS, classes),
        per_class,
        lambda label, i, part: (
            f"cars_{'test' if part == 'test' else 'train'}/{100 * label + i:05d}.jpg"
        ),
    )


def oxford_flowers_tree(root, per_class=4, classes=5):
    return json_tree(
        os.path.join(root, "oxford_flowers"),
        "jpg",
        "split_zhou_OxfordFlowers.json",
        many(FLOWERS, classes),
        per_class,
        lambda label, i, part: f"image_{100 * label + i:05d}.jpg",
    )


def food101_tree(root, per_class=4, classes=5):
    names = many(FOODS, classes)
    return json_tree(
        os.path.join(root, "food-101"),
        "images",
        "split_zhou_Food101.json",
        names,
        per_class,
        lambda label, i, part: f"{names[label]}/{1000000 + i}.jpg",
    )


def fgvc_aircraft_tree(root, per_class=4, classes=7):
    """Not a JSON: variants.txt and images_variant_{train,val,test}.txt."""
    folder, names = os.path.join(root, "fgvc_aircraft"), many(AIRCRAFT, classes)
    number, images = 1025794, []
    for part, n in zip(("train", "val", "test"), sizes(per_class)):
        lines = []
        for _ in range(n):
            for label in range(classes - 1, -1, -1):
                number += 1
                lines.append(f"{number:07d} {names[label]}\n")
                images.append((f"{number:07d}.jpg", label))
        write_text(os.path.join(folder, f"images_variant_{part}.txt"), "".join(lines))
    write_text(os.path.join(folder, "variants.txt"), "".join(name + "\n" for name in names))
    write_images(os.path.join(folder, "images"), images)
    return [name.replace("_", " ") for name in names]


def sun397_tree(root, per_class=4, classes=5):
    scenes = [*SCENES, *(f"m/made_up_{i:03d}" for i in range(classes))][:classes]
    return json_tree(os.path.join(root, "sun397"), "SUN397", "split_zhou_SUN397.json",
                     [SCENES.get(scene, scene[2:]) for scene in scenes], per_class,
                     lambda label, i, part: f"{scenes[label]}/sun_{label:04d}{i:04d}.jpg")


def dtd_tree(root, per_class=4, classes=5):
    names = many(TEXTURES, classes)
    return json_tree(
        os.path.join(root, "dtd"),
        "images",
        "split_zhou_DescribableTextures.json",
        names,
        per_class,
        lambda label, i, part: f"{names[label]}/{names[label]}_{i:04d}.jpg",
    )


def eurosat_tree(root, per_class=4, classes=10):
    folders = list(EUROSAT)[:classes]
    return json_tree(
        os.path.join(root, "eurosat"),
        "2750",
        "split_zhou_EuroSAT.json",
        [EUROSAT[f] for f in folders],
        per_class,
        lambda label, i, part: f"{folders[label]}/{folders[label]}_{i}.jpg",
    )


def ucf101_tree(root, per_class=4, classes=5):
    names = many(ACTIONS, classes)
    return json_tree(
        os.path.join(root, "ucf101"),
        "UCF-101-midframes",
        "split_zhou_UCF101.json",
        names,
        per_class,
        lambda label, i, part: (
            f"{names[label]}/v_{names[label].replace('_', '')}_g{i:02d}_c01.jpg"
        ),
    )


def imagenet_classes(classes):
    """dict wnid -> name with `classes` entries, in the order of the file."""
    made_up = {f"n{12000000 + i:08d}": f"made up class {i}" for i in range(classes)}
    return dict(list({**IMAGENET, **made_up}.items())[:classes])


def write_classnames(folder, classes):
    names = imagenet_classes(classes)
    write_text(
        os.path.join(folder, "classnames.txt"),
        "".join(f"{wnid} {name}\n" for wnid, name in names.items()),
    )
    return names


def imagenet_tree(root, per_class=4, classes=10):
    """images/train has `per_class` images a class, images/val half as many."""
    folder = os.path.join(root, "imagenet")
    names = write_classnames(folder, classes)
    for part, n in (("train", per_class), ("val", max(1, per_class // 2))):
        write_images(
            os.path.join(folder, "images", part),
            [
                (f"{wnid}/{wnid if part == 'train' else 'ILSVRC2012_val'}_{i:08d}.JPEG", label)
                for label, wnid in enumerate(sorted(names))
                for i in range(1, n + 1)
            ],
        )
        write_text(os.path.join(folder, "images", part, ".DS_Store"), "\0")
    return [names[wnid] for wnid in sorted(names)]


def imagenetv2_tree(
    root, per_class=2, classes=10, images="imagenetv2-matched-frequency-format-val"
):
    """Folders are numbers: label = line of classnames.txt, which is not sorted by wnid here."""
    folder = os.path.join(root, "imagenetv2")
    names = write_classnames(folder, classes)
    write_images(
        os.path.join(folder, images),
        [(f"{label}/{i:040x}.jpeg", label) for label in range(classes) for i in range(per_class)],
    )
    return list(names.values())


def wnid_tree(root, folder, images, per_class, names, wnids):
    write_images(
        os.path.join(root, folder, images),
        [
            (f"{wnid}/{wnid}_{i}.JPEG", label)
            for label, wnid in enumerate(wnids)
            for i in range(per_class)
        ],
    )
    write_text(os.path.join(root, folder, images, "README.txt"), "no class\n")
    return [names[wnid] for wnid in wnids]


def imagenet_sketch_tree(root, per_class=2, classes=10, images="images"):
    names = write_classnames(os.path.join(root, "imagenet-sketch"), classes)
    return wnid_tree(root, "imagenet-sketch", images, per_class, names, sorted(names))


def imagenet_a_tree(root, per_class=2, classes=5):
    """`classes` wnids out of twice as many in classnames.txt (the real one: 200 of 1,000)."""
    names = write_classnames(os.path.join(root, "imagenet-adversarial"), 2 * classes)
    return wnid_tree(
        root, "imagenet-adversarial", "imagenet-a", per_class, names, sorted(names)[1::2]
    )


def imagenet_r_tree(root, per_class=2, classes=5):
    names = write_classnames(os.path.join(root, "imagenet-rendition"), 2 * classes)
    return wnid_tree(root, "imagenet-rendition", "imagenet-r", per_class, names, sorted(names)[::2])


# Datasets of one's own: accents, digits, brackets and numbers in front.
BIRDS = {"001.Black_footed_Albatross": "Black footed Albatross", "002.Café_owl": "Café owl",
         "003.Finch_(zebra)": "Finch (zebra)", "010.3D bird's": "3D bird's"}


def own_folders_tree(folder, per_class=8):
    """A folder per class. Returns the class names, as all `own_*_tree` do."""
    write_images(str(folder), [(f"{name}/Photo {i}.JPG", label)
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
    return json_tree(str(folder), images, "split.json", list(BIRDS.values()), per_class,
                     lambda label, i, part: f"{list(BIRDS)[label]}/{i}.jpg")


TREES = {
    name: globals()[f"{name}_tree"]
    for name in (
        "imagenet",
        "caltech101",
        "oxford_pets",
        "stanford_cars",
        "oxford_flowers",
        "food101",
        "fgvc_aircraft",
        "sun397",
        "dtd",
        "eurosat",
        "ucf101",
        "imagenetv2",
        "imagenet_sketch",
        "imagenet_a",
        "imagenet_r",
    )
}


def write_descriptions(path, class_names, per_class=2):
    """A description file for `class_names`, for tests that do not care what it says."""
    sentences = {
        name: [f"A {name} looks like sample {i}." for i in range(per_class)]
        for name in class_names
    }
    write_text(path, json.dumps(sentences))
    return path
