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
import hashlib
import io
import json
import os
import pathlib
import shlex
import statistics
import sys
from typing import NamedTuple

import torch
from tqdm import tqdm

import data
import losses
from anchor import anchor_features, read_as_data
from position import plot_position_matrix
from prompts import BASELINES, build_learner, clip_identity, preprocess_of, unit
from stage1 import ELEVEN, VARIANTS, default_settings, plain_value, printable, say


# ---------------------------------------------------------------------------- the inference rule

def accuracy(logits, labels):
    """Top-1 accuracy in percent. logits (n, C), labels (n,). Raises ValueError for no images."""
    if len(labels) == 0:
        raise ValueError("accuracy of no images")
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
    Raises ValueError for no images, and for logits that are not finite.
    """
    training = learner.training
    learner.eval()                          # so W is the arg-max (unless test_position is sample)
    logits, labels = {}, []
    for f, x, y in batches:
        for reading, of_batch in infer(learner, f, x, f_anc, known).items():
            logits.setdefault(reading, []).append(of_batch)
        labels.append(y)
    learner.train(training)
    if not labels:
        raise ValueError("accuracy of no images")
    # Accuracy over all images at once: a mean of batches would weigh the last one too much.
    labels = torch.cat(labels)
    scores = {}
    for reading, parts in logits.items():
        of_all = torch.cat(parts)                                   # (n, C)
        check_finite(of_all, learner.class_names)
        scores[reading] = accuracy(of_all, labels)
    return scores


def check_finite(logits, class_names):
    """Raises ValueError for logits (n, C) that are not finite: arg-max takes NaN for an answer."""
    bad = ~logits.isfinite()
    if bad.any():
        of = [name for name, wrong in zip(class_names, bad.any(0).tolist()) if wrong]
        raise ValueError(f"the logits of {int(bad.any(1).sum())} of {len(logits)} images and "
                         f"{len(of)} of {len(class_names)} classes, such as {of[0]!r}, are not "
                         "finite: this CLIP's weights are not sound, or overflow (try --dtype "
                         "float32)")


def anchor_prompts(learner, settings, class_chunk=0):
    """f_T(t_anc) of the classes that a learner is bound to: unit (C, d); None without an anchor."""
    if settings["template"] != "anchoropt":
        return None
    return anchor_features(learner.clip_model, learner.class_names, learner.template.anchor_tokens,
                           settings["preposition"], class_chunk)


def evaluate_items(run, learner, items, known):
    """`evaluate` on image files. run: a `stage1.Run`; items: of `data.Item`, labels as learnt."""
    f_anc = anchor_prompts(learner, run.settings, run.args.class_chunk)
    return evaluate(learner, test_batches(run, learner, items, f_anc), f_anc, known)


def test_batches(run, learner, items, f_anc):
    """The test images in batches of f, x, y. Frozen features are computed once per process."""
    clip_model, device = learner.clip_model, learner.clip_model.logit_scale.device
    labels = torch.tensor([item.label for item in items], device=device)
    # All at a time, unless answer or memory depends on it.
    batch_size, matrix = len(items), learner.template.position_matrix
    if learner.needs_images:
        batch_size = run.args.test_batch or 200
    elif learner.prompts_per_image or (matrix is not None and matrix.test_position == "sample"):
        batch_size = run.args.test_batch or 100

    # f of the frozen tower, for all methods that read it; crops for MaPLe, which prompts the tower.
    preprocess = preprocess_of(clip_model)
    f = crops = None
    if f_anc is not None or not learner.needs_images:
        f = frozen_features(clip_model, run.settings["clip"], run.settings["dtype"], tuple(items),
                            run.args.feature_cache, run.args.workers)
    if learner.needs_images:
        images = data.Images(items, data.test_transform(preprocess))
        crops = iter(data.loader(images, batch_size=batch_size, workers=run.args.workers))
    starts = range(0, len(items), max(1, batch_size))
    for start in tqdm(starts, desc="testing", leave=False, disable=None):
        batch = slice(start, start + batch_size)
        x = None
        if crops is not None:
            x = data.normalize(next(crops)[0], preprocess, device)
        yield None if f is None else f[batch], x, labels[batch]


@functools.lru_cache(maxsize=32)
def frozen_features(clip_model, clip, dtype, items, cache, workers):
    """f_I of test images by the frozen CLIP: (n, d) float32. clip, dtype: of the settings."""
    images = data.Images(items, data.test_transform(preprocess_of(clip_model)))
    encode, kept = stage1.frozen_tower(clip_model, {"clip": clip, "dtype": dtype}, images, cache)
    f, _ = next(data.epoch_features(images, [0], encode, kept, workers=workers))
    return f.to(clip_model.logit_scale.device)


# ---------------------------------------------------------------------------- learnt prompts

def load_prompt(path):
    """Reads a prompt.pt: dict with `state` (learnt tensors), `settings`, `class_names`, `seed`.

    And `digest`, of what was read. Raises FileNotFoundError, or ValueError for a file that is
    damaged or something else.
    """
    # Read once: the digest is of what is used, whatever lies there a minute later.
    content = pathlib.Path(path).read_bytes()
    try:
        saved = read_as_data(io.BytesIO(content))
        settings = saved["settings"]
        if not (settings["baseline"] in BASELINES and settings["dtype"] in ("default",
                *stage1.DTYPES) and settings["clip"] and saved["class_names"] and saved["state"]):
            raise ValueError("its settings are not ours")
        return {key: saved[key] for key in ("state", "settings", "class_names", "seed")} | {
            "digest": hashlib.sha256(content).hexdigest()[:8]}
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is damaged, or no prompt.pt of stage2.py ({error}); where a run "
                         "wrote it: train it again with --overwrite") from error


def load_learner(path, saved, clip_model, class_chunk=0):
    """The learner of a prompt.pt, on the classes that it was learnt on, in eval mode.

    saved: from `load_prompt(path)`. Raises ValueError where state, settings and CLIP do not fit.
    """
    # A fresh learner of the same settings, then its learnt values.
    settings = saved["settings"] | {"class_chunk": class_chunk}
    try:
        anchor_tokens = saved["state"].get("template.anchor_tokens")
        learner = build_learner(settings, clip_model, saved["class_names"], anchor_tokens)
        learner.load_state_dict(saved["state"])
        return learner.eval()
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} does not fit its own settings or this CLIP ({str(error)[:200]}); "
                         "give the --clip it was trained with, or train it again with "
                         "--overwrite") from error


def prompt_files(paths):
    """The prompt.pt at and under `paths`; a file that is named is taken.

    Raises FileNotFoundError for a path without one.
    """
    found = {}
    for path in map(pathlib.Path, paths):
        files = [path] if path.is_file() else sorted(path.rglob("prompt.pt"))
        if not files:
            what = "holds no prompt.pt" if path.exists() else "does not exist"
            raise FileNotFoundError(f"{path} {what}; give a run of stage2.py, such as "
                                    "output/toy/coop-anchoropt/seed1")
        found |= {file.resolve(): file for file in files}
    return list(found.values())


def load_clip_of(path, settings, args):
    """The CLIP that a prompt was learnt with: its own precision, and its own weights.

    args: with clip, device, dtype. Raises ValueError where --clip is another one.
    """
    if args.clip and clip_identity(args.clip) != settings["clip"]:
        raise ValueError(f"{path} was trained with CLIP {settings['clip']}, but --clip is "
                         f"{clip_identity(args.clip)}; give the one it was trained with (none is "
                         "needed for a CLIP that has a name)")
    # Its own precision where it was asked for, else this machine's.
    if settings["dtype"] == "default":
        settings = settings | {"dtype": args.dtype or "default"}
    try:
        return stage1.load_clip_for(settings, args)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} was trained with CLIP {settings['clip']}: give its file "
                                f"with --clip ({error})") from error


class Classifier:
    """A learnt prompt, ready for pictures: `load_run(folder)` makes one.

    learner: in eval mode. settings: of its run. learnt_on: the classes that it was learnt on.
    `class_names`: the C classes that it is bound to now. `known`: are they all among those? Then
    the normal prompt answers, else the ensemble (Sec. 3.2.2).
    """

    def __init__(self, learner, settings, learnt_on, class_chunk=0):
        self.learner = learner
        self.settings = settings
        self.learnt_on = list(learnt_on)
        self.class_chunk = class_chunk
        clip_model = learner.clip_model
        self.preprocess, self.device = preprocess_of(clip_model), clip_model.logit_scale.device
        self.encode, _ = stage1.frozen_tower(clip_model, settings, None, None)
        self.transform = data.test_transform(self.preprocess)
        self.bind(self.learnt_on)

    def set_classes(self, class_names):
        """Binds it to any class names: C strings, read as folders' names are (`data.read_name`).

        A name that comes twice counts once. Raises ValueError for what CLIP cannot read.
        """
        # The names of the field's own datasets are known as they are.
        names = {}
        for name in class_names:
            names[name if name in self.learnt_on else data.read_name(name)] = None
        if not names:
            raise ValueError("no class names: there is nothing to choose from")
        return self.bind(list(names))

    @torch.no_grad()
    def bind(self, names):
        """Binds it to these class names, as they are."""
        self.learner.set_classes(names)
        self.class_names = names
        self.known = set(names) <= set(self.learnt_on)
        self.f_anc = anchor_prompts(self.learner, self.settings, self.class_chunk)
        return self

    def crop(self, picture):
        """A picture's file as CLIP reads it: (3, R, R), uint8. Raises data.BadImage."""
        return self.transform(data.load_image(picture, upright=True))

    @torch.no_grad()
    def probabilities(self, pictures, batch_size=100):
        """q(c | x), Eq. 1, by the inference rule: (n, C). pictures: n paths, or crops of `crop`."""
        q = [torch.zeros(0, len(self.class_names), device=self.device)]
        for start in range(0, len(pictures), batch_size):
            crops = []
            for picture in pictures[start:start + batch_size]:
                crops.append(picture if torch.is_tensor(picture) else self.crop(picture))
            crops = torch.stack(crops)                                          # (B, 3, R, R)
            x = data.normalize(crops, self.preprocess, self.device)
            f = self.encode(crops).float()                                      # (B, d)
            logits = infer(self.learner, f, x, self.f_anc, self.known)["final"]
            check_finite(logits, self.class_names)
            q.append(logits.softmax(-1))
        return torch.cat(q)

    @torch.no_grad()
    def text_features(self):
        """Unit text features of the classes, float32: normal (C, d), anchor (C, d) or None.

        Raises ValueError for CoCoOp, whose normal prompt is another for every image.
        """
        if self.learner.prompts_per_image:
            raise ValueError(f"{self.settings['baseline']}'s prompts depend on the image, so its "
                             "classes have no text features of their own")
        return unit(self.learner.text_features()), self.f_anc


def load_run(run, clip=None, device=None, dtype=None, class_chunk=0):
    """The `Classifier` of a run of stage2.py, on the classes that it was learnt on, ready for use.

    run: its folder or its prompt.pt. clip: the file of its CLIP, where it was none with a name.
    dtype, class_chunk: as the options. Raises FileNotFoundError and ValueError in one line.
    """
    files = prompt_files(run if isinstance(run, list) else [run])
    if len(files) > 1:
        raise ValueError(f"{len(files)} runs are there; name one, such as {files[0].parent}")
    saved = load_prompt(files[0])
    args = argparse.Namespace(clip=clip, dtype=dtype, device=device or stage1.default_device())
    clip_model = load_clip_of(files[0], saved["settings"], args)
    learner = load_learner(files[0], saved, clip_model, class_chunk)
    return Classifier(learner, saved["settings"], saved["class_names"], class_chunk)


# ---------------------------------------------------------------------------- pictures

def classify_pictures(args):
    """`python eval.py RUN --images ...`: the top classes of each picture, with probabilities.

    A picture that cannot be read is named, and the others are answered. Returns the exit code.
    """
    # The pictures, the run, the classes to choose from.
    pictures = []
    for path in args.images:
        pictures += data.image_files(path, deep=True) if os.path.isdir(path) else [path]
    classifier = load_run(args.paths, args.clip, args.device, args.dtype, args.class_chunk)
    if args.classes_from:
        classifier.set_classes(data.read_lines(args.classes_from, ""))
    ensemble = classifier.f_anc is not None and not classifier.known
    print_names(classifier.class_names)
    print(f"the {'ensemble with the anchor' if ensemble else 'normal'} prompt answers")

    # Batch by batch: what is answered is printed, whatever comes after it.
    rows, read = [], 0
    batch_size = args.test_batch or 100
    for start in range(0, len(pictures), batch_size):
        sound, crops = [], []
        for picture in pictures[start:start + batch_size]:
            try:
                crops.append(classifier.crop(picture))
                sound.append(picture)
            except data.BadImage as error:
                stage1.complain("eval.py", str(error))
        read += len(sound)
        for picture, q in zip(sound, classifier.probabilities(crops, batch_size)):
            best = []
            for i in q.argsort(descending=True)[:args.top or 5].tolist():
                name, p = classifier.class_names[i], q[i].item()
                best.append(f"{name} {100 * p:.1f} %")
                rows.append({"image": picture, "rank": len(best), "class": name,
                             "probability": f"{p:.6f}"})
            say(f"{picture}: {', '.join(best)}")
    if args.csv and rows:
        data.save_csv(args.csv, rows)
    return int(read < len(pictures))


def print_names(names):
    """What CLIP reads: folders' names are turned into it."""
    say(f"{len(names)} classes, read as: {', '.join(names[:8])}{', ...' if names[8:] else ''}")


# ---------------------------------------------------------------------------- other datasets

def evaluate_runs(args):
    """`python eval.py RUN ... --dataset NAME ...`: every run on every dataset, and a table."""
    datasets = [data.load_dataset(name, args.root) for name in args.dataset]
    key = clip_model = None
    results = []
    for file in prompt_files(args.paths):
        saved = load_prompt(file)
        settings = saved["settings"]
        for dataset in datasets:
            done = file.with_name(f"eval-{dataset.name}.json")
            facts = data.digests(dataset, data.few_shot_task(dataset, "all", seed=saved["seed"]))
            del facts["training images"]
            if done.exists() and not args.overwrite:
                result = read_result(done)
                if result["prompt"] == saved["digest"]:         # else it was learnt anew since
                    data.check_unchanged(done, result["facts"], facts,
                                         "to make it again: --overwrite")
                    say(f"finished already: {done} (--overwrite to make it again)")
                    results.append(result)
                    continue
            # One CLIP at a time is on the device.
            if key != (settings["clip"], settings["dtype"]):
                key = clip_model = None
                frozen_features.cache_clear()
                clip_model = load_clip_of(file, settings, args)
                key = settings["clip"], settings["dtype"]
            result = evaluate_run(file, saved, dataset, clip_model, args)
            data.save_json(done, result | {"facts": facts})
            results.append(read_result(done))
    print_results(results)


def evaluate_run(file, saved, dataset, clip_model, args):
    """A learnt prompt and its anchor on all classes of a dataset, as results.json says it.

    The inference rule: final is the ensemble for foreign classes, and the normal prompt for the
    classes that the run learnt on, ImageNet's in its variants after training with --classes all.
    file, saved: see `load_prompt`.
    """
    settings = saved["settings"]
    # Sec. 3.2.2: are these the classes that it has learnt on?
    known = dataset.class_names == saved["class_names"]
    if settings["dataset"] == "imagenet" and dataset.name in VARIANTS:
        known = True
    # What was noted of the run holds of its evaluations.
    notes, comparable = [], True
    if file.with_name("results.json").exists():
        of_run = read_result(file.with_name("results.json"))
        notes, comparable = of_run["notes"], of_run["comparable"]
    notes = notes + dataset.notes
    if settings["classes"] != "all" and settings["baseline"] != "clip":
        known = comparable = False
        notes.append("learnt on base classes alone, so final is the ensemble for all classes; "
                     "Tables 2 and 4 are of runs with --classes all")
    learner = load_learner(file, saved, clip_model, args.class_chunk)
    learner.set_classes(dataset.class_names)
    torch.manual_seed(saved["seed"])            # of W, with --test-position sample
    run = stage1.Run(settings, {}, saved["seed"], args)
    scores = evaluate_items(run, learner, dataset.test, known)
    return {"dataset": dataset.name, "settings": settings, "seed": saved["seed"],
            "prompt": saved["digest"], "base": scores, "novel": None, "hm": None, "notes": notes,
            "comparable": comparable and not dataset.notes}


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
        for key in ("dataset", "seed", "notes", "comparable", "prompt"):
            result[key]
        result["settings"]["dataset"], result["facts"]["class names"]
        for scores in (result["base"], result["novel"]):
            if scores is not None and not 0 <= scores["final"] <= 100:
                raise ValueError("no percentages")
        return {"position_matrix": None} | result | {
            "run": path.resolve().parent.parent.name, "folder": path.parent}
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, or not of this project; make it again with "
                         "--overwrite, or move it elsewhere") from error


def load_results(paths, transfers=False):
    """All results.json under these files and folders; transfers: and eval-*.json of other datasets.

    Raises ValueError where two folders hold the same seed of a run.
    """
    found = {}
    for path in map(pathlib.Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; give the folder that stage2.py wrote "
                                    "to (--output)")
        folder = path if path.is_dir() else path.parent
        found |= {file.resolve(): file for file in sorted(folder.rglob("results.json"))}
    results = [read_result(path) for path in found.values()]
    for run in results[:] if transfers else []:
        for file in sorted(run["folder"].glob("eval-*.json")):
            result = read_result(file)
            # Not of a prompt that was learnt anew since, nor of the run's own dataset.
            if result["prompt"] == run["prompt"] and result["dataset"] != run["dataset"]:
                results.append(result)
    places = {}
    for result in results:
        place = places.setdefault((run_key(result), result["seed"]), result["folder"])
        if place != result["folder"]:
            raise ValueError(f"{place} and {result['folder']} are both seed {result['seed']} of "
                             "one run: move one of them elsewhere")
    return results


def run_key(result):
    """What the seeds of one run share: their folder, and data that are the same but for the picks.

    Seeds of other classes or test images never meet in a mean.
    """
    facts = result["facts"]
    return (result["dataset"], result["run"], str(result["folder"].resolve().parent),
            facts["class names"], facts["test images"])


def means(seeds, reading):
    """measure -> percent: base, novel and HM of one reading; accuracy where nothing is novel.

    The HM is that of the averaged base and novel, as in the paper.
    """
    base = statistics.fmean(seed["base"][reading] for seed in seeds)
    if seeds[0]["novel"] is None:
        return {"accuracy": base}
    novel = statistics.fmean(seed["novel"][reading] for seed in seeds)
    return {"base": base, "novel": novel, "hm": harmonic_mean(base, novel)}


def listed_seeds(seeds):
    numbers = sorted(seed["seed"] for seed in seeds)
    many = "s" if len(seeds) > 1 else ""
    return f"seed{many} {', '.join(map(str, numbers))}"


TOY_WARNING = ("These are figures of the toy world: they check the machinery and are no evidence "
               "for or against the paper's claims.")


def print_results(results):
    """Table S1's rows for every run: the mean and, for several seeds, the deviation over them."""
    # A block a run, a line a reading, a column a measure.
    for (dataset, run, *_), seeds in data.group_by(run_key, results).items():
        rows = []
        for reading in seeds[0]["base"]:
            each = [means([seed], reading) for seed in seeds]
            row = [reading]
            for measure, mean in means(seeds, reading).items():
                spread = ""
                if len(seeds) > 1:
                    spread = f" ± {statistics.stdev(values[measure] for values in each):.2f}"
                row.append(f"{mean:.2f}{spread}")
            rows.append(row)
        header = ["prompt  ", *means(seeds, "final")]
        say("")
        say(f"{dataset}, {run}, {listed_seeds(seeds)}")
        say("")
        print_markdown([name.replace("hm", "HM") for name in header], rows)
    notes = []
    for result in results:
        notes += [(note, f"{result['dataset']}, {result['run']}") for note in result["notes"]]
    print_notes(notes)
    if any("toy" in (result["dataset"], result["settings"]["dataset"]) for result in results):
        print(f"\n{TOY_WARNING}")


def print_markdown(header, rows):
    """A table of Markdown: the first column to the left, the others to the right, "-" for none."""
    rows = [header, *([printable(cell) or "-" for cell in row] for row in rows)]
    first = max(len(row[0]) for row in rows)
    other = max(len(cell) for row in rows for cell in row[1:])
    for i, row in enumerate(rows):
        print(f"| {row[0]:{first}} | {' | '.join(cell.rjust(other) for cell in row[1:])} |")
        if i == 0:
            print("|:" + "-" * (first + 1) + "|" + ("-" * (other + 1) + ":|") * (len(row) - 1))


def print_notes(notes):
    """Each note once, with what it is about. notes: pairs (note, what)."""
    about = {}
    for note, what in dict.fromkeys(notes):
        about.setdefault(note, []).append(what)
    if about:
        print("\nNotes\n")
    for note, named in about.items():
        more = f"; and {len(named) - 3} more" if len(named) > 3 else ""
        say(f"- {note} ({'; '.join(named[:3])}{more})")


def draw_figure4(results, path):
    """Fig. 4: the learnt W (without noise) of every run, the lowest seed of each, side by side."""
    panels, n_anchor = {}, {}
    learnt = [result for result in results if result["position_matrix"]]
    for (dataset, run, *_), seeds in sorted(data.group_by(run_key, learnt).items()):
        first = min(seeds, key=lambda result: result["seed"])
        title = f"{dataset}, {run.replace(',', ', ')}"
        while title in panels:                              # the same run in another folder
            title += "'"
        panels[title] = first["position_matrix"]["end"]
        n_anchor[title] = first["settings"]["anchor_length"]
    if not panels:
        raise ValueError("no run with a learnt position matrix here; make one: python stage2.py")
    if not pathlib.Path(path).suffix:                           # it says the format
        path = f"{path}.png"
    with data.written_aside(path) as aside:
        plot_position_matrix(panels, aside, n_anchor)
    print(f"{path}: {len(panels)} matrices")


# ---------------------------------------------------------------------------- the paper's tables

# A cell takes runs whatever these are, and says so.
MACHINE = ("clip", "dtype", "descriptions", "anchor")


class Table(NamedTuple):
    title: str
    datasets: tuple = ("imagenet",)     # that have a cell in each row
    shown: tuple = ("imagenet",)        # blocks, one below the other; "average" is one
    source: str = ""                    # Tables 2 and 4: where the prompts were learnt


AVERAGE = (*ELEVEN, "average")
TABLES = {
    "1": Table("base to novel classes", ELEVEN, AVERAGE),
    "2": Table("from ImageNet to ten other datasets", ELEVEN, AVERAGE, "imagenet"),
    "3": Table("one stage and two", ELEVEN, ("average",)),
    "4": Table("from ImageNet to its variants", ("imagenet", *VARIANTS),
               ("imagenet", *VARIANTS, "average"), "imagenet"),
    "5": Table("the normal prompt alone", ELEVEN, ("average",)),
    "6": Table("prepositions"),
    "7": Table("anchor length N"),
    "8": Table("where the anchor stands"),
    "9": Table("distillation"),
    "S1": Table("each prompt of CoOp + AnchorOPT", ELEVEN, AVERAGE),
    "S2": Table("prepositions, and none"),
    "S3": Table("temperature of Eq. 7")}


def read_rows(name, number):
    """A table's rows (dicts of str) in assets/: in paper_tables.csv the printed ones."""
    with open(os.path.join(data.ASSETS, name), newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["table"] == number]


def settings_of(row, dataset):
    """The settings of a row's runs on a dataset, and those that the row changes."""
    changed = {}
    if row["changed"]:
        key, _, text = row["changed"].partition("=")
        changed[key] = plain_value(text)
    cell = {key: changed[key] for key in ("classes", "one_stage") if key in changed}
    return default_settings(dataset, row["baseline"], row["template"], **cell) | changed, changed


class Cell(NamedTuple):
    values: dict                        # measure -> percent
    runs: str                           # what they are the mean of, in words
    comparable: bool = False            # may the paper's figure be subtracted?
    notes: tuple = ()
    run: str = ""


def fill(table, row, results):
    """A row's cells: dict dataset -> `Cell`, "average" among them. ValueError where two runs fit.

    results: as `load_results` gives them.
    """
    cells = {}
    for dataset in table.datasets:
        # Tables 2 and 4: learnt on the source, tested here. Elsewhere both are one dataset.
        wanted, _ = settings_of(row, table.source or dataset)
        here = [result for result in results if result["dataset"] == dataset]
        runs = data.group_by(run_key, of_settings(here, wanted))
        if len(runs) > 1:
            raise ValueError(f"{' and '.join(key[2] for key in runs)} both fit {row['label']} on "
                             f"{dataset}: name the one that is meant, not the folder of both")
        for seeds in runs.values():
            cells[dataset] = cell_of(seeds, row["reading"], wanted)
    targets = [name for name in table.datasets if name not in (table.source, "toy")]
    present = [cells[name] for name in targets if name in cells]
    if present:
        cells["average"] = average(present, len(targets))
    return cells


def of_settings(results, wanted):
    """The results of runs with these settings: to the letter, or else whatever MACHINE's are."""
    fits = []
    for result in results:
        machine = {key: wanted[key] for key in MACHINE if key in wanted}
        if result["settings"] | machine == wanted:
            fits.append(result)
    exact = [result for result in fits if result["settings"] == wanted]
    return exact or fits


def cell_of(seeds, reading, wanted):
    """The mean over the seeds of a run, and what sets it off the paper's."""
    settings, notes = seeds[0]["settings"], []
    for key in MACHINE:
        if settings.get(key) != wanted.get(key):
            notes.append(f"run with {key} {settings[key]}")
    comparable = settings["clip"] == wanted["clip"]
    for seed in seeds:
        notes += seed["notes"]
        comparable = comparable and seed["comparable"]
    return Cell(means(seeds, reading), listed_seeds(seeds), comparable, tuple(notes),
                seeds[0]["run"])


def average(present, n):
    """The average of the cells that are there, of n. Its HM is that of the averages, as printed."""
    values = {}
    for measure in present[0].values:
        values[measure] = statistics.fmean(cell.values[measure] for cell in present)
    if "hm" in values:
        values["hm"] = harmonic_mean(values["base"], values["novel"])
    complete = len(present) == n
    comparable = complete and all(cell.comparable for cell in present)
    return Cell(values, f"{len(present)} of {n} datasets", comparable)


def commands(table, row, empty, output):
    """The shell's lines that fill a row's cells on the datasets `empty`. $DATA: their folder."""
    # What the row changes are options of the command.
    settings, changed = settings_of(row, table.source or "imagenet")
    words = f"--baseline {row['baseline']} --template {row['template']}"
    for key, value in changed.items():
        words += f" {stage1.option_of(key)}"
        if value is not True:
            words += f" {value}"
    words += " --seeds 1 2 3 --root $DATA"
    if output != "output":
        words += f" --output {shlex.quote(output)}"
    if not table.source:
        return [f"for d in {' '.join(empty)}; do python stage2.py --dataset $d {words}; done"]

    # Two commands: learn on the source, and test elsewhere what was learnt.
    run = os.path.join(output, table.source, data.folder_name(stage1.cell_name(settings), changed))
    there = " ".join(name for name in empty if name != table.source)
    test = f"python eval.py {shlex.quote(run)} --dataset {there} --root $DATA"
    if table.source not in empty:
        return [test]
    return [f"python stage2.py --dataset {table.source} {words}", test]


def print_paper_table(args):
    """`python eval.py OUTPUT --table N`: Markdown to stdout, and CSV to --csv FILE."""
    results, table = load_results(args.paths, transfers=True), TABLES[args.table]
    with_toy = any(result["dataset"] == "toy" for result in results)
    if with_toy and not table.source:
        table = Table(table.title, (*table.datasets, "toy"), (*table.shown, "toy"))

    # Ours: a cell for each dataset and row.
    ours, missing, notes = {}, [], []
    for row in read_rows("table_rows.csv", args.table):
        cells = fill(table, row, results)
        for dataset, cell in cells.items():
            notes += [(note, f"{row['label']}, {dataset}") for note in cell.notes]
        if row["note"] and cells:
            notes.append((row["note"], row["label"]))
        for dataset in (*table.datasets, "average"):
            ours[dataset, row["label"]] = cells.get(dataset, Cell({}, "none yet"))
        empty = [name for name in table.datasets if name not in (*cells, "toy")]
        if empty:
            missing += commands(table, row, empty, os.path.normpath(args.paths[0]))
    left = {result["run"] for result in results} - {cell.run for cell in ours.values()}
    if left:
        notes.append(("runs with other settings than the table's", ", ".join(sorted(left))))

    # Beside the paper's: a line a method, a block a dataset.
    print(f"## Table {args.table}: {table.title}")
    paper = {(row["dataset"], row["method"]): row
             for row in read_rows("paper_tables.csv", args.table)}
    records = []
    for dataset in table.shown:
        block = block_of(dataset, table, ours, paper)
        records += block
        if all(record["runs"] in ("none yet", "paper only") for record in block):
            print(f"\n### {dataset}: no run yet")
            continue
        print(f"\n### {dataset}\n")
        header = [name.replace("hm", "HM").rpartition("_")[2] for name in list(block[0])[1:]]
        print_markdown(header, [list(record.values())[1:] for record in block])
        notes += [(row["note"], f"the paper's {label}, {dataset}")
                  for (of, label), row in paper.items() if of == dataset and row["note"]]
        if dataset == "toy":
            print(f"\n{TOY_WARNING}")
    print_notes(notes)
    if missing:
        print("\nEmpty cells, and what fills them ($DATA: the folder of the datasets)\n")
        print("\n".join(["```", *dict.fromkeys(missing), "```"]))
    if args.csv:
        data.save_csv(args.csv, [{"table": args.table} | record for record in records])


def block_of(dataset, table, ours, paper):
    """A block of a table: per method and measure ours, the paper's and the difference, as text."""
    measures = ("accuracy",) if table.source else ("base", "novel", "hm")
    labels = [label for of, label in (*paper, *ours) if of == dataset]
    block = []
    for label in dict.fromkeys(labels):
        cell = ours.get((dataset, label), Cell({}, "paper only"))
        record = {"dataset": dataset, "method": label}
        for measure in measures:
            value = cell.values.get(measure)
            theirs = paper.get((dataset, label), {}).get(measure, "")
            record[measure] = "" if value is None else f"{value:.2f}"
            record[f"{measure}_paper"] = theirs
            record[f"{measure}_diff"] = ""
            if value is not None and theirs and cell.comparable:
                record[f"{measure}_diff"] = f"{value - float(theirs):+.2f}"
        block.append(record | {"runs": cell.runs})
    return block


# ---------------------------------------------------------------------------- command line

# Options that only mean something beside another one.
GOES_WITH = {"csv": ("table", "images"), "output": ("figure",), "classes_from": ("images",),
             "top": ("images",), "root": ("dataset",), "overwrite": ("dataset",),
             "feature_cache": ("dataset",), "test_batch": ("dataset", "images")}


def parse(argv):
    parser = stage1.make_parser("eval.py", __doc__, ["clip"], ["images"])
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
    parser.add_argument("--output", metavar="FILE",
                        help="with --figure: the picture to write (default: figure4.png)")
    parser.add_argument("--classes-from", metavar="FILE",
                        help="with --images: a text file of any class names, one a line (default: "
                             "the classes that the run learnt on)")
    parser.add_argument("--top", type=stage1.at_least(1), metavar="K",
                        help="with --images: how many classes of each picture (default: 5)")
    parser.add_argument("--root", metavar="DIR", help="with --dataset: folder that holds the "
                        "datasets (default: the environment's DATA, else ./data)")
    parser.add_argument("--overwrite", action="store_true",
                        help="with --dataset: evaluate again what is finished (default: skip it)")
    args = parser.parse_args(argv)
    for option, needs in GOES_WITH.items():
        if getattr(args, option) and not any(getattr(args, need) for need in needs):
            parser.error(f"{stage1.option_of(option)} goes with "
                         f"{' or '.join(map(stage1.option_of, needs))}")
    return args


def run(args):
    if args.dataset:
        return evaluate_runs(args)
    if args.images:
        return classify_pictures(args)
    if args.table:
        return print_paper_table(args)
    results = load_results(args.paths)
    if not results:
        raise FileNotFoundError(f"no results.json under {', '.join(args.paths)}; train with: "
                                "python stage2.py --dataset toy")
    if args.figure:
        return draw_figure4(results, args.output or "figure4.png")
    return print_results(results)


def main(argv=None):
    return stage1.run_script("eval.py", run, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
