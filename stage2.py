"""Stage II, adaptation (Sec. 3.2.2, Fig. 2b, Algorithm 1's second loop); one-stage training.

    python stage2.py                                                    the toy world: a minute
    python stage2.py --dataset caltech101 --baseline coop --root $DATA  a cell of Table 1
    python stage2.py --baseline maple --template atprompt --seeds 1 2 3

Freezes the anchor of Stage I (and runs Stage I first where it is missing), learns soft tokens and
position matrix on the base classes, and evaluates on base and novel test images. Prints Table S1's
rows; writes prompt.pt (what was learnt, with its settings), results.json, log.csv and
position.png (Fig. 4) to output/<dataset>/<baseline>-<template>[,changed settings]/seed<k>/.
"""

import argparse
import functools
import json
import os
import platform
import subprocess
import sys

import data
import losses
import stage1                       # first of the modules that need clip: it says what is missing
import eval as evaluation
import numpy
import PIL
import torch
import torchvision
from anchor import AnchorPrompt, anchor_features, load_anchor
from position import hard_assignment, plot_position_matrix
from prompts import BASELINES, TEMPLATES, build_learner, clip, encode_image
from stage1 import OF_THE_ROW, at_least, fraction, not_negative, positive


# -------------------------------------------------------------------- the method

def adapt(learner, epochs, features, labels, settings, seed, f_anc=None, anchor_step=None):
    """Stage II: minimises Eq. 12 over theta_s, theta_pos and what the baseline adds.

    learner: from `prompts.build_learner`, on the C base classes. epochs: the `stage1.Epochs` to go
    through; their first optimizer has the learner's parameters. features: of each of these epochs
    the n few-shot images' f (n, d), the frozen CLIP's features, and their crops (n, 3, R, R), uint8
    on the CPU; f is None for MaPLe without distillation, crops are None but for MaPLe (see
    `data.epoch_features`). labels (n,): on CLIP's device. settings: of the run, of which it needs
    batch_size, lambda_1, lambda_2 and temperature. seed: all chance in an epoch comes from it and
    the epoch's number. f_anc (C, d): unit features of the frozen anchor prompts, or None: no
    distillation. anchor_step: what one-stage training does first in each step, or None.
    Raises ValueError for a loss that is not finite, and for an image that cannot be read.
    """
    optimizer = epochs.optimizers[0]
    lambda_1, lambda_2 = settings["lambda_1"], settings.get("lambda_2", 0)
    batch_size, device = settings["batch_size"], labels.device
    used = min(len(labels), epochs.steps * batch_size)      # a last partial batch is dropped
    learner.train()                                         # so W is sampled: Eq. 6 with its noise

    # stage 2: adaptation. The epochs come first in zip: each sets its lr, then the frozen f_I runs
    # on its crops, in large batches.
    for epoch, (f_all, crops) in zip(epochs, features):
        torch.manual_seed(1_000_003 * seed + epoch)         # this epoch's order and Gumbel noise
        order = torch.randperm(len(labels))[:used]
        # On both sides: crops are on the CPU, and no step shall wait for an index to be copied.
        for batch, there in zip(order.split(batch_size), order.to(device).split(batch_size)):
            y = labels[there]                                               # (B,)
            f = None if f_all is None else f_all[there]                     # (B, d)
            x = None if crops is None else data.normalize(crops[batch], device)     # (B, 3, R, R)
            if anchor_step is not None:
                anchor_step()                               # theta_a, by Eq. 5 (one stage alone)

            # The normal prompt's answer. Its W is drawn in AnchorTemplate.forward, in every step
            # anew, once for all classes, images, layers (Algorithm 1 shows it above its loop). Only
            # CoCoOp's prompts depend on the image.
            f_img = learner.image_features(f, x)            # f_I(x): f itself, but for MaPLe
            f_norm = learner.text_features(f_img)           # f_T(t_norm), Eqs. 6-9 (or 2, or 3)
            l_norm = learner.logits(f_img, f_norm)          # logits of q_norm, Eq. 1: (B, C)
            ce = losses.cross_entropy(l_norm, y)            # Eq. 10
            ce = learner.own_loss(ce, f_img, f_norm, y)     # DePT mixes in its base-class head's

            # The ensemble with the anchor prompt teaches it.
            kl = torch.zeros_like(ce)
            if f_anc is not None:
                # Anchor prompts meet CLIP as it is: f, also where MaPLe prompts the image tower.
                l_anc = learner.logits(f, f_anc)            # logits of q_anc, Eq. 1: (B, C)
                l_ens = losses.ensemble_logits(l_norm, l_anc)           # those of q_ens
                kl = losses.distillation_kl(l_norm, l_ens, settings["temperature"])     # Eq. 11
            loss = losses.total_loss(ce, kl, lambda_1, lambda_2)    # Eq. 12 (Alg. 1: alpha, beta)

            optimizer.zero_grad()
            loss.backward()
            optimizer.step()                                # theta_s and theta_pos move
            epochs.note(loss=loss, ce=ce, kl=kl)


class OneStage:
    """One-stage training (Sec. 3.2.4, S1): the first half of every step, theta_a by Eq. 5.

    prompt: the `AnchorPrompt` of the base classes. targets (C, d): as in `stage1.learn_anchor`.
    learner: its frozen copy of the anchor follows. The second half of the step (soft tokens and W
    by Eq. 10, anchor frozen) is `adapt`'s.
    """

    def __init__(self, prompt, targets, learner, settings):
        self.prompt = prompt
        self.targets = targets
        self.learner = learner
        self.weight = settings["anchor_weight"]
        self.optimizer = stage1.sgd([prompt.tokens], settings["anchor_lr"])     # theta_a
        self.follow()

    def __call__(self):
        loss = self.weight * losses.anchor_mse(self.prompt(), self.targets)     # Eq. 5
        self.optimizer.zero_grad()
        stage1.scaled_backward(loss, self.prompt.tokens)
        self.optimizer.step()
        self.follow()

    def follow(self):
        """Puts the anchor where Stage II reads it, frozen."""
        template = self.learner.template
        template.anchor_tokens.copy_(self.prompt.tokens.detach())
        if template.anchor_in_suffix:       # it stands among the class tokens: bind them anew
            self.learner.set_classes(self.learner.class_names)

    def state_dict(self):
        return {"tokens": self.prompt.tokens.detach(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state):
        self.prompt.tokens.data.copy_(state["tokens"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.follow()


# -------------------------------------------------------------------- a run

def run_seed(args, settings, seed, dataset, task, descriptions, get_clip):
    """One run: the anchor, the learner, training, the inference rule, saving. Returns its results.

    dataset: a `data.Dataset`. task: its `data.Task` of this seed. descriptions: the
    `stage1.Descriptions` of the base classes, or None where no anchor is learnt. get_clip: a
    function that loads CLIP, once. A run that is finished is not run again. Raises ValueError and
    OSError (BlockingIOError where another process is at work on it) in one line.
    """
    folder = stage1.run_folder(args.output, settings, seed)
    # What the run depends on beside its settings, which hold the digest of an --anchor file.
    facts = data.digests(dataset, task)
    if descriptions is not None:
        facts |= {"descriptions' sentences": data.digest(descriptions.sentences)}

    with stage1.only_process(folder, wait=False, what=f"seed {seed}"):
        # CLIP is loaded only for a run that needs it.
        if (folder / "results.json").exists() and not args.overwrite:
            return finished_run(folder, settings, facts)
        clip_model = get_clip()
        check_names(task, clip_model, settings)
        task = with_notes(task, settings)

        # Algorithm 1, stage 1: the anchor, where it was not learnt before.
        anchor_tokens = find_anchor(clip_model, task, descriptions, args, settings, seed)
        if args.overwrite:                      # now that nothing is missing any more
            remove_run(folder)

        # The learner: a template in a baseline, with this seed's start values.
        torch.manual_seed(seed)
        options = settings | {"class_chunk": args.class_chunk}
        learner = build_learner(options, clip_model, task.base_names, anchor_tokens)
        W_start = learnt_W(learner)

        # Algorithm 1, stage 2: adaptation. Zero-shot CLIP has none.
        if settings.get("epochs"):
            learn_prompt(learner, task, descriptions, args, settings, seed, folder, facts)

        save_prompt(folder, learner, task.base_names, settings, seed)

        # Inference (Sec. 3.2.2): normal prompt for base classes, the ensemble for novel ones.
        torch.manual_seed(seed)                 # of W, with --test-position sample
        base = evaluation.evaluate_items(learner, settings, task.test_base, True, args)
        novel = hm = None
        if task.novel_names:
            learner.set_classes(task.novel_names)
            novel = evaluation.evaluate_items(learner, settings, task.test_novel, False, args)
            hm = {key: evaluation.harmonic_mean(base[key], novel[key]) for key in base}

        W_end = learnt_W(learner)
        return save_results(folder, {
            "dataset": settings["dataset"], "baseline": settings["baseline"],
            "template": settings["template"], "seed": seed, "clip": settings["clip"],
            "settings": settings, "facts": facts, "base": base, "novel": novel, "hm": hm,
            "position_matrix": {"start": W_start, "end": W_end} if W_end else None,
            "notes": task.notes, "comparable": task.comparable,
            "environment": environment(clip_model)}, plot=not args.no_plot)


def check_names(task, clip_model, settings):
    """Raises ValueError for class names that are too long, or a CLIP that does not suit the method.

    That is before Stage I has taken its time.
    """
    # A learner with an anchor of zeros, thrown away: its own checks are all that is wanted. The
    # random numbers that it draws change nothing: every stage begins with its seed.
    width = clip_model.token_embedding.weight.shape[1]
    trial_anchor = torch.zeros(settings.get("anchor_length", 1), width)
    learner = build_learner(settings, clip_model, task.base_names, trial_anchor)
    learner.set_classes(task.novel_names or task.base_names)


def with_notes(task, settings):
    """The task with what else its figures' reader must know; prints all of its notes."""
    # They travel with the results, so that no table shows a figure without them.
    if settings["clip"] not in ("toy", *clip.available_models()):
        note = (f"CLIP {settings['clip']} is a checkpoint of your own: figures do not compare with "
                "published ones")
        task = task._replace(notes=[*task.notes, note], comparable=False)
    for note in task.notes:
        print(f"note: {note}", flush=True)
    return task


def find_anchor(clip_model, task, descriptions, args, settings, seed):
    """The anchor tokens (N, d_t) that Stage II begins with, or None for the other templates.

    Raises ValueError for an --anchor that does not fit or was learnt on novel classes, and what
    `anchor.load_anchor` and `stage1.get_anchor` raise.
    """
    if settings["template"] != "anchoropt":
        return None
    if settings["one_stage"]:                   # learnt beside the prompt: OneStage fills these in
        width = clip_model.token_embedding.weight.shape[1]
        return torch.zeros(settings["anchor_length"], width)
    if not args.anchor:
        return stage1.get_anchor(clip_model, task.base_names, descriptions, args, settings, seed,
                                 renew=args.overwrite)
    anchor_tokens, saved = load_anchor(args.anchor)
    stage1.check_anchor(args.anchor, anchor_tokens, saved, settings, clip_model)
    seen = set(saved.get("class_names", [])) & set(task.novel_names)        # the authors' have none
    if seen:
        raise ValueError(f"{args.anchor} was learnt from descriptions of {len(seen)} classes that "
                         f"are novel here, such as {min(seen)!r}; give one that was not, or "
                         "--classes all")
    return anchor_tokens


def learn_prompt(learner, task, descriptions, args, settings, seed, folder, facts):
    """`adapt` with what surrounds it: optimizer, anchor prompts, images, the kept epochs.

    Changes the learner in place. The others are `run_seed`'s; descriptions are needed for one-stage
    training alone. Raises what `adapt` and `stage1.Epochs` raise.
    """
    clip_model = learner.clip_model
    device = clip_model.logit_scale.device

    # theta_s, theta_pos, and what the baseline learns beside.
    optimizer = stage1.sgd(learner.parameters(), settings["lr"])
    optimizers = [optimizer]
    parts = {"learner": learner, "optimizer": optimizer}

    # The anchor: f_T(t_anc) of a frozen one, or a step for one that is learnt beside.
    f_anc = anchor_step = None
    if settings.get("one_stage"):
        prompt = AnchorPrompt(clip_model, task.base_names, settings["anchor_length"],
                              settings["preposition"], args.class_chunk)
        f_des = stage1.description_features(clip_model, descriptions.sentences, task.base_names,
                                            descriptions.file)
        anchor_step = OneStage(prompt, torch.stack([f.mean(0) for f in f_des]), learner, settings)
        optimizers.append(anchor_step.optimizer)                    # theta_a
        parts["anchor_step"] = anchor_step
    elif settings["template"] == "anchoropt":
        anchor_tokens = learner.template.anchor_tokens
        facts = facts | {"anchor tokens": data.digest(anchor_tokens.tolist())}
        if settings["lambda_2"]:                                    # else nothing is distilled
            f_anc = anchor_features(clip_model, task.base_names, anchor_tokens,
                                    settings["preposition"], args.class_chunk)

    # The epochs, from where an earlier process was stopped.
    steps = max(1, len(task.train) // settings["batch_size"])       # whole batches, or the only one
    epochs = stage1.Epochs("stage II", settings["epochs"], steps, optimizers, folder / "last.pt",
                           parts, settings | facts, advice="lower --lr, --lambda-1 or --lambda-2")

    # f_I(x) of the epochs to come, frozen. It runs in large batches and in the order of the items,
    # so that features are the same to the bit for every method and batch size.
    images = data.Images(task.train, data.train_transform(clip_model.visual.input_resolution), seed)
    encode = kept = None
    if f_anc is not None or not learner.needs_images:   # MaPLe without distillation never reads it
        encode = functools.partial(encode_image, clip_model)
        if args.feature_cache:
            kept = stage1.kept_features(clip_model, settings, images, args.feature_cache)
    to_come = range(len(epochs.log) + 1, settings["epochs"] + 1)
    features = data.epoch_features(images, to_come, encode, device, learner.needs_images, kept,
                                   args.workers)
    labels = torch.tensor([item.label for item in task.train], device=device)
    adapt(learner, epochs, features, labels, settings, seed, f_anc, anchor_step)


def learnt_W(learner):
    """The learnt W without noise, as rows of 0 and 1; None where no W is learnt."""
    matrix = learner.template.position_matrix
    if matrix is None:
        return None
    return hard_assignment(matrix.logits.detach()).int().tolist()


def save_prompt(folder, learner, base_names, settings, seed):
    """prompt.pt: what was learnt, and all that building the learner anew takes."""
    # Tensors of a GPU load anywhere: `prompts.read_as_data` puts them on the CPU first.
    with data.written_aside(folder / "prompt.pt") as aside:
        torch.save({"state": learner.state_dict(), "settings": settings,
                    "class_names": base_names, "seed": seed}, aside)


def save_results(folder, result, plot):
    """position.png, then results.json, which finishes a run. Returns it as `eval.load_result`."""
    if result["position_matrix"] and plot:
        W, settings = torch.tensor(result["position_matrix"]["end"]), result["settings"]
        try:
            with data.written_aside(folder / "position.png") as aside:
                plot_position_matrix(W, aside, settings["anchor_length"], settings["dataset"])
        except ImportError as error:            # matplotlib is missing: a picture less
            print(f"no position.png: {error}")
    # The last file to come: where it stands, everything else does.
    with data.written_aside(folder / "results.json") as aside:
        aside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / "last.pt").unlink(missing_ok=True)
    print(f"saved to {folder}", flush=True)
    return result | {"run": folder.parent.name, "folder": folder}


def finished_run(folder, settings, facts):
    """The results of a run that is finished. ValueError where its data have changed."""
    file = folder / "results.json"
    # The folder's name says the settings, and a result is of the data that there were.
    result = evaluation.load_result(file)
    if result["settings"] != settings:
        raise ValueError(f"{folder} holds a run with other settings; choose another --output, or "
                         "--overwrite")
    stage1.check_unchanged(file, result.get("facts", {}), facts,
                           "to run it again: --overwrite, or choose another --output")
    (folder / "last.pt").unlink(missing_ok=True)    # of a process killed just before it did so
    print(f"finished already: {folder} (--overwrite to run it again)", flush=True)
    return result


def remove_run(folder):
    """Takes away what a run and its evaluations have left, to begin anew."""
    # results.json goes first: without it nobody takes the rest for a finished run.
    for name in ("results.json", "prompt.pt", "last.pt", "log.csv", "position.png"):
        (folder / name).unlink(missing_ok=True)
    for file in folder.glob("eval-*.json"):
        file.unlink()


def environment(clip_model):
    """What the figures were made with: versions, device, precision, commit, command."""
    device = clip_model.logit_scale.device
    name = platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    try:
        here = os.path.dirname(os.path.abspath(__file__))
        git = ["git", "describe", "--always", "--dirty"]
        done = subprocess.run(git, cwd=here, capture_output=True, text=True, timeout=10, check=True)
        commit = done.stdout.strip()
    except (OSError, subprocess.SubprocessError):   # no git, or no repository: a download
        commit = None
    return {"python": platform.python_version(), "torch": torch.__version__,
            "torchvision": torchvision.__version__, "pillow": PIL.__version__,
            "numpy": numpy.__version__, "device": str(device), "device_name": name,
            "dtype": str(clip_model.dtype).removeprefix("torch."), "commit": commit,
            "command": " ".join(sys.argv)}


# -------------------------------------------------------------------- command line

METHOD_OPTIONS = argparse.ArgumentParser(add_help=False)
group = METHOD_OPTIONS.add_argument_group("method")
group.add_argument("--baseline", choices=list(BASELINES), default="coop",
                   help="the method that learns the prompt; clip: zero-shot CLIP, which has no "
                        "template (default: coop)")
group.add_argument("--template", choices=TEMPLATES, default="anchoropt",
                   help="soft tokens, Eq. 2; with attribute words, Eq. 3; with anchor tokens, Eqs. "
                        "8-9 (default: anchoropt)")
group.add_argument("--one-stage", action="store_true",
                   help="learn anchor and prompt in turns, step by step, without distillation: "
                        "Sec. 3.2.4, Tab. 3 (default: Stage I first)")
group.add_argument("--soft-tokens", type=at_least(1), metavar="M",
                   help=f"how many soft tokens {OF_THE_ROW}")
group.add_argument("--attributes", nargs="+", metavar="WORD",
                   help=f"atprompt: its words, in the paper 1 to 3 {OF_THE_ROW}")
group.add_argument("--arrangement", choices=("adaptive", "before", "middle", "after-class"),
                   help="anchoropt: learn W; or fix the anchors before the soft tokens, in their "
                        "middle, or behind the class name: Tab. 8 (default: adaptive)")
group.add_argument("--tau", type=positive, metavar="TAU",
                   help="anchoropt: temperature of W's soft assignment, Eq. 7, Tab. S3 "
                        "(default: 1)")
group.add_argument("--depth", type=at_least(1), metavar="BLOCKS",
                   help=f"maple: blocks that get soft tokens, 1 = shallow {OF_THE_ROW}")
group.add_argument("--w-cat", type=fraction, metavar="WEIGHT",
                   help=f"dept: weight of the base-class head, 0 to 1 {OF_THE_ROW}")
group.add_argument("--anchor", metavar="FILE",
                   help="anchoropt: use this anchor for all seeds, an anchor.pt of stage1.py or "
                        "the authors' .pth.tar (default: learn it in Stage I)")
group.add_argument("--feature-at", choices=("eot", "released"),
                   help="anchoropt, released: read the normal prompt's feature N positions early, "
                        "as the released code does (default: eot)")
group.add_argument("--test-position", choices=("argmax", "sample"),
                   help="anchoropt, sample: draw W anew for each test batch, as the released code "
                        "does (default: argmax)")
group = METHOD_OPTIONS.add_argument_group("training, Stage II")
group.add_argument("--epochs", type=at_least(0), metavar="E",
                   help=f"length of Stage II {OF_THE_ROW}")
group.add_argument("--batch-size", type=at_least(1), metavar="B",
                   help=f"images a step {OF_THE_ROW}")
group.add_argument("--lr", type=positive, metavar="LR",
                   help=f"learning rate of Stage II {OF_THE_ROW}")
group.add_argument("--lambda-1", type=not_negative, metavar="WEIGHT",
                   help=f"weight of the cross entropy, Eq. 12 {OF_THE_ROW}")
group.add_argument("--lambda-2", type=not_negative, metavar="WEIGHT",
                   help="anchoropt in two stages: weight of the distillation, Eq. 12; 0: none, "
                        f"Tab. 9 {OF_THE_ROW}")
group.add_argument("--temperature", type=positive, metavar="T",
                   help="anchoropt in two stages: temperature of the distillation, Eq. 11 "
                        f"{OF_THE_ROW}")
group = METHOD_OPTIONS.add_argument_group("results")
group.add_argument("--no-plot", action="store_true", help="write no position.png")
group.add_argument("--overwrite", action="store_true",
                   help="begin anew, and remove the old results (default: skip what is finished, "
                        "go on with what is begun)")


def parse(argv):
    parser = stage1.Parser(
        "stage2.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[METHOD_OPTIONS, stage1.DATA_OPTIONS, stage1.ANCHOR_OPTIONS, stage1.CLIP_OPTIONS,
                 stage1.IMAGE_OPTIONS, stage1.RUN_OPTIONS])
    args = parser.parse_args(argv)
    if args.one_stage and args.epochs == 0:
        parser.error("--one-stage learns its anchor in Stage II: --epochs must be at least 1")
    if args.one_stage and (args.template != "anchoropt" or args.baseline == "clip"):
        parser.error("--one-stage learns an anchor beside the prompt, and "
                     f"{args.baseline}-{args.template} has none; use --template anchoropt with any "
                     "of coop, cocoop, maple, dept")
    return args


def run(args):
    dataset = data.load_dataset(args.dataset, args.root, args.seeds[0])
    if not dataset.train and args.baseline != "clip":
        raise ValueError(f"{dataset.name} has no training images: train on another dataset, then "
                         f"test on this one with: python eval.py RUN --dataset {dataset.name}")
    defaults = stage1.default_settings(dataset.name, args.baseline, args.template, args.classes,
                                       args.one_stage)
    settings = stage1.resolve(args, defaults)
    if dataset.name not in data.DATASETS:
        stage1.note_on_own(settings)
    get_clip = functools.cache(lambda: stage1.load_clip_for(settings, args))
    learns_anchor = settings["template"] == "anchoropt" and not args.anchor
    descriptions = None
    results = []
    for seed in dict.fromkeys(args.seeds):
        if dataset.notes and results:           # a split that was made here depends on the seed
            dataset = data.load_dataset(args.dataset, args.root, seed)
        task = data.few_shot_task(dataset, settings["classes"], settings["shots"], seed)
        if learns_anchor and descriptions is None:      # the classes are the same for all seeds
            descriptions = stage1.read_descriptions(task.base_names, args, settings)
        results.append(run_seed(args, settings, seed, dataset, task, descriptions, get_clip))
    if args.feature_cache:
        stage1.print_disk_use(args.feature_cache)
    evaluation.print_table(results)


def main(argv=None):
    return stage1.run_script("stage2.py", run, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
