"""Evaluation: the inference rule, accuracy and harmonic mean, learnt prompts elsewhere, tables.

    python eval.py output/                              all runs found there, without training
    python eval.py output/ --summary final              a row per run, with standard deviations
    python eval.py output/ --table 1                    the runs as a table of the paper
    python eval.py output/ --figure 4                   the learnt position matrices
    python eval.py RUN --dataset caltech101 dtd         a learnt prompt on other datasets
    python eval.py RUN --images PICTURE ...             a learnt prompt on pictures of your own
    python eval.py RUN --save-text-features FILE.npz    its text features, for other code

RUN is a folder that stage2.py wrote, such as output/toy/coop-anchoropt/seed1, or its prompt.pt.

Sec. 3.2.2, Inference: the normal prompt answers for known base classes, the ensemble of normal and
anchor prompt for unknown novel ones. Table S1's four rows are: anchor, normal, ensemble, and final
(what the rule picks). `eval` is also a builtin: import this module as `import eval as evaluation`.
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
import textwrap
from typing import NamedTuple

import numpy as np
import torch

import data
import losses
import stage1
from anchor import anchor_features, read_as_data
from position import plot_position_matrix
from prompts import TEMPLATES, build_learner, clip_identity, encode_image, sha256, unit
from stage1 import ELEVEN, VARIANTS, default_settings

READINGS = ("anchor", "normal", "ensemble", "final")


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
    l_ens = losses.ensemble_logits(l_norm, l_anc)                   # of q_ens
    final = l_norm if known else l_ens                              # the rule of Sec. 3.2.2
    return {"anchor": l_anc, "normal": l_norm, "ensemble": l_ens, "final": final}


@torch.no_grad()
def evaluate(learner, batches, f_anc=None, known=True):
    """Accuracy of the four readings: dict reading -> percent.

    batches: of f (B, d), x (B, 3, R, R) or None, y (B,); see `infer` for these and the rest.
    Raises ValueError for no images.
    """
    training = learner.training
    learner.eval()
    logits, labels = {}, []
    for f, x, y in batches:
        for reading, of_batch in infer(learner, f, x, f_anc, known).items():
            logits.setdefault(reading, []).append(of_batch)
        labels.append(y)
    learner.train(training)
    if not labels:
        raise ValueError("accuracy of no images")
    labels = torch.cat(labels)
    return {reading: accuracy(torch.cat(parts), labels) for reading, parts in logits.items()}


def anchor_prompts(learner, settings, class_chunk=0):
    """f_T(t_anc) of the classes that a learner is bound to: unit (C, d); None without an anchor."""
    if settings["template"] != "anchoropt":
        return None
    return anchor_features(learner.clip_model, learner.class_names, learner.template.anchor_tokens,
                           settings["preposition"], class_chunk)


def evaluate_items(learner, settings, items, known, args):
    """`evaluate` on image files. items: of `data.Item`, labels as the learner's classes."""
    f_anc = anchor_prompts(learner, settings, args.class_chunk)
    return evaluate(learner, test_batches(learner, settings, items, f_anc, args), f_anc, known)


def test_batches(learner, settings, items, f_anc, args):
    """The test images in batches of f, x, y. Frozen features are computed once per process."""
    clip_model, device = learner.clip_model, learner.clip_model.logit_scale.device
    labels = torch.tensor([item.label for item in items], device=device)
    batch_size = test_batch_size(learner, len(items), args.test_batch)
    f = crops = None
    if f_anc is not None or not learner.needs_images:
        clip_settings = tuple((name, settings[name]) for name in stage1.CLIP_SETTINGS)
        f = frozen_features(clip_model, clip_settings, tuple(items), args.feature_cache,
                            args.workers)
    if learner.needs_images:
        images = data.Images(items, data.test_transform(clip_model.visual.input_resolution))
        crops = iter(data.loader(images, batch_size=batch_size, workers=args.workers,
                                 device=device))

    for start in range(0, len(items), batch_size):
        batch = slice(start, start + batch_size)
        x = None
        if crops is not None:
            x = data.normalize(next(crops)[0], device)
        yield None if f is None else f[batch], x, labels[batch]


def test_batch_size(learner, n, asked):
    """How many of n test images go at a time: all, unless answer or memory depends on it."""
    matrix = learner.template.position_matrix
    if learner.needs_images:
        return asked or 200
    if learner.prompts_per_image or (matrix is not None and matrix.test_position == "sample"):
        return asked or 100
    return max(n, 1)


@functools.lru_cache(maxsize=32)
def frozen_features(clip_model, clip_settings, items, cache, workers):
    """f_I of test images by the frozen CLIP: (n, d) float32."""
    images = data.Images(items, data.test_transform(clip_model.visual.input_resolution))
    kept = None
    if cache:
        kept = stage1.kept_features(clip_model, dict(clip_settings), images, cache)
    encode = functools.partial(encode_image, clip_model)
    device = clip_model.logit_scale.device
    f, _ = next(data.epoch_features(images, [0], encode, device, kept=kept, workers=workers))
    return f


# ---------------------------------------------------------------------------- learnt prompts

def load_prompt(path):
    """Reads a prompt.pt: dict with `state` (learnt tensors), `settings`, `class_names`, `seed`.

    Raises FileNotFoundError, or ValueError for a file that is damaged or something else.
    """
    try:
        content = read_as_data(path)
    except ValueError as error:
        advice = "give a run's folder or its prompt.pt"
        if pathlib.Path(path).name == "prompt.pt":
            advice = "train it again with --overwrite"
        raise ValueError(f"{path} could not be read ({error}); {advice}") from error
    if not is_prompt(content):
        raise ValueError(f"{path} is not a prompt.pt of stage2.py")
    # Files from before a CLIP had settings of its own lack them.
    content["settings"] = dict.fromkeys(stage1.CLIP_SETTINGS, "default") | content["settings"]
    return content


def is_prompt(content):
    """Is this what stage2.py saves as prompt.pt, as far as its kinds of values go?"""
    kinds = {"state": dict, "settings": dict, "class_names": list, "seed": int}
    if not isinstance(content, dict):
        return False
    if not all(isinstance(content.get(key), kind) for key, kind in kinds.items()):
        return False
    if not all(isinstance(name, str) for name in content["class_names"]):
        return False
    settings = content["settings"]
    needed = ["dataset", "baseline", "template", "clip", "dtype", "classes"]
    if settings.get("template") == "anchoropt":
        needed.append("preposition")
    return all(isinstance(settings.get(key), str) for key in needed)


def load_learner(path, saved, clip_model, class_chunk=0):
    """The learner of a prompt.pt, on the classes that it was learnt on, in eval mode.

    saved: from `load_prompt(path)`. Raises ValueError where state, settings and CLIP do not fit.
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
        raise ValueError(f"{path} does not fit its own settings or this CLIP ({reason}); give "
                         "the --clip it was trained with, or train it again with "
                         "--overwrite") from error
    return learner.eval()


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
    """The CLIP that a prompt was learnt with; its settings win over the options.

    args: with clip, dtype, device. Raises ValueError where --clip is another one.
    """
    if args.clip and clip_identity(args.clip) != settings["clip"]:
        raise ValueError(f"{path} was trained with CLIP {settings['clip']}, but --clip is "
                         f"{clip_identity(args.clip)}; give the one it was trained with (none is "
                         "needed for a CLIP that has a name)")
    own = dict(settings)
    if own["dtype"] == "default":
        own["dtype"] = args.dtype or "default"
    elif args.dtype not in (None, own["dtype"]):
        print(f"note: {path} was trained in {own['dtype']}, which is used instead of "
              f"--dtype {args.dtype}")
    try:
        return stage1.load_clip_for(own, args)
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
        self.set_classes(self.learnt_on)

    @torch.no_grad()
    def set_classes(self, class_names):
        """Binds it to any class names: C strings. Raises ValueError for what CLIP cannot read."""
        class_names = list(class_names)
        if not class_names:
            raise ValueError("no class names: there is nothing to choose from")
        self.learner.set_classes(class_names)
        self.class_names = class_names
        self.known = set(class_names) <= set(self.learnt_on)
        self.f_anc = anchor_prompts(self.learner, self.settings, self.class_chunk)
        return self

    @torch.no_grad()
    def probabilities(self, pictures, batch_size=100, workers=0):
        """q(c | x), Eq. 1, by the inference rule: (n, C). pictures: n paths of image files."""
        clip_model, device = self.learner.clip_model, self.learner.clip_model.logit_scale.device
        items = [data.Item(str(picture), 0) for picture in pictures]
        images = data.Images(items, data.test_transform(clip_model.visual.input_resolution))
        q = [torch.zeros(0, len(self.class_names), device=device)]
        batches = data.loader(images, batch_size=batch_size, workers=workers, device=device)
        for crops, _ in batches:
            x = data.normalize(crops, device)                                   # (B, 3, R, R)
            f = encode_image(clip_model, x).float()                             # (B, d)
            logits = infer(self.learner, f, x, self.f_anc, self.known)["final"]
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
    files = prompt_files([run])
    if len(files) > 1:
        raise ValueError(f"{run} holds {len(files)} runs; name one, such as {files[0].parent}")
    path = files[0]
    saved = load_prompt(path)
    args = argparse.Namespace(clip=clip, dtype=dtype, device=device or stage1.default_device())
    clip_model = load_clip_of(path, saved["settings"], args)
    learner = load_learner(path, saved, clip_model, class_chunk)
    return Classifier(learner, saved["settings"], saved["class_names"], class_chunk)


# ---------------------------------------------------------------------------- pictures, features

def classify_pictures(args):
    """`python eval.py RUN --images ...`: the top classes of each picture, with probabilities."""
    pictures = []
    for path in args.images:
        pictures += data.pictures_in(path)
    classifier = classifier_of(args)
    rule = "ensemble of normal and anchor prompt"
    if classifier.known or classifier.f_anc is None:
        rule = "normal prompt"
    print(f"{len(classifier.class_names)} classes; the {rule} answers")

    q = classifier.probabilities(pictures, args.test_batch or 100, args.workers)
    rows = []
    for picture, of_picture in zip(pictures, q):
        best = of_picture.topk(min(args.top or 5, len(of_picture)))
        named = [(classifier.class_names[i], p)
                 for i, p in zip(best.indices.tolist(), best.values.tolist())]
        print(f"{picture}: " + ", ".join(f"{name} {100 * p:.1f} %" for name, p in named))
        for rank, (name, p) in enumerate(named, 1):
            rows.append({"image": picture, "rank": rank, "class": name, "probability": f"{p:.6f}"})
    if args.csv:
        stage1.save_csv(args.csv, rows)


def save_text_features(args):
    """`python eval.py RUN --save-text-features FILE.npz`: class_names, normal and anchor."""
    classifier = classifier_of(args)
    f_norm, f_anc = classifier.text_features()
    arrays = {"class_names": np.array(classifier.class_names), "normal": f_norm.cpu().numpy()}
    if f_anc is not None:
        arrays["anchor"] = f_anc.cpu().numpy()
    path = args.save_text_features
    with data.written_aside(path) as aside, open(aside, "wb") as file:
        np.savez(file, **arrays)
    print(f"{path}: {', '.join(arrays)} of {len(classifier.class_names)} classes")


def classifier_of(args):
    """The run that the command line names, bound to the classes that it names."""
    if len(args.paths) > 1:
        raise ValueError(f"name one run, not {len(args.paths)}: {', '.join(args.paths)}")
    names = None
    if args.classes_from:
        names = read_class_names(args.classes_from)
    classifier = load_run(args.paths[0], args.clip, args.device, args.dtype, args.class_chunk)
    if names is not None:
        classifier.set_classes(names)
    return classifier


def read_class_names(path):
    """A text file of class names, one a line; a name that comes twice counts once."""
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}); expected a class name a "
                         "line") from error
    if text.lstrip()[:1] in ("{", "["):
        raise ValueError(f"{path} looks like JSON; expected a class name a line")
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if not names:
        raise ValueError(f"{path} is empty; expected a class name a line")
    return list(dict.fromkeys(names))


# ---------------------------------------------------------------------------- other datasets

def evaluate_runs(args):
    """`python eval.py RUN ... --dataset NAME ...`: every run on every dataset, and a table."""
    files = prompt_files(args.paths)
    datasets = [data.load_dataset(name, args.root) for name in args.dataset]
    get_clip = OneClip(args)
    results = []
    for file in files:
        for name, dataset in zip(args.dataset, datasets):
            results.append(evaluate_run(file, dataset, name, args, get_clip))

    keys, rows = ("run", "seed", "target", "classes", "images"), []
    for result in results:
        figures = [two_digits(result["accuracy"].get(reading)) for reading in READINGS]
        rows.append([result[key] for key in keys] + figures)
    print("\n" + "\n".join(markdown_table([*keys, *READINGS], rows)))
    print_notes([(note, f"{result['run']} on {result['target']}")
                 for result in results for note in result["notes"]])
    if any("toy" in (result["dataset"], result["target"]) for result in results):
        print(f"\n{TOY_WARNING}")


class OneClip:
    """Loads the CLIP of a run, and keeps it for runs with the same: one at a time on the device."""

    def __init__(self, args):
        self.args = args
        self.key = None

    def __call__(self, path, settings):
        key = [settings[name] for name in stage1.CLIP_SETTINGS]
        if key != self.key:
            self.key = self.clip_model = None
            frozen_features.cache_clear()               # it holds the CLIP that goes
            self.clip_model = load_clip_of(path, settings, self.args)
            self.key = key
        return self.clip_model


def evaluate_run(path, dataset, dataset_path, args, get_clip):
    """A learnt prompt and its anchor on all classes of a dataset; writes eval-<dataset>.json.

    The inference rule: final is the ensemble for foreign classes, and the normal prompt for the
    classes that the run learnt on, ImageNet's in its variants after training with --classes all.
    path: of its prompt.pt. dataset: a `data.Dataset`, read from dataset_path. Returns the file's
    content.
    """
    saved = load_prompt(path)
    settings = saved["settings"]
    if dataset.notes and dataset.name == settings["dataset"]:
        # A split that was made here depends on the seed: take the one that the run learnt with.
        dataset = data.load_dataset(dataset_path, args.root, saved["seed"])
    task = data.few_shot_task(dataset, "all", seed=saved["seed"])
    facts = data.digests(dataset, task)
    facts = {key: facts[key] for key in ("class names", "test images")}
    file = transfer_file(path, dataset.name)
    done = None
    if not args.overwrite:
        done = load_transfer(path, dataset.name)
    if done is not None and "facts" in done:            # without, it is old: made again
        stage1.check_unchanged(file, done["facts"], facts, "to make it again: --overwrite")
        print(f"finished already: {file} (--overwrite to make it again)", flush=True)
        return done

    known = dataset.class_names == saved["class_names"]
    if settings["dataset"] == "imagenet" and dataset.name in VARIANTS:
        known = True
    notes, comparable = notes_of_run(path)
    notes += dataset.notes
    if settings["classes"] != "all" and settings["baseline"] != "clip":
        known = comparable = False
        note = "learnt on base classes alone; Tables 2 and 4 are of runs with --classes all"
        if settings["template"] == "anchoropt":
            note += "; final is the ensemble for all classes"
        notes.append(note)
    learner = load_learner(path, saved, get_clip(path, settings), args.class_chunk)
    learner.set_classes(dataset.class_names)
    torch.manual_seed(saved["seed"])            # of W, with --test-position sample
    scores = evaluate_items(learner, settings, dataset.test, known, args)
    result = {"dataset": settings["dataset"], "target": dataset.name, "seed": saved["seed"],
              "run": run_name(path), "prompt": sha256(path)[:8], "settings": settings,
              "accuracy": scores, "known": known, "classes": len(dataset.class_names),
              "images": len(dataset.test), "facts": facts, "notes": notes,
              "comparable": comparable and not dataset.notes}
    with data.written_aside(file) as aside:
        aside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def notes_of_run(path):
    """What is noted about the run of a prompt.pt, in its results.json, and whether it compares."""
    results = path.with_name("results.json")
    if path.name != "prompt.pt" or not results.exists():
        return [], True
    result = load_result(results)
    return list(result["notes"]), result["comparable"]


def run_name(path):
    """`coop-anchoropt` for .../coop-anchoropt/seed1/prompt.pt; elsewhere the file's own name."""
    path = path.resolve()
    if path.name == "prompt.pt" and path.parent.name.startswith("seed"):
        return path.parent.parent.name
    return path.stem


def transfer_file(path, target):
    """Where `evaluate_run` writes: eval-<target>.json, for another name with its stem in front."""
    if path.name == "prompt.pt":
        return path.with_name(f"eval-{target}.json")
    return path.with_name(f"{path.stem}-eval-{target}.json")


def load_transfer(path, target):
    """What `evaluate_run` wrote for this prompt.pt and target.

    None where there is nothing, or the prompt has been learnt anew since. ValueError for a damaged
    file.
    """
    file = transfer_file(path, target)
    if not file.exists():
        return None
    result = read_record(file)
    kinds = {"run": str, "target": str, "classes": int, "images": int, "prompt": str}
    if result is None or not is_accuracies(result.get("accuracy"), result["settings"]) or not all(
            isinstance(result.get(key), kind) for key, kind in kinds.items()):
        raise ValueError(f"{file} is damaged; make it again: python eval.py {path} "
                         f"--dataset {target} --overwrite")
    if path.exists() and result["prompt"] != sha256(path)[:8]:
        return None
    return result


# ---------------------------------------------------------------------------- results of runs

def read_record(path):
    """What results.json and eval-*.json share, checked: a dict, or None for anything else.

    Older files lack `notes` and `comparable`: they get what holds for them.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    record.setdefault("notes", [])
    record.setdefault("comparable", not record["notes"])
    kinds = {"settings": dict, "seed": int, "dataset": str, "notes": list, "comparable": bool}
    if not all(isinstance(record.get(key), kind) for key, kind in kinds.items()):
        return None
    if not isinstance(record.get("facts", {}), dict):
        return None
    if not all(isinstance(note, str) for note in record["notes"]):
        return None
    return record


def is_accuracies(value, settings):
    """Is this what `evaluate` returns for a run with these settings: a dict reading -> percent?"""
    expected = {"normal", "final"}
    if settings.get("template") == "anchoropt":
        expected = set(READINGS)
    if not isinstance(value, dict) or set(value) != expected:
        return False
    return all(isinstance(percent, (int, float)) and 0 <= percent <= 100
               for percent in value.values())


def has_sound_W(result):
    """Is the run's position matrix there as rows, or None where none was learnt?"""
    W = result.get("position_matrix")
    if W is None:
        return True
    if not isinstance(W, dict) or not isinstance(W.get("end"), list):
        return False
    for row in W["end"]:                                        # (K, K) of 0 and 1
        if not isinstance(row, list) or len(row) != len(W["end"]):
            return False
        if not all(value in (0, 1) for value in row):
            return False
    return isinstance(result["settings"].get("anchor_length"), int)


def load_result(path):
    """One results.json of stage2.py. Raises ValueError for a damaged one."""
    path = pathlib.Path(path)
    result = read_record(path)
    sound = result is not None and is_accuracies(result.get("base"), result["settings"])
    if sound and result["settings"].get("classes") != "all":
        sound = is_accuracies(result.get("novel"), result["settings"])
    elif sound:                                                 # nothing is novel
        sound = result.get("novel", "missing") is None
    if not sound or not has_sound_W(result):
        advice = ""
        if path.name == "results.json":
            advice = "; run it again with --overwrite"
        raise ValueError(f"{path} is not a results.json of stage2.py{advice}")
    return result | {"run": path.resolve().parent.parent.name, "folder": path.parent}


def load_results(paths):
    """All results.json under the given files and folders, sorted by path."""
    found = {}
    for path in map(pathlib.Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; give the folder that stage2.py wrote "
                                    "to (--output)")
        files = [path]
        if path.is_dir():
            files = sorted(path.rglob("results.json"))
        elif path.name == "prompt.pt":                          # the run's other file
            files = [path.with_name("results.json")]
        found |= {file.resolve(): file for file in files}
    results = [load_result(path) for path in found.values()]
    folders = {}                                            # of each seed of a run
    for result in results:
        folder = folders.setdefault((run_key(result), result["seed"]), result["folder"])
        if folder is not result["folder"]:
            raise ValueError(f"{folder} and {result['folder']} are both seed {result['seed']} of "
                             "one run: move one of them elsewhere")
    return results


def two_digits(value):
    return "" if value is None else f"{value:.2f}"


def listed_seeds(results):
    seeds = ", ".join(map(str, sorted(result["seed"] for result in results)))
    return f"seeds {seeds}" if len(results) > 1 else f"seed {seeds}"


def markdown_table(header, rows):
    """Lines of Markdown: the first column to the left, the others to the right, "-" for nothing."""
    rows = [[str(cell) or "-" for cell in row] for row in rows]
    rows.insert(0, header)
    widths = [max(5, *map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [f"{row[0]:{widths[0]}}"]
        cells += [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:])]
        lines.append(f"| {' | '.join(cells)} |")
    rules = [f":{'-' * (widths[0] + 1)}"]
    rules += [f"{'-' * (width + 1)}:" for width in widths[1:]]
    lines.insert(1, f"|{'|'.join(rules)}|")
    return lines


def run_key(result):
    """What the seeds of one run share: dataset, the run's name, the folder where it was found."""
    return result["dataset"], result["run"], str(result["folder"].resolve().parent)


def values_of(seeds, reading):
    """Mean base, novel and HM of one reading; base alone where all classes were learnt on.

    The HM is that of the averaged base and novel, as in the paper.
    """
    means = {"base": statistics.fmean(seed["base"][reading] for seed in seeds)}
    if seeds[0]["novel"]:
        means["novel"] = statistics.fmean(seed["novel"][reading] for seed in seeds)
        means["hm"] = harmonic_mean(means["base"], means["novel"])
    return means


MEASURES = ("base", "novel", "hm")


def results_table(results):
    """Table S1's rows for every run: lines of Markdown."""
    lines = []
    for (dataset, run, _), seeds in data.group_by(run_key, results).items():
        rows = []
        for reading in seeds[0]["base"]:
            values = values_of(seeds, reading)
            cells = [two_digits(values.get(measure)) for measure in MEASURES]
            rows.append([reading, *cells])
        lines += ["", f"{dataset}, {run}, {listed_seeds(seeds)}", ""]
        lines += markdown_table(["prompt  ", "base", "novel", "HM"], rows)
    return lines


def summary_table(results, reading):
    """One row per run: base, novel and HM of one reading, mean and standard deviation over seeds.

    The mean HM is that of the mean base and mean novel; its deviation is that of the seeds' HMs.
    """
    rows = []
    for (dataset, run, _), seeds in data.group_by(run_key, results).items():
        if reading not in seeds[0]["base"]:                     # plain prompts have no anchor
            continue
        means = values_of(seeds, reading)
        each = [values_of([seed], reading) for seed in seeds]
        cells = []
        for measure in MEASURES:
            cell = two_digits(means.get(measure))
            if cell and len(seeds) > 1:
                cell += f" ± {statistics.stdev(values[measure] for values in each):.2f}"
            cells.append(cell)
        rows.append([f"{dataset}, {run}", *cells, str(len(seeds))])
    return markdown_table([f"run ({reading})", "base", "novel", "HM", "seeds"], rows)


TOY_WARNING = ("These are figures of the toy world: they check the machinery and are no evidence "
               "for or against the paper's claims.")


def print_table(results, summary=None):
    """The runs as `results_table` or, for a reading, `summary_table`; and their notes."""
    lines = summary_table(results, summary) if summary else results_table(results)
    print("\n".join(lines))
    print_notes([(note, f"{result['dataset']}, {result['run']}")
                 for result in results for note in result["notes"]])
    if any(result["dataset"] == "toy" for result in results):
        print(f"\n{TOY_WARNING}")


def print_notes(notes):
    """Each note once, with what it is about. notes: pairs (note, what)."""
    about = {}
    for note, what in notes:
        about.setdefault(note, {})[what] = None                 # a set that keeps its order
    if about:
        print("\nNotes\n")
    for note, what in about.items():
        listed = "; ".join(list(what)[:3])
        if len(what) > 3:
            listed += f"; and {len(what) - 3} more"
        print(f"- {note} ({listed})")


def draw_figure4(results, path):
    """Fig. 4: the learnt W (without noise) of every run, the lowest seed of each, side by side."""
    first = {}
    for result in sorted(results, key=lambda result: result["seed"]):
        if result.get("position_matrix"):
            first.setdefault(run_key(result), result)
    if not first:
        raise ValueError("no run with a learnt position matrix here; make one: python stage2.py")
    panels = {}
    n_anchor = {}
    for key in sorted(first):
        title = panel_title(key, first)
        panels[title] = first[key]["position_matrix"]["end"]
        n_anchor[title] = first[key]["settings"]["anchor_length"]
    if not pathlib.Path(path).suffix:                           # it says the format
        path = f"{path}.png"
    with data.written_aside(path) as aside:
        plot_position_matrix(panels, aside, n_anchor)
    print(f"{path}: " + ", ".join(str(first[key]["folder"]) for key in sorted(first)))


def panel_title(key, keys):
    """As short as tells one run from the others: dataset, then its name, then its folder."""
    dataset, run, folder = key
    if len({other[0] for other in keys}) == len(keys):
        return dataset
    if len({other[:2] for other in keys}) == len(keys):
        return dataset + "\n" + "\n".join(textwrap.wrap(run, 40))
    return dataset + "\n" + "\n".join(textwrap.wrap(folder, 40))


# ---------------------------------------------------------------------------- the paper's tables

PAPER_FILE = pathlib.Path(data.ASSETS) / "paper_tables.csv"
# A cell takes runs whatever these are, and says so.
MACHINE = (*stage1.CLIP_SETTINGS, "descriptions", "anchor")


class Row(NamedTuple):
    """A row of a table: its label in the paper, the runs that belong in it, the prompt it shows."""
    label: str
    baseline: str = "coop"
    template: str = "anchoropt"
    changed: dict = {}                  # settings that are not baseline, template, dataset's own
    reading: str = "final"
    note: str = ""                      # what a reader of its figures must know

    def settings(self, dataset):
        """The settings of its runs on a dataset."""
        defaults = default_settings(dataset, self.baseline, self.template,
                                    self.changed.get("classes"),
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
        return ("accuracy",) if self.source else MEASURES


class Cell(NamedTuple):
    values: dict                        # measure -> percent
    runs: str                           # what they are the mean of, in words
    comparable: bool = True             # may the paper's figure be subtracted?


def option_rows(key, values, labels=None):
    """A row for each value of one setting of CoOp + AnchorOPT."""
    labels = labels or map(str, values)
    return [Row(label, changed={key: value}) for label, value in zip(labels, values)]


NAMES = {"coop": "CoOp", "cocoop": "CoCoOp", "maple": "MaPLe", "dept": "DePT"}
METHODS = [Row(name + suffix, baseline, template)
           for baseline, name in NAMES.items()
           for template, suffix in zip(TEMPLATES, ("", " + ATPrompt", " + AnchorOPT"))]

# Tables 2 and 4: learnt on all of ImageNet's classes, with settings of their own where a source has
# them (assets/settings.csv, the rows with classes = all).
NO_SOURCE = ("no source gives the settings for all 1,000 classes: those of the base-to-novel run "
             "are used")


def transfer_rows():
    rows = []
    for row in METHODS:
        if row.baseline == "dept":                          # the paper has none there
            continue
        note = ""
        if row.template == "anchoropt" and row.baseline != "coop":
            note = NO_SOURCE
        rows.append(row._replace(changed={"classes": "all"}, note=note))
    return rows


TRANSFER = transfer_rows()
N_ROWS = [Row(f"{reading} prompt, N = {n}", changed={"anchor_length": n}, reading=reading)
          for reading in ("anchor", "normal") for n in (1, 2, 3, 4)]
TAUS = (0.1, 0.5, 1, 2, 4)
TABLES = {
    "1": Table("base to novel classes", METHODS, ELEVEN, ("average", *ELEVEN)),
    "2": Table("from ImageNet to ten other datasets", TRANSFER, ELEVEN, (*ELEVEN, "average"),
               "imagenet"),
    "3": Table("one stage and two", [
        Row("One-stage", changed={"one_stage": True}),
        Row("Two-stage")], ELEVEN, ("average",)),
    "4": Table("from ImageNet to its variants", TRANSFER, ("imagenet", *VARIANTS),
               ("imagenet", *VARIANTS, "average"), "imagenet"),
    "5": Table("the normal prompt alone", [
        Row("ATPrompt", template="atprompt"),
        Row("AnchorOPT w/o Ensemble", reading="normal")], ELEVEN, ("average",)),
    "6": Table("prepositions", option_rows("preposition", ("with", "at", "sun", "sea", "of"))),
    "7": Table("anchor length N", N_ROWS),
    "8": Table("where the anchor stands", option_rows(
        "arrangement", ("adaptive", "before", "middle", "after-class"),
        ("Position Matrix", "Before Soft Token", "Middle", "After Class Token"))),
    "9": Table("distillation", [Row("without KD", changed={"lambda_2": 0}), Row("with KD")]),
    "S1": Table("each prompt of CoOp + AnchorOPT", [
        Row("CoOp", template="plain"),
        Row("ATPrompt", template="atprompt"),
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
    """One table of the paper, as printed: (dataset or "average", label) -> measure -> str; note."""
    with open(PAPER_FILE, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["table"] == number]
    return {(row["dataset"], row["method"]): row for row in rows}


def compares(result, settings):
    """May the paper's figure be subtracted from this run's? Data and CLIP must be the paper's."""
    return result["comparable"] and result["settings"].get("clip") == settings["clip"]


def find_seeds(results, settings):
    """The results, one per seed, of the run with these settings, and remarks on them.

    All settings but MACHINE must agree. Where several folders fit: one that compares with the
    paper, then the one with the fewest MACHINE settings off the defaults, then the one with most
    seeds.
    """
    def method(some):
        return {key: value for key, value in some.items() if key not in MACHINE}

    fits = {}                                               # folder of a run -> its seeds
    for result in results:
        if method(result["settings"]) == method(settings):
            fits.setdefault(result["folder"].resolve().parent, []).append(result)

    def off(folder):
        own = fits[folder][0]["settings"]
        return [f"{key} {own[key]}" for key in MACHINE
                if key in own and own[key] != settings.get(key, "default")]

    def last(folder):
        foreign = not all(compares(result, settings) for result in fits[folder])
        return foreign, len(off(folder)), -len(fits[folder]), str(folder)

    if not fits:
        return [], []
    best, *others = sorted(fits, key=last)
    remarks = [f"run with {what}" for what in off(best)]
    for left in others:
        what = f" ({', '.join(off(left))})" if off(left) else ""
        remarks.append(f"{best} is shown, {left}{what} is left out")
    return fits[best], remarks


def fill(table, results, output):
    """The cells of a table that these results fill, and what is missing.

    Returns cells, a dict (dataset, label) -> Cell, with "average" among the datasets; commands, the
    lines that fill the empty ones, for runs in the folder `output`; and notes, pairs as in
    `print_notes`.
    """
    cells = {}
    commands = []
    notes = []
    for row in table.rows:
        fill_row = fill_from_source if table.source else fill_from_runs
        row_cells, row_commands, row_notes = fill_row(table, row, results, output)
        cells |= row_cells
        commands += row_commands
        notes += row_notes
        if row.note:
            notes.append((row.note, row.label))
        targets = [dataset for dataset in table.datasets if dataset != table.source]
        present = [row_cells[dataset, row.label] for dataset in targets
                   if (dataset, row.label) in row_cells]
        if present:
            cells["average", row.label] = average_cell(table, present, len(targets))
    return cells, list(dict.fromkeys(commands)), notes


def average_cell(table, present, n):
    """The average of the cells that are there, of n."""
    averages = {}
    for measure in table.measures:
        if measure != "hm":                     # HM is that of the averages, as in the paper
            averages[measure] = statistics.fmean(cell.values[measure] for cell in present)
    if "hm" in table.measures:
        averages["hm"] = harmonic_mean(averages["base"], averages["novel"])
    comparable = len(present) == n and all(cell.comparable for cell in present)
    return Cell(averages, f"{len(present)} of {n} datasets", comparable)


def fill_from_runs(table, row, results, output):
    """`fill` for one row of a table whose cells are runs on their own dataset."""
    cells = {}
    commands = []
    notes = []
    for dataset in table.datasets:
        settings = row.settings(dataset)
        seeds, remarks = find_seeds(results, settings)
        if not seeds:
            commands.append(train_command(row, settings, output))
            notes += notes_on(f"{row.label}, {dataset}", left_out(results, row, dataset), [])
            continue
        comparable = all(compares(seed, settings) for seed in seeds)
        values = values_of(seeds, row.reading)
        cells[dataset, row.label] = Cell(values, listed_seeds(seeds), comparable)
        notes += notes_on(f"{row.label}, {dataset}", remarks, seeds)
    return cells, commands, notes


def left_out(results, row, dataset):
    """Why a cell is empty although its method was run there: a remark in a list, or none."""
    cell = {"dataset": dataset, "baseline": row.baseline, "template": row.template} | row.changed
    runs = {result["run"] for result in results
            if all(result["settings"].get(key) == value for key, value in cell.items())}
    if not runs:
        return []
    return [f"no run with the table's settings; left out: {', '.join(sorted(runs)[:3])}"]


def fill_from_source(table, row, results, output):
    """`fill` for one row of Tables 2 and 4: runs on the source, and what they left on targets."""
    settings = row.settings(table.source)
    seeds, remarks = find_seeds(results, settings)
    cells = {}
    commands = []
    absent = []
    if seeds:
        run = shlex.quote(str(seeds[0]["folder"].parent))
    else:                               # * stands for what is not known yet (descriptions, clip)
        run = shlex.quote(str(stage1.run_folder(output, settings, 1).parent)) + "*"
        commands.append(train_command(row, settings, output))
        remarks = left_out(results, row, table.source)
    notes = notes_on(f"{row.label}, {table.source}", remarks, seeds)

    for dataset in table.datasets:
        if dataset == table.source:
            found = seeds
            values = [seed["base"][row.reading] for seed in seeds]
        else:
            found = [load_transfer(seed["folder"] / "prompt.pt", dataset) for seed in seeds]
            found = [result for result in found if result is not None]
            values = [result["accuracy"][row.reading] for result in found]
        if found:
            comparable = all(compares(result, settings) for result in [*seeds, *found])
            accuracy_of_seeds = {"accuracy": statistics.fmean(values)}
            cells[dataset, row.label] = Cell(accuracy_of_seeds, listed_seeds(found), comparable)
            notes += notes_on(f"{row.label}, {dataset}", [], found)
        elif dataset != table.source:
            absent.append(dataset)
    if absent:
        commands.append(f"python eval.py {run} --dataset {' '.join(absent)} --root $DATA")
    return cells, commands, notes


def notes_on(cell, remarks, results):
    """Pairs as in `print_notes`: the remarks on a cell, and what its runs have noted."""
    notes = list(remarks)
    for result in results:
        notes += result["notes"]
    return [(note, cell) for note in notes]


def train_command(row, settings, output):
    """The shell's line that makes a cell's runs. $DATA is the user's folder of the datasets."""
    dataset = settings["dataset"]
    defaults = default_settings(dataset, row.baseline, row.template)
    words = ["python stage2.py", "--dataset", dataset,
             "--baseline", row.baseline, "--template", row.template]
    for key, value in row.changed.items():
        if value != defaults[key]:
            words.append(stage1.option_of(key))
            if value is not True:
                words.append(str(value))
    words.append("--seeds 1 2 3")
    if dataset != "toy":
        words.append("--root $DATA")
    if os.path.normpath(output) != "output":
        words.append(f"--output {shlex.quote(str(output))}")
    return " ".join(words)


def table_records(number, table, cells):
    """A dict of text per line: table, dataset, method, per measure ours, theirs, difference; runs.

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
                record[measure] = two_digits(ours)
                record[f"{measure}_paper"] = theirs
                record[f"{measure}_difference"] = ""
                if ours is not None and theirs and cell.comparable:
                    record[f"{measure}_difference"] = f"{ours - float(theirs):+.2f}"
            records.append(record | {"runs": cell.runs})
    return records


def print_paper_table(args):
    """`python eval.py OUTPUT --table N`: Markdown to stdout, or CSV (see --csv)."""
    results, table = load_results(args.paths), TABLES[args.table]
    output = args.paths[0]
    if results:                                             # output/<dataset>/<run>/seed<k>
        output = os.path.relpath(results[0]["folder"].resolve().parent.parent.parent)
    records = []
    commands = []
    notes = []
    tables = tables_to_show(table, args.on, results, output)
    for one in tables:
        cells, missing, own_notes = fill(one, results, output)
        records += table_records(args.table, one, cells)
        commands += missing
        notes += own_notes
    for (dataset, label), row in load_paper(args.table).items():
        if row["note"] and dataset in tables[0].blocks:
            notes.append((row["note"], f"the paper's {label}, {dataset}"))

    if args.csv == "-":
        writer = csv.DictWriter(sys.stdout, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        return
    if args.csv:
        stage1.save_csv(args.csv, records)
    print(f"## Table {args.table}: {table.title}")
    print_records(records, table.measures)
    print_notes(notes)
    if commands:
        print("\nEmpty cells, and what fills them ($DATA: the folder of the datasets)\n")
        print("\n".join(["```", *commands, "```"]))


def tables_to_show(table, on, results, output):
    """The table as the paper has it, or on another dataset; the toy world's where it has runs."""
    if on:
        check_on(on, table)
        return [table._replace(datasets=(on,), blocks=(on,))]
    toy = table._replace(datasets=("toy",), blocks=("toy",))
    if "average" in table.blocks and not table.source:
        toy_cells, _, _ = fill(toy, results, output)
        if toy_cells:                           # a first try, below the paper's datasets
            return [table, toy]
    return [table]


def check_on(dataset, table):
    if table.source:
        raise ValueError(f"--on {dataset}: Tables 2 and 4 are of runs on imagenet")
    if dataset not in (*ELEVEN, "toy"):
        raise ValueError(f"--on {dataset}: give one of {', '.join((*ELEVEN, 'toy'))}, which have "
                         "training images")


def print_records(records, measures):
    """`table_records` as Markdown, a block for each dataset."""
    header = ["method"]
    for measure in measures:
        header += [measure.replace("hm", "HM"), "paper", "diff"]
    for dataset in dict.fromkeys(record["dataset"] for record in records):
        of_dataset = [record for record in records if record["dataset"] == dataset]
        rows = [list(record.values())[2:] for record in of_dataset]     # from the method on
        print("\n".join(["", f"### {dataset}", "", *markdown_table([*header, "runs"], rows)]))
        if dataset == "toy" and any(record["runs"] != "none yet" for record in of_dataset):
            print(f"\n{TOY_WARNING}")


# ---------------------------------------------------------------------------- command line

EVAL_OPTIONS = argparse.ArgumentParser(add_help=False)
EVAL_OPTIONS.add_argument("paths", nargs="+", metavar="RUN",
                          help="a run's folder, or a folder of many, as output/; with --dataset, "
                               "--images and --save-text-features also a prompt.pt")
group = EVAL_OPTIONS.add_argument_group("what to do, one of these (default: list all runs found)")
group.add_argument("--summary", choices=READINGS,
                   help="a row per run with the standard deviation over seeds, for this prompt")
group.add_argument("--table", type=str.upper, choices=list(TABLES),
                   help="collect the runs into this table of the paper, beside its figures")
group.add_argument("--figure", choices=["4"], help="draw the learnt position matrices")
group.add_argument("--dataset", nargs="+", metavar="NAME",
                   help="evaluate the learnt prompts on all classes of these datasets, named as "
                        "for stage2.py; writes eval-NAME.json into each run")
group.add_argument("--images", nargs="+", metavar="PATH",
                   help="one RUN: name the likeliest classes of these pictures, or of those in a "
                        "folder")
group.add_argument("--save-text-features", metavar="FILE.npz",
                   help="one RUN, not of cocoop: write class_names and the prompts' unit text "
                        "features, normal and anchor (C, d), float32")
group = EVAL_OPTIONS.add_argument_group("tables and figures")
group.add_argument("--on", metavar="NAME",
                   help="with --table 1, 3 and 5 to S3: its runs on this dataset instead, one of "
                        "the eleven or toy (default: the paper's)")
group.add_argument("--csv", nargs="?", const="-", metavar="FILE",
                   help="with --table or --images: write it to FILE as CSV too; --table without "
                        "FILE: CSV alone, to stdout")
group.add_argument("--output", metavar="FILE",
                   help="with --figure: the picture to write (default: figure4.png)")
group = EVAL_OPTIONS.add_argument_group("pictures, text features")
group.add_argument("--classes-from", metavar="FILE",
                   help="a text file of any class names, one a line, words parted by spaces "
                        "(default: the classes that the run learnt on)")
group.add_argument("--top", type=stage1.at_least(1), metavar="K",
                   help="with --images: how many classes of each picture (default: 5)")
group = EVAL_OPTIONS.add_argument_group("other datasets")
group.add_argument("--root", metavar="DIR",
                   help="with --dataset: folder that holds the datasets (default: the "
                        "environment's DATA, else ./data)")
group.add_argument("--overwrite", action="store_true",
                   help="with --dataset: evaluate again what is finished (default: skip it)")

WHAT_TO_DO = ("summary", "table", "figure", "dataset", "images", "save_text_features")
# Options that only mean something beside another one.
GOES_WITH = {"on": ("table",), "csv": ("table", "images"), "output": ("figure",),
             "classes_from": ("images", "save_text_features"), "overwrite": ("dataset",),
             "top": ("images",), "root": ("dataset",), "feature_cache": ("dataset",),
             "test_batch": ("dataset", "images")}


def parse(argv):
    parser = stage1.Parser("eval.py", description=__doc__,
                           formatter_class=argparse.RawDescriptionHelpFormatter,
                           parents=[EVAL_OPTIONS, stage1.CLIP_OPTIONS, stage1.IMAGE_OPTIONS])
    args = parser.parse_args(argv)
    given = [stage1.option_of(name) for name in WHAT_TO_DO if getattr(args, name)]
    if len(given) > 1:
        parser.error(f"{' and '.join(given)} do not go together: give one of them")
    for option, needs in GOES_WITH.items():
        if getattr(args, option) and not any(getattr(args, need) for need in needs):
            needed = " or ".join(stage1.option_of(need) for need in needs)
            parser.error(f"{stage1.option_of(option)} goes with {needed}")
    if args.images and args.csv == "-":
        parser.error("--csv needs a FILE with --images")
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
        raise FileNotFoundError(f"no results.json under {', '.join(args.paths)}; train with: "
                                "python stage2.py --dataset toy")
    if args.figure:
        return draw_figure4(results, args.output or "figure4.png")
    return print_table(results, args.summary)


def main(argv=None):
    return stage1.run_script("eval.py", run, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
