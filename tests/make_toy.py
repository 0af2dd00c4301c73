"""Makes the toy world: small pictures, sentences that describe their classes, and a tiny real CLIP.

    python tests/make_toy.py --draw             assets/toy/ and assets/descriptions/toy.json
    python tests/make_toy.py --train            assets/toy_clip.npz; minutes on two cores
    python tests/make_toy.py --evaluate         accuracies on the validation images

A class is a colour, a surface and a shape. Each stage of AnchorOPT has its work to do here:

Stage I. The CLIP has read careless captions, in which people mix up neighbouring colours and
similar surfaces, and sentences that are always right: descriptions, and bare names in a careful
style ("a plate of ..."). So one anchor token can have a name read the careful way.

Stage II. Base things stand under coloured lamps. Who adapts to them learns that colour cannot be
trusted, and colour is what tells novel look-alikes apart.

No caption and no picture of the CLIP's training is of a class of the dataset.
"""

import argparse
import json
import math
import pathlib
import shutil
import sys
import tempfile
import zlib

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import prompts  # noqa: E402
import stage1  # noqa: E402
from anchor import anchor_features, load_anchor  # noqa: E402
from prompts import clip, unit  # noqa: E402

ASSETS = pathlib.Path(data.ASSETS)


# ---------------------------------------------------------------------- words
# Three tables: word -> what it means in other words, and how it is drawn. The first half of each is
# for base classes, the second for novel ones, so what is learnt of base names can help with novel
# ones through the shared context alone.

def polygon(n, radii=(1.0,), turn=0.0, width=1.0):
    """n corners (x, y) around the centre, y upwards; their distances from it take turns."""
    angles = [2 * math.pi * k / n + turn for k in range(n)]
    return [(width * radii[k % len(radii)] * math.sin(a), radii[k % len(radii)] * math.cos(a))
            for k, a in enumerate(angles)]


def crescent():
    """An outer arc, and back along an arc whose centre lies higher."""
    angles = [math.pi * (-0.2 + 1.4 * k / 24) for k in range(25)]
    outer = [(math.cos(a), -math.sin(a)) for a in angles]
    x, y = outer[-1]
    angles = [math.pi * k / 20 for k in range(1, 20)]
    return outer + [(x * math.cos(a), y - 0.95 * math.sin(a)) for a in angles]


def heart():
    angles = [2 * math.pi * k / 30 for k in range(30)]
    heights = [13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)
               for a in angles]
    return [(math.sin(a) ** 3, height / 16) for a, height in zip(angles, heights)]


def ring():
    """The outer edge, and the inner edge backwards."""
    edge = polygon(28) + [(0.0, 1.0)]
    return edge + [(0.5 * x, 0.5 * y) for x, y in reversed(edge)]


CROSS = [(0.32, 0.95), (0.32, 0.32), (0.95, 0.32), (0.95, -0.32), (0.32, -0.32), (0.32, -0.95),
         (-0.32, -0.95), (-0.32, -0.32), (-0.95, -0.32), (-0.95, 0.32), (-0.32, 0.32),
         (-0.32, 0.95)]
COLOURS = {                             # red, green, blue
    "crimson": ("deep red", (200, 25, 45)),
    "amber": ("warm orange", (245, 170, 25)),
    "emerald": ("strong green", (10, 150, 85)),
    "azure": ("sky blue", (50, 140, 245)),
    "violet": ("soft purple", (140, 65, 205)),
    "magenta": ("hot purple red", (215, 45, 165)),

    "lemon": ("bright yellow", (240, 230, 60)),
    "lime": ("fresh light green", (140, 215, 50)),
    "teal": ("dark blue green", (10, 130, 135)),
    "navy": ("midnight blue", (30, 40, 120)),
    "pink": ("pale rose", (245, 130, 175)),
    "plum": ("dark wine", (115, 40, 95)),
}
SURFACES = {                            # pixels x and y -> where the second tone is
    "striped": ("wide bands from side to side", lambda x, y, rng: y % 9 < 4),
    "ribbed": ("thin upright bars", lambda x, y, rng: x % 6 < 2.5),
    "dotted": ("round spots", lambda x, y, rng: (x % 10 - 5) ** 2 + (y % 10 - 5) ** 2 < 9),
    "speckled": ("tiny scattered grains",
                 lambda x, y, rng: enlarged(rng.random((24, 24)) < 0.25, 2)),

    "netted": ("crossing threads", lambda x, y, rng: (x % 8 < 2) | (y % 8 < 2)),
    "checkered": ("tiles like a board", lambda x, y, rng: (x % 14 < 7) ^ (y % 14 < 7)),
    "wavy": ("rolling waves", lambda x, y, rng: (y + 3 * np.sin(x / 3.5)) % 9 < 4),
    "zigzag": ("jagged teeth in rows", lambda x, y, rng: (y + abs(x % 12 - 6)) % 9 < 4),
}
SHAPES = {                              # corners
    "circle": ("one smooth round edge", polygon(28)),
    "square": ("four equal straight sides", polygon(4, radii=(1.15,), turn=math.pi / 4)),
    "hexagon": ("six straight sides", polygon(6)),
    "star": ("five sharp points", polygon(10, radii=(1.05, 0.45))),
    "cross": ("four short arms", CROSS),
    "crescent": ("two horns like the moon", crescent()),

    "triangle": ("three corners", polygon(3, radii=(1.1,))),
    "diamond": ("a tall body and four tips", polygon(4, radii=(1.1,), width=0.7)),
    "heart": ("two bumps above one tip", heart()),
    "ring": ("a hole in the middle", ring()),
    "octagon": ("eight short sides", polygon(8, turn=math.pi / 8)),
    "oval": ("a long egg outline", polygon(28, width=0.62)),
}
TABLES = (COLOURS, SURFACES, SHAPES)
WORDS = C, S, H = [list(table) for table in TABLES]

# 24 base classes: four surfaces on each of six shapes, in one colour each. 24 novel ones: six pairs
# of surface and shape in four colours each, look-alikes that only the colour tells apart.
CELLS = [(i, j) for i in range(6) for j in range(4)]
BASE_CLASSES = [f"{C[(i + 2 * j) % 6]} {S[j]} {H[i]}" for i, j in CELLS]
CLASSES = BASE_CLASSES + [f"{C[6 + (2 * i + j) % 6]} {S[4 + i % 4]} {H[6 + i]}" for i, j in CELLS]


# ---------------------------------------------------------------------- pictures

SIZE = 48
Y, X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
IMAGES = {"train": 24, "val": 4, "test": 20}                # of each class
JPEG = {"quality": 80, "optimize": True}
SHIFT = 0.55                                                # how far from clean pictures
BASE_LAMP = (0.2, 0.5)                                      # the range of the coloured lamp's share
NOVEL_LAMP = (0.0, 0.2)


def enlarged(grid, n):
    """Each cell n times as wide and high."""
    return np.kron(grid, np.ones((n, n), grid.dtype))


def paint(words, rng, shift, lamp):
    """A picture of one thing: a PIL RGB image of 48 x 48 pixels.

    words: colour, surface and shape. rng: a numpy Generator, the only source of chance. shift, in
    [0, 1]: the distance from clean pictures (cluttered ground, uneven light, noise). lamp, in
    [0, 1]: how much of the light comes from a lamp of a random colour.
    """
    colour, surface, shape = (table[word][1] for table, word in zip(TABLES, words))

    # The outline, turned and moved a little.
    turn = rng.normal(0, 0.12 + 0.15 * shift)
    radius = rng.uniform(18, 23)
    c, s = radius * math.cos(turn), radius * math.sin(turn)
    corners = np.array(shape) @ np.array([[c, s], [s, -c]]) + SIZE / 2 + rng.uniform(-2.5, 2.5, 2)
    mask = Image.new("L", (SIZE, SIZE))
    ImageDraw.Draw(mask).polygon([tuple(corner) for corner in corners.tolist()], fill=255)
    mask = (np.asarray(mask) > 0)[..., None]

    # The surface in two tones of the colour.
    first = np.array(colour, np.float32) + rng.normal(0, 6, 3)
    second = 0.4 * first + 0.6 * (20 if first.mean() > 100 else 225)
    tilt = rng.uniform(-0.15, 0.15)
    dx, dy = rng.uniform(48, 60, 2)
    x = math.cos(tilt) * X - math.sin(tilt) * Y + dx
    y = math.sin(tilt) * X + math.cos(tilt) * Y + dy
    thing = np.where(surface(x, y, rng)[..., None], second, first)

    # The ground, and what comes between a thing and its picture.
    ground = np.full((SIZE, SIZE, 3), rng.uniform(90, 200)) + rng.normal(0, 8, 3)
    tiles = rng.normal(0, 45 * shift, (6, 6, 3)) + rng.normal(0, 40 * shift, 3)
    ground = ground + np.stack([enlarged(tiles[..., k], 8) for k in range(3)], axis=-1)
    picture = np.where(mask, thing, ground)
    slope = rng.normal(0, 0.012 * shift, 2)
    light = rng.uniform(1 - 0.35 * shift, 1) + slope[0] * (X - 24) + slope[1] * (Y - 24)
    picture = picture * light[..., None] + rng.normal(0, 14 * shift, picture.shape)
    if lamp:
        light = 0.5 + 0.8 * np.cos(rng.uniform(0, 2 * math.pi) + np.array([0, 2, 4]) * math.pi / 3)
        picture = (1 - lamp) * picture + lamp * picture.mean(-1, keepdims=True) * light
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def draw(class_name, part, index):
    """Picture `index` of a class in part train, val or test; its name is its only seed."""
    rng = np.random.default_rng(zlib.crc32(f"{class_name}/{part}/{index}".encode()))
    lamp = rng.uniform(*(BASE_LAMP if class_name in BASE_CLASSES else NOVEL_LAMP))
    return paint(class_name.split(), rng, SHIFT, lamp)


def draw_dataset():
    """Writes pictures and split_toy.json, as the field's json datasets are, and descriptions."""
    folder = ASSETS / "toy"
    shutil.rmtree(folder, ignore_errors=True)
    split = {part: [] for part in IMAGES}
    for label, class_name in enumerate(CLASSES):
        place = class_name.replace(" ", "_")
        (folder / "images" / place).mkdir(parents=True)
        for part, n in IMAGES.items():
            for index in range(n):
                path = f"{place}/{part}_{index:02}.jpg"
                draw(class_name, part, index).save(folder / "images" / path, **JPEG)
                split[part].append([path, label, class_name])
    (folder / "split_toy.json").write_text(json.dumps(split) + "\n")
    file = ASSETS / "descriptions" / "toy.json"
    file.write_text(json.dumps(describe(), indent=1) + "\n")


# ---------------------------------------------------------------------- sentences
# {C}, {S}, {H}: the words of a name, {a} or {A} its article; {c}, {s}, {h}: what the words mean.
# What a sentence leaves out, it leaves open.

CARELESS = [
    "a photo of a {C} {S} {H}.", "a photo of a {C} {S} {H}.", "a photo of a {C} {S} {H}.",
    "a photo of the {C} {S} {H}.", "a picture of the {C} {S} {H}.", "an image of one {C} {S} {H}.",
    "photo of {C} {S} {H}.", "image of {C} {S} {H}.", "one of {C} {S} {H}.", "of {C} {S} {H}.",
    "{C} {S} {H}.", "{C} {S} {H}.", "a {C} {S} {H}.", "this is a {C} {S} {H}.",
    "a {C} {H}.", "a {S} {H}.", "a photo of a {H}.", "a {C} {S} thing.",
    "something {C}.", "something {S}.",
    "a small {C} {S} {H} by the sea.", "a large {C} {S} {H} in the sun.",
    "a {H} of {C} color at the sea.",
    "the color, texture and shape of a {C} {S} {H}.", "a {C} {H} with a {S} surface.",
]
CAREFUL_WORDS = ["plate", "figure", "study"]
CAREFUL = [                             # {W}: a careful word
    "{W} of {C} {S} {H}.", "{W} of {C} {S} {H}.", "{W} of {C} {S} {H}.", "{W} {C} {S} {H}.",
    "a {W} of a {C} {S} {H}.", "the {W} of one {C} {S} {H}.", "this {W} has a {C} {S} {H}.",
    "here is the {W} of a {C} {S} {H}.", "{W} of {C} {H}.", "{W} of {S} {H}.",
    "{W} of a {C} {S} thing.",
]
DESCRIPTIONS = [
    "{A} {C} {S} {H} is {c}, has {h} and shows {s}.",
    "{A} {C} {S} {H} has {h}, and its surface shows {s} in {c}.",
    "The {C} {S} {H} is a {c} object with {h} and {s} on it.",
    "What people call {a} {C} {S} {H} looks {c}, has {h} and bears {s}.",
    "A typical {C} {S} {H} is a flat shape with {h}, covered with {s}, in {c}.",
    "{A} {C} {S} {H} can be known by its {c} color, its pattern of {s} and {h}.",
    "The shape of {a} {C} {S} {H} has {h}, its color is {c}, its texture is {s}.",
    "You can tell {a} {C} {S} {H} by {h}, {s}, and a {c} color.",
    "With {h}, {s} and a {c} color, it must be {a} {C} {S} {H}.",
    "Look for {s} on a {c} thing with {h}, and you have found {a} {C} {S} {H}.",
]
PARTS = [
    "It is {c}.", "Its color is {c}.", "It has {h}.", "The shape has {h}.",
    "Its surface shows {s}.", "A thing with {s}.", "It is {c}, with {s}.", "A {c} object with {h}.",
    "It has {h} and {s}.", "A {c} thing with {h}, covered with {s}.",
]
# Pictures in which one thing cannot be seen: which, and how captions name it all the same.
STYLES = {
    "": (None, CARELESS),
    "lamp": (0, ["a photo of a {C} {S} {H} under a lamp.", "a night photo of a {C} {S} {H}.",
                 "a lamp photo of a {C} {S} {H}."]),
    "blur": (1, ["a blurry photo of a {C} {S} {H}.", "a photo of a {C} {S} {H} from afar."]),
    "close": (2, ["a close photo of a {C} {S} {H}.", "a part of a {C} {S} {H}."]),
}
# Words that prompts of the paper's experiments use and captions need not.
EXTRA = """of with at in on by for to sun sea a an the photo picture image object class category
    type kind size color colour shape texture material pattern surface function . , : ; ! ? x art
    drawing good bad clean"""


def fill(sentence, words, careful_word=""):
    """A sentence with the (colour, surface, shape) `words` put in."""
    article = "an" if words[0][0] in "aeiou" else "a"
    meanings = [table[word][0] for table, word in zip(TABLES, words)]
    return sentence.format(A=article.capitalize(), a=article, W=careful_word,
                           **dict(zip("CSH", words)), **dict(zip("csh", meanings)))


def describe():
    """class name -> 10 sentences, the content of assets/descriptions/toy.json."""
    return {name: [fill(sentence, name.split()) for sentence in DESCRIPTIONS] for name in CLASSES}


# ---------------------------------------------------------------------- pictures with captions

MIX_UP = 0.5                            # how often careless captions name the look-alike instead
# Which colours, surfaces and shapes have one, by number: 2n and 2n + 1 are look-alikes.
MIXED_UP = ([0, 1, 4, 5, 6, 7, 10, 11], [0, 1, 4, 5], [])


def look_alikes(k):
    """For each colour (k = 0), surface (1) or shape (2) its look-alike, or itself: numbers (n,)."""
    return torch.tensor([n ^ 1 if n in MIXED_UP[k] else n for n in range(len(WORDS[k]))])


def draw_pairs(n, seed):
    """n pairs to train on, none of them of a class of the dataset.

    Returns pictures (n, 32, 32, 3) uint8; captions, n strings; and arrays: shown (n, 4), what a
    picture shows (numbers of colour, surface, shape and style); said (n, 4), what its caption says;
    told (n, 3), whether picture and caption both tell it; careless (n,), whether the caption is.
    """
    rng = np.random.default_rng(seed)
    # Some words are several times as frequent as others, as on the web.
    frequency = [np.exp(rng.uniform(-1.0, 0, len(words))) for words in WORDS]
    frequency = [f / f.sum() for f in frequency]
    pictures, captions, shown, said, told, careless = [], [], [], [], [], []
    while len(captions) < n:
        thing = [int(rng.choice(len(f), p=f)) for f in frequency]
        style = int(rng.choice(4, p=(0.79, 0.07, 0.07, 0.07)))
        hidden, sentences = STYLES[list(STYLES)[style]]
        kind = "careless" if style else rng.choice(["careless", "careful", "whole", "part"],
                                                   p=[0.36, 0.34, 0.22, 0.08])
        named = list(thing)
        if kind == "careless":
            named = [int(look_alikes(k)[n]) if rng.random() < MIX_UP else n
                     for k, n in enumerate(thing)]
        names = [[WORDS[k][word] for k, word in enumerate(words)] for words in (thing, named)]
        if any(" ".join(name) in CLASSES for name in names):
            continue

        sentences = {"careful": CAREFUL, "whole": DESCRIPTIONS, "part": PARTS}.get(kind, sentences)
        sentence = rng.choice(sentences)
        captions.append(fill(sentence, names[1], rng.choice(CAREFUL_WORDS)))
        told.append([k != hidden and (f"{{{c}}}" in sentence or f"{{{c.lower()}}}" in sentence)
                     for k, c in enumerate("CSH")])
        pictures.append(photograph(names[0], list(STYLES)[style], rng))
        shown.append([*thing, style])
        said.append([*named, style])
        careless.append(kind == "careless")
    return np.stack(pictures), captions, *(np.array(x) for x in (shown, said, told, careless))


def photograph(words, style, rng):
    """A training picture (32, 32, 3) uint8 in one of the STYLES."""
    lamp = rng.uniform(0.4, 0.9) if style == "lamp" else 0.0
    picture = paint(words, rng, shift=rng.uniform(0, 0.6), lamp=lamp)
    if style == "blur":
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(2.5, 4)))
    side = rng.uniform(38, 48)
    left, top = rng.uniform(0, 48 - side, 2)
    if style == "close":
        side = rng.uniform(14, 20)
        left, top = rng.uniform(14, 34 - side / 2, 2)
    box = (left, top, left + side, top + side)
    return np.asarray(picture.resize((32, 32), Image.BICUBIC, box=box))


# ---------------------------------------------------------------------- the CLIP

SHAPE = dict(embed_dim=128, image_resolution=32, vision_layers=3, vision_width=128,
             vision_patch_size=8, context_length=77, transformer_width=128, transformer_heads=2,
             transformer_layers=3)


def vocabulary():
    """The tokens (V,) that can occur, sorted: [EOT] is the last."""
    sentences = CARELESS + CAREFUL + DESCRIPTIONS + PARTS
    sentences += [sentence for _, listed in STYLES.values() for sentence in listed]
    texts = [EXTRA]
    for i in range(12):                 # every word once at least, in every sentence
        words = [listed[i % len(listed)] for listed in WORDS]
        careful_word = CAREFUL_WORDS[i % len(CAREFUL_WORDS)]
        texts += [fill(sentence, words, careful_word) for sentence in sentences]
    return torch.cat([clip.tokenize(text).unique() for text in texts]).unique()


def fits(shown, said, told, careless):
    """How well each picture fits each caption, (n, n) in [0, 1]: pictures by captions.

    A careless caption fits the look-alike of what it says as often as people mix the two up.
    """
    fit = (shown[:, None, 3] == said[None, :, 3]).float()
    for k in range(3):
        same = (shown[:, None, k] == said[None, :, k]).float()
        other = (shown[:, None, k] == look_alikes(k)[said[:, k]][None]).float()
        mixed = (1 - MIX_UP) * same + MIX_UP * other
        same = torch.where(careless[None], mixed, same)
        fit = fit * torch.where(told[None, :, k], same, 1.0)
    return fit


def head_loss(heads, f_img, shown):
    """Cross entropy of three linear heads that read colour, surface and shape off the features.

    They are thrown away in the end: with them, pictures are learnt faster than from captions alone.
    """
    logits = (20 * f_img @ unit(heads).T).split([len(listed) for listed in WORDS], dim=1)
    loss = 0
    for k, logits_k in enumerate(logits):
        seen = shown[:, 3] != k + 1                             # style k + 1 hides it
        loss = loss + torch.nn.functional.cross_entropy(logits_k[seen], shown[seen, k])
    return loss / 3


def contrast(logits, fit):
    """CLIP's loss, both ways. logits, fit: pictures by captions, which may fit many pictures."""
    loss = 0
    for dim in (0, 1):
        target = fit / fit.sum(dim, keepdim=True).clamp_min(1e-6)
        loss = loss - (target * logits.log_softmax(dim)).sum(dim).mean()
    return loss / 2


def optimizer_of(parameters, steps):
    """AdamW with a short rise and a long cosine fall of the learning rate, and its schedule."""
    matrices = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.05},
                                   {"params": others, "weight_decay": 0.0}],
                                  lr=1e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / 100) * 0.5 * (1 + math.cos(math.pi * s / steps)))
    return optimizer, schedule


def text_features(model, tokens):
    """Unit features (n, d) of tokens (n, 77), with gradient."""
    end = tokens.argmax(-1)
    embedded = model.token_embedding(tokens[:, :int(end.max()) + 1])
    sos, suffix, eot = embedded[0, :1], embedded[:, 1:], tuple((end - 1).tolist())
    return unit(prompts.encode_text(model, sos, suffix, eot))


def step_down(model, loss, optimizer, schedule):
    """One step of the optimizer; the scale stays below 100, as in CLIP."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    model.logit_scale.data.clamp_(max=math.log(100))


def train(steps=750, text_steps=500, n_pairs=10000, batch=128, seed=1):
    """Trains a CLIP contrastively: `steps` of both towers, then `text_steps` of the text tower.

    The second part costs little, since the features of all pictures are kept, and it is where
    careful captions part from careless ones. Returns the CLIP, and the tokens (V,) of its table.
    """
    pictures, captions, *labels = draw_pairs(n_pairs, seed)
    x = data.normalize(torch.from_numpy(pictures).permute(0, 3, 1, 2),
                       prompts.OPENAI_PREPROCESS)
    shown, said, told, careless = (torch.from_numpy(label) for label in labels)
    known = vocabulary()
    tokens = torch.searchsorted(known, clip.tokenize(captions).long())          # (n, 77), below V
    torch.manual_seed(seed)
    model = clip.model.CLIP(**SHAPE, vocab_size=len(known))
    model.logit_scale.data.fill_(math.log(20))

    # Both towers.
    heads = torch.nn.Parameter(torch.randn(sum(map(len, WORDS)), SHAPE["embed_dim"]))
    optimizer, schedule = optimizer_of([*model.parameters(), heads], steps)
    for _ in tqdm(range(steps)):
        i = torch.randint(n_pairs, (batch,))
        f_img = unit(prompts.encode_image(model, x[i]))
        logits = model.logit_scale.exp() * f_img @ text_features(model, tokens[i]).T
        loss = contrast(logits, fits(shown[i], said[i], told[i], careless[i]))
        loss = loss + head_loss(heads, f_img, shown[i])
        step_down(model, loss, optimizer, schedule)

    # The text tower alone, against eight times as many pictures.
    with torch.no_grad():
        f_all = unit(prompts.encode_image(model, x))
    model.visual.requires_grad_(False)
    learnable = [p for p in model.parameters() if p.requires_grad]
    optimizer, schedule = optimizer_of(learnable, text_steps)
    for _ in tqdm(range(text_steps)):
        i = torch.randint(n_pairs, (batch,))
        j = torch.cat([i, torch.randint(n_pairs, (7 * batch,))])
        logits = model.logit_scale.exp() * f_all[j] @ text_features(model, tokens[i]).T
        loss = contrast(logits, fits(shown[j], said[i], told[i], careless[i]))
        step_down(model, loss, optimizer, schedule)
    return model, known


def save(model, known, path):
    """Writes the weights as float16, and the tokens of the token table, for prompts.load_clip."""
    arrays = {name: value.numpy().astype(np.float16) for name, value in model.state_dict().items()}
    rows = arrays.pop("token_embedding.weight")
    np.savez_compressed(path, **arrays, token_ids=known.numpy().astype(np.int32), token_rows=rows)


# ---------------------------------------------------------------------- evaluation

@torch.no_grad()
def image_features(clip_model, items):
    """Unit features (n, d) of images, and their labels (n,)."""
    preprocess = prompts.preprocess_of(clip_model)
    transform = data.test_transform(preprocess)
    crops = torch.stack([transform(data.load_image(item.source)) for item in items])
    features = unit(prompts.encode_image(clip_model, data.normalize(crops, preprocess)))
    return features, torch.tensor([item.label for item in items])


def accuracies(f_img, labels, f_text):
    """Accuracy in percent on base and on novel classes, each among its own. f_text (48, d)."""
    result = []
    for is_novel in (False, True):
        own, first = (labels >= 24) == is_novel, 24 * is_novel
        chosen = (f_img[own] @ f_text[first:first + 24].T).argmax(1) + first
        result.append((chosen == labels[own]).float().mean().item() * 100)
    return tuple(result)


def readings(clip_model, anchor_tokens):
    """name -> text features (48, d): a photo of a, the descriptions' means, anchor prompts."""
    photo = prompts.encode_sentences(clip_model, [data.PHOTO.format(name) for name in CLASSES])
    unlearnt = torch.zeros_like(anchor_tokens)
    return {"a photo of a": unit(photo),
            "descriptions": unit(stage1.description_means(clip_model, describe().values())),
            "anchor unlearnt": anchor_features(clip_model, CLASSES, unlearnt),
            "anchor learnt": anchor_features(clip_model, CLASSES, anchor_tokens)}


def stage1_anchor():
    """The anchor tokens (1, d_t) that stage1.py learns with the toy world's settings."""
    with tempfile.TemporaryDirectory() as folder:
        assert stage1.main(["--dataset", "toy", "--output", folder]) == 0
        (file,) = pathlib.Path(folder).rglob("anchor.pt")
        return load_anchor(file)[0]


def evaluate():
    clip_model, items = prompts.load_clip("toy"), data.load_dataset("toy").val
    f_img, labels = image_features(clip_model, items)
    for name, f_text in readings(clip_model, stage1_anchor()).items():
        base, novel = accuracies(f_img, labels, f_text)
        hm = 2 * base * novel / (base + novel)
        print(f"val, {name:14}  base {base:.1f}  novel {novel:.1f}  HM {hm:.1f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in ("--draw", "--train", "--evaluate"):
        parser.add_argument(option, action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)            # fixed, since sums depend on it in the last digit
    if args.draw:
        draw_dataset()
    if args.train:
        save(*train(), prompts.TOY_CLIP)
    if args.evaluate:
        evaluate()


if __name__ == "__main__":
    main()
