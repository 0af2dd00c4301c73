"""Stage II, adaptation (Sec. 3.2.2, Fig. 2b, the second loop of Algorithm 1), and the one-stage variant (Sec. 3.2.4).

    python stage2.py                                                      the toy world: minutes on a CPU
    python stage2.py --dataset caltech101 --baseline coop --root $DATA    a cell of Table 1
    python stage2.py --baseline maple --template atprompt --seeds 1 2 3

Freezes the anchor of Stage I (and runs Stage I first where it is missing), learns soft tokens and position matrix on
the base classes, and evaluates on base and novel test images. Prints Table S1's rows; writes prompt.pt (what
was learnt, with its settings), results.json and log.csv to output/<dataset>/<baseline>-<template>/seed<k>/.
"""

import argparse
import collections
import functools
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time

import torch
from tqdm import tqdm

import data
import eval as evaluation
import losses
import stage1
from anchor import AnchorPrompt, load_anchor
from position import hard_assignment, plot_position_matrix
from prompts import BASELINES, TEMPLATES, build_learner, clip, encode_image, load_clip

ENCODE_BATCH = 256                 # images that are loaded, and go to the frozen CLIP, at a time


def step_losses(learner, settings, f, x, y, anchor_features=None):
    """The forward half of a step: Eq. 12 and its two terms, of one batch. Returns (total, ce, kl), three scalars.

    f (B, d): the frozen CLIP's image features, None where neither baseline nor loss needs them; x (B, 3, R, R): the images,
    which only MaPLe reads; y (B,): labels; anchor_features (C, d): unit features of the frozen anchor prompts, or None: no
    distillation.
    """
    u = learner.image_features(f, x)
    v = learner.text_features(u)                                # f_T(t_norm): one sample of W
    l_norm = learner.logits(u, v)
    ce = losses.cross_entropy(l_norm, y)                                                         # Eq. 10
    if settings["baseline"] == "dept":
        ce_cat = losses.cross_entropy(*learner.head_logits(u, v, y))
        ce = (1 - settings["w_cat"]) * ce + settings["w_cat"] * ce_cat
    kl = torch.zeros_like(ce)
    if anchor_features is not None:
        l_anc = learner.logits(f, anchor_features)
        l_ens = losses.ensemble_logits(l_norm, l_anc)                                            # q_ens
        kl = losses.distillation_kl(l_norm, l_ens, settings["temperature"])                      # Eq. 11
    return losses.total_loss(ce, kl, settings["lambda_1"], settings.get("lambda_2", 0)), ce, kl          # Eq. 12


def train(learner, images, settings, seed, checkpoint, anchor_features=None, anchor_step=None, workers=0):
    """Minimises Eq. 12 over what the learner learns. The loop of Stage II.

    learner: from `prompts.build_learner`, on the base classes, changed in place. images: (items, decoded) of the
    few-shot set. settings: see `eval.default_settings`. checkpoint: a file that keeps every finished epoch; where it
    holds some, training goes on from there, to the same figures: all chance in an epoch comes from (seed, epoch).
    anchor_features (C, d): of the frozen anchor prompts, or None. anchor_step: one-stage training's first half of a
    step (see `OneStage`), or None. workers: processes that load images.
    Returns the log: a dict per epoch. Raises ValueError when a loss is not finite; the last good epoch is kept.
    """
    clip_model, device = learner.clip_model, learner.clip_model.logit_scale.device
    (items, decoded), batch_size = images, settings["batch_size"]
    transform = data.train_transform(clip_model.visual.input_resolution)
    chunk = max(1, ENCODE_BATCH // batch_size) * batch_size
    optimizer = torch.optim.SGD(learner.parameters(), lr=settings["lr"], momentum=0.9, weight_decay=5e-4)
    state = {"learner": learner, "optimizer": optimizer}
    if anchor_step:
        state["anchor_step"] = anchor_step
    elif anchor_features is not None:
        anchor = learner.template.anchor_tokens.cpu().numpy().tobytes()
        state["anchor"] = evaluation.Unchanged("anchor tokens", hashlib.sha256(anchor).hexdigest())
    if not settings.get("lambda_2"):
        anchor_features = None                                  # nothing is distilled (Tab. 9)
    needs_features = settings["baseline"] != "maple" or anchor_features is not None
    log = evaluation.resume(checkpoint, state, device)
    if log:
        evaluation.save_log(checkpoint.with_name("log.csv"), log)       # a process may have died between the two files
        print(f"going on after epoch {len(log)}", flush=True)

    epochs, n_steps = settings["epochs"], max(1, len(items) // batch_size)
    bar = tqdm(total=epochs * n_steps, initial=len(log) * n_steps, desc="stage II", unit="step", disable=None)
    learner.train()
    for epoch in range(len(log) + 1, epochs + 1):
        evaluation.at_work_on(f"Stage II, epoch {epoch} of {epochs}")
        start = time.perf_counter()
        lr = optimizer.param_groups[0]["lr"] = stage1.learning_rate(epoch, epochs, settings["lr"])
        torch.manual_seed(1_000_003 * seed + epoch)             # this epoch's order and Gumbel noise
        order = torch.randperm(len(items))
        if len(items) > batch_size:
            order = order[:n_steps * batch_size]                # the last partial batch is dropped
        terms = []                                              # stay on the device: a step waits for nobody
        for x_chunk, y_chunk in data.batches(data.Images(items, transform, (seed, epoch), decoded), order, chunk, workers):
            x_chunk, y_chunk = x_chunk.to(device, non_blocking=True), y_chunk.to(device, non_blocking=True)
            if needs_features:                                  # the frozen image tower, in large batches (exact)
                with torch.no_grad():
                    f_chunk = encode_image(clip_model, x_chunk).float()
            for at in range(0, len(y_chunk), batch_size):
                x, y = x_chunk[at:at + batch_size], y_chunk[at:at + batch_size]
                f = f_chunk[at:at + batch_size] if needs_features else None
                if anchor_step:
                    anchor_step(lr / settings["lr"])            # one-stage: theta_a first, by Eq. 5
                loss, ce, kl = step_losses(learner, settings, f, x, y, anchor_features)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                terms.append(torch.stack([loss.detach(), ce.detach(), kl.detach()]))
            bar.update(len(y_chunk) // batch_size or 1)
        terms = torch.stack(terms).cpu()                                                          # (steps, 3)
        if not terms.isfinite().all():
            step = int((~terms.isfinite()).any(1).nonzero()[0]) + 1
            raise ValueError(f"Stage II: the loss is not finite in epoch {epoch}, step {step}; epoch {epoch - 1} is kept in "
                             f"{checkpoint}; lower --lr, --lambda-1 or --lambda-2")
        mean = [f"{value:.6g}" for value in terms.mean(0).tolist()]
        log.append(dict(zip(("epoch", "lr", "loss", "ce", "kl", "seconds"),
                            (epoch, lr, *map(float, mean), round(time.perf_counter() - start, 3)))))
        with evaluation.written_aside(checkpoint) as aside:
            torch.save({key: part.state_dict() for key, part in state.items()} | {"log": log}, aside)
        evaluation.save_log(checkpoint.with_name("log.csv"), log)
        bar.set_postfix(epoch=epoch, loss=mean[0], ce=mean[1], kl=mean[2])
    bar.close()
    return log


class OneStage:
    """One-stage training (Sec. 3.2.4, S1): the first half of every step, which updates the anchor by Eq. 5 alone.

    prompt: the `AnchorPrompt` of the base classes; targets (C, d): as in `stage1.learn_anchor`; learner: its frozen copy of the
    anchor follows. The second half (soft tokens and W by Eq. 10, anchor frozen) is the loop of `train`.
    """

    def __init__(self, prompt, targets, learner, settings):
        self.prompt, self.targets, self.learner, self.settings = prompt, targets, learner, settings
        self.optimizer = torch.optim.SGD([prompt.tokens], lr=settings["anchor_lr"], momentum=0.9, weight_decay=5e-4)

    def __call__(self, schedule):
        """schedule: this epoch's learning rate as a part of the full one, the same for both halves."""
        self.optimizer.param_groups[0]["lr"] = schedule * self.settings["anchor_lr"]
        loss = self.settings["anchor_weight"] * losses.anchor_mse(self.prompt(), self.targets)       # Eq. 5
        self.optimizer.zero_grad()
        stage1.scaled_backward(loss, self.prompt.tokens)
        self.optimizer.step()
        self.follow()

    def follow(self):
        template = self.learner.template
        template.anchor_tokens.copy_(self.prompt.tokens.detach())
        if template.anchor_in_suffix:
            self.learner.set_classes(self.learner.class_names)

    def state_dict(self):
        return {"tokens": self.prompt.tokens.detach(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state):
        self.prompt.tokens.data.copy_(state["tokens"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.follow()


def run_seed(args, settings, seed, dataset, clip_model, test_sets):
    """One run: Stage I where needed, Stage II, evaluation. Returns its results (the content of results.json).

    dataset: a `data.Dataset`; clip_model: a function that loads CLIP, once; test_sets: see `eval.evaluate_items`.
    """
    folder = evaluation.run_folder(args.output, settings, seed)
    with evaluation.locked(folder, wait=False, what=f"seed {seed}"):
        if (folder / "results.json").exists() and not args.overwrite:
            result = evaluation.load_results([folder / "results.json"])[0]
            if result["settings"] != settings:
                raise ValueError(f"{folder} holds a run with other settings; choose another --output, or --overwrite")
            (folder / "last.pt").unlink(missing_ok=True)        # of a process killed just before it did so
            print(f"finished already: {folder} (--overwrite to run it again)", flush=True)
            return result
        if args.overwrite:
            for name in ("results.json", "prompt.pt", "last.pt", "log.csv", "position.png"):
                (folder / name).unlink(missing_ok=True)
            for stale in folder.glob("eval-*.json"):
                stale.unlink()
        clip_model, seconds = clip_model(), {}
        base, novel = data.split_base_novel(dataset.class_names)
        if settings["classes"] == "all":
            base, novel = list(range(len(dataset.class_names))), []
        base_names, novel_names = ([dataset.class_names[label] for label in labels] for labels in (base, novel))
        train_items, _ = data.few_shot(dataset.train, dataset.val, settings.get("shots", 16), seed)
        train_items = data.take(train_items, base)
        notes = list(dataset.notes)
        if settings["epochs"] and not train_items:
            raise ValueError(f"{args.dataset} has no training images: train on another dataset, then test on this one with "
                             f"python eval.py RUN --dataset {args.dataset}")
        counts = collections.Counter(item.label for item in train_items).values()
        scarce = sum(count < settings.get("shots", 0) for count in counts)
        if scarce:
            notes.append(f"{scarce} of {len(base)} classes have fewer than {settings['shots']} training images")
        if settings["clip"] not in ("toy", *clip.available_models()):
            notes.append(f"CLIP {settings['clip']} is a checkpoint of your own: figures do not compare with published ones")
        for note in notes:
            print(f"note: {note}", flush=True)

        # --- Stage I
        start = time.perf_counter()
        anchor_tokens, one_stage = None, settings.get("one_stage", False)
        if one_stage:
            anchor_tokens = torch.zeros(settings["anchor_length"], clip_model.token_embedding.weight.shape[1])
        elif settings["template"] == "anchoropt" and args.anchor:
            anchor_tokens, saved = load_anchor(args.anchor)
            stage1.check_anchor(args.anchor, anchor_tokens, saved, settings, clip_model)
        elif settings["template"] == "anchoropt":
            anchor_tokens = stage1.find_or_learn_anchor(clip_model, base_names, args, settings, seed)
        seconds["stage1"] = time.perf_counter() - start

        # --- Stage II
        start = time.perf_counter()
        torch.manual_seed(seed)                                             # the values that learning starts from
        learner = build_learner(settings | {"class_chunk": args.class_chunk}, clip_model, base_names, anchor_tokens)
        matrix = {"start": rows_of_W(learner)}
        if settings["epochs"]:
            decoded = data.decode_all(train_items, args.cache_images * 2 ** 30, max(1, args.workers))
            features, anchor_step = None, None
            if one_stage:
                prompt = AnchorPrompt(clip_model, base_names, settings["anchor_length"], settings["preposition"],
                                      args.class_chunk)
                sentences = data.load_descriptions(args.descriptions or data.default_descriptions(args.dataset), base_names,
                                                   settings["max_descriptions"], args.aliases)
                targets = torch.stack([f.mean(0) for f in stage1.description_features(clip_model, sentences)])
                anchor_step = OneStage(prompt, targets, learner, settings)
                anchor_step.follow()
            elif anchor_tokens is not None:
                features = evaluation.anchor_features(clip_model, base_names, anchor_tokens, settings)
            train(learner, (train_items, decoded), settings, seed, folder / "last.pt", features, anchor_step, args.workers)
        seconds["stage2"] = time.perf_counter() - start
        with evaluation.written_aside(folder / "prompt.pt") as aside:
            torch.save({"state": learner.state_dict(), "settings": settings, "class_names": base_names, "seed": seed}, aside)

        # --- Inference
        evaluation.at_work_on("evaluation")
        start = time.perf_counter()
        if anchor_tokens is not None:
            anchor_tokens = learner.template.anchor_tokens                  # one-stage training has moved it
        scores = {}
        for side, labels, names in (("base", base, base_names), ("novel", novel, novel_names)):
            scores[side] = None
            if labels:
                scores[side] = evaluation.evaluate_items(learner.set_classes(names), settings, data.take(dataset.test, labels),
                                                         anchor_tokens, side == "base", test_sets, args.workers, args.test_batch,
                                                         args.feature_cache)
        learner.set_classes(base_names)
        seconds["eval"] = time.perf_counter() - start
        if matrix["start"] and not args.no_plot:
            try:
                with evaluation.written_aside(folder / "position.png") as aside:
                    plot_position_matrix(torch.tensor(rows_of_W(learner)), aside, settings["anchor_length"], args.dataset)
            except ImportError as error:
                print(f"no position.png: {error}")

        result = {"dataset": args.dataset, "baseline": settings["baseline"], "template": settings["template"], "seed": seed,
                  "clip": settings["clip"], "settings": settings,
                  "seconds": {key: round(value, 2) for key, value in seconds.items()}, **scores,
                  "hm": scores["novel"] and {reading: evaluation.harmonic_mean(scores["base"][reading], scores["novel"][reading])
                                             for reading in scores["base"]},
                  "position_matrix": matrix["start"] and matrix | {"end": rows_of_W(learner)},
                  "notes": notes, "environment": environment(clip_model)}
        with evaluation.written_aside(folder / "results.json") as aside:
            text = json.dumps(result, indent=1)
            aside.write_text(re.sub(r"\[\s+([\d,\s]+?)\s+\]", lambda row: f"[{' '.join(row[1].split())}]", text) + "\n")
        (folder / "last.pt").unlink(missing_ok=True)
        return result | {"run": folder.parent.name}


def rows_of_W(learner):
    """The learnt W without noise, as rows of 0 and 1; None where no W is learnt."""
    matrix = getattr(getattr(learner, "template", None), "position_matrix", None)
    return matrix and hard_assignment(matrix.logits.detach()).int().tolist()


def environment(clip_model):
    """What the figures were made with: versions, device, precision, commit, command."""
    device = clip_model.logit_scale.device
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=os.path.dirname(os.path.abspath(__file__)),
                                capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = None
    return {"python": platform.python_version(), "torch": torch.__version__, "device": str(device),
            "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "dtype": str(clip_model.dtype).removeprefix("torch."), "commit": commit, "command": " ".join(sys.argv)}


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    row = "(default: the row of assets/settings.csv)"
    group = parser.add_argument_group("method")
    group.add_argument("--baseline", choices=list(BASELINES), default="coop", help="clip: zero-shot CLIP (default: coop)")
    group.add_argument("--template", choices=TEMPLATES, default="anchoropt", help="Eq. 2, Eq. 3 or Eqs. 8-9 (default: anchoropt)")
    group.add_argument("--one-stage", action="store_true", help="one-stage training, Sec. 3.2.4, Tab. 3 (default: two stages)")
    group.add_argument("--soft-tokens", type=int, help=f"M soft tokens {row}")
    group.add_argument("--attributes", nargs="+", metavar="WORD", help=f"atprompt: 1 to 3 attribute words {row}")
    group.add_argument("--arrangement", choices=("adaptive", "before", "middle", "after-class"),
                       help="where anchors stand, Tab. 8 (default: adaptive)")
    group.add_argument("--tau", type=float, help="temperature of Eq. 7, Tab. S3 (default: 1)")
    group.add_argument("--depth", type=int, help=f"maple: blocks that get soft tokens, 1 = shallow {row}")
    group.add_argument("--w-cat", type=float, help=f"dept: weight of the base-class head {row}")
    group.add_argument("--anchor", metavar="FILE", help="use this anchor; the authors' .pth.tar too (default: learn it in Stage I)")
    group.add_argument("--feature-at", choices=("eot", "released"),
                       help="released: read the normal prompt's feature N positions early, as the released code does (default: eot)")
    group.add_argument("--test-position", choices=("argmax", "sample"),
                       help="sample: draw W anew for each test batch, as the released code does (default: argmax)")
    group = parser.add_argument_group("training, Stage II")
    group.add_argument("--epochs", type=int, help=f"length of Stage II {row}")
    group.add_argument("--batch-size", type=int, help=f"images a step {row}")
    group.add_argument("--lr", type=float, help=f"learning rate of Stage II {row}")
    group.add_argument("--lambda-1", type=float, help=f"weight of the cross entropy, Eq. 12 {row}")
    group.add_argument("--lambda-2", type=float, help=f"weight of the distillation, Eq. 12; 0: none, Tab. 9 {row}")
    group.add_argument("--temperature", type=float, help=f"of the distillation, Eq. 11 {row}")
    stage1.add_arguments(parser)
    group = parser.add_argument_group("images and results")
    group.add_argument("--workers", type=int, help="processes that load images (default: 8 or fewer on a GPU, else 0)")
    group.add_argument("--cache-images", type=float, default=4, metavar="GB", help="keep decoded few-shot images (default: 4)")
    group.add_argument("--test-batch", type=int, help="test images at a time where prompts depend on them (default: 100; maple 200)")
    group.add_argument("--feature-cache", metavar="DIR", help="keep the frozen CLIP's test features here for other runs (default: nowhere)")
    group.add_argument("--no-plot", action="store_true", help="write no position.png")
    group.add_argument("--overwrite", action="store_true", help="run again what is finished (default: skip it)")
    args = parser.parse_args(argv)
    if args.workers is None:
        on_gpu = args.device.startswith("cuda") and args.dataset != "toy"
        args.workers = min(8, os.cpu_count() or 1) if on_gpu else 0
    return args


def main(argv=None):
    args = parse(argv)
    return evaluation.run_script("stage2.py", lambda: run(args), args.device)


def run(args):
    if args.one_stage and (args.template != "anchoropt" or args.baseline == "clip"):
        raise ValueError(f"--one-stage learns an anchor beside the prompt, and {args.baseline}-{args.template} has none; "
                         "use --template anchoropt with any of coop, cocoop, maple, dept")
    dataset = data.load_dataset(args.dataset, args.root, args.seeds[0])
    settings = evaluation.resolve(args, evaluation.default_settings(args.dataset, args.baseline, args.template, args.one_stage))
    evaluation.check_output(args.output)
    stage1.use_threads(settings)
    dtype, test_sets, results = args.dtype and getattr(torch, args.dtype), {}, []
    clip_model = functools.cache(lambda: load_clip(args.clip or settings["clip"], args.device, dtype))
    for i, seed in enumerate(args.seeds):
        if i and dataset.notes:                                       # a split made here depends on the seed
            dataset = data.load_dataset(args.dataset, args.root, seed)
        results.append(run_seed(args, settings, seed, dataset, clip_model, test_sets))
    evaluation.print_table(results)


if __name__ == "__main__":
    sys.exit(main())
