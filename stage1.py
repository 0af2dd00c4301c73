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
import functools
import json
import math
import os
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
    from prompts import (TOKENIZER, check_width, clip, clip_identity, encode_image,
                         encode_sentences, load_clip, preprocess_of, read_as_data, unit)
except ImportError as error:
    # A package is missing, or clip's pkg_resources is: every script imports this module first.
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

    # stage 1: anchor optimization. A step takes the descriptions of all classes at once, where
    # Algorithm 1 goes through them one by one.
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


def description_features(clip_model, descriptions):
    """The frozen f_T(t_d) of Eq. 5: C tensors (D_c, d), unit features of each class's sentences.

    descriptions: C lists of str.
    """
    return [unit(encode_sentences(clip_model, sentences)) for sentences in descriptions]


def new_anchor(run, clip_model, class_names, descriptions, facts):
    """Stage I from its inputs to its output: the learnt `AnchorPrompt` of these C base classes.

    run: a `Run`, whose seed draws theta_a's start values. descriptions: C lists of sentences.
    facts: what the epochs that are kept depend on, see `Epochs`, which raises ValueError.
    """
    settings = run.settings
    # f_T(t_d), frozen. Eq. 5 over the D_c sentences of a class has the gradient of Eq. 5 over their
    # mean, so each sentence is encoded once.
    features = description_features(clip_model, descriptions)               # C of (D_c, d)
    targets = torch.stack([f.mean(0) for f in features])                    # (C, d)

    # t_anc: theta_a starts at random, and the class names stand after it.
    torch.manual_seed(run.seed)
    prompt = AnchorPrompt(clip_model, class_names, settings["anchor_length"],
                          settings["preposition"], run.args.class_chunk)
    optimizer = sgd([prompt.tokens], settings["anchor_lr"])                 # theta_a
    before = cosine(prompt, features)

    # As many steps an epoch as if the few-shot images came in batches of 32 (the authors' logs).
    steps = max(1, settings["shots"] * len(class_names) // 32)
    epochs = Epochs("stage I ", settings["anchor_epochs"], steps,
                    {"prompt": prompt, "optimizer": optimizer},
                    run.anchor_folder / "last.pt", facts)
    learn_anchor(prompt, targets, epochs, settings["anchor_weight"])
    print(f"Stage I done: cosine of anchor prompts and descriptions {before:.3f} -> "
          f"{cosine(prompt, features):.3f}", flush=True)
    return prompt


@torch.no_grad()
def cosine(prompt, features):
    """Mean cosine between the anchor prompts and their classes' description features."""
    per_class = [(f_anc * f_des).sum(-1).mean() for f_anc, f_des in zip(prompt(), features)]
    return torch.stack(per_class).mean().item()


def get_anchor(run, clip_model, class_names, descriptions):
    """The anchor tokens (N, d_t) of this run: read where they are, else learnt by Stage I.

    descriptions: C lists of sentences. With --overwrite an anchor is learnt anew that is damaged or
    was made from what has changed since. Raises ValueError for such an anchor otherwise, OSError
    for a folder that cannot be written to, and what `new_anchor` raises.
    """
    file, last = run.anchor_folder / "anchor.pt", run.anchor_folder / "last.pt"
    # All that the anchor depends on: the settings, and what is in the files.
    facts = {key: run.settings[key] for key in ANCHOR_SETTINGS}
    facts |= {"class names": data.digest(list(class_names)),
              "descriptions' sentences": data.digest(descriptions)}

    # Only one process learns an anchor; others that need it wait, and then find it.
    with data.only_process(run.anchor_folder, wait=True, what="the anchor"):
        if file.exists():
            try:
                tokens, saved = load_anchor(file)
                # The folder's name says the settings off the table, and the table may change.
                data.check_unchanged(file, saved, facts, "choose another --output, --overwrite, or "
                                     f"remove {file.parent}")
                print(f"anchor found: {file}", flush=True)
                return tokens
            except ValueError:
                if not run.args.overwrite:
                    raise
        if run.args.overwrite:
            last.unlink(missing_ok=True)

        print(f"Stage I learns the anchor, {file}", flush=True)
        prompt = new_anchor(run, clip_model, class_names, descriptions, facts)
        # anchor.pt comes first: a process that dies in between leaves a file too many, no loss.
        with data.written_aside(file) as aside:
            save_anchor(aside, prompt.tokens, facts | {"class_names": list(class_names)})
        last.unlink(missing_ok=True)
        return prompt.tokens.detach()


def read_descriptions(class_names, args, settings):
    """What Stage I learns from: C lists of sentences, from --descriptions or the project's own.

    Raises FileNotFoundError and ValueError as `data.load_descriptions`, and for sentences that CLIP
    cannot read: all of them, before anything is loaded or learnt.
    """
    # S2.2.1: the first sentences of each class's list, and none that CLIP would cut.
    file = args.descriptions or data.default_descriptions(settings["dataset"])
    descriptions = data.load_descriptions(file, class_names, settings["max_descriptions"])
    long = []
    for name, sentences in zip(class_names, descriptions):
        long += [f"{name}: {sentence[:60]}..." for sentence in sentences
                 if len(TOKENIZER.encode(sentence)) > 75]
    if long:
        raise ValueError(f"{file}: {len(long)} sentences are longer than the 75 tokens that CLIP "
                         f"reads between [SOS] and [EOT]; shorten: {'; '.join(long)}")
    return descriptions


def given_anchor(run, clip_model, novel_names):
    """The anchor tokens (N, d_t) of --anchor FILE. Raises ValueError where they do not fit."""
    # The file may be of another length, word or CLIP than this run asks for.
    file, settings = run.args.anchor, run.settings
    tokens, saved = load_anchor(file)
    check_width(clip_model, tokens)
    # The authors' files say no settings.
    found = {key: saved.get(key, settings[key]) for key in ("preposition", "clip")}
    found["anchor_length"] = len(tokens)
    data.check_unchanged(file, found, {key: settings[key] for key in found},
                         f"it was learnt with {found}")
    seen = set(saved.get("class_names") or []) & set(novel_names)
    if seen:
        raise ValueError(f"{file} was learnt from descriptions of {len(seen)} classes that are "
                         f"novel here, such as {min(seen)!r}; give one that was not, or "
                         "--classes all")
    return tokens


def run(args):
    dataset = data.load_dataset(args.dataset, args.root)
    settings, changed = resolve(args, dataset.name, "coop", "anchoropt")
    if args.anchor:                         # S4 of an anchor that is there, the authors' too
        clip_model = load_clip_for(settings, args)
        tokens, _ = load_anchor(args.anchor)
        check_width(clip_model, tokens)
        print_nearest(tokens, clip_model, args.nearest or 10)
        return
    if not dataset.train:
        raise ValueError(f"{args.dataset} is for testing alone; learn the anchor on another "
                         "dataset, e.g. imagenet")
    task = data.few_shot_task(dataset, settings["classes"], settings["shots"])
    descriptions = read_descriptions(task.base_names, args, settings)
    clip_model = load_clip_for(settings, args)
    # The few-shot picks differ between seeds, but no image is read: only theta_a's start does.
    for seed in dict.fromkeys(args.seeds):
        one = Run(settings, changed, seed, args)
        tokens = get_anchor(one, clip_model, task.base_names, descriptions)
        if args.nearest:
            print_nearest(tokens, clip_model, args.nearest)


def print_nearest(tokens, clip_model, k):
    """S4: the k vocabulary words next to each anchor token."""
    print("nearest vocabulary words, by Euclidean distance (one reading of S4):")
    for i, words in enumerate(nearest_words(tokens, clip_model, k)):
        listed = "  ".join(f"{word} {distance:.2f}" for word, distance in words)
        print(f"  [Anc_{i + 1}]  {listed}")


def main(argv=None):
    parser = make_parser("stage1.py", __doc__, ["task", "clip", "anchor", "stage I"], ["run"])
    parser.add_argument("--nearest", type=at_least(0), default=0, metavar="K",
                        help="print the K vocabulary words nearest to each anchor token, S4")
    parser.add_argument("--anchor", metavar="FILE",
                        help="learn nothing: print the words nearest to the tokens of this file")
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
    keeps the finished epochs, log.csv beside it; or None. facts: name -> a setting, or a digest of
    data; a file that was begun with others is refused. `log`: a dict per epoch. Raises ValueError
    for a loss that is not finite, or a file that it cannot go on from.
    """

    def __init__(self, title, epochs, steps, parts, path=None, facts=None):
        self.title = title
        self.epochs = epochs
        self.steps = steps
        self.parts = parts
        self.optimizers = [part for part in parts.values()
                           if isinstance(part, torch.optim.Optimizer)]
        # What the schedule scales; going on brings back an optimizer with the rate of its epoch.
        self.lrs = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        self.path = path
        self.facts = facts or {}
        self.of_epoch = {}              # what a stage has to say of the epoch that it is in
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
                             f"{int(wrong.nonzero()[0]) + 1}; {kept}; lower the learning rate, or "
                             "the weights of the loss")
        means = {}
        for name, mean in zip(self.names, terms.mean(0).tolist()):
            means[name] = float(f"{mean:.6g}")
        lr = self.optimizers[0].param_groups[0]["lr"]
        self.log.append({"epoch": epoch, "lr": lr, **means, **self.of_epoch,
                         "seconds": round(seconds, 3)})
        self.bar.set_postfix(epoch=epoch, **means)

        # Kept: the parts, among them the optimizers with their momentum, the log, and what all of
        # it depends on. No state of a random generator: an epoch's chance comes from its number.
        if self.path is not None:
            state = {name: part.state_dict() for name, part in self.parts.items()}
            with data.written_aside(self.path) as aside:
                torch.save(state | {"log": self.log, "facts": self.facts}, aside)
            data.save_csv(self.path.with_name("log.csv"), self.log)

    def _go_on(self):
        advice = f"to begin anew, remove {self.path}"
        try:
            saved = read_as_data(self.path)
            data.check_unchanged(self.path, saved["facts"], self.facts, advice)
            for name, part in self.parts.items():
                part.load_state_dict(saved[name])
            self.log = saved["log"]
        except data.Changed:
            raise
        except (RuntimeError, LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{self.path}, which keeps the finished epochs, is damaged; "
                             f"{advice}") from error
        # A process may have died between the two.
        data.save_csv(self.path.with_name("log.csv"), self.log)
        print(f"{self.title.strip()}: going on after epoch {len(self.log)}", flush=True)


# -------------------------------------------------------------------- settings and their options

def at_least(least):
    """An argparse type: whole numbers from `least` on."""
    def whole_number(text):
        value = int(text)
        if not least <= value < 2 ** 31:
            raise argparse.ArgumentTypeError(f"must be at least {least} and below 2^31, not {text}")
        return value
    whole_number.__name__ = "whole number"
    return whole_number


def number(least, most=math.inf, open_=False):
    """An argparse type: finite numbers from `least` to `most`; open_: without `least` itself."""
    def real_number(text):
        value = float(text)
        if not least <= value <= most or value == math.inf or (open_ and value == least):
            wanted = f"above {least}" if open_ else f"from {least} on"
            raise argparse.ArgumentTypeError(f"must be {wanted} and at most {most}, not {text}")
        return value
    real_number.__name__ = "number"
    return real_number


class Setting(NamedTuple):
    """A setting of a run: saved with it and, where it is off its default, in its folder's name.

    of: which runs have it, see `has`. default: its value, or ROW. kind: the option's argparse
    type, a tuple of choices, bool for a switch; None for "start", which no option sets.
    """
    of: str
    default: object
    kind: object = None
    help: str = ""
    metavar: str = None


ROW = "the cell's value in assets/settings.csv"
SETTINGS = {
    "classes": Setting("task", "base", ("base", "all"),
                       "learn on the first half of the classes, the others being novel; or on all"),
    "shots": Setting("task", 16, at_least(1), "training images a class; Stage I has K x classes / "
                     "32 steps an epoch", "K"),
    "clip": Setting("clip", "ViT-B/16", str, f"one of {', '.join(clip.available_models())}, toy; "
                    "open_clip:ARCHITECTURE:TAG_OR_FILE, hf-hub:OWNER/NAME; OpenAI's file, "
                    "or a state dict of theirs; a folder of HuggingFace's CLIPModel (for the toy "
                    "world the toy CLIP; in eval.py the run's own)", "NAME"),
    "dtype": Setting("clip", "default", ("float32", "float16", "bfloat16"),
                     "of the frozen CLIP; by default float16 on CUDA and float32 elsewhere"),

    "anchor_length": Setting("anchor", 1, at_least(1), "N anchor tokens, Tab. 7", "N"),
    "preposition": Setting("anchor", "of", str, "of, with, at, sun, sea, any word, or none: Tabs. "
                           "6 and S2", "WORD"),
    "descriptions": Setting("anchor", "default", str, "JSON, class -> list of sentences; by "
                            "default the file in assets/descriptions/", "FILE"),
    "max_descriptions": Setting("anchor", ROW, at_least(1), "use the first D sentences of each "
                                "class", "D"),
    "anchor_epochs": Setting("stage I", ROW, at_least(0), "epochs of Stage I", "E"),
    "anchor_lr": Setting("anchor", ROW, number(0, open_=True), "learning rate of Stage I", "LR"),
    "anchor_weight": Setting("anchor", ROW, number(0), "factor before Eq. 5", "WEIGHT"),

    "one_stage": Setting("anchoropt", False, bool, "learn anchor and prompt in turns, step by "
                         "step, without distillation: Sec. 3.2.4, Tab. 3"),
    "anchor": Setting("stage II", "learnt", str, "use this anchor for all seeds, an anchor.pt or "
                      "the authors' .pth.tar; by default Stage I learns it", "FILE"),
    "soft_tokens": Setting("prompt", ROW, at_least(1), "how many soft tokens", "M"),
    "start_words": Setting("start", ROW),
    "attributes": Setting("atprompt", ROW, str, "atprompt: its words, in the paper 1 to 3", "WORD"),
    "arrangement": Setting("anchoropt", "adaptive", ("adaptive", "before", "middle", "after-class"),
                           "learn W; or fix the anchors before the soft tokens, in their middle, "
                           "or after the class name: Tab. 8"),
    "tau": Setting("W", 1.0, number(0, open_=True), "temperature of W's soft assignment, Eq. 7, "
                   "Tab. S3", "TAU"),
    "test_position": Setting("W", "argmax", ("argmax", "sample"), "sample: draw W anew for each "
                             "test batch, as the released code does"),
    "soft_W": Setting("W", False, bool, "multiply by the soft W in training, Eq. 9 as printed"),
    "draw": Setting("W", "step", ("step", "once"), "once: draw W's noise once, before the loop, as "
                    "Algorithm 1 shows it"),
    "ensemble": Setting("anchoropt", "logits", ("logits", "probabilities"), "what the ensemble "
                        "averages: Algorithm 1's l, or S3.1's q"),
    "feature_at": Setting("anchoropt", "eot", ("eot", "released"), "released: read the normal "
                          "prompt's feature N positions early, as the released code does"),
    "depth": Setting("maple", ROW, at_least(1), "maple: blocks that get soft tokens, 1 = shallow",
                     "BLOCKS"),
    "w_cat": Setting("dept", ROW, number(0, 1), "dept: weight of the base-class head", "WEIGHT"),

    "epochs": Setting("prompt", ROW, at_least(0), "length of Stage II", "E"),
    "batch_size": Setting("prompt", ROW, at_least(1), "images a step", "B"),
    "lr": Setting("prompt", ROW, number(0, open_=True), "learning rate of Stage II", "LR"),
    "lambda_1": Setting("prompt", ROW, number(0), "weight of the cross entropy, Eq. 12", "WEIGHT"),
    "lambda_2": Setting("stage II", ROW, number(0), "weight of the distillation, Eq. 12; 0: none, "
                        "Tab. 9", "WEIGHT"),
    "temperature": Setting("stage II", ROW, number(0, 100, open_=True), "temperature of the "
                           "distillation, Eq. 11", "T"),
}
# What an anchor depends on: the runs that agree in these share it.
OF_STAGE_1 = ("anchor_epochs", "anchor_lr", "anchor_weight", "descriptions", "max_descriptions")
ANCHOR_SETTINGS = ("clip", "dtype", "classes", "shots", "anchor_length", "preposition",
                   *OF_STAGE_1)
VARIANTS = ("imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r")
ELEVEN = tuple(name for name in data.DATASETS if name not in (*VARIANTS, "toy"))
CELL = ("baseline", "template", "dataset", "classes")       # what a row of the table is for


def has(cell, of):
    """Does a cell (baseline, template, one_stage) have the settings of this kind?"""
    if of in ("task", "clip") or cell["baseline"] == "clip":
        return of in ("task", "clip")
    anchors = cell["template"] == "anchoropt"
    two_stages = anchors and not cell["one_stage"]
    return {"prompt": True, "anchor": anchors, "anchoropt": anchors, "W": anchors,
            "stage I": two_stages, "stage II": two_stages,
            "start": cell["template"] == "plain" and cell["baseline"] != "dept",
            "atprompt": cell["template"] == "atprompt",
            "maple": cell["baseline"] == "maple", "dept": cell["baseline"] == "dept"}[of]


@functools.cache
def settings_rows():
    """The rows of assets/settings.csv: pairs of dicts, for which cell, and what is set there."""
    rows = []
    with open(os.path.join(data.ASSETS, "settings.csv"), newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            del row["source"]
            cell = {key: row.pop(key) for key in CELL}
            rows.append((cell, {key: plain_value(text) for key, text in row.items() if text}))
    return rows


def plain_value(text):
    """20, 0.002 or true of a table's text; other text as it is."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def default_settings(dataset, baseline, template, classes="base", one_stage=False):
    """The settings of a dataset x baseline x template cell: SETTINGS, and assets/settings.csv.

    classes: "base", or "all" for Tables 2 and 4. Rows of the table apply from top to bottom; `*`
    matches anything and an empty field leaves a setting as it is. Returns a dict of the settings
    that the cell has.
    """
    if baseline == "clip":
        template = "plain"
    cell = {"dataset": dataset, "baseline": baseline, "template": template, "classes": classes,
            "one_stage": one_stage}
    # The rows of the table that are for this cell, each over those above it.
    row = {}
    for matches, values in settings_rows():
        if all(matches[key] in ("*", cell[key]) for key in CELL):
            row |= values
    # What the cell has, from its rows or as all have it.
    settings = {key: cell[key] for key in ("dataset", "baseline", "template")}
    for key, setting in SETTINGS.items():
        if has(cell, setting.of):
            settings[key] = row.get(key) if setting.default is ROW else setting.default
            if settings[key] is None:
                raise ValueError(f"assets/settings.csv has no {key} for {cell}")
    settings["classes"] = classes
    if "one_stage" in settings:
        settings["one_stage"] = one_stage
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
    one_stage = bool(getattr(args, "one_stage", None))
    defaults = default_settings(dataset, baseline, template, args.classes or "base", one_stage)
    settings = dict(defaults)
    given = {key: value for key in SETTINGS if (value := getattr(args, key, None)) is not None}
    for key, value in given.items():
        option = option_of(key)
        if key not in defaults:
            with_one = " with --one-stage" if one_stage and key != "one_stage" else ""
            raise ValueError(f"{option} has no meaning for {cell_name(defaults)}{with_one}")
        if key in ("descriptions", "anchor") and not os.path.isfile(value):
            raise FileNotFoundError(f"{option} {value} does not exist")
        if key in ("clip", "descriptions", "anchor"):
            value = clip_identity(value)                    # a name by content: files move
        settings[key] = value

    # Options that another one has made meaningless.
    senseless = []
    if settings.get("arrangement", "adaptive") != "adaptive":           # no W is learnt
        senseless += [(key, "--arrangement") for key in SETTINGS if SETTINGS[key].of == "W"]
    if "anchor" in given:                                               # it is learnt already
        senseless += [(key, "--anchor") for key in OF_STAGE_1]
    if settings.get("epochs", 2) < 2:               # the schedule's first epoch runs at 1e-5
        senseless += [("lr", f"{settings['epochs']} epochs")]
    if settings.get("anchor_epochs", 2) < 2:
        senseless += [("anchor_lr", f"{settings['anchor_epochs']} anchor epochs")]
    for key, other in senseless:
        if key in given:
            raise ValueError(f"{option_of(key)} has no meaning with {other}")

    # Two other experiments, with rows of their own: their names always say so.
    usual = defaults | {"classes": "base"} | ({"one_stage": False} if one_stage else {})
    return settings, {key: value for key, value in settings.items() if value != usual[key]}


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
    args: argparse.Namespace        # the machine: output, device, workers, class_chunk, ...

    @property
    def folder(self):
        """output/<dataset>/<baseline>-<template>[,changed settings]/seed<k>, where it lives."""
        return data.run_folder(self, cell_name(self.settings), self.changed)

    @property
    def anchor_folder(self):
        """output/<dataset>/anchor[,changed settings]/seed<k>: shared where these are equal."""
        changed = {key: self.changed[key] for key in ANCHOR_SETTINGS if key in self.changed}
        return data.run_folder(self, "anchor", changed)


# -------------------------------------------------------------------- CLIP

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_clip_for(settings, args):
    """The CLIP of a run: settings say what it is, --clip where it lies, --device where it goes."""
    if settings["clip"] == "toy":
        # Its layers are so small that a second thread costs more than it brings.
        torch.set_num_threads(1)
    return load_clip(args.clip or settings["clip"], args.device, DTYPES.get(settings["dtype"]))


def frozen_tower(clip_model, settings, images, cache):
    """f_I as `data.epoch_features` takes it: encode, and the `KeptFeatures` in `cache`, or None."""
    preprocess, device = preprocess_of(clip_model), clip_model.logit_scale.device

    def encode(crops):
        return encode_image(clip_model, data.normalize(crops, preprocess, device))
    kept = None
    if cache:
        # The precision as it is, too: "default" is another one on a GPU.
        what = [settings["clip"], settings["dtype"], str(clip_model.dtype), repr(preprocess)]
        kept = data.KeptFeatures(cache, what, images)
    return encode, kept


# -------------------------------------------------------------------- options and errors

def default_device():
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


# The options that are no settings: which runs, where, and on what machine. Name -> argparse's
# arguments, by what needs them.
OPTIONS = {
    "run": {
        "dataset": dict(default="toy", metavar="NAME",
                        help=f"one of {', '.join(ELEVEN)}, toy; the folder of a dataset of your "
                             f"own; or, to test on alone, {', '.join(VARIANTS)}"),
        "root": dict(metavar="DIR", help="folder that holds the datasets; by default the "
                                         "environment's DATA, else ./data"),
        "seeds": dict(type=at_least(0), nargs="+", default=[1], metavar="K",
                      help="of few-shot picks, start values and order: a run each"),
        "output": dict(default="output", metavar="DIR", help="folder that runs are written to"),
        "overwrite": dict(action="store_true",
                          help="begin anew, and remove the old results; by default what is "
                               "finished is skipped, and what is begun goes on")},
    "machine": {
        "device": dict(default=default_device(), help="cpu, cuda, cuda:1, mps"),
        "class-chunk": dict(type=at_least(0), default=0, metavar="C",
                            help="encode this many classes at a time, to save memory; 0: all")},
    "images": {
        "workers": dict(type=at_least(0), metavar="N",
                        default=min(8, os.cpu_count() or 1) if torch.cuda.is_available() else 0,
                        help="processes that load images"),
        "test-batch": dict(type=at_least(1), metavar="B",
                           help="test images at a time for cocoop, maple and --test-position "
                                "sample; by default 100, maple 200"),
        "feature-cache": dict(metavar="DIR",
                              help="a folder that keeps the frozen CLIP's image features: what is "
                                   "there is read, what is not is written")}}


class Parser(argparse.ArgumentParser):
    """argparse, with an error in one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help lists the options)\n")


def make_parser(script, description, kinds, groups):
    """A script's options: of the settings of these kinds, and of these groups of OPTIONS."""
    # First the options that are no settings, then one group of settings after the other.
    parser = Parser(script, description=description,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for group in (*groups, "machine"):
        for name, how in OPTIONS[group].items():
            default = how.get("default")
            shown = f" (default: {default})" if default not in (None, [1]) else ""
            parser.add_argument(f"--{name}", **how | {"help": how["help"] + shown})
    for kind in kinds:
        options = parser.add_argument_group(f"settings: {kind}")
        for name, setting in SETTINGS.items():
            if setting.of != kind:
                continue
            how = {"help": f"{setting.help} (default: {setting.default})"}
            if setting.kind is bool:
                how |= {"action": "store_true", "default": None}
            elif isinstance(setting.kind, tuple):
                how["choices"] = setting.kind
            else:
                how |= {"type": setting.kind, "metavar": setting.metavar}
            if name == "attributes":
                how["nargs"] = "+"
            options.add_argument(option_of(name), **how)
    return parser


def run_script(name, run, args):
    """Runs a script's body; what a user can mend ends in one line. Returns the exit code."""
    for stream in (sys.stdout, sys.stderr):         # no terminal's alphabet stops a run
        if hasattr(stream, "reconfigure"):
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
        message = str(error)
        if isinstance(error, OSError) and error.filename is not None:       # not in our words yet
            message = f"{error.filename}: {error.strerror}"
        complain(name, message)
    except (RuntimeError, MemoryError) as error:
        message = str(error) or type(error).__name__
        if "DataLoader worker" in message:
            complain(name, f"{message.splitlines()[-1]}; set --workers 0, or give the container "
                           "more shared memory (docker run --shm-size)")
        elif re.search("(out of|allocate|enough) memory|MemoryError|ALLOC_FAILED", message):
            complain(name, f"out of memory ({message.splitlines()[0][:100]}); lower --batch-size, "
                           "--test-batch, or set --class-chunk 100")
        else:
            raise
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
    message = printable(message)
    if len(message) > 1200:
        message = f"{message[:1200]} ..."
    tqdm.write(f"{name}: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
