"""How fast, how big, and how equal: our training step against the CoOp family's conventional one.

    python tests/bench.py                      the whole table: ViT-B/16 sizes, random weights
    python tests/bench.py --quick              20 classes, one timing: under 3 minutes on two cores
    python tests/bench.py --device cuda --dtype float16

project       an epoch of one step of `stage2.adapt`, its order and what MaPLe does to its crops
              included. Images are encoded once an epoch in large batches, and each step is charged
              its share (on a CPU, `encode_image` itself goes on 8 at a time).
features kept the same for whoever comes second with --feature-cache: instead of the images' share
              that of reading the epoch's file, `data.KeptFeatures`.
conventional  77 positions for every class through CLIP's own, unmodified residual blocks; the
              anchor prompt encoded anew at every step without gradient; the step's images encoded
              inside it; CoCoOp image by image.

Both share whatever never touches a tower (template with its Gumbel noise, meta-network, heads, loss
functions, optimizer) and run on the same weights and inputs in one process, in turns. A step is
forward, backward and update (the text side: forward and backward). Times are medians of turns of
two seconds, or of one step where it takes longer, after a warm-up; a cell has at most five turns,
and none begins after a minute. Peak memory is that of a process of its own. Kernels are the
operations that a step dispatches, views left out: on a GPU, how often something is launched.
"""

import argparse
import datetime
import functools
import gc
import json
import os
import pathlib
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import types

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import data
import eval as evaluation
import losses
import stage1
import stage2
from anchor import AnchorPrompt, anchor_features
from prompts import SOS, build_learner, clip, embed, encode_image, unit

SIZES = {"ViT-B/16": (512, 224, 12, 768, 16, 77, 49408, 512, 8, 12),
         "tiny": (64, 32, 3, 128, 8, 77, 49408, 128, 2, 3)}
ROWS = {"coop": "CoOp", "cocoop": "CoCoOp", "maple": "MaPLe", "dept": "DePT"}
BATCH = {"coop": 8, "cocoop": 4, "maple": 4, "dept": 4}     # the paper's; CoCoOp's is 1
IMAGES = 800                                                # of an epoch: 50 classes, 16 shots

NOUNS = """
    accordion airplane anchor ant barrel beaver binocular bonsai buddha butterfly camera cannon
    chandelier cougar crab crayfish crocodile cup dalmatian dolphin dragonfly elephant emu
    euphonium ewer ferry flamingo gramophone hawksbill hedgehog helicopter ibis kangaroo ketch
    laptop leopard llama lobster lotus mandolin mayfly menorah metronome minaret nautilus
    octopus okapi pagoda panda pigeon pizza platypus revolver rhino rooster saxophone schooner
    scorpion seahorse stapler starfish stegosaurus strawberry sunflower tick trilobite umbrella
    warbler wheelchair wildcat wrench
""".split()
ADJECTIVES = """
    alpine american black blue bronze common crested desert english european giant golden great
    green italian japanese large northern painted pink purple royal scarlet silver small
    southern spotted striped tiger western white wild wooden yellow
""".split()
KINDS = """
    coast forest garden house island lake mountain river sea sand snow stone street valley
    winter
""".split()


def class_names(n, seed=0):
    """n different names of 1 to 4 words; a smaller n gives the first of a larger n's."""
    draw, names = random.Random(seed), {}
    while len(names) < n:
        words = draw.choices((1, 2, 3, 4), (40, 40, 15, 5))[0]
        parts = draw.sample(ADJECTIVES, max(0, words - 1))
        if words > 2:
            parts[-1] = draw.choice(KINDS)
        names[" ".join([*parts, draw.choice(NOUNS)])] = None
    return list(names)


# ---------------------------------------------------------------------------- what both sides share

def random_clip(size, device, dtype):
    """A frozen CLIP with random weights, in the precision that `prompts.load_clip` gives."""
    torch.manual_seed(0)
    model = clip.model.CLIP(*SIZES[size])
    if dtype != torch.float32:
        clip.model.convert_weights(model)               # float16 where OpenAI's files have it
        for parameter in model.parameters():
            if parameter.dtype == torch.float16:
                parameter.data = parameter.data.to(dtype)
    return model.to(device).eval().requires_grad_(False)


def make_case(row, clip_model, n_classes, batch_size=None, class_chunk=0):
    """One cell: the learner, its inputs, and what the conventional step tokenises beforehand."""
    names, batch_size = class_names(n_classes), batch_size or BATCH[row]
    scale = clip_model.logit_scale
    device, wide = scale.device, scale.dtype                # float64 in some tests, else float32
    settings = stage1.default_settings("caltech101", row, "anchoropt")
    settings |= {"class_chunk": class_chunk, "batch_size": batch_size}
    if row == "maple":
        settings["depth"] = min(settings["depth"], clip_model.transformer.layers)
    torch.manual_seed(1)
    width = clip_model.token_embedding.weight.shape[1]
    anchor_tokens = torch.randn(settings["anchor_length"], width) * 0.02
    learner = build_learner(settings, clip_model, names, anchor_tokens).train().to(wide)
    resolution = clip_model.visual.input_resolution
    case = types.SimpleNamespace(
        row=row, clip_model=clip_model, learner=learner, settings=settings, names=names,
        distil=settings["lambda_2"] > 0,                    # DePT's paper setting has none
        crops=torch.randint(256, (batch_size, 3, resolution, resolution), dtype=torch.uint8),
        labels=torch.randint(n_classes, (batch_size,)).to(device),
        optimizer=stage1.sgd(learner.parameters(), settings["lr"]),
        still=stage1.sgd(learner.parameters(), 0),          # moves nothing
        kernels={})                                         # (side, text_only) -> a step's
    for parameter in learner.parameters():
        parameter.grad = torch.zeros_like(parameter)
    case.still.step()                                       # makes its momentum buffers
    case.images = data.normalize(case.crops, device)
    with torch.no_grad():                                   # once an epoch, once a run
        case.f = encode_image(clip_model, case.images).to(wide)
        case.f_anc = anchor_features(clip_model, names, anchor_tokens, settings["preposition"])
    case.normal = tokenise_77(clip_model, names, learner.template.length)
    anchor_texts = [f"{settings['preposition']} {name}" for name in names]
    case.anchor = tokenise_77(clip_model, anchor_texts, len(anchor_tokens))
    return case


# ---------------------------------------------------------------------------- the project's step

class OneStep:
    """Stands for `stage1.Epochs`: one epoch of one step, whose loss stays here."""
    steps = 1

    def __init__(self, optimizer):
        self.optimizers = [optimizer]

    def __iter__(self):
        yield 1

    def note(self, loss, ce, kl):
        self.loss = loss.detach()


def project_step(case, optimizer):
    step = OneStep(optimizer)
    features = [(case.f, case.crops if case.learner.needs_images else None)]
    f_anc = case.f_anc if case.distil else None
    stage2.adapt(case.learner, step, features, case.labels, case.settings, 1, f_anc)
    return step.loss


def project_text(case):
    return case.learner.text_features(case.f)


# ---------------------------------------------------------------------------- the conventional step

def conventional_step(case, optimizer):
    optimizer.zero_grad()
    loss = conventional_loss(case)
    loss.backward()
    optimizer.step()
    return loss.detach()


def tokenise_77(clip_model, texts, n_context):
    """What the CoOp family keeps from tokenising "X ... X text.", with n_context placeholders X.

    Returns the embeddings behind the placeholders, and where [EOT] is.
    """
    placeholders = " ".join(["X"] * n_context)
    tokens = clip.tokenize([f"{placeholders} {text}." for text in texts])
    tokens = tokens.to(clip_model.logit_scale.device)
    with torch.no_grad():
        return clip_model.token_embedding(tokens)[:, 1 + n_context:], tokens.argmax(-1)


def encode_77(clip_model, context, tokenised, deep=None):
    """context (length, d_t), behind it each class's tokens and padding: 77 positions -> (C, d)."""
    behind, eot = tokenised
    sos = embed(clip_model, [SOS]).to(behind.dtype)
    before = torch.cat([sos, context.to(behind.dtype)]).expand(len(behind), -1, -1)
    prompts = torch.cat([before, behind], dim=1)                                # (C, 77, d_t)
    x = (prompts + clip_model.positional_embedding).to(clip_model.dtype).permute(1, 0, 2)
    inside = slice(1, 1 + len(context))
    for layer, block in enumerate(clip_model.transformer.resblocks):
        if deep is not None:
            changed = deep(layer, x[inside].permute(1, 0, 2)).permute(1, 0, 2)
            x = torch.cat([x[:1], changed, x[inside.stop:]])
        x = block(x)                                                            # (77, C, d_t)
    x = clip_model.ln_final(x.permute(1, 0, 2))
    read = x[torch.arange(len(x), device=x.device), eot]
    return read @ clip_model.text_projection.to(x.dtype)


def encode_image_prompted(clip_model, images, tokens):
    """MaPLe's image tower: tokens[l] (M, d_v) enter before CLIP's own block l. Returns (B, d)."""
    visual, M = clip_model.visual, len(tokens[0])
    x = visual.conv1(images.to(clip_model.dtype)).flatten(2).permute(0, 2, 1)
    first = visual.class_embedding.to(x.dtype).expand(len(x), 1, -1)
    x = torch.cat([first, x], dim=1) + visual.positional_embedding.to(x.dtype)
    prompts = [V_l.to(x.dtype).expand(len(x), -1, -1) for V_l in tokens]        # (B, M, d_v)
    x = visual.ln_pre(torch.cat([x, prompts[0]], dim=1)).permute(1, 0, 2)
    for layer, block in enumerate(visual.transformer.resblocks):
        if 1 <= layer < len(prompts):
            x = torch.cat([x[:-M], prompts[layer].permute(1, 0, 2)])
        x = block(x)
    return visual.ln_post(x[0]) @ visual.proj.to(x.dtype)


def conventional_loss(case):
    """The same objective, with every feature computed inside the step, 77 positions at a time."""
    clip_model, learner, template = case.clip_model, case.learner, case.learner.template
    f = f_anc = None
    with torch.no_grad():
        if case.row != "maple" or case.distil:
            f = clip_model.encode_image(case.images).to(clip_model.logit_scale.dtype)
        if case.distil:
            f_anc = unit(encode_77(clip_model, template.anchor_tokens, case.anchor))

    f_img, f_norm = f, None
    if case.row == "cocoop":
        l_norm = cocoop_logits(case, f)
    else:
        f_norm = conventional_text(case)
        if case.row == "maple":
            V = [template.soft_tokens, *learner.deep_tokens]
            tokens = [linear(V_l) for linear, V_l in zip(learner.to_visual, V)]
            f_img = encode_image_prompted(clip_model, case.images, tokens)
        l_norm = clip_model.logit_scale.exp() * unit(f_img) @ unit(f_norm).T

    ce = losses.cross_entropy(l_norm, case.labels)                              # Eq. 10
    ce = learner.own_loss(ce, f_img, f_norm, case.labels)                       # DePT's head
    kl = torch.zeros_like(ce)
    if case.distil:
        l_ens = losses.ensemble_logits(l_norm, learner.logits(f, f_anc))
        kl = losses.distillation_kl(l_norm, l_ens, case.settings["temperature"])        # Eq. 11
    return losses.total_loss(ce, kl, case.settings["lambda_1"], case.settings["lambda_2"])


def cocoop_logits(case, f):
    """Image by image: each has a context, and so a text feature of each class, of its own."""
    contexts, _ = case.learner.template(case.learner.meta_net(unit(f)))         # (B, length, d_t)
    rows = []
    for u, context in zip(unit(f), contexts):
        v = unit(encode_77(case.clip_model, context, case.normal))              # (C, d)
        rows.append(case.clip_model.logit_scale.exp() * u @ v.T)
    return torch.stack(rows)


def conventional_text(case):
    """The text features of CoOp, DePT and MaPLe, 77 positions a class: (C, d)."""
    context, W = case.learner.template()
    if case.row != "maple":
        return encode_77(case.clip_model, context, case.normal)
    V = case.learner.deep_tokens

    def deep(layer, hidden):
        if not 1 <= layer <= len(V):
            return hidden
        return case.learner.template.deepen(W, V[layer - 1].to(hidden.dtype), hidden)
    return encode_77(case.clip_model, context, case.normal, deep)


# ---------------------------------------------------------------------------- measuring

STEPS = {"project": project_step, "conventional": conventional_step}
TEXTS = {"project": project_text, "conventional": conventional_text}


def step(case, side, text_only=False, update=True):
    """One step; returns its loss. With text_only: the features' sum of squares, no update."""
    torch.manual_seed(1_000_003 + 1)            # as `stage2.adapt` does in epoch 1 of seed 1
    if not text_only:
        if side == "conventional":
            torch.randperm(len(case.labels))    # the order, which is drawn before the Gumbel noise
        return STEPS[side](case, case.optimizer if update else case.still)
    case.optimizer.zero_grad()
    loss = TEXTS[side](case).to(case.clip_model.logit_scale.dtype).square().sum()
    loss.backward()
    return loss.detach()


def loss_and_gradients(case, side, text_only=False):
    """name -> tensor: the loss of a step that moves nothing, and the gradients that it leaves.

    Counts the step's kernels on the way.
    """
    with Kernels() as counter:
        found = {"loss": step(case, side, text_only, update=False)}
    case.kernels[side, text_only] = counter.count
    for name, parameter in case.learner.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad.clone()
    return found


def differences(case, text_only=False):
    """||a - b|| / ||b||, project (a) and conventional (b): of the loss, the gradients' largest."""
    ours, theirs = (loss_and_gradients(case, side, text_only) for side in STEPS)
    assert ours.keys() == theirs.keys(), "the two steps reach different parameters"
    each = {name: float((ours[name] - b).norm() / b.norm().clamp_min(1e-30))
            for name, b in theirs.items()}
    return each.pop("loss"), max(each.values())


class Kernels(TorchDispatchMode):
    """Counts the operations that run something on the device: no views, and no empty memory."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aliases = [argument.alias_info for argument in function._schema.arguments]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        is_empty = "empty" in function.__name__ or "_unsafe_view" in function.__name__
        self.count += not is_view and not is_empty
        return function(*args, **(kwargs or {}))


def seconds(function, device, at_least=0):
    """Seconds a call: the mean of one call, or of as many as `at_least` seconds take."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - start < at_least:
        function()
        calls += 1
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / calls


def medians(functions, device, repeats, patience=60):
    """Median seconds of each function.

    They take turns of two seconds or a call, so that a machine that slows down slows all.
    """
    times, start = [], time.perf_counter()
    at_least = 2 if repeats > 1 else 0
    while not times or len(times) < repeats and time.perf_counter() - start < patience:
        times.append([seconds(function, device, at_least) for function in functions])
    return [statistics.median(column) for column in zip(*times)]


# ---------------------------------------------------------------------------- memory

def peak_gb():
    """The peak resident size of this process."""
    try:
        return proc_value("/proc/self/status", "VmHWM")     # not ru_maxrss: a child inherits that
    except OSError:
        import resource
        unit_of_rss = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_of_rss / 1e9


def available_gb(device):
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 1e9
    try:
        return proc_value("/proc/meminfo", "MemAvailable")
    except OSError:
        return float("inf")


def proc_value(path, key):
    """A line such as `VmHWM:  123 kB`, in GB. Raises OSError where there is no such file."""
    with open(path) as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) * 1024 / 1e9


def measure_alone(args, side, row, n_classes):
    """What a fresh process does to learn its peak memory: the epoch's images if any, a step."""
    clip_model = args.random_clip()
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(args.device)
    if side == "project":
        encode_images(clip_model, args.encode_batch)()
    case = make_case(row, clip_model, n_classes, class_chunk=args.class_chunk)
    took = seconds(lambda: step(case, side), args.device)
    peak = peak_gb()
    if args.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(args.device) / 1e9
    print(json.dumps({"gb": peak, "seconds": took}))


@functools.cache
def alone(side, row, n_classes, options, exact=False):
    """`measure_alone` in a process of its own: {"gb": peak memory, "seconds": of its step}.

    exact: to extrapolate from. glibc keeps what small tensors leave free, up to half as much again;
    the large ones that are extrapolated to leave nothing.
    """
    command = [sys.executable, "-W", "ignore", __file__, *options,
               "--alone", side, row, str(n_classes)]
    environment = dict(os.environ)
    if exact:
        environment["MALLOC_MMAP_THRESHOLD_"] = "1000000"
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def too_much(args, row, n_classes):
    """None, or "n/a (needs X GB)" where the conventional step of this cell would not fit.

    What it would take lies on a line through two smaller ones.
    """
    few, many = (20, 50) if row == "cocoop" else (80, 200)      # CoCoOp: a prompt a class and image
    small, large = (alone("conventional", row, n, args.options, exact=True) for n in (few, many))
    further = (n_classes - many) / (many - few)
    gb, took = (large[key] + (large[key] - small[key]) * further for key in ("gb", "seconds"))
    if gb < 0.9 * available_gb(args.device) and took < args.patience:
        return None
    return (f"n/a (needs {gb:.1f} GB and {took:.0f} s, "
            f"extrapolated from {few} and {many} classes)")


# ---------------------------------------------------------------------------- images

def encode_images(clip_model, n):
    """A function that encodes n images at once, as an epoch of Stage II and a test set does."""
    resolution = clip_model.visual.input_resolution
    images = torch.randn(n, 3, resolution, resolution, device=clip_model.logit_scale.device)

    def encode():
        with torch.no_grad():
            return encode_image(clip_model, images).float()
    return encode


def reading_seconds(clip_model, device):
    """Seconds an image to read an epoch's features from `data.KeptFeatures`."""
    with tempfile.TemporaryDirectory() as folder:
        items = [data.Item(__file__, 0)] * IMAGES               # any file that is there
        images = data.Images(items, data.train_transform(224), seed=1)
        kept = data.KeptFeatures(folder, "bench", images)
        kept.write(1, torch.randn(IMAGES, clip_model.text_projection.shape[1]).to(clip_model.dtype))
        read = functools.partial(kept.read, 1)
        assert read() is not None
        times = [seconds(lambda: read().to(device), device) for _ in range(20)]
    return statistics.median(times) / IMAGES


# ---------------------------------------------------------------------------- tables

COLUMNS = ["step", "classes", "batch", "longest suffix", "project, s", "conventional, s", "ratio",
           "project, kernels", "conventional, kernels", "project, GB", "conventional, GB",
           "loss differs by", "gradients differ by"]


def line(cells):
    return "| " + " | ".join(map(str, cells)) + " |"


def table_rows(args, clip_model, row, n_classes):
    """The lines of one cell: for CoOp the text side alone, the whole step, the features kept."""
    case = make_case(row, clip_model, n_classes, class_chunk=args.class_chunk)
    reason = None
    if n_classes > (50 if row == "cocoop" else 200):
        reason = too_much(args, row, n_classes)
    if row == "coop":
        yield line(measured(args, case, reason, text_only=True)[0])
    cells, took = measured(args, case, reason)
    yield line(cells)
    if row != "maple":                          # which prompts the image tower: nothing to keep
        yield line(with_features_kept(args, case, took))


def measured(args, case, reason, text_only=False):
    """One line's cells, and the seconds [project, conventional] without the images' share.

    reason: None, or why the conventional step is not run.
    """
    row, n_classes, batch = case.row, len(case.names), len(case.labels)
    ours = functools.partial(step, case, "project", text_only)
    theirs = functools.partial(step, case, "conventional", text_only)
    if reason:
        loss_and_gradients(case, "project", text_only)                      # warms up
        differ = ["-", "-"]
        took = [*medians([ours], args.device, args.repeats), None]
    else:
        differ = [f"{value:.1e}" for value in differences(case, text_only)]     # warms both up, too
        took = medians([ours, theirs], args.device, args.repeats)

    counts = [case.kernels.get((side, text_only), "-") for side in STEPS]
    share = 0
    if not text_only and (row != "maple" or case.distil):
        share = batch * args.image_seconds
    name, memory = f"{ROWS[row]} + AnchorOPT", ["-", "-"]
    if text_only:
        name = f"{ROWS[row]}, text side"
    elif not args.no_memory:
        memory = [f"{alone('project', row, n_classes, args.options)['gb']:.2f}", "n/a"]
        if not reason:
            memory[1] = f"{alone('conventional', row, n_classes, args.options)['gb']:.2f}"
    if not text_only:
        args.step_seconds[row, n_classes] = took[0] + share
    timing = times(took[0], share, "images", took[1], reason)
    return [name, *sizes(case), *timing, *counts, *memory, *differ], took


def with_features_kept(args, case, took):
    """The cells of a second method: its step without the image tower, but with reading f."""
    share = len(case.labels) * args.reading_seconds
    timing = times(took[0], share, "reading", took[1], "n/a")
    name = f"{ROWS[case.row]}, second method, features kept"
    return [name, *sizes(case), *timing, *["-"] * 6]


def sizes(case):
    return [len(case.names), len(case.labels), case.learner.suffix.shape[1]]


def times(own, share, what, conventional, reason):
    """Three cells: the project's seconds with the images' share, the conventional's, the ratio."""
    ours = f"{own + share:.3f}"
    if share:
        ours += f" ({what} {share:.3f})" if share >= 5e-4 else f" ({what} {1e6 * share:.0f} us)"
    if conventional is None:
        return [ours, reason, "n/a"]
    return [ours, f"{conventional:.3f}", f"{conventional / (own + share):.1f}x"]


def other_lines(args, clip_model):
    """Stage I, an epoch of Stage II, evaluation: Caltech101's size, 50 base classes."""
    n_classes = 50 if 50 in args.classes else args.classes[0]
    yield stage1_line(args, clip_model, n_classes)

    picture = Image.effect_noise((300, 200), 60).convert("RGB")
    transform = data.train_transform(clip_model.visual.input_resolution)
    crop = functools.partial(transform, picture)
    loading = statistics.median(seconds(crop, args.device) for _ in range(20))
    for row in args.rows:
        steps = IMAGES // BATCH[row]
        took = steps * args.step_seconds[row, n_classes] + IMAGES * loading
        yield line([f"Stage II, {ROWS[row]}: an epoch of {IMAGES} images, batch {BATCH[row]}",
                    f"{took:.1f} s, scaled: {steps} steps and {IMAGES * loading:.1f} s to crop and "
                    "flip in one process"])
    for row in args.rows:
        yield evaluation_line(args, clip_model, row, n_classes)


def stage1_line(args, clip_model, n_classes):
    prompt = AnchorPrompt(clip_model, class_names(n_classes))
    targets, optimizer = prompt().detach(), stage1.sgd([prompt.tokens], 0.002)

    def stage1_step():
        optimizer.zero_grad()
        stage1.scaled_backward(losses.anchor_mse(prompt(), targets), prompt.tokens)
        optimizer.step()
    stage1_step()
    took, = medians([stage1_step], args.device, max(3, args.repeats))
    return line([f"Stage I, a step on {n_classes} classes", f"{took:.3f} s"])


def evaluation_line(args, clip_model, row, n_classes):
    n, case = args.encode_batch, make_case(row, clip_model, n_classes)
    f = encode_images(clip_model, n)()
    labels = torch.randint(n_classes, (n,), device=args.device)
    resolution = clip_model.visual.input_resolution
    images = torch.randn(n, 3, resolution, resolution, device=args.device)
    parts = [None] * n
    if row == "maple":
        parts = images.split(100)
    batches = list(zip(f.split(100), parts, labels.split(100)))
    evaluate = functools.partial(evaluation.evaluate, case.learner, batches, case.f_anc)
    took = seconds(evaluate, args.device)
    return line([f"Evaluation, {ROWS[row]}, {n_classes} classes, {n} images in memory",
                 f"{n / (took + n * args.image_seconds):.1f} images/s ({n / took:.1f} once CLIP's "
                 "image features are there)"])


# ---------------------------------------------------------------------------- command line

def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"),
                        help="of CLIP (default: float16 on CUDA, else float32)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS),
                        help="baselines (default: all)")
    parser.add_argument("--classes", nargs="+", type=int,
                        help="class counts (default: 50 500 1000; --quick: 20)")
    parser.add_argument("--repeats", type=int, help="timings of each step (default: 5; --quick: 1)")
    parser.add_argument("--patience", type=float, default=180,
                        help="skip a conventional step of more seconds than this (default: 180)")
    parser.add_argument("--class-chunk", type=int, default=0,
                        help="the project's switch of that name (default: 0)")
    parser.add_argument("--quick", action="store_true",
                        help="20 classes, one timing, images encoded 8 at a time, no memory")
    parser.add_argument("--no-memory", action="store_true",
                        help="leave the memory columns empty: no further processes")
    parser.add_argument("--tiny", action="store_true",
                        help="a CLIP of three small blocks, to try the benchmark itself")
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.classes = args.classes or ([20] if args.quick else [50, 500, 1000])
    args.repeats = args.repeats or (1 if args.quick else 5)
    args.no_memory = args.no_memory or (args.quick and not args.tiny)
    args.device = torch.device(args.device)
    on_gpu = args.device.type == "cuda"
    args.dtype = args.dtype or ("float16" if on_gpu else "float32")
    args.encode_batch = 8 if args.quick else 32
    if on_gpu:
        args.encode_batch = data.ENCODE_BATCH
    size = "tiny" if args.tiny else "ViT-B/16"
    args.random_clip = functools.partial(random_clip, size, args.device, getattr(torch, args.dtype))
    switches = [f"--{name}" for name in ("quick", "tiny") if getattr(args, name)]
    args.options = ("--device", str(args.device), "--dtype", args.dtype,
                    "--class-chunk", str(args.class_chunk), *switches)
    args.step_seconds = {}
    return args


def headline(args, command):
    """What was measured where, before the table."""
    names = class_names(3)
    if args.device.type == "cuda":
        device, where = torch.cuda.get_device_name(args.device), "allocated on the device"
    else:
        device = (f"{platform.machine()} CPU, {torch.get_num_threads()} of {os.cpu_count()} cores, "
                  f"load {os.getloadavg()[0]:.1f} at the start")
        where = (f"resident, with Python, torch and CLIP's weights ({peak_gb():.1f} GB in this "
                 "process so far)")
    size = "a tiny CLIP" if args.tiny else "ViT-B/16"
    return f"""\
{datetime.date.today()}: {device}, torch {torch.__version__}, {args.dtype}, {size} with random \
weights. Command: python tests/bench.py {' '.join(command)}

Seconds per step: medians of up to {args.repeats} timings. "images": the step's share of encoding \
{args.encode_batch} images at once ({1000 * args.image_seconds:.1f} ms an image); "reading": of \
reading an epoch's features. Kernels: operations of a step, views left out. Peak memory: {where}. \
Names: {', '.join(names)}, ... CoCoOp's batch is 4 here (the paper's: 1); DePT's setting has no \
distillation.
"""


def main(argv=None):
    args = parse(argv)
    if args.alone:
        side, row, n_classes = args.alone
        return measure_alone(args, side, row, int(n_classes))
    clip_model = args.random_clip()
    encode = encode_images(clip_model, args.encode_batch)
    encode_seconds, = medians([encode], args.device, args.repeats, patience=20)
    args.image_seconds = encode_seconds / args.encode_batch
    args.reading_seconds = reading_seconds(clip_model, args.device)
    print(headline(args, sys.argv[1:] if argv is None else argv))
    print(line(COLUMNS))
    print("|:--" + "|--:" * (len(COLUMNS) - 1) + "|", flush=True)
    for row in tqdm(args.rows, disable=None, leave=False):
        for n_classes in args.classes:
            for text in table_rows(args, clip_model, row, n_classes):
                print(text, flush=True)
            gc.collect()
    print("\n| whole stages | |\n|:--|--:|")
    for text in other_lines(args, clip_model):
        print(text, flush=True)


if __name__ == "__main__":
    main()
