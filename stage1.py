"""Stage I, anchor optimization (Sec. 3.2.1, Fig. 2a, the first loop of Algorithm 1).

    python stage1.py --dataset toy                                   seconds on a CPU, no download
    python stage1.py --dataset caltech101 --root $DATA --nearest 10  an anchor, and words near it

Learns the anchor tokens [Anc_1]..[Anc_N] of "{Anc} of {Class}" from class descriptions alone: no
image is read. Every step takes all base classes at once, against the mean of each class's
description features: Eq. 5 up to a constant, so with its gradient (losses.anchor_mse). Descriptions
of novel classes never reach the anchor. stage2.py runs this by itself where the anchor is missing.

Below Stage I stands what every run shares: the loop over epochs, the settings and options.
"""

import argparse
import csv
import json
import math
import os
import pathlib
import re
import sys
import time
from typing import NamedTuple

try:
    import torch
    from tqdm import tqdm

    import data
    import losses
    from anchor import AnchorPrompt, load_anchor, nearest_words, save_anchor
    from prompts import (BASELINES, TEMPLATES, clip, clip_identity, encode_image,
                         encode_sentences, load_clip, preprocess_of, read_as_data, unit)
except ImportError as error:            # stage1, stage2 and eval come by here first
    sys.exit(f"{error} (requirements.txt lists what is needed)")


# -------------------------------------------------------------------- Stage I

def learn_anchor(prompt, targets, epochs, weight):
    """Minimises  weight * L_theta_a  (Eq. 5) over the anchor tokens theta_a, and nothing else.

    prompt: an `anchor.AnchorPrompt` of the C base classes, changed in place. targets (C, d): the
    means of their unit description features, not renormalised. epochs: the `Epochs` to go through,
    whose optimizer has theta_a alone. weight: the factor before the loss.
    """
    # stage 1: anchor optimization. A step takes the descriptions of all classes at once, where
    # Algorithm 1 goes through them one by one.
    for _ in epochs:                                                # sets the epoch's lr, too
        for _ in range(epochs.steps):
            epochs.note(loss=anchor_step(prompt, targets, epochs.optimizers[0], weight))


def anchor_step(prompt, targets, optimizer, weight):
    """One step of theta_a by Eq. 5; see `learn_anchor`. Returns the loss, a scalar."""
    f_anc = prompt()                                # f_T(t_anc; theta_a), Eq. 4: unit (C, d)
    loss = weight * losses.anchor_mse(f_anc, targets)               # Eq. 5, against f_T(t_d)
    optimizer.zero_grad()
    # Eq. 5 is a mean over C x d numbers, so with many classes its gradients would underflow on
    # their way through a float16 CLIP. A power of two changes no digit of a gradient.
    (256 * loss).backward()
    prompt.tokens.grad /= 256
    optimizer.step()                                                # theta_a moves
    return loss


def description_means(clip_model, descriptions):
    """The frozen f_T(t_d) of Eq. 5: each class's mean of its sentences' unit features, (C, d).

    Eq. 5 over the D_c sentences of a class has the gradient of Eq. 5 over their mean (see
    losses.anchor_mse), so each sentence is encoded once. descriptions: C lists of str.
    """
    means = [unit(encode_sentences(clip_model, sentences)).mean(0) for sentences in descriptions]
    return torch.stack(means)


def new_anchor(run, clip_model, class_names, descriptions, facts):
    """Stage I from its inputs to its output: the learnt `AnchorPrompt` of these C base classes.

    run: a `Run`, whose seed draws theta_a's start values. descriptions: C lists of sentences.
    facts: what the epochs that are kept depend on, see `Epochs`, which raises ValueError.
    """
    settings = run.settings
    targets = description_means(clip_model, descriptions)                   # f_T(t_d): (C, d)

    # t_anc: theta_a starts at random, and the class names stand after it.
    torch.manual_seed(run.seed)
    prompt = AnchorPrompt(clip_model, class_names, settings["anchor_length"],
                          settings["preposition"])
    optimizer = sgd([prompt.tokens], settings["anchor_lr"])                 # theta_a
    before = cosine(prompt, targets)

    # As many steps an epoch as if the few-shot images came in batches of 32 (the authors' logs).
    steps = max(1, settings["shots"] * len(class_names) // 32)
    epochs = Epochs("stage I", settings["anchor_epochs"], steps,
                    {"prompt": prompt, "optimizer": optimizer},
                    run.anchor_folder / "last.pt", facts)
    learn_anchor(prompt, targets, epochs, settings["anchor_weight"])
    print(f"Stage I done: cosine of anchor prompts and descriptions {before:.3f} -> "
          f"{cosine(prompt, targets):.3f}", flush=True)
    return prompt


@torch.no_grad()
def cosine(prompt, targets):
    """Mean cosine of anchor prompts and descriptions, whose mean features are targets (C, d)."""
    return (prompt() * targets).sum(-1).mean().item()


def get_anchor(run, clip_model, class_names, descriptions):
    """The anchor tokens (N, d_t) of this run: read where they are, else learnt by Stage I.

    descriptions: C lists of sentences. Raises ValueError for an anchor that is damaged or was made
    from what has changed since (--overwrite learns it anew), and what `new_anchor` raises.
    """
    file, last = run.anchor_folder / "anchor.pt", run.anchor_folder / "last.pt"
    # All that the anchor depends on: the settings, and what is in the files.
    facts = {key: run.settings[key] for key in ANCHOR_SETTINGS}
    facts |= {"class names": data.digest(list(class_names)),
              "descriptions' sentences": data.digest(descriptions)}

    # Only one process learns an anchor; others that need it wait, and then find it.
    with data.only_process(run.anchor_folder, wait=True, what="the anchor"):
        if run.args.overwrite:
            last.unlink(missing_ok=True)
        elif file.exists():
            tokens, saved = load_anchor(file)
            # The folder's name says the settings off the table, and the table may change.
            data.check_unchanged(file, saved, facts, "choose another --output, or --overwrite")
            print(f"anchor found: {file}", flush=True)
            return tokens

        print(f"Stage I learns the anchor, {file}", flush=True)
        prompt = new_anchor(run, clip_model, class_names, descriptions, facts)
        # anchor.pt comes first: a process that dies in between leaves a file too many, no loss.
        with data.written_aside(file) as aside:
            save_anchor(aside, prompt.tokens, facts | {"class_names": list(class_names)})
        last.unlink(missing_ok=True)
        return prompt.tokens.detach()


def read_descriptions(class_names, args, settings):
    """What Stage I learns from: C lists of sentences, from --descriptions or the project's own.

    Raises FileNotFoundError and ValueError as `data.load_descriptions`.
    """
    # S2.2.1: the first sentences of each class's list.
    file = args.descriptions or data.default_descriptions(settings["dataset"])
    return data.load_descriptions(file, class_names, settings["max_descriptions"])


def run(args):
    dataset = data.load_dataset(args.dataset, args.root)
    settings, changed = resolve(args, dataset.name, "coop", "anchoropt")
    task = data.few_shot_task(dataset, settings["classes"], settings["shots"])
    descriptions = read_descriptions(task.base_names, args, settings)
    clip_model = load_clip_for(settings, args)
    # The few-shot picks differ between seeds, but no image is read: only theta_a's start does.
    for seed in dict.fromkeys(args.seeds):
        one = Run(settings, changed, seed, args)
        tokens = get_anchor(one, clip_model, task.base_names, descriptions)
        # S4, by Euclidean distance, which is one reading of it.
        for i, words in enumerate(nearest_words(tokens, clip_model, args.nearest)):
            listed = [f"{word} {distance:.2f}" for word, distance in words]
            if listed:
                print(f"[Anc_{i + 1}], its nearest words: {', '.join(listed)}")


def main(argv=None):
    groups = ["run", "files", "machine", "task", "clip", "anchor", "anchor's learning", "stage I"]
    parser = make_parser("stage1.py", __doc__, groups)
    parser.add_argument("--nearest", type=COUNT_OR_ZERO, default=0, metavar="K",
                        help="print the K vocabulary words nearest to each anchor token, S4")
    return run_script("stage1.py", run, parser.parse_args(argv))


# ==================================================================== what every run shares
# -------------------------------------------------------------------- the loop over epochs

def learning_rate(epoch, epochs, lr):
    """The schedule of both stages, as in the authors' logs.

    Epoch 1 runs at 1e-5, epoch e >= 2 at lr (1 + cos(pi (e - 2) / T)) / 2, with T = epochs.
    """
    if epoch == 1:
        return 1e-5
    return 0.5 * lr * (1 + math.cos(math.pi * (epoch - 2) / epochs))


def sgd(parameters, lr):
    """The optimizer of both stages: SGD (S2.2), its momentum and decay from the authors' logs.

    `Epochs` moves its lr along `learning_rate`.
    """
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=5e-4)


class Epochs:
    """The epochs of a stage: `for epoch in epochs`, and `epochs.note(loss=...)` after every step.

    What both loops need beside the method: the schedule, the progress bar, a loss that is not
    finite, keeping every finished epoch, and going on from it with the same figures.

    title, epochs, steps: of the bar, and how many. parts: name -> what has a state_dict and is
    kept; the learning rates of the optimizers among them follow the schedule. path: the file that
    keeps the finished epochs, log.csv beside it. facts: name -> a setting, or a digest of data; a
    file that was begun with others is refused. `log`: a dict per epoch. Raises ValueError
    for a loss that is not finite, or a file that it cannot go on from.
    """

    def __init__(self, title, epochs, steps, parts, path, facts):
        self.title = title
        self.epochs = epochs
        self.steps = steps
        self.parts = parts
        self.optimizers = [part for part in parts.values()
                           if isinstance(part, torch.optim.Optimizer)]
        # The schedule scales these. (A kept optimizer comes back with the rate of its epoch.)
        self.lrs = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        self.path = path
        self.facts = facts
        self.of_epoch = {}              # what a stage has to say of the epoch that it is in
        self.log = []
        if path.is_file():
            self._go_on()

    def __iter__(self):
        done = len(self.log)
        with tqdm(total=self.epochs * self.steps, initial=done * self.steps, desc=self.title,
                  unit="step", disable=None) as self.bar:
            for epoch in range(done + 1, self.epochs + 1):
                for optimizer, lr in zip(self.optimizers, self.lrs):
                    optimizer.param_groups[0]["lr"] = learning_rate(epoch, self.epochs, lr)
                self.terms = []
                start = time.perf_counter()
                yield epoch                                     # the stage's own steps run here
                self._finish(epoch, time.perf_counter() - start)

    def note(self, **terms):
        """Notes the losses of a step. They stay on the device: no step waits for them."""
        self.names = list(terms)
        self.terms.append(torch.stack([term.detach() for term in terms.values()]))
        self.bar.update()

    def _finish(self, epoch, seconds):
        # Here the host waits for the device, once an epoch.
        means = torch.stack(self.terms).mean(0)                 # (number of terms,)
        if not means.isfinite().all():
            raise ValueError(f"{self.title}: the loss is not finite in epoch {epoch}; what "
                             "was finished before is kept; lower the learning rate, or the weights "
                             "of the loss")
        row = {"epoch": epoch, "lr": self.optimizers[0].param_groups[0]["lr"]}
        row |= {name: float(f"{mean:.6g}") for name, mean in zip(self.names, means.tolist())}
        self.bar.set_postfix(row)
        self.log.append(row | self.of_epoch | {"seconds": round(seconds, 3)})

        # Kept: the parts, among them the optimizers with their momentum, the log, and what all of
        # it depends on. No state of a random generator: an epoch's chance comes from its number.
        data.save_csv(self.path.with_name("log.csv"), self.log)
        state = {name: part.state_dict() for name, part in self.parts.items()}
        with data.written_aside(self.path) as aside:
            torch.save(state | {"log": self.log, "facts": self.facts}, aside)

    def _go_on(self):
        advice = f"to begin anew, remove {self.path}"
        try:
            saved = read_as_data(self.path)
            facts, self.log = saved["facts"], saved["log"]
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{self.path}, which keeps the finished epochs, is damaged; "
                             f"{advice}") from error
        data.check_unchanged(self.path, facts, self.facts, advice)
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        print(f"{self.title}: going on after epoch {len(self.log)}", flush=True)


# -------------------------------------------------------------------- settings and their options

def bounded(kind, least, most=2 ** 31):
    """An argparse type: an int or float (kind) from `least` to `most`."""
    def number(text):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be from {least} to {most}, not {text}")
        return value
    number.__name__ = kind.__name__
    return number


class Option(NamedTuple):
    """An option of the scripts.

    group: of a setting, which runs have it, see `has`; else which scripts. default: its value, or
    ROW. type: argparse's, a tuple of choices, bool for a switch; None where no option sets it.
    """
    group: str
    default: object
    type: object = None
    help: str = ""
    metavar: str = None


ROW = "the cell's value in assets/settings.csv"
COUNT, COUNT_OR_ZERO = bounded(int, 1), bounded(int, 0)
POSITIVE, WEIGHT = bounded(float, 1e-9), bounded(float, 0)
# The settings of a run: saved with it and, where they are off their default, in its folder's name.
SETTINGS = {
    "classes": Option("task", "base", ("base", "all"),
                      "learn on the first half of the classes, the others being novel; or on all"),
    "shots": Option("task", 16, COUNT, "training images a class; Stage I has K x classes / 32 "
                    "steps an epoch", "K"),
    "clip": Option("clip", "ViT-B/16", str, f"one of {', '.join(clip.available_models())}, toy; "
                   "open_clip:ARCHITECTURE:TAG_OR_FILE, hf-hub:OWNER/NAME; OpenAI's file, "
                   "or a state dict of theirs; a folder of HuggingFace's CLIPModel (for the toy "
                   "world the toy CLIP; in eval.py the run's own)", "NAME"),
    "dtype": Option("clip", "default", ("float32", "float16"),
                    "of the frozen CLIP; by default float16 on CUDA and float32 elsewhere"),

    "anchor_length": Option("anchor", 1, COUNT, "N anchor tokens, Tab. 7", "N"),
    "preposition": Option("anchor", "of", str, "of, with, at, sun, sea, any word, or none: Tabs. "
                          "6 and S2", "WORD"),
    "descriptions": Option("anchor's learning", "default", str, "JSON, class -> list of "
                           "sentences; by default the file in assets/descriptions/", "FILE"),
    "max_descriptions": Option("anchor's learning", ROW, COUNT, "use the first D sentences of "
                               "each class", "D"),
    "anchor_epochs": Option("stage I", ROW, COUNT_OR_ZERO, "epochs of Stage I", "E"),
    "anchor_lr": Option("anchor's learning", ROW, POSITIVE, "learning rate of Stage I", "LR"),
    "anchor_weight": Option("anchor's learning", ROW, WEIGHT, "factor before Eq. 5", "WEIGHT"),

    "one_stage": Option("anchoropt", False, bool, "learn anchor and prompt in turns, step by "
                        "step, without distillation: Sec. 3.2.4, Tab. 3"),
    "anchor": Option("stage II", "learnt", str, "use this anchor for all seeds, an anchor.pt or "
                     "the authors' .pth.tar; by default Stage I learns it", "FILE"),
    "soft_tokens": Option("prompt", ROW, COUNT, "how many soft tokens", "M"),
    "start_words": Option("start", ROW),
    "attributes": Option("atprompt", ROW, str, "atprompt: its words, in the paper 1 to 3", "WORD"),
    "arrangement": Option("anchoropt", "adaptive", ("adaptive", "before", "middle", "after-class"),
                          "learn W; or fix the anchors before the soft tokens, in their middle, "
                          "or after the class name: Tab. 8"),
    "tau": Option("W", 1.0, POSITIVE, "temperature of W's soft assignment, Eq. 7, Tab. S3", "TAU"),
    "test_position": Option("W", "argmax", ("argmax", "sample"), "sample: draw W anew for each "
                            "test batch, as the released code does"),
    "soft_W": Option("W", False, bool, "multiply by the soft W in training, Eq. 9 as printed"),
    "draw": Option("W", "step", ("step", "once"), "once: draw W's noise once, before the loop, as "
                   "Algorithm 1 shows it"),
    "ensemble": Option("anchoropt", "logits", ("logits", "probabilities"), "what the ensemble "
                       "averages: Algorithm 1's l, or S3.1's q"),
    "feature_at": Option("anchoropt", "eot", ("eot", "released"), "released: read the normal "
                         "prompt's feature N positions early, as the released code does"),
    "depth": Option("maple", ROW, COUNT, "maple: blocks that get soft tokens, 1 = shallow",
                    "BLOCKS"),
    "w_cat": Option("dept", ROW, bounded(float, 0, 1), "dept: weight of the base-class head",
                    "WEIGHT"),

    "epochs": Option("prompt", ROW, COUNT_OR_ZERO, "length of Stage II", "E"),
    "batch_size": Option("prompt", ROW, COUNT, "images a step", "B"),
    "lr": Option("prompt", ROW, POSITIVE, "learning rate of Stage II", "LR"),
    "lambda_1": Option("prompt", ROW, WEIGHT, "weight of the cross entropy, Eq. 12", "WEIGHT"),
    "lambda_2": Option("stage II", ROW, WEIGHT, "weight of the distillation, Eq. 12; 0: none, "
                       "Tab. 9", "WEIGHT"),
    "temperature": Option("stage II", ROW, bounded(float, 1e-9, 100), "temperature of the "
                          "distillation, Eq. 11", "T"),
}
# What an anchor depends on: the runs that agree in these share it.
ANCHOR_SETTINGS = ("clip", "dtype", "classes", "shots", "anchor_length", "preposition",
                   "descriptions", "max_descriptions", "anchor_epochs", "anchor_lr",
                   "anchor_weight")
ELEVEN, VARIANTS = tuple(data.DATASETS)[:11], tuple(data.DATASETS)[11:15]
CELL = ("baseline", "template", "dataset", "classes")       # what a row of the table is for


def has(cell, group):
    """Does a run have the settings of this group? cell: what decides it, see `default_settings`."""
    if group in ("task", "clip") or cell["baseline"] == "clip":
        return group in ("task", "clip")
    anchors = cell["template"] == "anchoropt"
    two_stages = anchors and not cell["one_stage"]
    learns = anchors and cell["anchor"] == "learnt"
    return {"prompt": True, "anchor": anchors, "anchoropt": anchors, "stage II": two_stages,
            "anchor's learning": learns, "stage I": learns and two_stages,
            "W": anchors and cell["arrangement"] == "adaptive",
            "start": cell["template"] == "plain" and cell["baseline"] != "dept",
            "atprompt": cell["template"] == "atprompt",
            "maple": cell["baseline"] == "maple", "dept": cell["baseline"] == "dept"}[group]


def plain_value(text):
    """20, 0.002 or true of a table's text; other text as it is."""
    try:
        return json.loads(text)
    except ValueError:
        return text


with open(os.path.join(data.ASSETS, "settings.csv"), newline="", encoding="utf-8") as file:
    SETTINGS_ROWS = list(csv.DictReader(file))


def default_settings(dataset, baseline, template, given=()):
    """The defaults of a dataset x baseline x template cell: SETTINGS', and assets/settings.csv's.

    given: a dict of the settings that are given, of which some decide what else there is to set
    (--one-stage has no distillation) and which rows hold (--classes all: Tables 2 and 4). Rows of
    the table apply from top to bottom; `*` matches anything and an empty field leaves a setting as
    it is. Returns a dict of the settings that the run has, without what is given.
    """
    if baseline == "clip":
        template = "plain"
    cell = {key: setting.default for key, setting in SETTINGS.items()} | dict(given)
    cell |= {"dataset": dataset, "baseline": baseline, "template": template}
    # The rows of the table that are for this cell, each over those above it.
    found = {}
    for row in SETTINGS_ROWS:
        if all(row[key] in ("*", cell[key]) for key in CELL):
            found |= {key: plain_value(text) for key, text in row.items() if text}
    # What the run has, from its rows or as all have it.
    settings = {"dataset": dataset, "baseline": baseline, "template": template}
    for key, setting in SETTINGS.items():
        if has(cell, setting.group):
            settings[key] = found.get(key) if setting.default is ROW else setting.default
            assert settings[key] is not None, f"settings.csv has no {key} for {baseline} {template}"
    if "attributes" in settings:
        settings["attributes"] = settings["attributes"].split()
    if dataset == "toy":
        settings["clip"] = "toy"
    if baseline == "clip":                  # zero-shot: the field's hand-written prompt
        known = data.DATASETS.get(dataset)
        settings["prompt"] = known.prompt if known else data.PHOTO
    return settings


def resolve(args, dataset, baseline, template):
    """The settings of a run: the cell's, and every option that was given on the command line.

    args: an argparse namespace in which None stands for "not given". Returns the settings, and
    those that are off the cell's defaults (a dict), which name the run's folder. Raises ValueError
    for an option that has no meaning here, FileNotFoundError for a file that is not there.
    """
    given = {}
    for key in SETTINGS:
        value = getattr(args, key, None)
        if value is None:
            continue
        if key in ("descriptions", "anchor"):
            os.stat(value)                                  # FileNotFoundError names what is not
        if key in ("clip", "descriptions", "anchor"):
            value = clip_identity(value)                    # a name by content: files move
        given[key] = value
    defaults = default_settings(dataset, baseline, template, given)
    for key in given:
        if key not in defaults:
            raise ValueError(f"{option_of(key)} has no meaning for {cell_name(defaults)} with "
                             f"{' '.join(map(option_of, given))}")
    settings = defaults | given
    return settings, {key: value for key, value in settings.items() if value != defaults[key]}


def option_of(name):
    """soft_tokens -> --soft-tokens."""
    return "--" + name.replace("_", "-")


def cell_name(settings):
    """`coop-anchoropt`; `clip` for zero-shot CLIP."""
    if settings["baseline"] == "clip":
        return "clip"
    return f"{settings['baseline']}-{settings['template']}"


class Run(NamedTuple):
    """One run: what the experiment is, and on what machine."""
    settings: dict                  # all settings of the experiment, saved with its results
    changed: dict                   # those that are off the cell's defaults
    seed: int
    args: argparse.Namespace        # the machine: output, device, workers, ...

    @property
    def folder(self):
        """output/<dataset>/<baseline>-<template>[,changed settings]/seed<k>, where it lives."""
        return self._folder(cell_name(self.settings), self.changed)

    @property
    def anchor_folder(self):
        """output/<dataset>/anchor[,changed settings]/seed<k>: shared where these are equal."""
        changed = {key: self.changed[key] for key in ANCHOR_SETTINGS if key in self.changed}
        return self._folder("anchor", changed)

    def _folder(self, kind, changed):
        name = data.folder_name(kind, changed)
        return pathlib.Path(self.args.output, self.settings["dataset"], name, f"seed{self.seed}")


# -------------------------------------------------------------------- CLIP

DTYPES = {"float32": torch.float32, "float16": torch.float16}


def load_clip_for(settings, args):
    """The CLIP of a run: settings say what it is, --clip where it lies, --device where it goes."""
    if settings["clip"] == "toy":
        # Its layers are so small that a second thread costs more than it brings.
        torch.set_num_threads(1)
    return load_clip(args.clip or settings["clip"], args.device, DTYPES.get(settings["dtype"]))


def frozen_tower(clip_model):
    """f_I of the frozen CLIP: a function of crops (B, 3, H, W), uint8, to (B, d)."""
    preprocess, device = preprocess_of(clip_model), clip_model.logit_scale.device

    def encode(crops):
        return encode_image(clip_model, data.normalize(crops, preprocess, device))
    return encode


def kept_features(clip_model, name, images, folder):
    """The `data.KeptFeatures` of these images and this CLIP in --feature-cache, or None.

    name: the CLIP's, of the settings.
    """
    if folder is None:
        return None
    # In float16 features are others.
    what = [name, str(clip_model.dtype), repr(preprocess_of(clip_model))]
    return data.KeptFeatures(folder, what, images)


# -------------------------------------------------------------------- options and errors

def default_device():
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


# The options that are no settings: which runs, where, and on what machine.
OPTIONS = {
    "dataset": Option("run", "toy", str, f"one of {', '.join(ELEVEN)}, toy; the folder of a "
                      f"dataset of your own; or, to test on alone, {', '.join(VARIANTS)}", "NAME"),
    "seeds": Option("run", [1], COUNT_OR_ZERO, "of few-shot picks, start values and order: a run "
                    "each", "K"),
    "output": Option("run", "output", str, "folder that runs are written to", "DIR"),
    "baseline": Option("method", "coop", tuple(BASELINES), "what learns the prompt; clip: "
                       "zero-shot CLIP, which has no template"),
    "template": Option("method", "anchoropt", TEMPLATES, "soft tokens, Eq. 2; with attribute "
                       "words, Eq. 3; with anchor tokens, Eqs. 8-9"),
    "no_plot": Option("method", False, bool, "write no position.png"),
    "root": Option("files", None, str, "folder that holds the datasets; by default the "
                   "environment's DATA, else ./data", "DIR"),
    "overwrite": Option("files", False, bool, "begin anew, and remove the old results; by default "
                        "what is finished is skipped, and what is begun goes on"),
    "device": Option("machine", default_device(), str, "cpu, cuda, cuda:1, mps"),
    "workers": Option("images", min(8, os.cpu_count()) if torch.cuda.is_available() else 0,
                      COUNT_OR_ZERO, "processes that load images", "N"),
    "feature_cache": Option("images", None, str, "a folder that keeps the frozen CLIP's image "
                            "features: what is there is read, what is not is written", "DIR"),
}


class Parser(argparse.ArgumentParser):
    """argparse, with an error in one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help lists the options)\n")


def make_parser(script, description, groups):
    """A script's options: those of OPTIONS and SETTINGS that are of these groups."""
    parser = Parser(script, description=description,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for group in groups:
        section = parser.add_argument_group(group)
        for name, option in (OPTIONS | SETTINGS).items():
            if option.group != group:
                continue
            # Of a setting None says that it was not given; of the others the default holds.
            how = {"help": option.help, "default": None}
            if option.default not in (None, "default"):
                how["help"] += f" (default: {option.default})"
            if name in OPTIONS:
                how["default"] = option.default
            if option.type is bool:
                how["action"] = "store_true"
            elif isinstance(option.type, tuple):
                how["choices"] = option.type
            else:
                how |= {"type": option.type, "metavar": option.metavar}
            if name in ("seeds", "attributes"):
                how["nargs"] = "+"
            section.add_argument(option_of(name), **how)
    return parser


def run_script(name, run, args):
    """Runs a script's body; what a user can mend ends in one line. Returns the exit code."""
    for stream in (sys.stdout, sys.stderr):         # no terminal's alphabet stops a run
        if hasattr(stream, "reconfigure"):          # a notebook's has not
            stream.reconfigure(errors="backslashreplace")
    try:
        code = run(args)
        sys.stdout.flush()
        return code or 0
    except KeyboardInterrupt:
        complain(name, "stopped; what is finished is kept, and the same command goes on from there")
        return 130
    except BrokenPipeError:                         # `| head` has seen enough: no more to be said
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, ImportError) as error:
        complain(name, str(error))
    except (RuntimeError, MemoryError) as error:
        if not re.search("(out of|allocate|enough) memory|MemoryError|ALLOC_FAILED", repr(error)):
            raise
        complain(name, f"out of memory ({error!r:.160}); a smaller --batch-size "
                       "or --dtype float16 needs less")
    return 2


def printable(text):
    """Without line breaks and a file's control codes, which a terminal would obey."""
    text = " ".join(str(text).split())
    return "".join(c if c.isprintable() else "?" for c in text)


def say(text):
    """Prints one line that may have names out of files in it."""
    print(printable(text), flush=True)


def complain(name, message):
    """One line on stderr, below a progress bar and not in it."""
    tqdm.write(f"{name}: {printable(message)[:1200]}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
