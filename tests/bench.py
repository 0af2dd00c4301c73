"""How fast, how big, and how equal: our training step against the CoOp family's conventional one.

    python tests/bench.py --device cuda --output DIR     all of it in ten minutes
    python tests/bench.py --classes 50                   on a CPU, which does a and b
    python tests/bench.py --quick                        a tiny CLIP: does the benchmark work?

On ViT-B/16 with random weights: (a) seconds, dispatched kernels (no views) and peak memory of a
step; (b) the frozen image tower; (c) a run of Caltech101's size, first and with its features kept;
(d) losses in float16 and float32; (e) whether a step waits for the GPU.

project: steps of `stage2.adapt`. Image features are computed once an epoch, in large batches; each
step is charged its share. conventional: 77 positions for every class through CLIP's own blocks, the
anchor prompt anew at every step, the step's images inside it, CoCoOp image by image. Both share
what never touches a tower. A step is forward, backward and update, at learning rate 0. Times are
medians after a warm-up.
"""

import argparse
import contextlib
import ctypes
import io
import os
import pathlib
import sys
import tempfile
import time
import traceback
import types
from functools import partial
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import data
import eval as evaluation
import losses
import prompts
import stage1
import stage2
from anchor import anchor_features
from prompts import SOS, build_learner, clip, embed, encode_image, preprocess_of

SIZES = {"ViT-B/16": (512, 224, 12, 768, 16, 77, 49408, 512, 8, 12),
         "tiny": (64, 32, 3, 128, 8, 77, 49408, 128, 2, 3)}
ROWS = ("coop", "cocoop", "maple", "dept")


def random_clip(size, device, dtype=torch.float32):
    """A frozen CLIP with random weights, in the precision that `prompts.load_clip` gives."""
    torch.manual_seed(0)
    model = clip.model.CLIP(*SIZES[size])
    if dtype == torch.float16:
        clip.model.convert_weights(model)
    return model.to(device).eval().requires_grad_(False)


def class_names(n, dataset="imagenet"):
    return list(data.read_json_object(data.default_descriptions(dataset)))[:n]


def make_case(row, clip_model, n_classes, batch_size=None):
    """One cell: the learner, its inputs, and what the conventional step tokenises beforehand."""
    names, scale = class_names(n_classes), clip_model.logit_scale
    device, wide = scale.device, scale.dtype                # float64 in some tests, else float32
    R, d_t = clip_model.visual.input_resolution, clip_model.token_embedding.weight.shape[1]
    settings = stage1.default_settings("caltech101", row, "anchoropt")
    B = settings["batch_size"] = batch_size or max(4, settings["batch_size"])
    if row == "maple":
        settings["depth"] = min(settings["depth"], clip_model.transformer.layers)
    torch.manual_seed(1)
    anchor_tokens = torch.randn(settings["anchor_length"], d_t) * 0.02
    learner = build_learner(settings, clip_model, names, anchor_tokens).train().to(wide)
    case = types.SimpleNamespace(
        clip_model=clip_model, learner=learner, settings=settings,
        crops=torch.randint(256, (B, 3, R, R), dtype=torch.uint8),
        labels=torch.randint(n_classes, (B,)).to(device),
        distil=settings["lambda_2"] > 0,                    # DePT's paper setting has none
        optimizer=stage1.sgd(learner.parameters(), 0),      # moves nothing
        kernels={})                                         # side -> a step's
    case.images = data.normalize(case.crops, preprocess_of(clip_model), device)
    with torch.no_grad():                                   # once an epoch, once a run
        case.f = encode_image(clip_model, case.images).to(wide)
        case.f_anc = anchor_features(clip_model, names, anchor_tokens, settings["preposition"])
    case.normal = tokenise_77(clip_model, names, learner.template.length)
    anchor_texts = [f"{settings['preposition']} {name}" for name in names]
    case.anchor = tokenise_77(clip_model, anchor_texts, len(anchor_tokens))
    return case


class Steps:
    """Stands for `stage1.Epochs`: one epoch. watched: after its first step, waiting is an error."""

    def __init__(self, optimizer, steps, watched):
        self.optimizers, self.steps, self.watched, self.losses = [optimizer], steps, watched, []

    def __iter__(self):
        yield 1

    def note(self, loss, ce, kl):
        self.losses.append(loss.detach())
        if self.watched:
            torch.cuda.set_sync_debug_mode("error" if len(self.losses) < self.steps else "default")


def project_steps(case, n=1, watched=False):
    """n steps on the case's images, over and over. Returns their losses (n,)."""
    crops = case.crops.repeat(n, 1, 1, 1) if case.learner.needs_images else None
    steps = Steps(case.optimizer, n, watched)
    stage2.adapt(case.learner, stage1.Run(case.settings, {}, 1, None), steps,
                 iter([(case.f.repeat(n, 1), crops)]), case.labels.repeat(n),
                 case.f_anc if case.distil else None)
    return torch.stack(steps.losses)


def conventional_steps(case, n=1):
    torch.manual_seed(1_000_003 + 1)            # as `stage2.adapt` does in epoch 1 of seed 1,
    torch.randperm(n * len(case.labels))        # with the order, drawn before the Gumbel noise
    for _ in range(n):
        loss = conventional_loss(case)
        case.optimizer.zero_grad()
        loss.backward()
        case.optimizer.step()
    return loss.detach().unsqueeze(0)


def tokenise_77(clip_model, texts, n_context):
    """Of "X ... X text." with n_context X: the embeddings behind these, and where [EOT] is."""
    tokens = clip.tokenize([f"{'X ' * n_context}{text}." for text in texts])
    tokens = tokens.to(clip_model.logit_scale.device)
    with torch.no_grad():
        return clip_model.token_embedding(tokens)[:, 1 + n_context:], tokens.argmax(-1)


def encode_77(clip_model, context, tokenised, deep=None):
    """context (length, d_t), behind it each class's tokens and padding: 77 positions -> (C, d)."""
    behind, eot = tokenised
    before, end = torch.cat([embed(clip_model, [SOS]), context]), 1 + len(context)
    x = torch.cat([before.to(behind.dtype).expand(len(behind), -1, -1), behind], dim=1)
    x = (x + clip_model.positional_embedding).to(clip_model.dtype).transpose(0, 1)
    for layer, block in enumerate(clip_model.transformer.resblocks):
        if deep is not None:
            changed = deep(layer, x[1:end].transpose(0, 1)).transpose(0, 1)
            x = torch.cat([x[:1], changed, x[end:]])
        x = block(x)                                                            # (77, C, d_t)
    x = clip_model.ln_final(x.transpose(0, 1))
    return x[torch.arange(len(x), device=x.device), eot] @ clip_model.text_projection.to(x.dtype)


def encode_image_prompted(clip_model, images, tokens):
    """MaPLe's image tower: tokens[l] (M, d_v) enter before CLIP's own block l. Returns (B, d)."""
    visual, M = clip_model.visual, len(tokens[0])
    x = visual.conv1(images.to(clip_model.dtype)).flatten(2).transpose(1, 2)
    whole = visual.class_embedding.to(x.dtype).expand(len(x), 1, -1)
    x = torch.cat([whole, x], dim=1) + visual.positional_embedding.to(x.dtype)
    prompts = [V_l.to(x.dtype).expand(len(x), -1, -1) for V_l in tokens]        # (B, M, d_v)
    x = visual.ln_pre(torch.cat([x, prompts[0]], dim=1)).transpose(0, 1)
    for layer, block in enumerate(visual.transformer.resblocks):
        if 1 <= layer < len(prompts):
            x = torch.cat([x[:-M], prompts[layer].transpose(0, 1)])
        x = block(x)
    return visual.ln_post(x[0]) @ visual.proj.to(x.dtype)


def conventional_loss(case):
    """The same objective, with every feature computed inside the step, 77 positions at a time."""
    clip_model, learner, settings = case.clip_model, case.learner, case.settings

    def encode_context(context, deep=None):
        if context.dim() == 2:
            return encode_77(clip_model, context, case.normal, deep)
        return torch.stack([encode_77(clip_model, each, case.normal) for each in context])
    with torch.no_grad():
        f = clip_model.encode_image(case.images).to(clip_model.logit_scale.dtype)
        if case.distil:
            f_anc = encode_77(clip_model, learner.template.anchor_tokens, case.anchor)
    with (mock.patch.object(learner, "encode_context", encode_context),
          mock.patch.object(prompts, "encode_image", encode_image_prompted)):
        f_img = learner.image_features(f, case.images)
        f_norm = learner.text_features(f_img)
    l_norm = learner.logits(f_img, f_norm)                                      # Eq. 1
    ce = losses.cross_entropy(l_norm, case.labels)                              # Eq. 10
    ce = learner.own_loss(ce, f_img, f_norm, case.labels)                       # DePT's head
    kl = torch.zeros_like(ce)
    if case.distil:
        l_ens = losses.ensemble_logits(l_norm, learner.logits(f, f_anc))
        kl = losses.distillation_kl(l_norm, l_ens, settings["temperature"])     # Eq. 11
    return losses.total_loss(ce, kl, settings["lambda_1"], settings["lambda_2"])


SIDES = {"project": project_steps, "conventional": conventional_steps}


def gradients(case, side):
    """name -> tensor: a step's loss, and its gradients. Counts its kernels on the way."""
    with Kernels() as counter:
        found = {"loss": SIDES[side](case)}
    case.kernels[side] = counter.count
    return found | {name: parameter.grad.clone()
                    for name, parameter in case.learner.named_parameters()}


def differences(case):
    """name -> ||a - b|| / ||b||, a the project's and b the conventional: loss and gradients."""
    ours, theirs = (gradients(case, side) for side in SIDES)
    return {name: float((ours[name] - b).norm() / b.norm().clamp_min(1e-30))
            for name, b in theirs.items()}


class Kernels(TorchDispatchMode):
    """Counts the operations that run something on the device: no views, and no empty memory."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        is_empty = "empty" in function.__name__ or "_unsafe_view" in function.__name__
        self.count += not function.is_view and not is_empty
        return function(*args, **(kwargs or {}))


def now(device):
    """Seconds, when all that the device has been told to do is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def medians(functions, device, repeats, at_least=0.5):
    """Median seconds of a call of each. They take turns: a slow minute of the machine hits all."""
    times, begun = [], time.perf_counter()
    while not times or len(times) < repeats and time.perf_counter() - begun < 60:
        times.append([])
        for function in functions:
            start, calls = now(device), 0
            while calls == 0 or time.perf_counter() - start < at_least:
                function()
                calls += 1
            times[-1].append((now(device) - start) / calls)
    return torch.tensor(times).median(0).values.tolist()


def peak_gb(function, device):
    """The peak memory while it runs, in GB: on the device, or of this process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform != "linux":                                     # which alone tells
        return 0.0
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")           # sets VmHWM back
    function()
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9


def add_row(args, table, **cells):
    """Prints a line of a table; the first brings the head along. Keeps all tables in bench.json."""
    rows = args.tables.setdefault(table, [])
    rows.append(cells)
    if len(rows) == 1:
        head = " | ".join(cells).replace("_", " ")
        print(f"\n{table}\n\n| {head} |\n|:--{'|--:' * (len(cells) - 1)}|")
    texts = [f"{each:.4g}" if isinstance(each, float) else str(each) for each in cells.values()]
    print(f"| {' | '.join(texts)} |", flush=True)
    if args.output:
        data.save_json(args.output / "bench.json", args.tables)


def measure_cell(args, row, n_classes):
    # The conventional step takes at most five times what it takes for a fifth of the classes.
    few = partial(conventional_steps, make_case(row, args.clip_model, n_classes // 5 + 1))
    gb = 5 * peak_gb(few, args.device)                              # warms up
    seconds = 5 * medians([few], args.device, 1, at_least=0)[0]
    case, differ, reason = make_case(row, args.clip_model, n_classes), {}, None
    if 16 * seconds > args.left() or gb > 0.8 * args.memory:        # 4 steps, a quarter of the time
        reason = f"left out: up to {seconds:.0f} s, {gb:.0f} GB"
        gradients(case, "project")
    else:
        differ = differences(case)                                  # both are warm now

    calls = [partial(SIDES[side], case) for side in case.kernels]
    memory = [peak_gb(lambda: (args.encode(), calls[0]()), args.device),        # images, too
              *(peak_gb(call, args.device) for call in calls[1:]), "-"]
    took = medians([partial(call, args.steps) for call in calls], args.device, args.repeats)
    ours, theirs = [*(seconds / args.steps for seconds in took), reason][:2]
    kernels = [*case.kernels.values(), "-"]
    share = len(case.labels) * args.image_seconds
    add_row(
        args, "a. a step", learner=row, classes=n_classes, batch=len(case.labels), project_s=ours,
        share_s=share, conventional_s=theirs, ratio="-" if reason else theirs / (ours + share),
        project_kernels=kernels[0], conventional_kernels=kernels[1], project_GB=memory[0],
        conventional_GB=memory[1], loss_differs_by=differ.pop("loss", "-"),
        gradients_differ_by=max(differ.values(), default="-"))


def images(args):
    add_row(args, "b. the image tower", images_a_second=1 / args.image_seconds,
            at_a_time=args.images)


def runs(args):
    # The paper's 100 epochs, of 25 steps in Stage I and 100 in II, or what there is time for.
    step = partial(project_steps, make_case("coop", args.clip_model, args.run_classes))
    seconds = 125 * medians([step], args.device, 3)[0] + 800 * args.image_seconds
    epochs = min(args.epochs, int((args.left() - 30) / 2 / seconds))
    if epochs < 2:
        print(f"\nc. a run: left out, an epoch would take {seconds:.0f} s")
        return
    with tempfile.TemporaryDirectory() as folder:
        dataset = caltech101(folder, 2 * args.run_classes, args.test_images)
        first, second = (whole_run(args, dataset, output, epochs) for output in ("1", "2"))
    for stage in first:
        add_row(args, "c. a run of CoOp", stage=stage, epochs=epochs, first_s=first[stage],
                features_kept_s=second[stage])


def caltech101(folder, n_classes, n_test):
    """A dataset of 300 x 200 JPEGs: 16 a class to learn on, n_test to test. All look the same."""
    picture = Image.effect_noise((100, 67), 60).resize((300, 200)).convert("RGB")
    items, n = [], 16 * n_classes
    for i in range(n + n_test):
        picture.save(f"{folder}/{i}.jpg", quality=90)
        items.append(data.Item(f"{folder}/{i}.jpg", i % n_classes))
    names = class_names(n_classes, "caltech101")
    return data.Dataset(names, items[:n], [], items[n:], name="caltech101", folder=folder)


def whole_run(args, dataset, output, epochs):
    """stage -> seconds, of `stage2.run_seed`: Stage I, Stage II and evaluation."""
    took = {"Stage I": 0, "Stage II": 0, "evaluation": 0, "all of it": 0}

    def timed(stage, module, name):
        function = getattr(module, name)

        def call(*given, **named):
            start = now(args.device)
            result = function(*given, **named)
            took[stage] += now(args.device) - start
            return result
        return mock.patch.object(module, name, call)
    options = stage2.parse(
        f"--device {args.device} --epochs {epochs} --anchor-epochs {epochs} --no-plot".split()
        + ["--output", f"{dataset.folder}/{output}", "--feature-cache", f"{dataset.folder}/kept"])
    settings, changed = stage1.resolve(options, dataset.name, "coop", "anchoropt")
    run = stage1.Run(settings, changed, 1, options)
    task = data.few_shot_task(dataset)
    descriptions = stage1.read_descriptions(task.base_names, options, settings)
    with (timed("Stage I", stage1, "get_anchor"), timed("Stage II", stage2, "learn_prompt"),
          timed("evaluation", evaluation, "evaluate_items"), timed("all of it", stage2, "run_seed"),
          contextlib.redirect_stdout(io.StringIO())):
        stage2.run_seed(run, dataset, task, descriptions, lambda: args.clip_model)
    evaluation.frozen_features.cache_clear()                # else the second has the first's
    return took


def precision(args):
    losses_of, dtypes = {}, (torch.float16, torch.float32)
    models = [random_clip(args.size, args.device, dtype) for dtype in dtypes]
    for row in ROWS:
        for model in models:
            case = make_case(row, model, args.classes[0])
            case.optimizer.param_groups[0]["lr"] = case.settings["lr"]      # else nothing moves
            losses_of[f"{row} {str(model.dtype)[6:]}"] = project_steps(case, args.losses).tolist()
    for i in range(args.losses):
        of_step = {name: each[i] for name, each in losses_of.items()}
        add_row(args, "d. losses", step=i + 1, **of_step)


def waits(args, row, n_classes):
    """Where a step makes the host wait for the GPU, CUDA raises an error."""
    case = make_case(row, args.clip_model, n_classes)
    project_steps(case, 3)                                          # warms up
    try:
        project_steps(case, 3, watched=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    print(f"\ne. {row}, {n_classes} classes: no step waits")


def jobs(args):
    """In their order: a title, a function, and what it is called with."""
    cells = [(row, n_classes) for n_classes in args.classes for row in ROWS]
    yield from ((f"a. a step, {row}, {n}", measure_cell, row, n) for row, n in cells)
    yield "b. images", images
    if not args.on_gpu and not args.quick:
        print("\nc, d, e: left out, for a GPU")
        return
    yield "c. a run", runs
    yield "d. precision", precision
    if args.on_gpu:
        yield from ((f"e. waiting, {row}, {n}", waits, row, n) for row, n in cells)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cpu", type=torch.device, help="cpu or cuda")
    add("--output", type=pathlib.Path, help="folder to write bench.json to")
    add("--classes", nargs="+", type=int, help="class counts (default: 50 500)")
    add("--minutes", type=float, default=10, help="then the rest is left out (default: 10)")
    add("--quick", action="store_true", help="a tiny CLIP, and little of all")
    args = parser.parse_args(argv)
    args.on_gpu = args.device.type == "cuda"
    if args.on_gpu and not torch.cuda.is_available():
        parser.error("there is no CUDA here")
    args.dtype = torch.float16 if args.on_gpu else torch.float32
    args.size, args.repeats, args.losses = "ViT-B/16", 5, 100
    args.run_classes, args.test_images, args.epochs = 50, 2465, 100
    if args.quick:
        args.size, args.repeats, args.losses = "tiny", 1, 5
        args.run_classes, args.test_images, args.epochs = 3, 12, 2
        torch.set_num_threads(1)            # so small that a second one costs more than it brings
    args.classes = args.classes or ([5] if args.quick else [50, 500])
    args.steps = 10 if args.on_gpu else 1                           # in a call that is timed
    args.images = data.ENCODE_BATCH if args.on_gpu else 16          # in the image tower at a time
    args.memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    if args.on_gpu:
        args.memory = torch.cuda.mem_get_info(args.device)[1] / 1e9
    args.tables, args.failed = {}, False
    end = time.perf_counter() + 60 * args.minutes
    args.left = lambda: end - time.perf_counter()
    return args


def main(argv=None):
    args = parse(argv)
    name = torch.cuda.get_device_name(args.device) if args.on_gpu else "CPU"
    add_row(args, "machine", name=name, cores=os.cpu_count(), load=os.getloadavg()[0],
            torch=torch.__version__, precision=str(args.dtype), CLIP=args.size)
    args.clip_model = random_clip(args.size, args.device, args.dtype)
    encode = stage1.frozen_tower(args.clip_model)
    size = preprocess_of(args.clip_model)["size"]
    crops = torch.randint(256, (args.images, 3, *size), dtype=torch.uint8)
    args.encode = torch.no_grad()(partial(encode, crops))
    args.encode()                                                   # warms up
    args.image_seconds = medians([args.encode], args.device, args.repeats)[0] / args.images
    for title, function, *given in jobs(args):
        if args.left() <= 0:
            print(f"{title}: left out, the {args.minutes:g} minutes are over")
            continue
        try:
            function(args, *given)
        except Exception:                       # such as too little memory: the rest goes on
            args.failed = True
            print(f"{title}: FAILED\n{traceback.format_exc()}")
    print(f"\n{args.minutes - args.left() / 60:.1f} minutes on {name}")
    return int(args.failed)


if __name__ == "__main__":
    sys.exit(main())
