"""Evaluation: the inference rule, accuracy and harmonic mean, learnt prompts elsewhere, tables.

    python eval.py output/                              all runs found there, without training
    python eval.py output/ --table 1                    the runs as a table of the paper
    python eval.py output/ --figure 4                   the learnt position matrices
    python eval.py RUN --dataset caltech101 dtd         a learnt prompt on other datasets
    python eval.py RUN --images PICTURE ...             a learnt prompt on pictures of your own

RUN is a folder that stage2.py wrote, such as output/toy/coop-anchoropt/seed1, or its prompt.pt.

Sec. 3.2.2, Inference: the normal prompt answers for known base classes, the ensemble of normal and
anchor prompt for unknown novel ones. The readings of Table S1: anchor, normal, ensemble, and final
(what the rule picks). `eval` is also a builtin: import this module as `import eval as evaluation`.
"""

import stage1                       # first of the modules that need clip: it says what is missing

import argparse
import csv
import functools
import itertools
import json
import os
import pathlib
import shlex
import statistics
import sys

import torch
from tqdm import tqdm

import data
import losses
from anchor import anchor_features
from position import plot_position_matrix
from prompts import build_learner, clip_identity, preprocess_of, read_as_data, sha256, unit
from stage1 import ELEVEN, VARIANTS, default_settings, plain_value, say


# ---------------------------------------------------------------------------- the inference rule

def accuracy(logits, labels):
    """Top-1 accuracy in percent. logits (n, C), labels (n,)."""
    return 100.0 * int((logits.argmax(-1) == labels).sum()) / len(labels)


def harmonic_mean(base, novel):
    """HM = 2 base novel / (base + novel), percent in and out; 0 where both are 0."""
    if base + novel == 0:
        return 0.0
    return 2 * base * novel / (base + novel)


def infer(learner, f, x=None, f_anc=None, known=True):
    """The four readings of Table S1 for one batch: dict reading -> logits (B, C).

    learner: in eval mode, bound to the C classes. f (B, d): the frozen CLIP's image features, not
    normalised. x (B, 3, R, R): the images, where `learner.needs_images`. f_anc (C, d): unit
    features of the anchor prompts, or None where there is no anchor: then only normal and final
    come back. known: classes that were learnt on (final = normal) or not (final = ensemble).
    """
    l_norm = learner(f, x)                                          # logits of q_norm
    if f_anc is None:
        return {"normal": l_norm, "final": l_norm}
    l_anc = learner.logits(f, f_anc)                                # of q_anc
    l_ens = losses.ensemble_logits(l_norm, l_anc, learner.ensemble)         # of q_ens
    final = l_norm if known else l_ens                              # the rule of Sec. 3.2.2
    return {"anchor": l_anc, "normal": l_norm, "ensemble": l_ens, "final": final}


@torch.no_grad()
def evaluate(learner, batches, f_anc=None, known=True):
    """Accuracy of the four readings: dict reading -> percent.

    batches: of f (B, d), x (B, 3, R, R) or None, y (B,); see `infer` for these and the rest.
    Raises ValueError for logits that are not finite.
    """
    training = learner.training
    learner.eval()                          # so W is the arg-max (unless test_position is sample)
    parts = {}                              # reading -> logits (B, C) of each batch
    labels = []
    for f, x, y in batches:
        for reading, logits in infer(learner, f, x, f_anc, known).items():
            parts.setdefault(reading, []).append(logits)
        labels.append(y)
    learner.train(training)

    # Accuracy over all images at once: a mean of batches would weigh the last one too much.
    scores = {}
    for reading, of_batches in parts.items():
        logits = torch.cat(of_batches)                              # (n, C)
        check_finite(logits, learner.class_names)
        scores[reading] = accuracy(logits, torch.cat(labels))
    return scores


def check_finite(logits, class_names):
    """Raises ValueError for logits (n, C) that are not finite: arg-max takes NaN for an answer."""
    bad = ~logits.isfinite()
    if bad.any():
        first = class_names[bad.any(0).int().argmax()]
        raise ValueError(f"the logits of {int(bad.any(1).sum())} of {len(logits)} images are not "
                         f"finite, the first of class {first!r}: try --dtype float32")


def anchor_prompts(learner, settings):
    """f_T(t_anc) of the classes that a learner is bound to: unit (C, d); None without an anchor."""
    if settings["template"] != "anchoropt":
        return None
    return anchor_features(learner.clip_model, learner.class_names, learner.template.anchor_tokens,
                           settings["preposition"])


def evaluate_items(run, learner, items, known):
    """`evaluate` on image files. run: a `stage1.Run`; items: of `data.Item`, labels as learnt."""
    # Whatever the anchor was learnt on: its tokens stand before any class name, Eq. 4.
    f_anc = anchor_prompts(learner, run.settings)
    return evaluate(learner, test_batches(run, learner, items, f_anc), f_anc, known)


def test_batches(run, learner, items, f_anc):
    """The test images in batches of f, x, y, see `evaluate`."""
    clip_model = learner.clip_model
    args = run.args
    # All at once; in batches where memory asks for it, or where a W that is sampled is drawn anew
    # for each.
    batch_size = len(items)
    if learner.needs_images:
        batch_size = 200
    elif learner.prompts_per_image or run.settings.get("test_position") == "sample":
        batch_size = 100

    # f of the frozen tower, for all methods that read it; crops for MaPLe, which prompts the tower.
    device = clip_model.logit_scale.device
    f = x = itertools.repeat(None)
    if f_anc is not None or not learner.needs_images:
        f = frozen_features(clip_model, run.settings["clip"], tuple(items), args.feature_cache,
                            args.workers).split(batch_size)
    if learner.needs_images:
        preprocess = preprocess_of(clip_model)
        images = data.Images(items, data.test_transform(preprocess))
        crops = data.loader(images, batch_size=batch_size, workers=args.workers)
        x = (data.normalize(crop, preprocess, device) for crop, _ in crops)
    y = torch.tensor([item.label for item in items], device=device).split(batch_size)
    yield from tqdm(zip(f, x, y), "testing", len(y), leave=False, disable=None)


@functools.cache                            # once for all seeds and runs of a process
def frozen_features(clip_model, name, items, folder, workers):
    """f_I of test images by the frozen CLIP: (n, d) float32. name: the CLIP's, of the settings.

    folder: where `--feature-cache` keeps them, or None.
    """
    images = data.Images(items, data.test_transform(preprocess_of(clip_model)))
    kept = stage1.kept_features(clip_model, name, images, folder)
    encode = stage1.frozen_tower(clip_model)
    f, _ = next(data.epoch_features(images, [0], encode, kept, workers=workers))
    return f.to(clip_model.logit_scale.device)


# ---------------------------------------------------------------------------- learnt prompts

def load_prompt(path):
    """Reads a prompt.pt: dict with `state` (learnt tensors), `settings`, `class_names`, `seed`.

    And `digest`, of the file. Raises FileNotFoundError, or ValueError for a file that is damaged or
    something else.
    """
    # First: if the prompt is learnt anew meanwhile, its evaluation is stale, and not wrong.
    digest = sha256(path)[:8]
    try:
        saved = read_as_data(path) | {"digest": digest}
        return {key: saved[key] for key in ("state", "settings", "class_names", "seed", "digest")}
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is damaged, or no prompt.pt of stage2.py; where a run wrote it: "
                         "train it again with --overwrite") from error


def load_learner(saved, clip_model):
    """The learner of a prompt.pt, on the classes that it was learnt on, in eval mode.

    saved: from `load_prompt`. clip_model: the CLIP it was learnt with, see `load_clip_of`.
    """
    # A fresh learner of the same settings, then its learnt values.
    anchor_tokens = saved["state"].get("template.anchor_tokens")
    learner = build_learner(saved["settings"], clip_model, saved["class_names"], anchor_tokens)
    learner.load_state_dict(saved["state"])
    return learner.eval()


def load_clip_of(path, settings, args):
    """The CLIP that a prompt was learnt with, in its own precision if --dtype names no other.

    args: with clip, device, dtype. Raises ValueError where --clip is another one.
    """
    if args.clip and clip_identity(args.clip) != settings["clip"]:
        raise ValueError(f"{path} was trained with CLIP {settings['clip']}, and --clip is another")
    return stage1.load_clip_for(settings | {"dtype": args.dtype or settings["dtype"]}, args)


def files_under(paths, name):
    """The files of this name under `paths`; a file that is named is taken itself.

    Raises FileNotFoundError for a path without one.
    """
    found = []
    for path in map(pathlib.Path, paths):
        files = [path] if path.is_file() else sorted(path.rglob(name))
        if not files:
            raise FileNotFoundError(f"no {name} in {path}: give what stage2.py wrote, such as "
                                    "output/toy/coop-anchoropt/seed1")
        found += files
    return found


class Classifier:
    """A learnt prompt, ready for pictures: `load_run(folder)` makes one.

    learner: in eval mode. settings: of its run. learnt_on: the classes that it was learnt on.
    `class_names`: the C classes that it is bound to now. `known`: are they all among those? Then
    the normal prompt answers, else the ensemble (Sec. 3.2.2).
    """

    def __init__(self, learner, settings, learnt_on):
        self.learner = learner
        self.settings = settings
        self.learnt_on = learnt_on
        self.preprocess = preprocess_of(learner.clip_model)
        self.transform = data.test_transform(self.preprocess)
        self.encode = stage1.frozen_tower(learner.clip_model)
        self.set_classes(learnt_on)

    @torch.no_grad()
    def set_classes(self, class_names):
        """Binds it to any class names: C strings, read as folders' names are (`data.read_name`).

        Raises ValueError for what CLIP cannot read.
        """
        names = []
        for name in class_names:
            # The names of the field's own datasets are known as they are.
            names.append(name if name in self.learnt_on else data.read_name(name))
        # What was learnt stays as it is, and the class tokens after it are exchanged.
        self.learner.set_classes(names)
        self.class_names = names
        self.known = set(names) <= set(self.learnt_on)
        self.f_anc = anchor_prompts(self.learner, self.settings)
        return self

    def crop(self, picture):
        """A picture's file as CLIP reads it: (3, R, R), uint8. Raises data.BadImage."""
        return self.transform(data.load_image(picture, upright=True))

    def probabilities(self, pictures, batch_size=100):
        """q(c | x), Eq. 1, by the inference rule: (n, C), for n paths. Raises data.BadImage."""
        q = []
        for start in range(0, len(pictures), batch_size):
            batch = pictures[start:start + batch_size]
            q.append(self.answer([self.crop(picture) for picture in batch]))
        return torch.cat(q)

    @torch.no_grad()
    def answer(self, crops):
        """`probabilities` of B crops: (B, C). Raises ValueError for logits that are not finite."""
        crops = torch.stack(crops)                                              # (B, 3, R, R)
        f = self.encode(crops).float()                                          # (B, d)
        x = data.normalize(crops, self.preprocess, f.device)
        logits = infer(self.learner, f, x, self.f_anc, self.known)["final"]
        check_finite(logits, self.class_names)
        return logits.softmax(-1)

    @torch.no_grad()
    def text_features(self):
        """Unit text features of the classes, float32: normal (C, d), anchor (C, d) or None.

        CoCoOp has none: its normal prompt is another for every image.
        """
        return unit(self.learner.text_features()), self.f_anc


def load_run(run, clip=None, device=None, dtype=None):
    """The `Classifier` of a run of stage2.py, on the classes that it was learnt on, ready for use.

    run: its folder or its prompt.pt. clip: the file of its CLIP, where it was none with a name.
    dtype: as the option. Raises FileNotFoundError and ValueError in one line.
    """
    files = files_under(run if isinstance(run, list) else [run], "prompt.pt")
    if len(files) > 1:
        raise ValueError(f"{len(files)} runs are there: name one, such as {files[0].parent}")
    saved = load_prompt(files[0])
    args = argparse.Namespace(clip=clip, dtype=dtype, device=device or stage1.default_device())
    clip_model = load_clip_of(files[0], saved["settings"], args)
    learner = load_learner(saved, clip_model)
    return Classifier(learner, saved["settings"], saved["class_names"])


# ---------------------------------------------------------------------------- pictures

def classify_pictures(args):
    """`python eval.py RUN --images ...`: the top classes of each picture, with probabilities.

    A picture that cannot be read is named, and the others are answered. Returns the exit code.
    """
    # The pictures, the run, the classes to choose from.
    pictures = []
    for path in args.images:
        pictures += data.image_files(path, deep=True) if os.path.isdir(path) else [path]
    classifier = load_run(args.paths, args.clip, args.device, args.dtype)
    if args.classes_from:
        classifier.set_classes(data.read_lines(args.classes_from))
    print_names(classifier.class_names)
    print(f"learnt on all of them: {classifier.known}")                      # Sec. 3.2.2

    # Batch by batch: what is answered is printed, whatever comes after it.
    rows = []
    code = 0
    for start in range(0, len(pictures), 100):
        crops = {}
        for picture in pictures[start:start + 100]:
            # Not training data: one that is broken is said, and takes no other with it.
            try:
                crops[picture] = classifier.crop(picture)
            except data.BadImage as error:
                stage1.complain("eval.py", error)
                code = 1
        q = classifier.answer(list(crops.values())) if crops else []
        for picture, of_picture in zip(crops, q):
            best = []
            for i in of_picture.argsort(descending=True)[:args.top]:
                name = classifier.class_names[i]
                p = of_picture[i].item()
                best.append(f"{name} {p:.1%}")
                rows.append({"image": picture, "rank": len(best), "class": name,
                             "probability": f"{p:.6f}"})
            say(f"{picture}: {', '.join(best)}")
    if args.csv and rows:
        data.save_csv(args.csv, rows)
    return code


def print_names(names):
    """What CLIP reads: folders' names are turned into it."""
    say(f"{len(names)} classes, read as: {', '.join(names[:8])}{', ...' if names[8:] else ''}")


# ---------------------------------------------------------------------------- other datasets

def evaluate_runs(args):
    """`python eval.py RUN ... --dataset NAME ...`: every run on every dataset, and a table."""
    datasets = [data.load_dataset(name, args.root) for name in args.dataset]
    results = []
    clips = {}
    for file in files_under(args.paths, "prompt.pt"):
        saved = load_prompt(file)
        settings = saved["settings"]
        for dataset in datasets:
            done = file.with_name(f"eval-{dataset.name}.json")
            facts = data.digests(dataset, data.few_shot_task(dataset, "all"))
            del facts["training images"]                # of the target: nothing is learnt on it
            if done.exists() and not args.overwrite:
                result = read_result(done)
                data.check_unchanged(done, result | result["facts"],
                                     facts | {"prompt": saved["digest"]},
                                     "to make it again: --overwrite")
                say(f"finished already: {done} (--overwrite to make it again)")
            else:
                # Only what is not finished needs a CLIP, and runs share it.
                key = settings["clip"], settings["dtype"]
                if key not in clips:
                    clips[key] = load_clip_of(file, settings, args)
                result = evaluate_run(file, saved, dataset, clips[key], args)
                data.save_json(done, result | {"facts": facts})
            results.append(read_result(done))
    print_results(results)


def evaluate_run(file, saved, dataset, clip_model, args):
    """A learnt prompt and its anchor on all classes of a dataset, as results.json says it.

    The inference rule: final is the normal prompt where it has learnt on all these classes, as
    after --classes all on ImageNet in its variants, and else the ensemble. file, saved: see
    `load_prompt`.
    """
    settings = saved["settings"]
    # What was noted of the run holds of its evaluations.
    notes = dataset.notes
    if file.with_name("results.json").exists():
        notes = read_result(file.with_name("results.json"))["notes"] + notes
    if settings["classes"] == "base":
        notes = [*notes, "a run of --classes base, and Tables 2 and 4 are of --classes all"]

    # Secs. 4.3, 4.4: the source's soft tokens, W and anchor, bound to the target's classes.
    learner = load_learner(saved, clip_model)
    learner.set_classes(dataset.class_names)
    known = set(dataset.class_names) <= set(saved["class_names"])           # Sec. 3.2.2
    torch.manual_seed(saved["seed"])            # of W, with --test-position sample
    run = stage1.Run(settings, {}, saved["seed"], args)
    scores = evaluate_items(run, learner, dataset.test, known)
    return {"dataset": dataset.name, "settings": settings, "seed": saved["seed"],
            "prompt": saved["digest"], "base": scores, "novel": None, "notes": notes}


# ---------------------------------------------------------------------------- results of runs

def read_result(path):
    """A results.json of stage2.py or an eval-*.json, with `run` and `folder`, else ValueError.

    `dataset` is what it was tested on; base and novel are a dict reading -> percent each, or novel
    is None: then base is of all classes.
    """
    # We wrote it whole: what does not read is damaged.
    path = pathlib.Path(path)
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        for key in ("dataset", "seed", "settings", "facts", "novel", "notes", "prompt"):
            result[key]
        result["base"]["final"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is damaged, or not of this project; make it again with "
                         "--overwrite, or move it elsewhere") from error
    return result | {"run": path.resolve().parent.parent.name, "folder": path.parent}


def load_results(paths, transfers=False):
    """All results.json under these folders; transfers: and eval-*.json of other datasets."""
    results = [read_result(file) for file in files_under(paths, "results.json")]
    if not transfers:
        return results
    for run in list(results):
        for file in run["folder"].glob("eval-*.json"):
            result = read_result(file)
            # Not of a prompt that was learnt anew since, nor of the run's own dataset.
            if result["prompt"] == run["prompt"] and result["dataset"] != run["dataset"]:
                results.append(result)
    return results


def run_key(result):
    """What the seeds of one run share: their folder, and data that are the same but for the picks.

    Seeds of other classes or test images never meet in a mean.
    """
    facts = result["facts"]
    return (result["dataset"], result["run"], str(result["folder"].resolve().parent),
            facts["class names"], facts["test images"])


def figures(result, reading):
    """measure -> percent, of one reading: base and novel; accuracy where nothing is novel."""
    if result["novel"] is None:
        return {"accuracy": result["base"][reading]}
    return {"base": result["base"][reading], "novel": result["novel"][reading]}


def average(several):
    """The mean of several dicts measure -> percent. HM is that of the means, as in the paper."""
    means = {}
    for measure in several[0]:
        means[measure] = statistics.fmean(each[measure] for each in several)
    # Base 81.24 and novel 76.27 give the paper's 78.68; the mean of its eleven HMs is another.
    if "novel" in means:
        means["HM"] = harmonic_mean(means["base"], means["novel"])
    return means


def listed_seeds(seeds):
    return "seed " + ", ".join(str(seed["seed"]) for seed in seeds)


TOY_WARNING = ("These are figures of the toy world: they check the machinery and are no evidence "
               "for or against the paper's claims.")


def print_results(results):
    """Table S1's rows for every run: the mean and, for several seeds, the deviation over them."""
    for (dataset, run, *_), seeds in data.group_by(run_key, results).items():
        # A line a reading, a column a measure.
        records = []
        for reading in seeds[0]["base"]:
            each = [average([figures(seed, reading)]) for seed in seeds]
            record = {"prompt": reading}
            for measure, mean in average(each).items():
                record[measure] = f"{mean:.2f}"
                if len(seeds) > 1:
                    record[measure] += f" ± {statistics.stdev(one[measure] for one in each):.2f}"
            records.append(record)
        print(f"\n{dataset}, {run}, {listed_seeds(seeds)}\n")
        print_markdown(records)
    print_notes(results)


def print_markdown(records):
    """Dicts of str with the same keys as a table, "-" for nothing."""
    rows = [list(records[0])]
    for record in records:
        rows.append([cell or "-" for cell in record.values()])
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        print(f"| {' | '.join(cells)} |")


def print_notes(results, notes=()):
    """What a reader of the figures must know: the results' notes and others, each once."""
    notes = [note for note in notes if note]
    for result in results:
        notes += result["notes"]
        if "toy" in (result["dataset"], result["settings"]["dataset"]):
            notes.append(TOY_WARNING)
    if notes:
        print("\nNotes\n")
    for note in dict.fromkeys(notes):
        say(f"- {note}")


def draw_figure4(results, path):
    """Fig. 4: the learnt W (without noise) of every run, of its first seed, side by side."""
    panels = {}
    n_anchor = {}
    for (dataset, run, *_), seeds in data.group_by(run_key, results).items():
        if seeds[0]["position_matrix"]:
            # Without noise: what is tested, unless --test-position is sample.
            title = f"{dataset}, {run.replace(',', ', ')}"
            panels[title] = seeds[0]["position_matrix"]["end"]
            n_anchor[title] = seeds[0]["settings"]["anchor_length"]
    if not panels:
        raise ValueError("no run with a learnt position matrix here; make one: python stage2.py")
    with data.written_aside(path) as aside:
        plot_position_matrix(panels, aside, n_anchor)
    print(f"saved to {path}")


# ---------------------------------------------------------------------------- the paper's tables

# The datasets that have a cell in each row of a table.
TABLES = {
    "1": ELEVEN,                                # base to novel classes
    "2": ELEVEN,                                # from ImageNet to the ten others
    "3": ELEVEN,                                # one stage and two
    "4": ("imagenet", *VARIANTS),               # from ImageNet to its variants
    "5": ELEVEN,                                # the normal prompt alone
    "6": ("imagenet",),                         # prepositions
    "7": ("imagenet",),                         # anchor length N
    "8": ("imagenet",),                         # where the anchor stands
    "9": ("imagenet",),                         # distillation
    "S1": ELEVEN,                               # each prompt of CoOp + AnchorOPT
    "S2": ("imagenet",),                        # prepositions, and none
    "S3": ("imagenet",)}                        # temperature of Eq. 7
# Where prompts were learnt that are tested elsewhere.
SOURCE = {"2": "imagenet", "4": "imagenet"}
# A cell takes runs whatever these are, and says so.
MACHINE = {"clip", "dtype", "descriptions", "anchor"}


def read_rows(name, number):
    """A table's rows (dicts of str) in assets/: in paper_tables.csv the printed ones."""
    with open(os.path.join(data.ASSETS, name), newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["table"] == number]


def given_by(row):
    """The setting that a row of a table is about: a dict, {} where it has none."""
    if not row["changed"]:
        return {}
    key, _, text = row["changed"].partition("=")
    return {key: plain_value(text)}


def differences(result, wanted):
    """A run's settings that are not the wanted ones: a dict. (A run may have fewer of them.)"""
    return {key: value for key, value in result["settings"].items() if value != wanted.get(key)}


def collect(number, results, output):
    """Our side of a table: dict (block, method) -> percentages, and what they are the mean of.

    Also the results in it, notes, and the commands that fill the empty cells. results: as
    `load_results` gives them. Raises ValueError where two runs fit a cell.
    """
    source = SOURCE.get(number)
    ours = {}
    used = []
    notes = []
    missing = []
    for row in read_rows("table_rows.csv", number):
        label = row["label"]
        given = given_by(row)
        for dataset in (*TABLES[number], "toy"):
            # Tables 2 and 4: learnt on the source, tested here. Elsewhere both are one dataset.
            wanted = default_settings(source or dataset, row["baseline"], row["template"],
                                      given) | given
            # The seeds of one run; with another CLIP, say, they are in, and the cell says so.
            fits = [result for result in results if result["dataset"] == dataset
                    and differences(result, wanted).keys() <= MACHINE]
            found = data.group_by(run_key, fits)
            if len(found) > 1:
                raise ValueError(f"{label} on {dataset} fits {[key[2] for key in found]}: name the "
                                 "one that is meant, not the folder of all")
            for seeds in found.values():
                used += seeds
                notes.append(row["note"])
                values = average([figures(seed, row["reading"]) for seed in seeds])
                runs = listed_seeds(seeds)
                for key, value in differences(seeds[0], wanted).items():
                    runs += f", {key} {value}"              # in which it is not the paper's
                ours[dataset, label] = values, runs

        # The average is over what is there, without the source, and says of how many.
        targets = [name for name in TABLES[number] if name != source]
        present = [ours[name, label][0] for name in targets if (name, label) in ours]
        if present and len(targets) > 1:
            members = f"{len(present)} of {len(targets)} datasets"
            ours["average", label] = average(present), members
        empty = [name for name in TABLES[number] if (name, label) not in ours]
        if empty:
            missing += commands(row, number, empty, output)
    return ours, used, notes, missing


def commands(row, number, empty, output):
    """The shell's lines that fill a row's cells on the datasets `empty`. $DATA: their folder."""
    source = SOURCE.get(number)
    # What the row is about is an option of the command.
    given = given_by(row)
    words = f"--baseline {row['baseline']} --template {row['template']}"
    for key, value in given.items():
        words += f" {stage1.option_of(key)}"
        if value is not True:
            words += f" {value}"
    words += f" --seeds 1 2 3 --root $DATA --output {shlex.quote(output)}"
    if not source:
        return [f"for d in {' '.join(empty)}; do python stage2.py --dataset $d {words}; done"]

    # Two commands: learn on the source, and test elsewhere what was learnt. Both skip what is done.
    run = os.path.join(output, source, data.folder_name(stage1.cell_name(row), given))
    targets = " ".join(name for name in empty if name != source)
    return [f"python stage2.py --dataset {source} {words}",
            f"python eval.py {shlex.quote(run)} --dataset {targets} --root $DATA"]


def print_paper_table(args):
    """`python eval.py OUTPUT --table N`: Markdown to stdout, and CSV to --csv FILE."""
    number = args.table
    results = load_results(args.paths, transfers=True)
    ours, used, notes, missing = collect(number, results, args.paths[0])
    notes += [f"fits no cell: {result['run']}" for result in results if result not in used]
    printed = read_rows("paper_tables.csv", number)
    paper = {(row["dataset"], row["method"]): row for row in printed}

    # Side by side, a block a dataset.
    print(f"## Table {number}")
    lines = [side_by_side(key, number, paper, ours) for key in dict.fromkeys((*paper, *ours))]
    for block in data.group_by(lambda line: line["dataset"], lines).values():
        if any(line["runs"] != "no run" for line in block):
            print()
            print_markdown(block)
    print_notes(used, notes)
    if missing:
        print("\nEmpty cells, and what fills them ($DATA: the folder of the datasets)\n")
    for line in dict.fromkeys(missing):
        print(f"    {line}")
    if args.csv:
        data.save_csv(args.csv, lines)


def side_by_side(key, number, paper, ours):
    """A line of a table, as text: each measure ours and the paper's, our runs, its slips."""
    values, runs = ours.get(key, ({}, "no run"))
    printed = paper.get(key, {})
    line = {"dataset": key[0], "method": key[1]}
    for measure in ("accuracy",) if number in SOURCE else ("base", "novel", "HM"):
        line[measure] = f"{values[measure]:.2f}" if values else ""
        line[f"{measure}_paper"] = printed.get(measure.lower(), "")
    return line | {"runs": runs, "note": printed.get("note", "")}


# ---------------------------------------------------------------------------- command line

def parse(argv):
    parser = stage1.make_parser("eval.py", __doc__, ["files", "clip", "machine", "images"])
    parser.add_argument("paths", nargs="+", metavar="RUN",
                        help="a run's folder, or a folder of many, as output/; before the options")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--table", type=str.upper, choices=list(TABLES),
                      help="collect the runs into this table of the paper, beside its figures")
    what.add_argument("--figure", choices=["4"], help="draw the learnt position matrices")
    what.add_argument("--dataset", nargs="+", metavar="NAME",
                      help="evaluate the learnt prompts on all classes of these datasets, named as "
                           "for stage2.py; writes eval-NAME.json into each run")
    what.add_argument("--images", nargs="+", metavar="PATH",
                      help="one RUN: name the likeliest classes of these pictures, or of those in "
                           "a folder")
    parser.add_argument("--csv", metavar="FILE", help="with --table, --images: as CSV, too")
    parser.add_argument("--output", metavar="FILE", default="figure4.png",
                        help="with --figure: the picture to write (default: figure4.png)")
    parser.add_argument("--classes-from", metavar="FILE",
                        help="with --images: a text file of any class names, one a line (default: "
                             "the classes that the run learnt on)")
    parser.add_argument("--top", type=stage1.bounded(int, 1), default=5, metavar="K",
                        help="with --images: how many classes of each picture (default: 5)")
    return parser.parse_args(argv)


def run(args):
    if args.dataset:
        return evaluate_runs(args)
    if args.images:
        return classify_pictures(args)
    if args.table:
        return print_paper_table(args)
    results = load_results(args.paths)
    if args.figure:
        return draw_figure4(results, args.output)
    return print_results(results)


def main(argv=None):
    return stage1.run_script("eval.py", run, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
