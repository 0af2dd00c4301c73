"""Stage I, anchor optimization (Sec. 3.2.1, Fig. 2a, the first loop of Algorithm 1).

    python stage1.py --dataset toy                                   seconds on a CPU, no download
    python stage1.py --dataset caltech101 --root $DATA --nearest 10  an anchor, and words near it

Learns the anchor tokens [Anc_1]..[Anc_N] of "{Anc} of {Class}" from class descriptions alone: no
image is read. Every step takes all base classes at once, against the mean of each class's
description features: Eq. 5 up to a constant, so with its gradient (losses.anchor_mse). Descriptions
of novel classes never reach the anchor. stage2.py runs this by itself where the anchor is missing.

Below Stage I stands what every run shares: the loop over epochs, settings, folders, options.
"""

import argparse
import collections
import contextlib
import csv
import functools
import json
import math
import os
import pathlib
import sys
import time
import urllib.parse
from typing import NamedTuple

import filelock
import torch
from tqdm import tqdm

import data
import losses

try:
    from anchor import AnchorPrompt, load_anchor, nearest_words, save_anchor
    from prompts import (check_width, clip, clip_identity, encode_sentences, load_clip,
                         read_as_data, unit)
except ImportError as error:
    # clip is missing, or its pkg_resources is: every script imports this module first.
    script = os.path.basename(sys.argv[0])
    if script not in ("stage1.py", "stage2.py", "eval.py"):
        raise
    print(f"{script}: {error} (requirements.txt lists what is needed)", file=sys.stderr)
    sys.exit(2)


# -------------------------------------------------------------------- Stage I

def learn_anchor(prompt, targets, epochs, weight):
    """Minimises  weight * L_theta_a  (Eq. 5) over the anchor tokens theta_a, and nothing else.

    prompt: an `anchor.AnchorPrompt` of the C base classes, changed in place. targets (C, d): the
    means of their unit description features, not renormalised. epochs: the `Epochs` to go through,
    whose optimizer has theta_a alone. weight: the factor before the loss.
    """
    optimizer = epochs.optimizers[0]

    # stage 1: anchor optimization. A step takes the descriptions of all classes at once.
    for _ in epochs:                                                # sets the epoch's lr, too
        for _ in range(epochs.steps):
            f_anc = prompt()                        # f_T(t_anc; theta_a), Eq. 4: unit (C, d)
            loss = weight * losses.anchor_mse(f_anc, targets)       # Eq. 5, against f_T(t_d)
            optimizer.zero_grad()
            scaled_backward(loss, prompt.tokens)
            optimizer.step()                                        # theta_a moves
            epochs.note(loss=loss)


def scaled_backward(loss, tokens):
    """loss.backward() for tokens.grad alone, times 2^8 on the way.

    Eq. 5 is a mean over C x d numbers, so with many classes its gradients would underflow on their
    way through a float16 CLIP. A power of two changes no digit of those that would not.
    """
    (256 * loss).backward()
    tokens.grad /= 256


def description_features(clip_model, descriptions, class_names, file="descriptions"):
    """The frozen f_T(t_d) of Eq. 5: C tensors (D_c, d), unit features of each class's sentences.

    descriptions: C lists of str. Raises ValueError naming the file, the class and the sentence
    where CLIP cannot read one.
    """
    features = []
    for name, sentences in zip(class_names, descriptions):
        try:
            features.append(unit(encode_sentences(clip_model, sentences)))
        except ValueError as error:
            raise ValueError(f"{file}: the sentences of {name!r}: {error}") from error
    return features


def new_anchor(clip_model, class_names, descriptions, settings, seed, last, facts, class_chunk):
    """Stage I from its inputs to its output: the learnt `AnchorPrompt` of these C base classes.

    descriptions: a `Descriptions` of them. settings: of the run, of which it needs ANCHOR_SETTINGS.
    seed: of theta_a's start. last: the file that keeps the finished epochs, and facts what they
    depend on (see `Epochs`). class_chunk: see `prompts.encode_text`. Raises ValueError for a
    sentence that CLIP cannot read, and what `Epochs` raises.
    """
    # f_T(t_d), frozen. Eq. 5 over the D_c sentences of a class has the gradient of Eq. 5 over their
    # mean, so each sentence is encoded once.
    features = description_features(clip_model, descriptions.sentences, class_names,
                                    descriptions.file)                      # C of (D_c, d)
    targets = torch.stack([f.mean(0) for f in features])                    # (C, d)

    # t_anc: theta_a starts at random, and the class names stand behind it.
    torch.manual_seed(seed)
    prompt = AnchorPrompt(clip_model, class_names, settings["anchor_length"],
                          settings["preposition"], class_chunk)
    optimizer = sgd([prompt.tokens], settings["anchor_lr"])                 # theta_a
    before = cosine(prompt, features)

    # As many steps an epoch as if the few-shot images came in batches of 32 (the authors' logs).
    steps = max(1, settings["shots"] * len(class_names) // 32)
    epochs = Epochs("stage I ", settings["anchor_epochs"], steps, [optimizer], last,
                    {"prompt": prompt, "optimizer": optimizer}, facts,
                    advice="lower --anchor-lr or --anchor-weight")
    learn_anchor(prompt, targets, epochs, settings["anchor_weight"])
    print(f"Stage I done: cosine of anchor prompts and descriptions {before:.3f} -> "
          f"{cosine(prompt, features):.3f}", flush=True)
    return prompt


@torch.no_grad()
def cosine(prompt, features):
    """Mean cosine between the anchor prompts and their classes' description features."""
    per_class = [(f_anc * f_des).sum(-1).mean() for f_anc, f_des in zip(prompt(), features)]
    return torch.stack(per_class).mean().item()


def get_anchor(clip_model, class_names, descriptions, args, settings, seed, renew=False):
    """The anchor tokens (N, d_t) of these settings and this seed: read where they are, else learnt.

    descriptions: a `Descriptions` of these classes. renew: learn an anchor anew that is damaged or
    was made from what has changed since, and go on with no Stage I that was begun.
    Raises ValueError for such an anchor otherwise, OSError for a folder that cannot be written to,
    and what `new_anchor` raises.
    """
    folder = anchor_folder(args.output, settings, seed)
    file, last = folder / "anchor.pt", folder / "last.pt"
    # All that the anchor depends on: the settings, and what is in the files.
    facts = {key: settings[key] for key in ANCHOR_SETTINGS}
    facts |= {"class names": data.digest(list(class_names)),
              "descriptions' sentences": data.digest(descriptions.sentences)}

    # Only one process learns an anchor; others that need it wait, and then find it.
    with only_process(folder, wait=True, what="the anchor"):
        if file.exists():
            try:
                tokens = own_anchor(file, clip_model, settings, facts)
                print(f"anchor found: {file}", flush=True)
                return tokens
            except ValueError:
                if not renew:
                    raise
                print(f"{file} is damaged, or what it was made from has changed", flush=True)
        else:
            print(f"no anchor at {file} yet", flush=True)
        if renew:
            last.unlink(missing_ok=True)

        print("Stage I learns the anchor now", flush=True)
        prompt = new_anchor(clip_model, class_names, descriptions, settings, seed, last, facts,
                            args.class_chunk)
        # anchor.pt comes first: a process that dies in between leaves a file too many, no loss.
        with data.written_aside(file) as aside:
            save_anchor(aside, prompt.tokens, facts | {"class_names": list(class_names)})
        last.unlink(missing_ok=True)
        print(f"anchor saved to {file}", flush=True)
        return prompt.tokens.detach()


def own_anchor(file, clip_model, settings, facts):
    """The tokens of an anchor that `get_anchor` has saved.

    Raises ValueError where it is damaged, or was made from what has changed since.
    """
    advice = f"choose another --output, or remove {file.parent}"
    try:
        tokens, saved = load_anchor(file)
    except ValueError as error:
        raise ValueError(f"{error}; {advice}") from error
    check_anchor(file, tokens, saved, settings, clip_model)
    # The folder's name says the settings where they are not the table's, and the table may change.
    check_unchanged(file, saved, facts, advice)
    return tokens


class Descriptions(NamedTuple):
    """What Stage I learns from."""
    file: str
    sentences: list                # of each class: C lists of str


def read_descriptions(class_names, args, settings):
    """The `Descriptions` of these classes, from --descriptions or the project's own file.

    Prints how they were read, and writes an aliases file for names that do not match. Raises
    FileNotFoundError and ValueError as `data.load_descriptions` does.
    """
    file = args.descriptions or data.default_descriptions(settings["dataset"])
    notes = []
    sentences = data.load_descriptions(file, class_names, settings["max_descriptions"],
                                       args.aliases, notes)
    for note in notes:
        print(f"note: {note}", flush=True)
    return Descriptions(file, sentences)


def check_anchor(file, tokens, saved, settings, clip_model):
    """Raises ValueError where an anchor file does not fit what is asked for: says both values."""
    # Both values are said: which of the two is the wrong one, only the user knows.
    facts = [("anchor length", len(tokens), settings["anchor_length"])]
    for key in ("preposition", "clip"):
        if key in saved:                    # the authors' files say neither
            facts.append((key, saved[key], settings[key]))
    wrong = []
    for what, found, wanted in facts:
        if found != wanted:
            wrong.append(f"has {what} {found}, asked for is {wanted}")
    try:
        check_width(clip_model, tokens)
    except ValueError as error:
        wrong.append(f"does not fit: {error}")
    if wrong:
        raise ValueError(f"{file} {'; '.join(wrong)}; make the right one with: python stage1.py "
                         f"--dataset {settings['dataset']} "
                         f"--anchor-length {settings['anchor_length']} "
                         f"--preposition {settings['preposition']}, and the --clip of this run")


def run(args):
    dataset = data.load_dataset(args.dataset, args.root)
    if not dataset.train:
        raise ValueError(f"{args.dataset} is for testing alone; learn the anchor on another "
                         "dataset, e.g. imagenet")
    settings = resolve(args, default_settings(dataset.name, "coop", "anchoropt", args.classes))
    task = data.few_shot_task(dataset, settings["classes"], settings["shots"])
    for note in dataset.notes:
        print(f"note: {note}")
    descriptions = read_descriptions(task.base_names, args, settings)
    clip_model = load_clip_for(settings, args)
    # The few-shot picks differ between seeds, but no image is read: only theta_a's start does.
    for seed in dict.fromkeys(args.seeds):
        tokens = get_anchor(clip_model, task.base_names, descriptions, args, settings, seed)
        if args.nearest:
            print_nearest(tokens, clip_model, args.nearest)


def print_nearest(tokens, clip_model, k):
    """S4: the k vocabulary words next to each anchor token."""
    print("nearest vocabulary words (Euclidean distance); they make no sense to a person, as the "
          "paper finds (S4):")
    for i, words in enumerate(nearest_words(tokens, clip_model, k)):
        listed = "  ".join(f"{word} {distance:.2f}" for word, distance in words)
        print(f"  [Anc_{i + 1}]  {listed}")


def main(argv=None):
    parser = Parser("stage1.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter,
                    parents=[DATA_OPTIONS, ANCHOR_OPTIONS, CLIP_OPTIONS, RUN_OPTIONS])
    parser.add_argument("--nearest", type=at_least(0), default=0, metavar="K",
                        help="print the K vocabulary words nearest to each anchor token, S4 "
                             "(default: 0)")
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
    """The epochs of a stage: `for epoch in epochs`, and `epochs.note(loss=...)` behind every step.

    What both loops need beside the method: the schedule, the progress bar, a loss that is not
    finite, keeping every finished epoch, and going on from it with the same figures.

    title, epochs, steps: of the bar, and how many. optimizers: their learning rates follow the
    schedule. path: the file that keeps the finished epochs, log.csv beside it; or None. parts:
    name -> what has a state_dict and is kept. facts: name -> a setting, or a digest of data; a file
    that was begun with others is refused. advice: what to do about a loss that is not finite.
    `log`: a dict per epoch. Raises ValueError for such a loss, or a file that it cannot go on from.
    """

    def __init__(self, title, epochs, steps, optimizers, path=None, parts=None, facts=None,
                 advice=""):
        self.title = title
        self.epochs = epochs
        self.steps = steps
        self.optimizers = optimizers
        # What the schedule scales; going on brings back an optimizer with the rate of its epoch.
        self.lrs = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
        self.path = path
        self.parts = parts or {}
        self.facts = facts or {}
        self.advice = advice
        self.log = []
        if path is not None and path.is_file():
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
        terms = torch.stack(self.terms).cpu()                   # (steps, number of terms)
        wrong = ~terms.isfinite().all(1)
        if wrong.any():
            kept = f"epoch {epoch - 1} is kept" if self.log else "no epoch is kept"
            raise ValueError(f"{self.title.strip()}: the loss is not finite in epoch {epoch}, step "
                             f"{int(wrong.nonzero()[0]) + 1}; {kept}; {self.advice}")
        means = {}
        for name, mean in zip(self.names, terms.mean(0).tolist()):
            means[name] = float(f"{mean:.6g}")
        lr = self.optimizers[0].param_groups[0]["lr"]
        self.log.append({"epoch": epoch, "lr": lr, **means, "seconds": round(seconds, 3)})
        self.bar.set_postfix(epoch=epoch, **means)

        # Kept: the parts, among them the optimizers with their momentum, the log, and what all of
        # it depends on. No state of a random generator: an epoch's chance comes from its number.
        if self.path is not None:
            state = {name: part.state_dict() for name, part in self.parts.items()}
            with data.written_aside(self.path) as aside:
                torch.save(state | {"log": self.log, "facts": self.facts}, aside)
            save_csv(self.path.with_name("log.csv"), self.log)

    def _go_on(self):
        advice = f"to begin anew, remove {self.path}"
        # Is the file sound,
        try:
            saved = read_as_data(self.path)
            facts, log = dict(saved["facts"]), list(saved["log"])
            if not log or [row["epoch"] for row in log] != list(range(1, len(log) + 1)):
                raise ValueError("epochs are missing")
            if any(row.keys() != log[0].keys() for row in log):
                raise ValueError("its epochs differ in form")
        except (PermissionError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.path}, which keeps the finished epochs, is damaged ({error}); "
                             f"{advice}") from error
        # of the same data,
        check_unchanged(self.path, facts, self.facts, advice)
        # and of the same method?
        try:
            for name, part in self.parts.items():
                part.load_state_dict(saved[name])
        except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise ValueError(f"{self.path} is of another run ({reason}); {advice}") from error
        self.log = log
        save_csv(self.path.with_name("log.csv"), log)   # a process may have died between the two
        print(f"{self.title.strip()}: going on after epoch {len(log)}", flush=True)


def check_unchanged(path, saved, now, advice):
    """Raises ValueError where settings or digests `now` are not those a file was made with."""
    changed = [name for name, value in now.items() if not is_same(saved.get(name), value)]
    if changed:
        raise ValueError(f"{path} was made with other {' and '.join(changed)} than there are now; "
                         f"{advice}")


def is_same(saved, now):
    """Is a plain value of ours what a file holds, which may be anything? 100 is 100.0."""
    if isinstance(now, (int, float)) and isinstance(saved, (int, float)):
        return saved == now
    return type(saved) is type(now) and saved == now


def save_csv(path, rows):
    """Rows (dicts with the same keys) as CSV."""
    with data.written_aside(path) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


# -------------------------------------------------------------------- settings

SETTINGS_FILE = pathlib.Path(data.ASSETS) / "settings.csv"

# What an image feature depends on, and what an anchor depends on: the runs that agree in these
# share kept features and anchors.
CLIP_SETTINGS = ("clip", "activation", "vision_heads", "text_heads", "dtype")
ANCHOR_SETTINGS = (*CLIP_SETTINGS, "classes", "shots", "anchor_length", "preposition",
                   "anchor_epochs", "anchor_lr", "anchor_weight", "descriptions",
                   "max_descriptions")


CELL = ("baseline", "template", "dataset", "classes")       # what a row of the table is for


@functools.cache
def settings_rows():
    """The rows of the table: pairs of dicts, for which cell, and what a row sets there."""
    rows = []
    with open(SETTINGS_FILE, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            del row["source"]
            cell = {key: row.pop(key) for key in CELL}
            values = {key: text for key, text in row.items() if text}
            for key, text in values.items():
                with contextlib.suppress(ValueError):           # else it is text: "color shape"
                    values[key] = json.loads(text)              # 20 or 0.002
            rows.append((cell, values))
    return rows


def default_settings(dataset, baseline, template, classes=None, one_stage=False):
    """The settings of a dataset x baseline x template cell: assets/settings.csv, and what all have.

    classes: "base" (default) or "all", for Tables 2 and 4. Rows of the table apply from top to
    bottom; `*` matches anything and an empty field leaves a setting as it is. A dataset that the
    table does not know gets, for what only datasets' rows have, the value that most of the eleven
    share. Returns a dict of the settings that matter for this cell.
    """
    # What no row of the table says.
    settings = {"dataset": dataset, "baseline": baseline, "template": template, "shots": 16,
                "classes": classes or "base", "clip": "ViT-B/16"}
    settings |= dict.fromkeys(CLIP_SETTINGS[1:], "default")
    if dataset == "toy":
        settings["clip"] = "toy"
    if baseline == "clip":
        prompt = data.DATASETS[dataset].prompt if dataset in data.DATASETS else data.PHOTO
        return settings | {"template": "plain", "prompt": prompt}

    # The rows of the table that are for this cell, each over those above it.
    for cell, values in settings_rows():
        if all(cell[key] in ("*", settings[key]) for key in CELL):
            settings |= values
    # What belongs to a template.
    if template == "atprompt":
        settings["attributes"] = settings.get("attributes", "").split()
    if template == "anchoropt":
        settings |= {"arrangement": "adaptive", "tau": 1.0, "test_position": "argmax",
                     "feature_at": "eot", "anchor_length": 1, "preposition": "of",
                     "descriptions": "default", "one_stage": one_stage, "anchor": "learnt"}
    if dataset not in data.DATASETS:
        settings |= shared_settings(settings, one_stage)
    if one_stage:                       # no Stage I before it, and no distillation (Sec. 3.2.4)
        for unused in ("anchor_epochs", "anchor", "lambda_2", "temperature"):
            settings.pop(unused, None)
    return settings


def shared_settings(settings, one_stage):
    """For a dataset of one's own: what the `*` rows leave open, as most of the eleven have it."""
    cell = settings["baseline"], settings["template"]
    others = [default_settings(name, *cell, one_stage=one_stage) for name in ELEVEN]
    shared = {}
    for key in others[0]:
        if settings.get(key, []) == []:                         # missing, or no attributes
            values = [repr(other[key]) for other in others if key in other]
            common = collections.Counter(values).most_common(1)[0][0]
            shared[key] = next(other[key] for other in others if repr(other.get(key)) == common)
    return shared


def note_on_own(settings):
    """Says which settings of a dataset of one's own are those that most of the eleven share."""
    shared = set()
    for cell, values in settings_rows():
        same = all(cell[key] in ("*", settings[key]) for key in ("baseline", "template", "classes"))
        if same and cell["dataset"] in ELEVEN:
            shared |= values.keys() & settings.keys()
    if shared:
        values = ", ".join(f"{key} {settings[key]}" for key in sorted(shared))
        print(f"note: {settings['dataset']} has no row in assets/settings.csv; as most of the "
              f"eleven datasets have it, or as given: {values}", flush=True)


VARIANTS = ("imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r")
ELEVEN = tuple(name for name in data.DATASETS if name not in (*VARIANTS, "toy"))

# The options that are settings of a run: they are saved with it and, where they differ from the
# default, stand in the name of its folder.
OF_STAGE_1 = ("anchor_epochs", "anchor_lr", "anchor_weight", "descriptions", "max_descriptions")
OPTIONS = {"shots", "classes", *CLIP_SETTINGS, "soft_tokens", "attributes", "epochs", "batch_size",
           "lr", "lambda_1", "lambda_2", "temperature", "w_cat", "depth", "arrangement", "tau",
           "test_position", "feature_at", "anchor", "anchor_length", "preposition", *OF_STAGE_1}


def resolve(args, defaults):
    """The settings of a run: the defaults, and every option that was given on the command line.

    args: an argparse namespace in which None stands for "not given". Raises ValueError for an
    option that has no meaning here, FileNotFoundError for a file that is not there.
    """
    settings = dict(defaults)
    cell = cell_name(defaults)
    if defaults.get("one_stage"):
        cell += " with --one-stage"
    for key in sorted(OPTIONS):             # so arrangement comes before what depends on it
        value = getattr(args, key, None)
        if value is None:
            continue
        option = option_of(key)
        if key not in defaults:
            raise ValueError(f"{option} has no meaning for {cell}")
        if getattr(args, "anchor", None) and key in OF_STAGE_1:
            raise ValueError(f"{option} has no meaning with --anchor, which brings an anchor "
                             "learnt already")
        if key in ("tau", "test_position") and settings["arrangement"] != "adaptive":
            raise ValueError(f"{option} has no meaning with --arrangement "
                             f"{settings['arrangement']}, where no W is learnt")
        if key in ("descriptions", "anchor") and not os.path.isfile(value):
            raise FileNotFoundError(f"{option} {value} does not exist")
        if key in ("clip", "descriptions", "anchor"):
            value = clip_identity(value)                    # a name by content: files move
        settings[key] = value
    return settings


def option_of(name):
    """soft_tokens -> --soft-tokens."""
    return "--" + name.replace("_", "-")


def cell_name(settings):
    """`coop-anchoropt`; `clip` for zero-shot CLIP."""
    if settings["baseline"] == "clip":
        return "clip"
    return f"{settings['baseline']}-{settings['template']}"


# -------------------------------------------------------------------- folders

def folder_name(kind, settings, defaults):
    """`coop-anchoropt,epochs=1,tau=0.5`: every setting that is not its default, sorted by name.

    No two settings share a name: values are %-escaped as in a URL, and what would be too long for a
    file system ends in a digest of the whole.
    """
    parts = [kind]
    for key in sorted(settings):
        if settings[key] != defaults.get(key):
            values = settings[key]
            if not isinstance(values, list):
                values = [values]
            text = "+".join(urllib.parse.quote(str(value), safe="") for value in values)
            parts.append(f"{key}={text}")
    name = ",".join(parts)
    if len(name) > 200:
        name = f"{name[:180]},{data.digest(name)}"
    return name


def run_folder(output, settings, seed):
    """output/<dataset>/<baseline>-<template>[,changed settings]/seed<k>, where a run lives."""
    defaults = default_settings(settings["dataset"], settings["baseline"], settings["template"],
                                settings["classes"], settings.get("one_stage", False))
    # These two are other experiments, with rows of their own: always said in the name.
    defaults["classes"] = "base"
    if "one_stage" in defaults:
        defaults["one_stage"] = False
    name = folder_name(cell_name(settings), settings, defaults)
    return pathlib.Path(output) / settings["dataset"] / name / f"seed{seed}"


def anchor_folder(output, settings, seed):
    """output/<dataset>/anchor[,changed settings]/seed<k>: runs share it where these are equal."""
    defaults = default_settings(settings["dataset"], "coop", "anchoropt", settings["classes"])
    defaults["classes"] = "base"
    name = folder_name("anchor", {key: settings[key] for key in ANCHOR_SETTINGS}, defaults)
    return pathlib.Path(output) / settings["dataset"] / name / f"seed{seed}"


@contextlib.contextmanager
def only_process(folder, wait, what):
    """Holds a folder for this process alone, as long as the process lives.

    wait: another process that holds it is waited for; else BlockingIOError says that it is at work.
    Raises OSError where the folder cannot be written to: before anything is learnt.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The operating system holds the lock: it goes with the process, however that ends.
        lock = filelock.FileLock(folder / ".lock")
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            if not wait:
                raise BlockingIOError(f"another process is at work on {what} in {folder}; wait for "
                                      "it, or choose another --output") from None
            print(f"{what}: waiting for the process that is at work on it in {folder}", flush=True)
            lock.acquire()
    except BlockingIOError:
        raise
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"cannot write to {folder} ({reason}); mend that, or choose another "
                      "--output") from error
    try:
        # What processes have left that were killed while they wrote.
        for litter in folder.glob(".*.part*"):
            litter.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


# -------------------------------------------------------------------- CLIP

def load_clip_for(settings, args):
    """The CLIP of a run: settings say what it is, --clip where it lies, --device where it goes."""
    if settings["clip"] == "toy":
        # Its layers are so small that a second thread costs more than it brings.
        torch.set_num_threads(1)
    own = {key: settings[key] for key in CLIP_SETTINGS if settings[key] != "default"}
    dtype = None
    if "dtype" in own:
        dtype = getattr(torch, own["dtype"])
    # prompts.py, which people copy, knows nothing of options: what to try is said here.
    try:
        clip_model = load_clip(args.clip or settings["clip"], args.device, dtype,
                               own.get("activation"), own.get("vision_heads"),
                               own.get("text_heads"))
    except ValueError as error:
        raise ValueError(f"{error}; see --clip, --device, --vision-heads, --text-heads") from error
    for note in clip_model.notes:
        print(f"note: {note}; say otherwise with --activation, --vision-heads, --text-heads",
              flush=True)
    return clip_model


def kept_features(clip_model, settings, images, cache):
    """The folder `cache` (--feature-cache) as it keeps the frozen CLIP's features of images."""
    # The precision as it is, too: "default" is another one on a GPU.
    what = [settings[key] for key in CLIP_SETTINGS] + [str(clip_model.dtype)]
    return data.KeptFeatures(cache, what, images)


def print_disk_use(cache):
    """How much --feature-cache takes by now, of this run and of others."""
    sizes = [file.stat().st_size for file in pathlib.Path(cache).glob("*.npz")]
    print(f"features kept: {len(sizes)} files, {sum(sizes) / 1e6:.1f} MB in {cache}", flush=True)


# -------------------------------------------------------------------- options and errors

class Parser(argparse.ArgumentParser):
    """argparse, with an error in one line."""

    def error(self, message):
        if message.endswith("required: RUN"):
            message += ", which comes before the options"
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help lists the options)\n")


def at_least(least):
    """An argparse type: whole numbers from `least` on."""
    def whole_number(text):
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be whole numbers, parted by spaces where there "
                                             f"are several, not {text!r}") from None
        if not least <= value < 2 ** 31:
            raise argparse.ArgumentTypeError(f"must be at least {least} and below 2^31, not "
                                             f"{text}")
        return value
    return whole_number


def positive(text):
    """An argparse type: finite numbers above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, not {text}")
    return value


def fraction(text):
    """An argparse type: numbers from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, not {text}")
    return value


def not_negative(text):
    """An argparse type: finite numbers from 0 on."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be 0 or a positive number, not {text}")
    return value


def default_device():
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


# The options that scripts share, as argparse's parents. None stands for "not given": the default is
# the dataset's row.
OF_THE_ROW = "(default: the cell's value in assets/settings.csv)"

DATA_OPTIONS = argparse.ArgumentParser(add_help=False)
group = DATA_OPTIONS.add_argument_group("data")
group.add_argument("--dataset", default="toy", metavar="NAME",
                   help=f"one of {', '.join(ELEVEN)}, toy; the folder of a dataset of your own; "
                        f"or, to test on alone, {', '.join(VARIANTS)} (default: toy)")
group.add_argument("--root", metavar="DIR",
                   help="folder that holds the datasets (default: the environment's DATA, else "
                        "./data)")
group.add_argument("--shots", type=at_least(1), metavar="K",
                   help="training images a class; Stage I has K x classes / 32 steps an epoch "
                        "(default: 16)")
group.add_argument("--classes", choices=("base", "all"),
                   help="learn on the first half of the classes, the others being novel; or on all "
                        "(default: base)")
group.add_argument("--seeds", type=at_least(0), nargs="+", default=[1], metavar="K",
                   help="of few-shot picks, start values and order: a run each (default: 1)")

ANCHOR_OPTIONS = argparse.ArgumentParser(add_help=False)
group = ANCHOR_OPTIONS.add_argument_group("anchor, Stage I (--template anchoropt)")
group.add_argument("--descriptions", metavar="FILE",
                   help="JSON, class -> list of sentences (default: the file in "
                        "assets/descriptions/; a dataset of your own needs one)")
group.add_argument("--aliases", metavar="FILE",
                   help="JSON, class -> its key in the description file (default: none)")
group.add_argument("--max-descriptions", type=at_least(1), metavar="D",
                   help="use the first D sentences of each class (default: 10; imagenet 5)")
group.add_argument("--anchor-length", type=at_least(1), metavar="N",
                   help="N anchor tokens, Tab. 7 (default: 1)")
group.add_argument("--preposition", metavar="WORD",
                   help="of, with, at, sun, sea, any word, or none: Tabs. 6 and S2 (default: of)")
group.add_argument("--anchor-epochs", type=at_least(0), metavar="T",
                   help=f"epochs of Stage I; none with --one-stage {OF_THE_ROW}")
group.add_argument("--anchor-lr", type=positive, metavar="LR",
                   help="learning rate of Stage I (default: 0.002)")
group.add_argument("--anchor-weight", type=not_negative, metavar="WEIGHT",
                   help=f"factor before Eq. 5 {OF_THE_ROW}")

CLIP_OPTIONS = argparse.ArgumentParser(add_help=False)
group = CLIP_OPTIONS.add_argument_group(
    "CLIP", "In eval.py for --dataset, --images and --save-text-features; a run's own settings say "
    "there which CLIP it needs.")
group.add_argument("--clip", metavar="NAME_OR_FILE",
                   help=f"one of {', '.join(clip.available_models())}; or a checkpoint file: "
                        "OpenAI's, OpenCLIP's or HuggingFace's (default: in eval.py the run's "
                        "own, where that has a name; else ViT-B/16, and the toy CLIP for the toy "
                        "world)")
group.add_argument("--device", default=default_device(),
                   help="cpu, cuda, cuda:1, mps (default: cuda or mps where there is one; here "
                        "%(default)s)")
group.add_argument("--dtype", choices=("float32", "float16", "bfloat16"),
                   help="of the frozen CLIP (default: in eval.py the run's own, else float16 on "
                        "CUDA and float32 elsewhere)")
group.add_argument("--class-chunk", type=at_least(0), default=0, metavar="C",
                   help="encode this many classes at a time, to save memory (default: 0, all)")

RUN_OPTIONS = argparse.ArgumentParser(add_help=False)
group = RUN_OPTIONS.add_argument_group("CLIP")
group.add_argument("--activation", choices=("quickgelu", "gelu"),
                   help="of a CLIP file that is not OpenAI's; most of OpenCLIP's have gelu "
                        "(default: quickgelu)")
group.add_argument("--vision-heads", type=at_least(1), metavar="H",
                   help="attention heads of such a file's image tower; OpenCLIP's ViT-H, -g and "
                        "-bigG have 16 (default: width / 64)")
group.add_argument("--text-heads", type=at_least(1), metavar="H",
                   help="attention heads of such a file's text tower (default: width / 64)")
group = RUN_OPTIONS.add_argument_group("results")
group.add_argument("--output", default="output", metavar="DIR",
                   help="folder that all runs are written to (default: output)")

IMAGE_OPTIONS = argparse.ArgumentParser(add_help=False)
group = IMAGE_OPTIONS.add_argument_group("images")
group.add_argument("--workers", type=at_least(0), metavar="N",
                   help="processes that load images (default: 8 or fewer on CUDA, else 0)")
group.add_argument("--test-batch", type=at_least(1), metavar="B",
                   help="test images at a time for cocoop, maple and --test-position sample "
                        "(default: 100; maple 200)")
group.add_argument("--feature-cache", metavar="DIR",
                   help="a folder that keeps the frozen CLIP's image features: what is there is "
                        "read, what is not is written (default: none)")


def run_script(name, run, args):
    """Runs a script's body; what a user can mend ends in one line. Returns the exit code."""
    try:
        run(args)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        again = "goes on from there"
        if getattr(args, "overwrite", False):
            again = "begins anew, for its --overwrite"
        complain(name, f"stopped; what is finished is kept, the same command {again}")
        return 130
    except torch.OutOfMemoryError as error:
        reason = str(error).split(".")[0]
        advice = "set --class-chunk 100"
        for option in ("batch_size", "test_batch"):
            if hasattr(args, option):
                advice = f"lower {option_of(option)}, {advice}"
        complain(name, f"out of memory ({reason}); {advice}")
    except BrokenPipeError as error:
        try:
            print(flush=True)                   # does anybody read the output?
            complain(name, f"{error}: a process that it works with has ended")
        except BrokenPipeError:                 # `| head` has seen enough: no more to be said
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, ImportError) as error:
        message = str(error)
        if isinstance(error, OSError) and error.filename is not None:       # not in our words yet
            message = f"{error.filename}: {error.strerror}"
        complain(name, message)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        complain(name, f"{error}; set --workers 0, or give the container more shared memory "
                       "(docker run --shm-size)")
    return 2


def complain(name, message):
    """One line on stderr, below a progress bar and not in it."""
    tqdm.write(f"{name}: {' '.join(message.split())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
