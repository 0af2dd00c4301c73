"""Evaluation: the inference rule, accuracy and harmonic mean, other datasets, pictures, and tables.

    python eval.py output/                                     all runs found there, without training
    python eval.py --summary final output/                     a row per run, with standard deviations
    python eval.py --table 1 output/                           the runs as a table of the paper
    python eval.py --figure 4 output/                          the learnt position matrices
    python eval.py RUN --dataset caltech101 dtd --root $DATA   a learnt prompt on other datasets
    python eval.py RUN --images PICTURE ...                    a learnt prompt on pictures of your own
    python eval.py RUN --save-text-features FILE.npz           its text features, for other code

Sec. 3.2.2, Inference: the normal prompt answers for known base classes, the ensemble of normal and anchor
prompt for unknown novel ones. Table S1's four rows are: anchor, normal, ensemble, and final (what the rule
picks). (`eval` is also a builtin: import this module as `import eval as evaluation`.)
"""

import argparse
import csv
import functools
import json
import os
import pathlib
import shlex
import statistics
import sys
from typing import NamedTuple

import torch

import data
import losses
import stage1
from anchor import anchor_features, read_as_data
from position import plot_position_matrix
from prompts import TEMPLATES, build_learner, clip_identity, encode_image, sha256
from stage1 import ELEVEN, VARIANTS, default_settings

READINGS = ("anchor", "normal", "ensemble", "final")


# ---------------------------------------------------------------------------- the inference rule

def accuracy(predictions, labels):
    """Top-1 accuracy in percent. predictions (n,): class indices; labels (n,). ValueError for no images."""
    if len(labels) == 0:
        raise ValueError("accuracy of no images")
    return 100.0 * int((predictions == labels).sum()) / len(labels)


def harmonic_mean(base, novel):
    """HM = 2 base novel / (base + novel), percent in and out; 0 where both are 0."""
    if base + novel == 0:
        return 0.0
    return 2 * base * novel / (base + novel)


def infer(learner, f, x=None, f_anc=None, known=True):
    """The four readings of Table S1 for one batch: dict reading -> logits (B, C).

    learner: in eval mode, bound to the C classes. f (B, d): the frozen CLIP's image features, not
    normalised. x (B, 3, R, R): the images, where `learner.needs_images`. f_anc (C, d): unit features of
    the anchor prompts, or None where there is no anchor (then only normal and final come back).
    known: classes that were learnt on (final = normal) or not (final = ensemble).
    """
    readings = {"normal": learner(f, x)}
    readings["final"] = readings["normal"]
    if f_anc is not None:
        readings["anchor"] = learner.logits(f, f_anc)
        readings["ensemble"] = losses.ensemble_logits(readings["normal"], readings["anchor"])
        if not known:
            readings["final"] = readings["ensemble"]
    return {reading: readings[reading] for reading in READINGS if reading in readings}


@torch.no_grad()
def evaluate(learner, batches, f_anc=None, known=True):
    """Accuracy of the four readings: dict reading -> percent.

    batches: of f (B, d), x (B, 3, R, R) or None, y (B,); see `infer` for these and the rest.
    Raises ValueError for no images.
    """
    training = learner.training
    learner.eval()
    predictions, labels = {}, []
    for f, x, y in batches:
        for reading, logits in infer(learner, f, x, f_anc, known).items():
            predictions.setdefault(reading, []).append(logits.argmax(-1))
        labels.append(y)
    learner.train(training)
    labels = torch.cat(labels) if labels else torch.zeros(0)
    if len(labels) == 0:
        raise ValueError("accuracy of no images")
    return {reading: accuracy(torch.cat(parts), labels) for reading, parts in predictions.items()}


def evaluate_items(learner, settings, items, known, args):
    """`evaluate` on image files. items: of `data.Item`, labels as the learner's classes."""
    f_anc = None
    if settings["template"] == "anchoropt":
        f_anc = anchor_features(learner.clip_model, learner.class_names, learner.template.anchor_tokens,
                                settings["preposition"], args.class_chunk)
    return evaluate(learner, test_batches(learner, settings, items, f_anc, args), f_anc, known)


def test_batches(learner, settings, items, f_anc, args):
    """The test images in batches of f, x, y. Frozen features are computed once for all runs of a process."""
    clip_model, device = learner.clip_model, learner.clip_model.logit_scale.device
    W = learner.template.position_matrix
    sampled = W is not None and W.test_position == "sample"
    batch_size = len(items)                                 # one batch, where nothing depends on it
    if learner.needs_images or learner.prompts_per_image or sampled:
        batch_size = args.test_batch or (200 if learner.needs_images else 100)
    labels = torch.tensor([item.label for item in items], device=device)
    f = None
    if not learner.needs_images or f_anc is not None:
        own = tuple((name, settings[name]) for name in stage1.CLIP_SETTINGS)
        f = frozen_features(clip_model, own, tuple(items), args.feature_cache, args.workers)
    crops = None
    if learner.needs_images:
        images = data.Images(items, data.test_transform(clip_model.visual.input_resolution))
        crops = iter(data.loader(images, batch_size=batch_size, workers=args.workers))
    for start in range(0, len(items), batch_size):
        part = slice(start, start + batch_size)
        x = None
        if crops is not None:
            x = data.normalize(next(crops)[0].to(device, non_blocking=True))
        yield f[part] if f is not None else None, x, labels[part]


@functools.lru_cache(maxsize=32)
def frozen_features(clip_model, clip_settings, items, cache, workers):
    """f_I of test images by the frozen CLIP: (n, d) float32."""
    images = data.Images(items, data.test_transform(clip_model.visual.input_resolution))
    kept = stage1.kept_features(clip_model, dict(clip_settings), images, cache)
    encode = functools.partial(encode_image, clip_model)
    device = clip_model.logit_scale.device
    f, _ = data.EpochFeatures(images, [0], encode, device, kept=kept, workers=workers)[0]
    return f


# ---------------------------------------------------------------------------- learnt prompts

def load_prompt(path):
    """Reads a prompt.pt: dict with `state` (learnt tensors), `settings`, `class_names`, `seed`.

    Raises FileNotFoundError, or ValueError for a file that is damaged or something else.
    """
    try:
        content = read_as_data(path)
    except ValueError as error:
        raise ValueError(f"{path} could not be read ({error}); train it again with --overwrite") from error
    kinds = {"state": dict, "settings": dict, "class_names": list, "seed": int}
    sound = isinstance(content, dict) and all(isinstance(content.get(key), kind)
                                              for key, kind in kinds.items())
    needed = {"dataset", "baseline", "template", "clip", "dtype", "classes"}
    if not sound or not needed <= set(content["settings"]):
        raise ValueError(f"{path} is not a prompt.pt of stage2.py")
    content["settings"] = dict.fromkeys(stage1.CLIP_SETTINGS, "default") | content["settings"]
    return content


def load_learner(path, saved, clip_model, class_chunk=0):
    """The learner of a prompt.pt, on the classes that it was learnt on, in eval mode.

    saved: from `load_prompt(path)`. Raises ValueError where state, settings and CLIP do not fit together.
    """
    settings = saved["settings"] | {"class_chunk": class_chunk}
    try:
        anchor_tokens = saved["state"].get("template.anchor_tokens")
        learner = build_learner(settings, clip_model, saved["class_names"], anchor_tokens)
        learner.load_state_dict(saved["state"])
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} does not fit its own settings or this CLIP ({reason}); give the --clip "
                         "it was trained with, or train it again with --overwrite") from error
    return learner.eval()


def prompt_files(paths):
    """The prompt.pt at and under `paths`; a file that is named is taken. FileNotFoundError for none."""
    found = {}
    for path in map(pathlib.Path, paths):
        files = [path] if path.is_file() else sorted(path.rglob("prompt.pt"))
        if not files:
            raise FileNotFoundError(f"{path} holds no prompt.pt; give a run of stage2.py, such as "
                                    "output/toy/coop-anchoropt/seed1")
        found |= {file.resolve(): file for file in files}
    return list(found.values())


def load_clip_of(path, settings, args):
    """The CLIP that a prompt was learnt with; its settings win over the options. ValueError for another."""
    if args.clip and clip_identity(args.clip) != settings["clip"]:
        raise ValueError(f"{path} was trained with CLIP {settings['clip']}, but --clip is "
                         f"{clip_identity(args.clip)}; give the one it was trained with (none is needed "
                         "for a CLIP that has a name)")
    own = dict(settings)
    if own["dtype"] == "default":
        own["dtype"] = args.dtype or "default"
    elif args.dtype not in (None, own["dtype"]):
        print(f"note: {path} was trained in {own['dtype']}, which is used instead of --dtype {args.dtype}")
    try:
        return stage1.load_clip_for(own, args)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} was trained with CLIP {settings['clip']}: give its file with "
                                f"--clip ({error})") from error


class Classifier:
    """A learnt prompt, ready for pictures: `load_run(folder)` makes one.

    learner: in eval mode, on `class_names`. `known`: are these classes that it was learnt on? Then the
    normal prompt answers, else the ensemble (Sec. 3.2.2).
    """

    def __init__(self, learner, settings, learnt_on):
        self.learner = learner
        self.settings = settings
        self.learnt_on = list(learnt_on)
        self.set_classes(self.learnt_on)

    @torch.no_grad()
    def set_classes(self, class_names):
        """Binds it to any class names: C strings. Raises ValueError for names that CLIP cannot read."""
        self.class_names = list(class_names)
        self.known = set(self.class_names) <= set(self.learnt_on)
        self.learner.set_classes(self.class_names)
        self.f_anc = None
        if self.settings["template"] == "anchoropt":
            self.f_anc = anchor_features(self.learner.clip_model, self.class_names,
                                         self.learner.template.anchor_tokens, self.settings["preposition"])
        return self

    @torch.no_grad()
    def probabilities(self, pictures, batch_size=100):
        """q(c | x), Eq. 1, by the inference rule: (n, C). pictures: n paths of image files."""
        clip_model, device = self.learner.clip_model, self.learner.clip_model.logit_scale.device
        items = [data.Item(str(picture), 0) for picture in pictures]
        images = data.Images(items, data.test_transform(clip_model.visual.input_resolution))
        q = []
        for crops, _ in data.loader(images, batch_size=batch_size):
            x = data.normalize(crops.to(device))
            f = encode_image(clip_model, x).float()
            q.append(infer(self.learner, f, x, self.f_anc, self.known)["final"].softmax(-1))
        return torch.cat(q)

    @torch.no_grad()
    def text_features(self):
        """Unit text features of the classes, float32: f_T(t_norm) (C, d), f_T(t_anc) (C, d) or None.

        Raises ValueError for CoCoOp, whose normal prompt is another for every image.
        """
        if self.learner.prompts_per_image:
            raise ValueError("cocoop's prompts depend on the image, so they have no text features")
        f_norm = torch.nn.functional.normalize(self.learner.text_features().float(), dim=-1)
        return f_norm, None if self.f_anc is None else self.f_anc.float()


def load_run(run, clip=None, device=None):
    """The `Classifier` of a run of stage2.py, on the classes that it was learnt on.

    run: its folder or its prompt.pt. clip: the file of its CLIP, where it was none with a name. Raises
    FileNotFoundError and ValueError in one line.
    """
    args = argparse.Namespace(clip=clip, dtype=None, device=device or stage1.default_device())
    path = prompt_files([run])[0]
    saved = load_prompt(path)
    clip_model = load_clip_of(path, saved["settings"], args)
    return Classifier(load_learner(path, saved, clip_model), saved["settings"], saved["class_names"])


# ---------------------------------------------------------------------------- pictures, text features

def classify_pictures(args):
    """`python eval.py RUN --images ...`: the top classes of each picture, with probabilities."""
    classifier = one_run(args)
    pictures = []
    for path in args.images:
        pictures += data.pictures_in(path)
    rule = "normal prompt" if classifier.known or classifier.f_anc is None else "ensemble"
    print(f"{len(classifier.class_names)} classes, {rule}")
    q, rows = classifier.probabilities(pictures, args.test_batch or 100), []
    for picture, values in zip(pictures, q):
        best = values.topk(min(args.top, len(values)))
        named = [(classifier.class_names[i], p) for i, p in zip(best.indices.tolist(), best.values.tolist())]
        print(f"{picture}: " + ", ".join(f"{name} {100 * p:.1f} %" for name, p in named))
        rows += [{"image": picture, "rank": rank, "class": name, "probability": f"{p:.6f}"}
                 for rank, (name, p) in enumerate(named, 1)]
    if args.csv:
        stage1.save_csv(args.csv, rows)


def save_text_features(args):
    """`python eval.py RUN --save-text-features FILE.npz`: class_names, normal and, where learnt, anchor."""
    import numpy as np

    classifier = one_run(args)
    f_norm, f_anc = classifier.text_features()
    arrays = {"class_names": np.array(classifier.class_names), "normal": f_norm.cpu().numpy()}
    if f_anc is not None:
        arrays["anchor"] = f_anc.cpu().numpy()
    path = args.save_text_features
    with data.written_aside(path) as aside, open(aside, "wb") as file:
        np.savez(file, **arrays)
    print(f"{path}: {', '.join(arrays)} of {len(classifier.class_names)} classes")


def one_run(args):
    files = prompt_files(args.paths)
    if len(files) > 1:
        raise ValueError(f"{len(files)} runs are there; name one, such as {files[0].parent}")
    classifier = load_run(files[0], args.clip, args.device)
    if args.classes_from:
        with open(args.classes_from, encoding="utf-8-sig") as file:
            names = [line.strip() for line in file if line.strip()]
        if not names:
            raise ValueError(f"{args.classes_from} is empty; expected a class name a line")
        classifier.set_classes(names)
    return classifier


# ---------------------------------------------------------------------------- other datasets

def evaluate_runs(args):
    """`python eval.py RUN ... --dataset NAME ...`: every run on every dataset, and a table of them."""
    files = prompt_files(args.paths)
    datasets = [data.load_dataset(name, args.root) for name in args.dataset]    # first what costs nothing
    for dataset in datasets:
        for note in dataset.notes:
            print(f"note: {note}", flush=True)
    get_clip = OneClip(args)
    results = [evaluate_run(file, dataset, name, args, get_clip)
               for file in files for name, dataset in zip(args.dataset, datasets)]
    keys = ("run", "seed", "target", "classes", "images")
    rows = [[*(result[key] for key in keys),
             *(two_digits(result["accuracy"].get(reading)) for reading in READINGS)] for result in results]
    print("\n" + "\n".join(markdown_table([*keys, *READINGS], rows)))
    print_notes([note for result in results for note in result["notes"]])
    if any("toy" in (result["dataset"], result["target"]) for result in results):
        print(f"\n{TOY_WARNING}")


class OneClip:
    """Loads the CLIP of a run, and keeps it for runs with the same: one CLIP at a time on the device."""

    def __init__(self, args):
        self.args = args
        self.key = None

    def __call__(self, path, settings):
        key = [settings[name] for name in stage1.CLIP_SETTINGS]
        if key != self.key:
            self.clip_model = None
            frozen_features.cache_clear()
            self.clip_model = load_clip_of(path, settings, self.args)
            self.key = key
        return self.clip_model


def evaluate_run(path, dataset, dataset_path, args, get_clip):
    """A learnt prompt and its anchor on all classes of a dataset; writes eval-<dataset>.json beside it.

    The inference rule: final is the ensemble for foreign classes, and the normal prompt for the classes
    that the run learnt on, ImageNet's in its variants after training with --classes all. path: of its
    prompt.pt. dataset: a `data.Dataset`, read from dataset_path. Returns the file's content.
    """
    saved = load_prompt(path)
    settings = saved["settings"]
    if dataset.notes and dataset.name == settings["dataset"]:       # a split made here depends on the seed
        dataset = data.load_dataset(dataset_path, args.root, saved["seed"])
    task = data.few_shot_task(dataset, "all", seed=saved["seed"])
    facts = data.digests(dataset, task)
    facts = {key: facts[key] for key in ("class names", "test images")}
    file = transfer_file(path, dataset.name)
    done = None if args.overwrite else load_transfer(path, dataset.name)
    if done is not None:
        stage1.check_unchanged(file, done.get("facts", {}), facts, "to make it again: --overwrite")
        print(f"finished already: {file} (--overwrite to make it again)", flush=True)
        return done

    known = dataset.name == settings["dataset"]
    if settings["dataset"] == "imagenet" and dataset.name in VARIANTS:
        known = True
    notes = list(dataset.notes)
    if settings["classes"] != "all":
        known = False
        print(f"note: {path} has learnt on base classes alone, so final is the ensemble for all of "
              f"{dataset.name}; Tables 2 and 4 are of runs with --classes all", flush=True)
    learner = load_learner(path, saved, get_clip(path, settings), args.class_chunk)
    learner.set_classes(dataset.class_names)
    scores = evaluate_items(learner, settings, dataset.test, known, args)
    result = {"dataset": settings["dataset"], "target": dataset.name, "seed": saved["seed"],
              "run": path.resolve().parent.parent.name, "prompt": sha256(path)[:8], "settings": settings,
              "accuracy": scores, "known": known, "classes": len(dataset.class_names),
              "images": len(dataset.test), "facts": facts, "notes": notes, "comparable": not notes}
    with data.written_aside(file) as aside:
        aside.write_text(json.dumps(result, indent=1) + "\n")
    return result


def transfer_file(path, target):
    """Where `evaluate_run` writes: eval-<target>.json; for a prompt.pt with another name, that in front."""
    if path.name == "prompt.pt":
        return path.with_name(f"eval-{target}.json")
    return path.with_name(f"{path.stem}-eval-{target}.json")


def load_transfer(path, target):
    """What `evaluate_run` wrote; None where there is nothing, or the prompt has been learnt anew since.

    Raises ValueError for a damaged file.
    """
    file = transfer_file(path, target)
    if not file.exists():
        return None
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        sound = is_accuracies(result["accuracy"])
        stale = path.exists() and result["prompt"] != sha256(path)[:8]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise ValueError(f"{file} is damaged; make it again: python eval.py {path} --dataset {target} "
                         "--overwrite")
    return None if stale else result


# ---------------------------------------------------------------------------- results of runs

def is_accuracies(value):
    """Is this what `evaluate` returns: a dict reading -> percent, with at least the final one?"""
    return "final" in value and all(isinstance(number, (int, float)) and 0 <= number <= 100
                                    for number in value.values())


def load_result(path):
    """One results.json of stage2.py. Raises ValueError for a damaged one."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        sides = [side for side in (result["base"], result["novel"]) if side is not None]
        sound = (all(is_accuracies(side) for side in sides)
                 and result["base"].keys() == sides[-1].keys()
                 and isinstance(result["settings"], dict)
                 and isinstance(result["seed"], int)
                 and isinstance(result["dataset"], str)
                 and isinstance(result.setdefault("notes", []), list))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise ValueError(f"{path} is not a results.json of stage2.py; run it again with --overwrite")
    return result | {"run": path.resolve().parent.parent.name, "folder": path.parent}


def load_results(paths):
    """All results.json under the given files and folders, sorted by path."""
    found = {}
    for path in map(pathlib.Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; give the folder that stage2.py wrote to "
                                    "(--output)")
        files = sorted(path.rglob("results.json")) if path.is_dir() else [path]
        found |= {file.resolve(): file for file in files}
    return [load_result(path) for path in found.values()]


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def two_digits(value):
    return "" if value is None else f"{value:.2f}"


def listed_seeds(results):
    seeds = ", ".join(map(str, sorted(result["seed"] for result in results)))
    return f"seeds {seeds}" if len(results) > 1 else f"seed {seeds}"


def markdown_table(header, rows):
    """Lines of a Markdown table: the first column to the left, the others to the right, "-" for nothing."""
    rows = [[str(cell) or "-" for cell in row] for row in rows]
    widths = [max(5, *map(len, column)) for column in zip(header, *rows)]

    def line(cells):
        others = "".join(f" {cell:>{width}} |" for cell, width in zip(cells[1:], widths[1:]))
        return f"| {cells[0]:{widths[0]}} |{others}"
    rule = f"|:{'-' * (widths[0] + 1)}|" + "".join(f"{'-' * (width + 1)}:|" for width in widths[1:])
    return [line(header), rule, *map(line, rows)]


def group(result):
    """What the seeds of one run share: dataset, the run's name, its folder where it was read from one."""
    return result["dataset"], result["run"], str(result["folder"].parent)


def grouped(results):
    """The seeds of each run: dict `group` -> list of results."""
    groups = {}
    for result in results:
        groups.setdefault(group(result), []).append(result)
    return groups


def with_hm(values):
    """Adds HM, of the averaged base and novel as the paper does, where there are both."""
    if "novel" not in values:
        return values
    return values | {"hm": harmonic_mean(values["base"], values["novel"])}


def results_table(results):
    """Table S1's rows for every run: lines of Markdown. HM is that of the mean base and mean novel."""
    lines = []
    for (dataset, run, _), seeds in grouped(results).items():
        rows = []
        for reading in seeds[0]["base"]:
            values = {side: mean(seed[side][reading] for seed in seeds)
                      for side in ("base", "novel") if seeds[0][side]}
            values = with_hm(values)
            rows.append([reading, *(two_digits(values.get(key)) for key in ("base", "novel", "hm"))])
        lines += ["", f"{dataset}, {run}, {listed_seeds(seeds)}", ""]
        lines += markdown_table(["prompt  ", "base", "novel", "HM"], rows)
    return lines


def summary_table(results, reading):
    """One row per run: base, novel and HM of one reading, mean and standard deviation over seeds.

    The mean HM is that of the mean base and mean novel; its deviation is that of the seeds' own HMs.
    """
    rows = []
    results = [result for result in results if reading in result["base"] and result["novel"]]
    for (dataset, run, _), seeds in grouped(results).items():
        base = [seed["base"][reading] for seed in seeds]
        novel = [seed["novel"][reading] for seed in seeds]
        hm = [harmonic_mean(b, n) for b, n in zip(base, novel)]
        centres = (mean(base), mean(novel), harmonic_mean(mean(base), mean(novel)))
        cells = []
        for centre, values in zip(centres, (base, novel, hm)):
            spread = f" ± {statistics.stdev(values):.2f}" if len(seeds) > 1 else ""
            cells.append(two_digits(centre) + spread)
        rows.append([f"{dataset}, {run}", *cells, str(len(seeds))])
    return markdown_table([f"run ({reading})", "base", "novel", "HM", "seeds"], rows)


TOY_WARNING = ("These are figures of the toy world: they check the machinery and are no evidence for or "
               "against the paper's claims.")


def print_table(results, summary=None):
    lines = summary_table(results, summary) if summary else results_table(results)
    print("\n".join(lines))
    print_notes([note for result in results for note in result["notes"]])
    if any(result["dataset"] == "toy" for result in results):
        print(f"\n{TOY_WARNING}")


def print_notes(notes):
    if notes:
        print("\nNotes\n")
    for note in dict.fromkeys(notes):
        print(f"- {note}")


def draw_figure4(results, path):
    """Fig. 4: the learnt W (without noise) of every run, the lowest seed of each, side by side."""
    first = {}
    for result in sorted(results, key=lambda result: result["seed"]):
        if result.get("position_matrix"):
            first.setdefault(group(result), result)
    lengths = sorted({result["settings"]["anchor_length"] for result in first.values()})
    if not lengths:
        raise ValueError("no run with a learnt position matrix here; make one: python stage2.py")
    if len(lengths) > 1:
        raise ValueError(f"runs with {' and '.join(map(str, lengths))} anchor tokens do not go into one "
                         "picture; name fewer runs")
    panels = {}
    for key in sorted(first):
        panels[panel_title(key, first)] = first[key]["position_matrix"]["end"]
    with data.written_aside(path) as aside:
        plot_position_matrix(panels, aside, lengths[0])
    print(f"{path}: " + ", ".join(str(first[key]["folder"]) for key in sorted(first)))


def panel_title(key, keys):
    """As short as tells one run from the others: dataset, then its name, then its folder."""
    dataset, run, folder = key
    if len({other[0] for other in keys}) == len(keys):
        return dataset
    if len({other[:2] for other in keys}) == len(keys):
        return f"{dataset}\n{run}"
    return f"{dataset}\n{folder}"


# ---------------------------------------------------------------------------- the paper's tables

PAPER_FILE = pathlib.Path(data.ASSETS) / "paper_tables.csv"
MACHINE = (*stage1.CLIP_SETTINGS, "descriptions")   # a cell takes runs whatever these are, and says so


class Row(NamedTuple):
    """A row of a table: its label in the paper, the runs that belong in it, the prompt it shows."""
    label: str
    baseline: str = "coop"
    template: str = "anchoropt"
    changed: dict = {}                  # settings, beside the defaults of baseline, template and dataset
    reading: str = "final"
    note: str = ""                      # what a reader of its figures must know

    def settings(self, dataset):
        """The settings of its runs on a dataset."""
        defaults = default_settings(dataset, self.baseline, self.template, self.changed.get("classes"),
                                    self.changed.get("one_stage", False))
        return defaults | self.changed


class Table(NamedTuple):
    title: str
    rows: list
    datasets: tuple = ("imagenet",)     # that need a run, or a target of one where `source` is set
    blocks: tuple = ("imagenet",)       # that are shown, one below the other
    source: str = ""                    # Tables 2 and 4: where the prompts were learnt

    @property
    def measures(self):
        return ("accuracy",) if self.source else ("base", "novel", "hm")


class Cell(NamedTuple):
    values: dict                        # measure -> percent
    runs: str                           # what they are the mean of, in words
    comparable: bool = True             # may the paper's figure be subtracted?


def option_rows(key, values, labels=None):
    labels = labels or map(str, values)
    return [Row(label, changed={key: value}) for label, value in zip(labels, values)]


METHODS = [Row(name + suffix, baseline, template)
           for baseline, name in (("coop", "CoOp"), ("cocoop", "CoCoOp"), ("maple", "MaPLe"), ("dept", "DePT"))
           for template, suffix in zip(TEMPLATES, ("", " + ATPrompt", " + AnchorOPT"))]
# Tables 2 and 4: learnt on all of ImageNet's classes, with settings of their own where a source has them.
WITHOUT_SOURCE = ("{}: no source gives its settings for all 1,000 classes; its row of base-to-novel runs "
                  "is used")
TRANSFER = []
for row in METHODS:
    note = WITHOUT_SOURCE.format(row.label) if row.label in ("CoCoOp + AnchorOPT", "MaPLe + AnchorOPT") else ""
    if row.baseline != "dept":
        TRANSFER.append(row._replace(changed={"classes": "all"}, note=note))
TAUS = (0.1, 0.5, 1, 2, 4)
TABLES = {
    "1": Table("base to novel classes", METHODS, ELEVEN, ("average", *ELEVEN)),
    "2": Table("from ImageNet to ten other datasets", TRANSFER, ELEVEN, (*ELEVEN, "average"), "imagenet"),
    "3": Table("one stage and two", [Row("One-stage", changed={"one_stage": True}), Row("Two-stage")],
               ELEVEN, ("average",)),
    "4": Table("from ImageNet to its variants", TRANSFER, ("imagenet", *VARIANTS),
               ("imagenet", *VARIANTS, "average"), "imagenet"),
    "5": Table("the normal prompt alone", [Row("ATPrompt", template="atprompt"),
                                           Row("AnchorOPT w/o Ensemble", reading="normal")],
               ELEVEN, ("average",)),
    "6": Table("prepositions", option_rows("preposition", ("with", "at", "sun", "sea", "of"))),
    "7": Table("anchor length N", [
        Row(f"{reading} prompt, N = {n}", changed={"anchor_length": n}, reading=reading)
        for reading in ("anchor", "normal") for n in (1, 2, 3, 4)]),
    "8": Table("where the anchor stands", option_rows(
        "arrangement", ("adaptive", "before", "middle", "after-class"),
        ("Position Matrix", "Before Soft Token", "Middle", "After Class Token"))),
    "9": Table("distillation", [Row("without KD", changed={"lambda_2": 0}), Row("with KD")]),
    "S1": Table("each prompt of CoOp + AnchorOPT", [
        Row("CoOp", template="plain"), Row("ATPrompt", template="atprompt"),
        Row("AnchorOPT-One Stage", changed={"one_stage": True}),
        Row("AnchorOPT-Anchor Prompts", reading="anchor"),
        Row("AnchorOPT-Normal Prompts", reading="normal"),
        Row("AnchorOPT-Ensemble", reading="ensemble"),
        Row("AnchorOPT-Final")], ELEVEN, ("average", *ELEVEN)),
    "S2": Table("prepositions, and none", option_rows(
        "preposition", ("none", "with", "at", "sun", "sea", "of"))),
    "S3": Table("temperature of Eq. 7", option_rows("tau", TAUS, [f"tau = {tau}" for tau in TAUS])),
}


def load_paper(number):
    """One table of the paper, as printed: (dataset or "average", label) -> measure -> str, and `note`."""
    with open(PAPER_FILE, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["table"] == number]
    return {(row["dataset"], row["method"]): row for row in rows}


def find_seeds(results, settings):
    """The results, one per seed, of the run with these settings, and remarks on them.

    All settings but MACHINE must agree. Where several folders fit: the one with the fewest MACHINE
    settings off the defaults, then the one with most seeds.
    """
    def method(some):
        return {key: value for key, value in some.items() if key not in MACHINE}

    fits = {}
    for result in results:
        if method(result["settings"]) == method(settings):
            off = [f"{key} {value}" for key, value in result["settings"].items()
                   if value != settings.get(key, "default")]
            fits.setdefault((len(off), result["folder"].parent, *off), []).append(result)
    order = sorted(fits, key=lambda fit: (fit[0], -len(fits[fit]), fit))
    if not order:
        return [], []
    best, *others = order
    remarks = [f"some runs are with {off}" for off in best[2:]]
    for left in others:
        remarks.append(f"{best[1]} is shown, {left[1]} ({' '.join(left[2:])}) is left out")
    return fits[best], remarks


def fill(table, results, output):
    """The cells of a table that these results fill, and what is missing.

    Returns cells, a dict (dataset, label) -> Cell, with "average" among the datasets; commands, the lines
    that fill the empty ones, for runs in the folder `output`; and notes.
    """
    cells, commands, notes = {}, [], []
    for row in table.rows:
        if table.source:
            filled = fill_from_source(table, row, results, output)
        else:
            filled = fill_from_runs(table, row, results, output)
        row_cells, row_commands, row_notes = filled
        commands += row_commands
        notes += row_notes
        if row.note and any(cell.values for cell in row_cells.values()):
            notes.append(row.note)
        cells |= row_cells
        targets = [dataset for dataset in table.datasets if dataset != table.source]
        present = [row_cells[dataset, row.label] for dataset in targets if (dataset, row.label) in row_cells]
        if present:
            average = {key: mean(cell.values[key] for cell in present)
                       for key in table.measures if key != "hm"}
            comparable = len(present) == len(targets) and all(cell.comparable for cell in present)
            cells["average", row.label] = Cell(
                with_hm(average), f"{len(present)} of {len(targets)} datasets", comparable)
    return cells, list(dict.fromkeys(commands)), list(dict.fromkeys(notes))


def fill_from_runs(table, row, results, output):
    """`fill` for one row of a table whose cells are runs on their own dataset."""
    cells, commands, notes = {}, [], []
    for dataset in table.datasets:
        settings = row.settings(dataset)
        seeds, remarks = find_seeds(results, settings)
        notes += remarks
        if not seeds:
            commands.append(train_command(row, settings, output))
            continue
        values = {side: mean(seed[side][row.reading] for seed in seeds) for side in ("base", "novel")}
        cells[dataset, row.label] = cell_of(with_hm(values), seeds)
        notes += [note for seed in seeds for note in seed["notes"]]
    return cells, commands, notes


def fill_from_source(table, row, results, output):
    """`fill` for one row of Tables 2 and 4: the runs on the source, and what they left on each target."""
    settings = row.settings(table.source)
    seeds, notes = find_seeds(results, settings)
    cells, commands, absent = {}, [], []
    if seeds:
        run = shlex.quote(str(seeds[0]["folder"].parent))
    else:                                   # * stands for what is not known yet (descriptions, clip)
        run = shlex.quote(str(stage1.run_folder(output, settings, 1).parent)) + "*"
        commands.append(train_command(row, settings, output))
    for dataset in table.datasets:
        if dataset == table.source:
            found = seeds
            values = [seed["base"][row.reading] for seed in seeds]
        else:
            found = [load_transfer(seed["folder"] / "prompt.pt", dataset) for seed in seeds]
            found = [result for result in found if result is not None]
            values = [result["accuracy"]["final"] for result in found]
        if found:
            cells[dataset, row.label] = cell_of({"accuracy": mean(values)}, found)
            notes = notes + [note for result in found for note in result.get("notes", [])]
        elif dataset != table.source:
            absent.append(dataset)
    if absent:
        commands.append(f"python eval.py {run} --dataset {' '.join(absent)} --root $DATA")
    return cells, commands, notes


def cell_of(values, found):
    comparable = all(result.get("comparable", True) for result in found)
    return Cell(values, listed_seeds(found), comparable)


def train_command(row, settings, output):
    """The line of a shell that makes a cell's runs. $DATA and $DESCRIPTIONS are the user's folders."""
    dataset = settings["dataset"]
    defaults = default_settings(dataset, row.baseline, row.template)
    words = ["python stage2.py --dataset", dataset, "--baseline", row.baseline, "--template", row.template]
    for key, value in row.changed.items():
        if value != defaults[key]:
            words.append("--" + key.replace("_", "-"))
            if value is not True:
                words.append(str(value))
    words.append("--seeds 1 2 3")
    if dataset != "toy":
        words.append("--root $DATA")
    if os.path.normpath(output) != "output":
        words.append(f"--output {shlex.quote(str(output))}")
    return " ".join(words)


def table_records(number, table, cells):
    """A dict of text per line: table, dataset, method, per measure ours, the paper's, difference; runs.

    Empty where there is no figure. What does not compare has no difference.
    """
    paper, records = load_paper(number), []
    own_labels = [row.label for row in table.rows]
    for dataset in table.blocks:
        printed = [label for block, label in paper if block == dataset]
        for label in dict.fromkeys(printed + own_labels):
            nothing = Cell({}, "none yet" if label in own_labels else "paper only")
            cell = cells.get((dataset, label), nothing)
            record = {"table": number, "dataset": dataset, "method": label}
            for measure in table.measures:
                ours = cell.values.get(measure)
                theirs = paper.get((dataset, label), {}).get(measure, "")
                difference = ""
                if ours is not None and theirs and cell.comparable:
                    difference = f"{ours - float(theirs):+.2f}"
                record |= {measure: two_digits(ours), f"{measure}_paper": theirs,
                           f"{measure}_difference": difference}
            records.append(record | {"runs": cell.runs})
    return records


def print_paper_table(args):
    """`python eval.py --table N OUTPUT`: Markdown to stdout, or CSV (see --csv)."""
    results, table = load_results(args.paths), TABLES[args.table]
    output = args.paths[0]
    if results:
        output = os.path.relpath(results[0]["folder"].resolve().parent.parent.parent)
    tables = [table]
    if args.on:
        check_on(args.on, table)
        tables = [table._replace(datasets=(args.on,), blocks=(args.on,))]
    elif "average" in table.blocks and not table.source:
        toy = table._replace(datasets=("toy",), blocks=("toy",))
        if fill(toy, results, output)[0]:                   # a practitioner's first runs, below the paper's
            tables.append(toy)

    notes = [f"the paper's {label}, {dataset}: {row['note']}"
             for (dataset, label), row in load_paper(args.table).items()
             if row["note"] and dataset in tables[0].blocks]
    records, commands = [], []
    for one in tables:
        cells, missing, remarks = fill(one, results, output)
        commands += missing
        notes += remarks
        records += table_records(args.table, one, cells)
    if args.csv == "-":
        writer = csv.DictWriter(sys.stdout, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        return
    if args.csv:
        stage1.save_csv(args.csv, records)

    header = ["method"]
    for measure in table.measures:
        header += [measure.replace("hm", "HM"), "paper", "diff"]
    print(f"## Table {args.table}: {table.title}")
    for dataset in dict.fromkeys(record["dataset"] for record in records):
        rows = [list(record.values())[2:] for record in records if record["dataset"] == dataset]
        print("\n".join(["", f"### {dataset}", "", *markdown_table([*header, "runs"], rows)]))
    if any(record["dataset"] == "toy" and record.get("base") for record in records):
        print(f"\n{TOY_WARNING}")
    print_notes(notes)
    if commands:
        print("\nEmpty cells, and what fills them ($DATA: the folder of the datasets)\n")
        print("\n".join(["```", *commands, "```"]))


def check_on(dataset, table):
    if table.source:
        raise ValueError(f"--on {dataset}: Tables 2 and 4 are of runs on imagenet")
    if dataset not in (*ELEVEN, "toy"):
        raise ValueError(f"--on {dataset}: give one of {', '.join((*ELEVEN, 'toy'))}, which have training "
                         "images")


# ---------------------------------------------------------------------------- command line

def parse(argv):
    parser = stage1.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", metavar="OUTPUT",
                        help="folders written by stage2.py, with all that is under them; or one prompt.pt")
    group = parser.add_argument_group("what to do (default: list all runs found)")
    what = group.add_mutually_exclusive_group()
    what.add_argument("--dataset", nargs="+", metavar="NAME",
                      help="evaluate learnt prompts on all classes of these datasets")
    what.add_argument("--images", nargs="+", metavar="PATH",
                      help="say what is on these pictures, or on those in a folder")
    what.add_argument("--save-text-features", metavar="FILE.npz",
                      help="write class_names, normal and anchor: unit text features (C, d), float32")
    what.add_argument("--table", type=str.upper, choices=list(TABLES),
                      help="collect the runs into this table of the paper")
    what.add_argument("--summary", choices=READINGS,
                      help="a row per run with the standard deviation over seeds")
    what.add_argument("--figure", choices=["4"], help="draw the learnt position matrices")
    group = parser.add_argument_group("tables, figures, pictures")
    group.add_argument("--on", metavar="NAME",
                       help="with --table: the runs on this dataset instead (default: the paper's)")
    group.add_argument("--csv", nargs="?", const="-", metavar="FILE",
                       help="with --table or --images: write it as CSV too; without FILE a table goes to "
                            "stdout as CSV alone")
    group.add_argument("--output", metavar="FILE", help="with --figure: the picture (default: figure4.png)")
    group.add_argument("--classes-from", metavar="FILE",
                       help="with --images, --save-text-features: any class names, one a line (default: the "
                            "classes learnt on)")
    group.add_argument("--top", type=stage1.at_least(1), default=5,
                       help="with --images: how many classes of each (default: 5)")
    group = parser.add_argument_group("with --dataset, --images, --save-text-features")
    group.add_argument("--root", help="folder that holds the datasets (default: the environment's DATA, "
                                      "else ./data)")
    stage1.add_clip_options(group)
    stage1.add_image_options(group)
    group.add_argument("--overwrite", action="store_true",
                       help="evaluate again what is finished (default: skip it)")
    args = parser.parse_args(argv)
    for option, needs in (("on", ("table",)), ("csv", ("table", "images")), ("output", ("figure",)),
                          ("classes_from", ("images", "save_text_features")), ("overwrite", ("dataset",))):
        if getattr(args, option) and not any(getattr(args, need) for need in needs):
            needed = " or ".join("--" + need.replace("_", "-") for need in needs)
            parser.error(f"--{option.replace('_', '-')} goes with {needed}")
    if args.images and args.csv == "-":
        parser.error("--csv needs a FILE with --images")
    if args.workers is None:
        args.workers = stage1.default_workers(args)
    return args


def run(args):
    if args.dataset:
        return evaluate_runs(args)
    if args.images:
        return classify_pictures(args)
    if args.save_text_features:
        return save_text_features(args)
    if args.table:
        return print_paper_table(args)
    results = load_results(args.paths)
    if not results:
        raise FileNotFoundError(f"no results.json under {', '.join(args.paths)}; train with: python "
                                "stage2.py --dataset toy")
    if args.figure:
        return draw_figure4(results, args.output or "figure4.png")
    return print_table(results, args.summary)


def main(argv=None):
    return stage1.run_script("eval.py", run, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
