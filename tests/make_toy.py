"""Makes what the toy world needs and no download brings: a tiny real CLIP, and descriptions of the toy classes.

    python tests/make_toy_clip.py --descriptions     writes assets/descriptions/toy.json
    python tests/make_toy_clip.py                    trains and writes assets/toy_clip.npz (7 minutes on two cores)
    python tests/make_toy_clip.py --evaluate         zero-shot accuracy of the stored model, and of its descriptions

The model learns from pictures of coloured shapes and from sentences about them, none of which is of a class of the toy
dataset: those colour-surface-shape triples are left out, so that zero-shot is what it says. It reads plain captions ("a photo
of a teal plain heart."), parts of them, paraphrases in the manner of class descriptions, and captions of pictures in which
something cannot be seen: the colour (lamp light), the surface (blur), the outline (close-up).
"""
import argparse
import json
import math
import pathlib
import sys
import time
import zlib
from typing import NamedTuple

import clip
import numpy as np
import torch
import torch.nn.functional as F
from clip.model import CLIP, build_model
from PIL import Image, ImageDraw, ImageFilter

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SHAPE = dict(embed_dim=128, image_resolution=32, vision_layers=4, vision_width=128, vision_patch_size=8,
             context_length=77, vocab_size=49408, transformer_width=128, transformer_heads=2, transformer_layers=3)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# -------------------------------------------------------------------------------------- the toy world
# Drawn by code from a seed, so that everything here runs without a download. Its figures check the machinery and
# are no evidence for the paper's claims. tests/make_toy_clip.py trains the CLIP that goes with it.

# A class is a colour, a surface and a shape. Base and novel classes share no word, so nothing that is learnt about the
# name of a base class can help with a novel one, except through the context that all prompts share.
TOY_COLOURS = {
    "crimson": (200, 25, 45), "amber": (245, 170, 25), "emerald": (10, 150, 85), "azure": (50, 140, 245),
    "violet": (140, 65, 205), "ivory": (240, 232, 205),
    "pink": (245, 130, 175), "lemon": (240, 230, 60), "lime": (140, 215, 50), "teal": (10, 130, 135),
    "navy": (30, 40, 120), "brown": (120, 72, 35)}
TOY_SURFACES = ["striped", "dotted", "checkered", "plain", "ribbed", "netted", "speckled", "wavy"]
TOY_SHAPES = ["circle", "square", "hexagon", "star", "cross", "crescent",
              "triangle", "diamond", "heart", "ring", "octagon", "oval"]
_COLOUR_NAMES = list(TOY_COLOURS)


def _toy_classes():
    """24 base classes: every base surface on every base shape, so that surface and shape alone tell them apart. 24 novel
    classes: six surface-shape pairs in four colours each, look-alikes that only the colour tells apart."""
    base = [f"{_COLOUR_NAMES[(i + 2 * j) % 6]} {TOY_SURFACES[j]} {TOY_SHAPES[i]}" for i in range(6) for j in range(4)]
    novel = [f"{_COLOUR_NAMES[6 + (i + j + j // 2) % 6]} {TOY_SURFACES[4 + i % 4]} {TOY_SHAPES[6 + i]}"
             for i in range(6) for j in range(4)]
    return base + novel


TOY_CLASSES = _toy_classes()
_BASE_CLASSES = frozenset(TOY_CLASSES[:(len(TOY_CLASSES) + 1) // 2])


class ToyImage(NamedTuple):
    """What identifies one image of the toy dataset; `draw_toy` draws it, always the same."""
    class_name: str
    split: str
    index: int


def _outline(shape):
    """Corners of a shape as (x, y) in the unit circle, y upwards, one polygon (a ring walks its inner edge backwards)."""
    def polygon(n, radii=(1.0,), turn=0.0, width=1.0):
        return [(width * radii[k % len(radii)] * math.sin(2 * math.pi * k / n + turn),
                 radii[k % len(radii)] * math.cos(2 * math.pi * k / n + turn)) for k in range(n)]
    if shape == "cross":
        a, b = 0.32, 0.95
        return [(a, b), (a, a), (b, a), (b, -a), (a, -a), (a, -b), (-a, -b), (-a, -a), (-b, -a), (-b, a), (-a, a), (-a, b)]
    if shape == "crescent":  # the outer arc, and back along an arc whose centre lies higher
        arc = [math.pi * (-0.2 + 1.4 * k / 24) for k in range(25)]
        outer = [(math.cos(t), -math.sin(t)) for t in arc]
        x, y = outer[-1]
        inner = [(x * math.cos(math.pi * k / 20), y - 0.95 * math.sin(math.pi * k / 20)) for k in range(1, 20)]
        return outer + inner
    if shape == "heart":
        t = [2 * math.pi * k / 30 for k in range(30)]
        return [(math.sin(v) ** 3, (13 * math.cos(v) - 5 * math.cos(2 * v) - 2 * math.cos(3 * v) - math.cos(4 * v)) / 16)
                for v in t]
    if shape == "ring":
        edge = polygon(28) + [(0.0, 1.0)]
        return edge + [(0.5 * x, 0.5 * y) for x, y in reversed(edge)]
    return {"circle": polygon(28), "square": polygon(4, turn=math.pi / 4, radii=(1.15,)), "hexagon": polygon(6),
            "star": polygon(10, radii=(1.05, 0.45)), "triangle": polygon(3, radii=(1.1,)),
            "diamond": polygon(4, width=0.7, radii=(1.1,)), "octagon": polygon(8, turn=math.pi / 8),
            "oval": polygon(28, width=0.62)}[shape]


_OUTLINES = {shape: np.array(_outline(shape)) for shape in TOY_SHAPES}
_SIZE = 48
_Y, _X = np.mgrid[0:_SIZE, 0:_SIZE].astype(np.float32)


def _pattern(surface, rng):
    """(48, 48) of 0 and 1: where a surface shows the second tone."""
    angle, (dx, dy) = rng.uniform(-0.15, 0.15), rng.uniform(0, 12, 2)
    x = math.cos(angle) * _X - math.sin(angle) * _Y + dx + 48
    y = math.sin(angle) * _X + math.cos(angle) * _Y + dy + 48
    if surface == "striped":
        return y % 9 < 4
    if surface == "ribbed":
        return x % 6 < 2.5
    if surface == "dotted":
        return (x % 10 - 5) ** 2 + (y % 10 - 5) ** 2 < 9
    if surface == "checkered":
        return (x % 14 < 7) ^ (y % 14 < 7)
    if surface == "netted":
        return (x % 8 < 2) | (y % 8 < 2)
    if surface == "speckled":
        return np.kron(rng.random((24, 24)) < 0.25, np.ones((2, 2), bool))
    if surface == "wavy":
        return (y + 3 * np.sin(x / 3.5)) % 9 < 4
    return np.zeros_like(x, bool)


def paint_toy(colour, surface, shape, rng, shift=0.0, lamp=0.0):
    """One picture of a thing: a PIL RGB image of 48 x 48 pixels.

    `shift` in [0, 1] is the distance from clean pictures (cluttered ground, uneven light, noise), `lamp` in [0, 1] how much
    of the light comes from a lamp of a random colour. `rng`: a numpy Generator, the only source of chance.
    """
    turn, radius = rng.normal(0, 0.12 + 0.15 * shift), rng.uniform(18, 23)
    centre = _SIZE / 2 + rng.uniform(-2.5, 2.5, 2)
    c, s = radius * math.cos(turn), radius * math.sin(turn)
    corners = _OUTLINES[shape] @ np.array([[c, s], [s, -c]]) + centre
    mask = Image.new("L", (_SIZE, _SIZE))
    ImageDraw.Draw(mask).polygon([tuple(p) for p in corners.tolist()], fill=255)
    mask = (np.asarray(mask) > 0)[..., None]
    first = np.array(TOY_COLOURS[colour], np.float32) + rng.normal(0, 6, 3)
    second = 0.4 * first + 0.6 * (20 if first.mean() > 100 else 225)
    thing = np.where(_pattern(surface, rng)[..., None], second, first)
    ground = np.full((_SIZE, _SIZE, 3), rng.uniform(90, 200), np.float32) + rng.normal(0, 8, 3)
    if shift:
        blocks = rng.normal(0, 45 * shift, (6, 6, 3)) + rng.normal(0, 40 * shift, 3)
        ground = ground + np.kron(blocks, np.ones((8, 8, 1)))
    picture = np.where(mask, thing, ground)
    if shift:
        slope = rng.normal(0, 0.012 * shift, 2)
        picture = picture * (rng.uniform(1 - 0.35 * shift, 1) + slope[0] * (_X - 24) + slope[1] * (_Y - 24))[..., None]
        picture = picture + rng.normal(0, 14 * shift, picture.shape)
    if lamp:
        light = 0.5 + 0.8 * np.cos(rng.uniform(0, 2 * math.pi) + np.array([0, 2, 4]) * math.pi / 3)
        picture = (1 - lamp) * picture + lamp * picture.mean(-1, keepdims=True) * light
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def draw_toy(toy_image):
    """The PIL RGB image, 48 x 48, that a `ToyImage` names. The same in every process: its only seed is the name."""
    rng = np.random.default_rng(zlib.crc32("/".join(map(str, toy_image)).encode()))
    # Base things stand under coloured lamps, novel things hardly do. Whoever learns from base images alone learns that
    # colour cannot be trusted, and colour is what tells novel look-alikes apart: this is what adapting costs here.
    lamp = rng.uniform(0.3, 0.8) if toy_image.class_name in _BASE_CLASSES else rng.uniform(0.0, 0.2)
    return paint_toy(*toy_image.class_name.split(), rng, shift=0.7, lamp=lamp)


def toy_dataset(n_train=24, n_val=8, n_test=20):
    """The toy dataset: {"train": ..., "val": ..., "test": ...}, each a list of (ToyImage, label); labels follow TOY_CLASSES."""
    sizes = {"train": n_train, "val": n_val, "test": n_test}
    return {split: [(ToyImage(name, split, index), label) for label, name in enumerate(TOY_CLASSES) for index in range(n)]
            for split, n in sizes.items()}


# ---- sentences
PARAPHRASE = {
    "crimson": "deep red", "amber": "warm orange", "emerald": "strong green", "azure": "sky blue", "violet": "purple",
    "ivory": "cream white", "pink": "pale rose", "lemon": "bright yellow", "lime": "fresh light green",
    "teal": "dark blue green", "navy": "midnight blue", "brown": "wood",
    "striped": "wide bands from side to side", "dotted": "round spots", "checkered": "tiles like a board",
    "plain": "no marks at all", "ribbed": "thin upright bars", "netted": "crossing threads",
    "speckled": "tiny scattered grains", "wavy": "rolling waves",
    "circle": "one smooth round edge", "square": "four equal straight sides", "hexagon": "six straight sides",
    "star": "five sharp points", "cross": "four short arms", "crescent": "two horns like the moon",
    "triangle": "three corners", "diamond": "a tall body and four tips", "heart": "two bumps above one tip",
    "ring": "a hole in the middle", "octagon": "eight short sides", "oval": "a long egg outline"}
# {C}, {S}, {H}: the words of a name; {c}, {s}, {h}: what they mean. What a sentence leaves out, it leaves open.
CAPTIONS = ["a photo of a {C} {S} {H}.", "a photo of a {C} {S} {H}.", "a photo of a {C} {S} {H}.", "{C} {S} {H}.",
            "a picture of the {C} {S} {H}.", "an image of one {C} {S} {H}.", "this is a {C} {S} {H}.",
            "a {C} {H}.", "a {S} {H}.", "a photo of a {H}.", "a {C} {S} thing.", "something {C}.", "something {S}.",
            "a small {C} {S} {H} by the sea.", "a large {C} {S} {H} in the sun.", "a {H} of {C} color at the sea.",
            "the color, texture and shape of a {C} {S} {H}.", "a {C} {H} with a {S} surface."]
DESCRIPTIONS = ["A {C} {S} {H} is {c}, has {h} and shows {s}.", "A {C} {S} {H} has {h}, and its surface shows {s}.",
                "The {C} {S} {H} is a {c} object with {s} on it.", "Most {C} {S} {H}s look {c} and have {h}.",
                "A typical {C} {S} {H} is a flat shape with {h}, covered with {s}, in {c}.",
                "A {C} {S} {H} can be known by its {c} color and its pattern of {s}.",
                "The shape of a {C} {S} {H} has {h}, its color is {c}, its texture is {s}.",
                "You can tell a {C} {S} {H} by {h}, {s}, and a {c} color."]
PARTS = ["It is {c}.", "Its color is {c}.", "It has {h}.", "The shape has {h}.", "Its surface shows {s}.", "A thing with {s}.",
         "It is {c}, with {s}.", "A {c} object with {h}.", "It has {h} and {s}.", "A {c} thing with {h}, covered with {s}."]
# Pictures in which one thing cannot be seen, and how captions speak of them; the captions name it all the same.
STYLES = {"lamp": (0, ["a photo of a {C} {S} {H} under a lamp.", "a night photo of a {C} {S} {H}.", "a lamp photo of a {C} {S} {H}."]),
          "blur": (1, ["a blurry photo of a {C} {S} {H}.", "a photo of a {C} {S} {H} from afar."]),
          "close": (2, ["a close photo of a {C} {S} {H}.", "a part of a {C} {S} {H}."])}
# Words that prompts of the paper's experiments use and captions need not.
EXTRA = "of with at in on by for to sun sea a an the photo picture image object class category type kind size color colour shape " \
        "texture material pattern surface function . , : ; ! ? x art drawing good bad clean"


def fill(sentence, words):
    """A sentence of the grammar with the (colour, surface, shape) `words` put in."""
    paraphrases = [PARAPHRASE[word] for word in words]
    return sentence.format(**dict(zip("CSH", words)), **dict(zip("csh", paraphrases)))


def draw_caption(words, style, rng):
    """A random caption: the text, and for colour, surface and shape whether the text and its picture both speak of it."""
    if style:
        hidden, sentences = STYLES[style]
        return fill(rng.choice(sentences), words), [k != hidden for k in range(3)]
    kind = rng.random()
    sentence = rng.choice(CAPTIONS if kind < 0.6 else DESCRIPTIONS if kind < 0.85 else PARTS)
    if kind > 0.8 and rng.random() < 0.4:  # long texts, so that later positions are known too
        sentence = sentence + " " + rng.choice(PARTS)
    told = [f"{{{k}}}" in sentence or f"{{{k.lower()}}}" in sentence for k in "CSH"]
    return fill(sentence, words), told


def describe():
    """{class name: 8 sentences}: the answers to "What does a {class} look like?" of assets/descriptions/json."""
    return {name: [fill(sentence, name.split()) for sentence in DESCRIPTIONS] for name in TOY_CLASSES}


# ------------------------------------------------------------------------------------------------------------------ pictures
def draw_pairs(n, seed):
    """n training pairs: (n, 32, 32, 3) uint8 pictures, texts, (n, 4) ids of colour, surface, shape and style, (n, 3) told."""
    rng = np.random.default_rng(seed)
    vocabulary = [list(TOY_COLOURS), TOY_SURFACES, TOY_SHAPES]
    # Some words are ten times as frequent as others, as on the web.
    frequency = [p / p.sum() for p in (np.exp(rng.uniform(-2.3, 0, len(words))) for words in vocabulary)]
    styles = ["", *STYLES]
    pictures, texts, ids, told = np.empty((n, 32, 32, 3), np.uint8), [], np.empty((n, 4), np.int64), np.empty((n, 3), bool)
    while len(texts) < n:
        i = len(texts)
        chosen = [rng.choice(len(words), p=p) for words, p in zip(vocabulary, frequency)]
        words = [vocabulary[k][c] for k, c in enumerate(chosen)]
        if " ".join(words) in TOY_CLASSES:
            continue
        style = rng.choice(4, p=(0.7, 0.1, 0.1, 0.1))
        lamp = rng.uniform(0.4, 0.9) if styles[style] == "lamp" else 0.0
        picture = paint_toy(*words, rng, shift=rng.uniform(0, 0.35), lamp=lamp)
        if styles[style] == "blur":
            picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(2.5, 4)))
        side = rng.uniform(14, 20) if styles[style] == "close" else rng.uniform(38, 48)
        left, top = (rng.uniform(14, 34 - side / 2, 2) if styles[style] == "close" else rng.uniform(0, 48 - side, 2))
        picture = picture.resize((32, 32), Image.BICUBIC, box=(left, top, left + side, top + side))
        pictures[i] = picture
        text, told[i] = draw_caption(words, styles[style], rng)
        ids[i] = (*chosen, style)
        texts.append(text)
    return pictures, texts, ids, told


def to_tensor(pictures):
    """(n, 32, 32, 3) uint8 to normalised (n, 3, 32, 32) float32."""
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


# --------------------------------------------------------------------------------------------------------------------- model
def encode_text(model, tokens):
    """Text features (n, d) of (n, 77) tokens. The padding behind the longest text is cut off: causal attention never reads it."""
    end = tokens.argmax(-1)
    length = int(end.max()) + 1
    x = (model.token_embedding(tokens[:, :length]) + model.positional_embedding[:length]).permute(1, 0, 2)
    for block in model.transformer.resblocks:
        mask = block.attn_mask[:length, :length].to(x)
        y = block.ln_1(x)
        x = x + block.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        x = x + block.mlp(block.ln_2(x))
    x = model.ln_final(x.permute(1, 0, 2))
    return x[torch.arange(len(x)), end] @ model.text_projection


def train(steps, n_pairs, batch, seed):
    """Trains the toy CLIP contrastively; returns it. A text is right for every picture in the batch of which it is true."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed + 1)
    start = time.time()
    pictures, texts, ids, told = draw_pairs(n_pairs, seed)
    tokens, ids, told = clip.tokenize(texts), torch.from_numpy(ids), torch.from_numpy(told)
    print(f"{n_pairs} pairs drawn in {time.time() - start:.0f} s, longest text {int(tokens.argmax(-1).max()) + 1} tokens")
    model = CLIP(**SHAPE)
    model.logit_scale.data.fill_(math.log(20))
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
                                  lr=1e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min(1, (s + 1) / 100) * 0.5 * (1 + math.cos(math.pi * s / steps)))
    for step in range(steps):
        at = torch.from_numpy(rng.integers(0, n_pairs, batch))
        image = F.normalize(model.encode_image(to_tensor(pictures[at.numpy()])), dim=-1)
        # Short texts and long ones apart, so that the short ones are not padded to the longest.
        order = tokens[at].argmax(-1).argsort()
        text = torch.cat([encode_text(model, part) for part in tokens[at][order].chunk(4)])[order.argsort()]
        text = F.normalize(text, dim=-1)
        agree = ids[at][:, None] == ids[at][None]  # (picture, text, attribute)
        true = ((agree[..., :3] | ~told[at][None]).all(-1) & agree[..., 3]).float()
        logits = model.logit_scale.exp() * image @ text.T
        loss = (-(true / true.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()
                - (true / true.sum(0, keepdim=True) * logits.log_softmax(0)).sum(0).mean()) / 2
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        model.logit_scale.data.clamp_(max=math.log(100))
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}, scale {model.logit_scale.exp().item():.1f}, "
                  f"{time.time() - start:.0f} s", flush=True)
    return model


def save_toy_clip(model, path):
    """Writes the weights as float16; of the token embedding only the rows of words that can occur."""
    texts = [EXTRA, *PARAPHRASE, *PARAPHRASE.values(), *STYLES, *TOY_CLASSES]
    sentences = CAPTIONS + DESCRIPTIONS + PARTS + [s for _, listed in STYLES.values() for s in listed]
    texts += [fill(sentence, name.split()) for sentence in sentences for name in TOY_CLASSES]
    token_ids = np.array(sorted(set(clip.tokenize(texts).flatten().tolist()) - {0}), np.int32)
    arrays = {name: value.numpy().astype(np.float16) for name, value in model.state_dict().items()
              if name != "token_embedding.weight"}
    rows = model.token_embedding.weight.detach().numpy()[token_ids].astype(np.float16)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays, token_ids=token_ids, token_rows=rows)


def load_toy_state_dict(path):
    """The full state dict, float32, for `clip.model.build_model`; rows of words that the toy world lacks are small noise."""
    with np.load(path, allow_pickle=False) as stored:
        state = {name: torch.from_numpy(stored[name]).float() for name in stored.files if not name.startswith("token_")}
        rows = np.random.RandomState(0).normal(0, 0.02, (SHAPE["vocab_size"], stored["token_rows"].shape[1]))
        rows[stored["token_ids"]] = stored["token_rows"]
    state["token_embedding.weight"] = torch.from_numpy(rows).float()
    return state


# ---------------------------------------------------------------------------------------------------------------- evaluation
@torch.no_grad()
def evaluate(model, split):
    """{"template" and "descriptions": (base, novel, harmonic mean)}, zero-shot accuracies in percent on a split."""
    images = toy_dataset()[split]
    pictures = np.stack([np.asarray(draw_toy(image).resize((32, 32), Image.BICUBIC)) for image, _ in images])
    labels = torch.tensor([label for _, label in images])
    features = F.normalize(model.encode_image(to_tensor(pictures)), dim=-1)
    sentences = {"template": [[f"a photo of a {name}."] for name in TOY_CLASSES], "descriptions": list(describe().values())}
    n_base, result = (len(TOY_CLASSES) + 1) // 2, {}
    for kind, listed in sentences.items():
        text = torch.stack([F.normalize(encode_text(model, clip.tokenize(s)), dim=-1).mean(0) for s in listed])
        scores = features @ F.normalize(text, dim=-1).T
        base = (scores[labels < n_base, :n_base].argmax(1) == labels[labels < n_base]).float().mean().item() * 100
        novel = (scores[labels >= n_base, n_base:].argmax(1) + n_base == labels[labels >= n_base]).float().mean().item() * 100
        result[kind] = base, novel, 2 * base * novel / max(base + novel, 1e-9)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "assets" / "toy_clip.npz")
    parser.add_argument("--descriptions", action="store_true", help="only write the descriptions")
    parser.add_argument("--descriptions-output", type=pathlib.Path, default=ROOT / "assets" / "descriptions" / "json")
    parser.add_argument("--evaluate", action="store_true", help="only evaluate the stored model, on --split")
    parser.add_argument("--split", default="test", choices=["train", "val", "test"])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=24000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="fixed, since sums depend on it in the last digit")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.descriptions:
        args.descriptions_output.parent.mkdir(parents=True, exist_ok=True)
        args.descriptions_output.write_text(json.dumps(describe(), indent=1) + "\n")
        return
    if not args.evaluate:
        save_toy_clip(train(args.steps, args.pairs, args.batch, args.seed), args.output)
        print(f"{args.output}: {args.output.stat().st_size / 1e6:.2f} MB")
    model = build_model(load_toy_state_dict(args.output)).float()
    for kind, (base, novel, mean) in evaluate(model, args.split).items():
        print(f"{args.split}, {kind}: base {base:.1f}, novel {novel:.1f}, HM {mean:.1f}")


if __name__ == "__main__":
    main()
