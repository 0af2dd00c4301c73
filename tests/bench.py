"""How fast, how big, and how equal: this project's training step against the conventional step of the CoOp family.

    python tests/bench.py                      the whole table: ViT-B/16 sizes, random weights
    python tests/bench.py --quick              20 classes, one timing, no memory: under 3 minutes on two cores
    python tests/bench.py --device cuda --dtype float16

project       `stage2.step_losses`, the step of Stage II; images are encoded once an epoch in large batches, and each step
              is charged its share (on a CPU, `encode_image` itself goes on 8 at a time).
conventional  77 positions for every class through CLIP's own, unmodified residual blocks; the anchor prompt encoded anew
              at every step without gradient; the step's images encoded inside it; CoCoOp image by image.

Both share whatever never touches a tower (template with its Gumbel noise, meta-network, heads, loss functions, optimizer) and
run on the same weights and inputs in one process, in turns. A step is forward, backward and update (the text side:
forward and backward). Times are medians of turns of two seconds, or of one step where it takes longer, after a warm-up; a cell
has at most five turns, and none begins after a minute. Peak memory is that of a process of its own.
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
import time
import types

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import torch
from PIL import Image
from tqdm import tqdm

import data
import eval as evaluation
import losses
import stage2
from anchor import AnchorPrompt
from prompts import SOS, build_learner, clip, embed, encode_image, unit

SIZES = {"ViT-B/16": (512, 224, 12, 768, 16, 77, 49408, 512, 8, 12), "tiny": (64, 32, 3, 128, 8, 77, 49408, 128, 2, 3)}
ROWS = {"coop": "CoOp", "cocoop": "CoCoOp", "maple": "MaPLe", "dept": "DePT"}
BATCH = {"coop": 8, "cocoop": 4, "maple": 4, "dept": 4}         # the paper's, but for CoCoOp: 1 there
NOUNS = """accordion airplane anchor ant barrel beaver binocular bonsai buddha butterfly camera cannon chandelier cougar crab
    crayfish crocodile cup dalmatian dolphin dragonfly elephant emu euphonium ewer ferry flamingo gramophone hawksbill
    hedgehog helicopter ibis kangaroo ketch laptop leopard llama lobster lotus mandolin mayfly menorah metronome
    minaret nautilus octopus okapi pagoda panda pigeon pizza platypus revolver rhino rooster saxophone schooner
    scorpion seahorse stapler starfish stegosaurus strawberry sunflower tick trilobite umbrella warbler wheelchair
    wildcat wrench""".split()
ADJECTIVES = """alpine american black blue bronze common crested desert english european giant golden great green italian
    japanese large northern painted pink purple royal scarlet silver small southern spotted striped tiger western
    white wild wooden yellow""".split()
KINDS = "coast forest garden house island lake mountain river sea sand snow stone street valley winter".split()


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


# ------------------------------------------------------------------------------------------- what both sides share

def random_clip(size, device, dtype):
    """A frozen CLIP of these sizes with random weights, large matrices in `dtype` as `prompts.load_clip` leaves them."""
    torch.manual_seed(0)
    model = clip.model.CLIP(*SIZES[size])
    if dtype != torch.float32:
        clip.model.convert_weights(model)                       # float16 where OpenAI's checkpoints have it
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype if parameter.dtype == torch.float16 else parameter.dtype)
    return model.to(device).eval().requires_grad_(False)


def make_case(row, clip_model, n_classes, batch_size=None, class_chunk=0):
    """One cell of the table: the learner, its inputs, and what the conventional step tokenises beforehand."""
    names, batch_size, device = class_names(n_classes), batch_size or BATCH[row], clip_model.logit_scale.device
    settings = evaluation.default_settings("caltech101", row, "anchoropt") | {"class_chunk": class_chunk}
    if row == "maple":
        settings["depth"] = min(settings["depth"], clip_model.transformer.layers)
    torch.manual_seed(1)
    anchor_tokens = torch.randn(settings["anchor_length"], clip_model.token_embedding.weight.shape[1]) * 0.02
    learner = build_learner(settings, clip_model, names, anchor_tokens).train()
    resolution, wide = clip_model.visual.input_resolution, clip_model.logit_scale.dtype         # float64 in some tests
    learner = learner.to(wide)
    case = types.SimpleNamespace(
        row=row, clip_model=clip_model, learner=learner, settings=settings, names=names,
        distil=settings["lambda_2"] > 0,                  # DePT's paper setting has none: no side encodes anchors there
        images=torch.randn(batch_size, 3, resolution, resolution).to(device),
        labels=torch.randint(n_classes, (batch_size,)).to(device),
        optimizer=torch.optim.SGD(learner.parameters(), lr=settings["lr"], momentum=0.9, weight_decay=5e-4))
    with torch.no_grad():                                                    # once an epoch, once a run
        case.features = encode_image(clip_model, case.images).to(wide)
        case.anchor_features = evaluation.anchor_features(clip_model, names, anchor_tokens, settings)
    case.normal = tokenise_77(clip_model, names, learner.template.length)
    case.anchor = tokenise_77(clip_model, [f"{settings['preposition']} {name}" for name in names], len(anchor_tokens))
    return case


def project_loss(case):
    anchor_features = case.anchor_features if case.distil else None
    return stage2.step_losses(case.learner, case.settings, case.features, case.images, case.labels, anchor_features)[0]


# ------------------------------------------------------------------------------------------- the conventional step

def tokenise_77(clip_model, texts, n_context):
    """What the CoOp family keeps from tokenising "X ... X text.": embeddings behind the n_context placeholders, [EOT]."""
    tokens = clip.tokenize([" ".join(["X"] * n_context + [text]) + "." for text in texts]).to(clip_model.logit_scale.device)
    with torch.no_grad():
        return clip_model.token_embedding(tokens)[:, 1 + n_context:], tokens.argmax(-1)


def encode_77(clip_model, context, tokenised, deep=None):
    """context (length, d_t), behind it each class's tokens and padding: (C, 77, d_t) through CLIP's blocks -> (C, d)."""
    behind, eot = tokenised
    sos = embed(clip_model, [SOS]).to(behind.dtype)
    prompts = torch.cat([torch.cat([sos, context.to(behind.dtype)]).expand(len(behind), -1, -1), behind], dim=1)
    x = (prompts + clip_model.positional_embedding).to(clip_model.dtype).permute(1, 0, 2)          # (77, C, d_t)
    for layer, block in enumerate(clip_model.transformer.resblocks):
        if deep is not None:
            inside = x[1:1 + len(context)].permute(1, 0, 2)
            x = torch.cat([x[:1], deep(layer, inside).permute(1, 0, 2), x[1 + len(context):]])
        x = block(x)
    x = clip_model.ln_final(x.permute(1, 0, 2))
    return x[torch.arange(len(x), device=x.device), eot] @ clip_model.text_projection.to(x.dtype)


def encode_image_prompted(clip_model, images, tokens):
    """MaPLe's image tower: tokens[l] (M, d_v) enter before CLIP's own block l. Returns (B, d)."""
    visual, M = clip_model.visual, len(tokens[0])
    x = visual.conv1(images.to(clip_model.dtype)).flatten(2).permute(0, 2, 1)
    x = torch.cat([visual.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
    x = x + visual.positional_embedding.to(x.dtype)
    x = visual.ln_pre(torch.cat([x, tokens[0].to(x.dtype).expand(len(x), -1, -1)], dim=1)).permute(1, 0, 2)
    for layer, block in enumerate(visual.transformer.resblocks):
        if 1 <= layer < len(tokens):
            x = torch.cat([x[:-M], tokens[layer].to(x.dtype)[:, None].expand(-1, x.shape[1], -1)])
        x = block(x)
    return visual.ln_post(x[0]) @ visual.proj.to(x.dtype)


def objective(case, f, u, v, l_norm, anchor_features):
    """Eqs. 10-12, and DePT's head, of features that the conventional step computed."""
    ce = losses.cross_entropy(l_norm, case.labels)                                                       # Eq. 10
    if case.row == "dept":
        w_cat = case.settings["w_cat"]
        ce = (1 - w_cat) * ce + w_cat * losses.cross_entropy(*case.learner.head_logits(u, v, case.labels))
    kl = torch.zeros_like(ce)
    if case.distil:
        l_ens = losses.ensemble_logits(l_norm, case.learner.logits(f, anchor_features))
        kl = losses.distillation_kl(l_norm, l_ens, case.settings["temperature"])                         # Eq. 11
    return losses.total_loss(ce, kl, case.settings["lambda_1"], case.settings["lambda_2"])               # Eq. 12


def conventional_loss(case):
    """The same objective, with every feature computed inside the step, 77 positions at a time."""
    clip_model, learner, template = case.clip_model, case.learner, case.learner.template
    wide = clip_model.logit_scale.dtype
    f = None
    if case.row != "maple" or case.distil:
        with torch.no_grad():
            f = clip_model.encode_image(case.images).to(wide)
    u, anchor_features = f, None
    if case.distil:
        with torch.no_grad():
            anchor_features = unit(encode_77(clip_model, template.anchor_tokens, case.anchor))
    scale = clip_model.logit_scale.exp()
    if case.row == "cocoop":
        contexts, _ = template(learner.meta_net(unit(f)))                                # (B, length, d_t)
        v, l_norm = None, []
        for u_i, context in zip(unit(f), contexts):
            l_norm.append(scale * u_i @ unit(encode_77(clip_model, context, case.normal)).T)
        l_norm = torch.stack(l_norm)
    else:
        v = conventional_text(case)
        if case.row == "maple":
            V = [template.soft_tokens, *learner.deep_tokens]
            u = encode_image_prompted(clip_model, case.images, [linear(V_l) for linear, V_l in zip(learner.to_visual, V)])
        l_norm = scale * unit(u) @ unit(v).T
    return objective(case, f, u, v, l_norm, anchor_features)


def conventional_text(case):
    """The text features of CoOp, DePT and MaPLe, 77 positions a class: (C, d)."""
    context, W = case.learner.template()
    if case.row != "maple":
        return encode_77(case.clip_model, context, case.normal)
    tokens = case.learner.deep_tokens

    def deep(layer, hidden):
        if not 1 <= layer <= len(tokens):
            return hidden
        return case.learner.template.deepen(W, tokens[layer - 1].to(hidden.dtype), hidden)
    return encode_77(case.clip_model, context, case.normal, deep)


# ----------------------------------------------------------------------------------------------------- measuring

LOSSES = {"project": project_loss, "conventional": conventional_loss}
TEXTS = {"project": lambda case: case.learner.text_features(case.features), "conventional": conventional_text}


def step(case, side, text_only=False, update=True):
    """One step. Returns the loss; with text_only there are no losses and no update, and it is the features' sum of squares."""
    torch.manual_seed(2)                                                     # the Gumbel noise
    case.optimizer.zero_grad()
    if text_only:
        loss = TEXTS[side](case).to(case.clip_model.logit_scale.dtype).square().sum()
    else:
        loss = LOSSES[side](case)
    loss.backward()
    if update and not text_only:
        case.optimizer.step()
    return loss.detach()


def differences(case, text_only=False):
    """||a - b|| / ||b|| between project (a) and conventional (b): of the loss, and the largest of all gradient tensors."""
    found = {}
    for side in LOSSES:
        found[side] = [step(case, side, text_only, update=False)] + [p.grad.clone() for p in case.learner.parameters()
                                                                    if p.grad is not None]
    ours, theirs = found.values()
    assert len(ours) == len(theirs), "the two steps reach different parameters"
    each = [float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(ours, theirs)]
    return each[0], max(each[1:])


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
    """Median seconds of each function. They take turns of two seconds or a call, so that a machine that slows down slows all."""
    times, start = [], time.perf_counter()
    while not times or len(times) < repeats and time.perf_counter() - start < patience:
        times.append([seconds(function, device, at_least=2 if repeats > 1 else 0) for function in functions])
    return [statistics.median(column) for column in zip(*times)]


def peak_gb():
    """The peak resident size of this process. Not ru_maxrss where it can be helped: on Linux a child inherits its parent's."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024 / 1e9
    except OSError:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def measure_alone(args, side, row, n_classes):
    """What a fresh process does to learn its peak memory: the epoch's image encoding where `side` has one, then a step."""
    clip_model = args.random_clip()
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(args.device)
    if side == "project":
        encode_images(clip_model, args.encode_batch)()
    case = make_case(row, clip_model, n_classes, class_chunk=args.class_chunk)
    took = seconds(lambda: step(case, side), args.device)
    peak = torch.cuda.max_memory_allocated(args.device) / 1e9 if args.device.type == "cuda" else peak_gb()
    print(json.dumps({"gb": peak, "seconds": took}))


@functools.cache
def alone(side, row, n_classes, options, exact=False):
    """`measure_alone` in a process of its own: {"gb": peak memory, "seconds": of its step}. exact: to extrapolate from."""
    command = [sys.executable, "-W", "ignore", __file__, *options, "--alone", side, row, str(n_classes)]
    # glibc keeps what small tensors leave free, up to half as much again; the large ones that are extrapolated to leave nothing
    tight = {"MALLOC_MMAP_THRESHOLD_": "1000000"} if exact else {}
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | tight)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def available_gb(device):
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 1e9
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("MemAvailable")) * 1024 / 1e9
    except OSError:
        return float("inf")


def too_much(args, row, n_classes):
    """None, or "n/a (needs X GB)": what the conventional step of this cell would take, on a line through two smaller ones."""
    few, many = (20, 50) if row == "cocoop" else (80, 200)                 # CoCoOp's step has a prompt for each class and image
    small, large = (alone("conventional", row, n, args.options, exact=True) for n in (few, many))
    gb, took = (large[key] + (large[key] - small[key]) * (n_classes - many) / (many - few) for key in ("gb", "seconds"))
    if gb < 0.9 * available_gb(args.device) and took < args.patience:
        return None
    return f"n/a (needs {gb:.1f} GB and {took:.0f} s, extrapolated from {few} and {many} classes)"


def encode_images(clip_model, n):
    """A function that encodes n images at once, as each epoch of Stage II and each test set does."""
    resolution = clip_model.visual.input_resolution
    images = torch.randn(n, 3, resolution, resolution, device=clip_model.logit_scale.device)

    def encode():
        with torch.no_grad():
            return encode_image(clip_model, images).float()
    return encode


# -------------------------------------------------------------------------------------------------------- tables

def table_row(args, clip_model, image_seconds, row, n_classes):
    """The cells of one line (two for CoOp: the text side alone, the whole step)."""
    case = make_case(row, clip_model, n_classes, class_chunk=args.class_chunk)
    batch, suffix = len(case.labels), case.learner.suffix.shape[1]
    reason = too_much(args, row, n_classes) if n_classes > (50 if row == "cocoop" else 200) else None
    memory = ["-", "-"]
    if not args.no_memory:
        memory = [f"{alone('project', row, n_classes, args.options)['gb']:.2f}",
                  "n/a" if reason else f"{alone('conventional', row, n_classes, args.options)['gb']:.2f}"]
    for text_only in ((True, False) if row == "coop" else (False,)):
        amortised = 0 if text_only or (row == "maple" and not case.distil) else batch * image_seconds
        ours = functools.partial(step, case, "project", text_only)
        theirs = functools.partial(step, case, "conventional", text_only)
        if reason:
            ours()
            took, differ, conventional, ratio = medians([ours], args.device, args.repeats), ("-", "-"), reason, "n/a"
        else:
            differ = [f"{value:.1e}" for value in differences(case, text_only)]               # warms both up, too
            took = medians([ours, theirs], args.device, args.repeats)
            conventional, ratio = f"{took[1]:.3f}", f"{took[1] / (took[0] + amortised):.1f}x"
        name = f"{ROWS[row]}, text side" if text_only else f"{ROWS[row]} + AnchorOPT"
        ours = f"{took[0] + amortised:.3f}" + f" (images {amortised:.3f})" * bool(amortised)
        cells = [name, n_classes, batch, suffix, ours, conventional, ratio, *(["-", "-"] if text_only else memory), *differ]
        yield "| " + " | ".join(map(str, cells)) + " |"
    args.step_seconds[row, n_classes] = took[0] + amortised


def other_lines(args, clip_model, image_seconds):
    """Stage I, an epoch of Stage II, and evaluation, on a set of Caltech101's size: 50 base classes, 800 training images."""
    n_classes = 50 if 50 in args.classes else args.classes[0]
    names, device = class_names(n_classes), args.device
    prompt = AnchorPrompt(clip_model, names)
    targets, optimizer = prompt().detach(), torch.optim.SGD([prompt.tokens], lr=0.002, momentum=0.9, weight_decay=5e-4)

    def stage1_step():
        optimizer.zero_grad()
        losses.anchor_mse(prompt(), targets).backward()
        optimizer.step()
    stage1_step()
    yield f"| Stage I, a step on {n_classes} classes | {medians([stage1_step], device, max(3, args.repeats))[0]:.3f} s |"

    picture = Image.effect_noise((300, 200), 60).convert("RGB")
    transform = data.train_transform(clip_model.visual.input_resolution)
    loading = statistics.median(seconds(lambda: transform(picture), device) for _ in range(20))
    for row in args.rows:
        steps = 800 // BATCH[row]
        took = steps * args.step_seconds[row, n_classes] + 800 * loading
        yield (f"| Stage II, {ROWS[row]}: an epoch of 800 images, batch {BATCH[row]} | {took:.1f} s, scaled: {steps} steps and "
               f"{800 * loading:.1f} s to crop and flip in one process |")

    n = args.encode_batch
    features, labels = encode_images(clip_model, n)(), torch.randint(n_classes, (n,), device=device)
    resolution = clip_model.visual.input_resolution
    images = [(torch.randn(len(part), 3, resolution, resolution), part) for part in labels.split(100)]
    for row in args.rows:
        case = make_case(row, clip_model, n_classes)
        took = seconds(lambda: evaluation.evaluate(case.learner, features, labels, case.anchor_features, False,
                                                   images if row == "maple" else None), device)
        yield (f"| Evaluation, {ROWS[row]}, {n_classes} classes, {n} images in memory | "
               f"{n / (took + n * image_seconds):.1f} images/s ({n / took:.1f} once CLIP's image features are there) |")


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), 
                        help="of CLIP (default: float16 on CUDA, else float32)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="baselines (default: all)")
    parser.add_argument("--classes", nargs="+", type=int, help="class counts (default: 50 500 1000; --quick: 20)")
    parser.add_argument("--repeats", type=int, help="timings of each step (default: 5; --quick: 1)")
    parser.add_argument("--patience", type=float, default=180,
                        help="skip a conventional step of more seconds than this (default: 180)")
    parser.add_argument("--class-chunk", type=int, default=0, help="the project's switch of that name (default: 0)")
    parser.add_argument("--quick", action="store_true", help="20 classes, one timing, images encoded 8 at a time, no memory columns")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory columns empty: no further processes")
    parser.add_argument("--tiny", action="store_true", help="a CLIP of three small blocks, to try the benchmark itself")
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.classes = args.classes or ([20] if args.quick else [50, 500, 1000])
    args.repeats = args.repeats or (1 if args.quick else 5)
    args.no_memory = args.no_memory or (args.quick and not args.tiny)
    args.device = torch.device(args.device)
    args.dtype = args.dtype or ("float16" if args.device.type == "cuda" else "float32")
    args.encode_batch = stage2.ENCODE_BATCH if args.device.type == "cuda" else 8 if args.quick else 32
    size = "tiny" if args.tiny else "ViT-B/16"
    args.random_clip = functools.partial(random_clip, size, args.device, getattr(torch, args.dtype))
    args.options = ("--device", str(args.device), "--dtype", args.dtype, "--class-chunk", str(args.class_chunk),
                    *["--quick"] * args.quick, *["--tiny"] * args.tiny)
    args.step_seconds = {}
    return args


def main(argv=None):
    args = parse(argv)
    if args.alone:
        side, row, n_classes = args.alone
        return measure_alone(args, side, row, int(n_classes))
    clip_model, names = args.random_clip(), class_names(max(args.classes))
    device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else \
        f"{platform.machine()} CPU, {torch.get_num_threads()} of {os.cpu_count()} cores"
    encode = encode_images(clip_model, args.encode_batch)
    image_seconds = medians([encode], args.device, args.repeats, patience=20)[0] / args.encode_batch
    where = "allocated on the device" if args.device.type == "cuda" else \
        f"resident, with Python, torch and CLIP's weights ({peak_gb():.1f} GB in this process so far)"
    print(f"{datetime.date.today()}: {device}, load {os.getloadavg()[0]:.1f} at the start, torch {torch.__version__}, "
          f"{args.dtype}, {'a tiny CLIP' if args.tiny else 'ViT-B/16'} with random weights. Command: "
          f"python tests/bench.py {' '.join(sys.argv[1:] if argv is None else argv)}\n\n"
          f"Seconds per step: medians of up to {args.repeats} timings. \"images\": the step's share of encoding "
          f"{args.encode_batch} images at once ({1000 * image_seconds:.1f} ms an image). Peak memory: {where}. "
          f"Names: {names[0]}, {names[1]}, {names[2]}, ... CoCoOp's batch is 4 here (the paper's: 1); "
          "DePT's setting has no distillation.\n\n"
          "| step | classes | batch | longest suffix | project, s | conventional, s | ratio | project, GB | conventional, GB "
          "| loss differs by | gradients differ by |\n" + "|:--" + "|--:" * 10 + "|", flush=True)
    for row in tqdm(args.rows, disable=None, leave=False):
        for n_classes in args.classes:
            for line in table_row(args, clip_model, image_seconds, row, n_classes):
                print(line, flush=True)
            gc.collect()
    print("\n| whole stages | |\n|:--|--:|")
    for line in other_lines(args, clip_model, image_seconds):
        print(line, flush=True)


if __name__ == "__main__":
    main()
