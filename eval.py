"""Evaluation: the inference rule, accuracy and harmonic mean, the folders that runs live in, and tables of them.

    python eval.py output/                                     all runs found there, without training
    python eval.py --summary final output/                     a row per run, with standard deviations
    python eval.py RUN --dataset caltech101 dtd --root $DATA   a learnt prompt on other datasets (Tabs. 2 and 4)
    python eval.py --table 1 output/                           the runs as a table of the paper, beside its figures
    python eval.py --figure 4 output/                          the learnt position matrices

Sec. 3.2.2, Inference: the normal prompt answers for known base classes, the ensemble of normal and anchor prompt
for unknown novel ones. Table S1's four rows are: anchor, normal, ensemble, and final (what the rule picks).
(`eval` is also a builtin: import this module as `import eval as evaluation`.)
"""

import argparse
import contextlib
import csv
import hashlib
import json
import math
import os
import pathlib
import shlex
import shutil
import statistics
import sys
import urllib.parse
from typing import NamedTuple

import torch

import data
import losses
from anchor import AnchorPrompt, read_as_data
from data import written_aside
from position import plot_position_matrix
from prompts import TEMPLATES, build_learner, clip_identity, encode_image, load_clip, sha256

READINGS = ("anchor", "normal", "ensemble", "final")


# --------------------------------------------------------------------------------- accuracy and harmonic mean

def accuracy(logits, labels):
    """Top-1 accuracy in percent. logits (n, C), labels (n,). Raises ValueError for no images."""
    if len(labels) == 0:
        raise ValueError("accuracy of no images")
    return 100.0 * int((logits.argmax(-1) == labels).sum()) / len(labels)


def harmonic_mean(base, novel):
    """HM = 2 base novel / (base + novel), percent in and out; 0 where both are 0."""
    return 2 * base * novel / (base + novel) if base + novel else 0.0


@torch.no_grad()
def image_features(clip_model, batches):
    """f_I of a DataLoader's images by the frozen CLIP, once: features (n, d) float32, labels (n,), on its device."""
    device, features, labels = clip_model.logit_scale.device, [], []
    for images, label in batches:
        features.append(encode_image(clip_model, images.to(device, non_blocking=True)).float())
        labels.append(label)
    return torch.cat(features), torch.cat(labels).to(device)


@torch.no_grad()
def evaluate(learner, features, labels, anchor_features=None, known=True, images=None, test_batch=100):
    """The four readings of Table S1 on one set of classes: dict reading -> accuracy in percent.

    learner: bound to the C classes; features (n, d): the frozen CLIP's, not normalised; labels (n,);
    anchor_features (C, d): unit features of the anchor prompts, or None where there is no anchor (then only
    normal and final come back). known: base classes (final = normal) or novel ones (final = ensemble).
    images: a DataLoader of the same images in the same order, for baselines that prompt the image tower.
    test_batch: images at a time where prompts depend on the image or W is sampled anew for each batch.
    Raises ValueError for no images.
    """
    if len(labels) == 0:
        raise ValueError("accuracy of no images")
    training = learner.training
    learner.eval()
    matrix = getattr(learner.template, "position_matrix", None) if hasattr(learner, "template") else None
    at_once = not learner.per_image and (matrix is None or matrix.test_position == "argmax")
    size = len(labels) if at_once else test_batch
    pixels = iter(images) if images is not None else None
    picks = {reading: [] for reading in READINGS}
    for start in range(0, len(labels), size):
        u = features[start:start + size]
        x = next(pixels)[0].to(u.device, non_blocking=True) if pixels else None
        normal = learner(u, x)
        picks["normal"].append(normal.argmax(-1))
        if anchor_features is not None:
            anchor = learner.logits(u, anchor_features)
            picks["anchor"].append(anchor.argmax(-1))
            picks["ensemble"].append(losses.ensemble_logits(normal, anchor).argmax(-1))
    learner.train(training)
    result = {reading: 100.0 * int((torch.cat(parts) == labels).sum()) / len(labels)
              for reading, parts in picks.items() if parts}
    result["final"] = result["normal" if known or anchor_features is None else "ensemble"]
    return result


def evaluate_items(learner, settings, items, anchor_tokens=None, known=True, test_sets=None, workers=0, test_batch=None,
                   cache=None):
    """`evaluate` from a list of `data.Item`s: prepares the frozen features, once for all runs that share `test_sets`.

    anchor_tokens (N, d_t): of the run, or None. test_sets: a dict that keeps features between calls, or None.
    test_batch: None for the field's 100 (MaPLe 200). cache: a folder that keeps features between runs, or None.
    """
    clip_model, test_sets = learner.clip_model, {} if test_sets is None else test_sets
    maple = settings["baseline"] == "maple"
    test_batch = test_batch or (200 if maple else 100)
    images = data.Images(items, data.test_transform(clip_model.visual.input_resolution))
    key, device = tuple(items), clip_model.logit_scale.device
    if maple and anchor_tokens is None:                      # nobody reads the frozen features
        features = torch.zeros(len(items), 0, device=device)
        labels = torch.tensor([item.label for item in items], device=device)
    else:
        if key not in test_sets:
            test_sets[key] = frozen_features(clip_model, settings["clip"], images, workers, cache)
        features, labels = test_sets[key]
    anchors = None
    if anchor_tokens is not None:
        anchors = anchor_features(clip_model, learner.class_names, anchor_tokens, settings)
    pixels = data.batches(images, range(len(items)), test_batch, workers) if maple else None
    return evaluate(learner, features, labels, anchors, known, pixels, test_batch)


def frozen_features(clip_model, identity, images, workers=0, cache=None):
    """`image_features` of a `data.Images` in test mode; read from the folder `cache` where they stand there.

    A file's name is a digest of the CLIP (`prompts.clip_identity`), its precision, the transform, and path, size, time
    and label of every image, so a stale or damaged file is never used. The toy world is drawn, and not kept.
    """
    batches, path = data.batches(images, range(len(images)), 256, workers), None
    if cache and all(isinstance(item.source, str) for item in images.items):
        stats = [os.stat(item.source) for item in images.items]
        stamps = [(*item, stat.st_size, stat.st_mtime_ns) for item, stat in zip(images.items, stats)]
        digest = hashlib.sha256(repr((identity, clip_model.dtype, images.transform, stamps)).encode()).hexdigest()
        path = pathlib.Path(cache) / f"{digest[:32]}.pt"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            kept = read_as_data(path, clip_model.logit_scale.device)
            if kept["digest"] == digest:
                return kept["features"], kept["labels"]
    features, labels = image_features(clip_model, batches)
    if path:
        with written_aside(path) as aside:
            torch.save({"digest": digest, "features": features, "labels": labels}, aside)
    return features, labels


# ------------------------------------------------------------------------------------------- settings and folders

SETTINGS_FILE = pathlib.Path(__file__).resolve().parent / "assets" / "settings.csv"
ANCHOR_SETTINGS = ("clip", "dtype", "classes", "shots", "anchor_length", "preposition", "anchor_epochs", "anchor_lr",
                   "anchor_weight", "descriptions", "max_descriptions")


def number(text):
    """The settings table's text -> int, float or str."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def default_settings(dataset, baseline, template, one_stage=False):
    """The settings of one dataset x baseline x template cell: assets/settings.csv, then what holds for all.

    Rows of the table apply from top to bottom, `*` matches anything and an empty field leaves a setting as it is.
    Returns a dict of the settings that matter for this cell; None where the table has no default.
    """
    settings = {"dataset": dataset, "baseline": baseline, "template": template, "shots": 16, "classes": "base",
                "dtype": "default", "clip": "toy" if dataset == "toy" else "ViT-B/16"}
    if baseline == "clip":
        del settings["shots"]
        return settings | {"template": "plain", "prompt": data.DATASETS[dataset].prompt, "epochs": 0}
    settings |= dict.fromkeys(("soft_tokens", "epochs", "batch_size", "lr", "lambda_1"))
    if template == "anchoropt":
        settings |= dict.fromkeys(("lambda_2", "anchor_epochs", "anchor_weight"))
    with open(SETTINGS_FILE, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if all(row[key] in ("*", settings[key]) for key in ("dataset", "baseline", "template")):
                settings |= {key: number(value) for key, value in row.items()
                             if value and key not in ("dataset", "baseline", "template", "source")}
    if template == "atprompt":
        settings["attributes"] = settings.get("attributes", "").split()
    if template == "anchoropt":
        settings |= {"arrangement": "adaptive", "tau": 1.0, "test_position": "argmax", "feature_at": "eot",
                     "anchor_length": 1, "preposition": "of", "descriptions": "default", "max_descriptions": 10,
                     "one_stage": False, "anchor": "learnt"}
        if one_stage:
            settings["one_stage"] = True
            for key in ("anchor_epochs", "anchor", "lambda_2", "temperature"):           # nothing is distilled (Sec. 3.2.4)
                del settings[key]
    if template != "anchoropt":
        for key in ("lambda_2", "temperature"):
            settings.pop(key, None)
    for key, owner in (("w_cat", "dept"), ("depth", "maple")):
        if baseline != owner:
            settings.pop(key, None)
    return settings


OPTIONS = {"shots", "classes", "clip", "dtype", "soft_tokens", "attributes", "epochs", "batch_size", "lr", "lambda_1",
           "lambda_2", "temperature", "w_cat", "depth", "arrangement", "tau", "test_position", "feature_at", "anchor",
           "anchor_length", "preposition", "anchor_epochs", "anchor_lr", "anchor_weight", "descriptions", "max_descriptions"}
POSITIVE = {"shots", "soft_tokens", "batch_size", "lr", "temperature", "tau", "anchor_length", "max_descriptions", "depth"}


def resolve(args, defaults):
    """The settings of a run: the defaults, and every option that was given on the command line.

    args: an argparse namespace in which None stands for "not given". Raises ValueError for an option that has no
    meaning here, a value out of range, or a setting without default.
    """
    def option(key):
        return "--" + key.replace("_", "-")
    cell = defaults["baseline"] if defaults["baseline"] == "clip" else f"{defaults['baseline']}-{defaults['template']}"
    settings = dict(defaults)
    for key, value in vars(args).items():
        if key not in OPTIONS or value is None:
            continue
        if key not in defaults:
            raise ValueError(f"{option(key)} has no meaning for {cell}" + (" with --one-stage" * bool(defaults.get("one_stage"))))
        if getattr(args, "anchor", None) and key in ("anchor_epochs", "anchor_lr", "anchor_weight", "descriptions", "max_descriptions"):
            raise ValueError(f"{option(key)} has no meaning with --anchor, which brings an anchor learnt already")
        if key in ("descriptions", "anchor") and not os.path.isfile(value):
            raise FileNotFoundError(f"{option(key)} {value} does not exist")
        settings[key] = clip_identity(value) if key in ("clip", "descriptions", "anchor") else value
    for key, least in (("seeds", 0), ("class_chunk", 0), ("workers", 0), ("test_batch", 1), ("cache_images", 0)):
        given = getattr(args, key, None)
        if given is not None and not all(least <= value < 2 ** 31 for value in (given if isinstance(given, list) else [given])):
            raise ValueError(f"{option(key)} must be at least {least} and below 2^31, got {given}")
    for key, value in settings.items():
        if isinstance(value, (int, float)) and not (math.isfinite(value) and (value > 0 if key in POSITIVE else value >= 0)):
            raise ValueError(f"{option(key)} must be {'positive' if key in POSITIVE else 'at least 0'}, got {value}")
    missing = [option(key) for key, value in settings.items() if value is None or value == []]
    if missing:
        raise ValueError(f"assets/settings.csv has no row for {cell} on {settings['dataset']}; give {' '.join(missing)}")
    return settings


def folder_name(kind, settings, defaults):
    """`coop-anchoropt,epochs=1,tau=0.5`: every setting that differs from its default, sorted by name."""
    def text(value):                                        # two values never give one text: %-escapes, as in a URL
        return "+".join(urllib.parse.quote(str(part), safe="") for part in (value if isinstance(value, list) else [value]))
    changed = sorted(key for key in settings if settings[key] != defaults.get(key))
    return ",".join([kind] + [f"{key}={text(settings[key])}" for key in changed])


def run_folder(output, settings, seed):
    """Where a run of stage2.py lives: output/<dataset>/<baseline>-<template>[,changed settings]/seed<k>."""
    defaults = default_settings(settings["dataset"], settings["baseline"], settings["template"], settings.get("one_stage"))
    defaults |= {key: False for key in ("one_stage",) if key in defaults}             # always said in the name
    kind = settings["baseline"] if settings["baseline"] == "clip" else f"{settings['baseline']}-{settings['template']}"
    return pathlib.Path(output) / settings["dataset"] / folder_name(kind, settings, defaults) / f"seed{seed}"


def anchor_folder(output, settings, seed):
    """Where the anchor of a run lives: output/<dataset>/anchor[,changed settings]/seed<k>."""
    defaults = default_settings(settings["dataset"], "coop", "anchoropt")
    own = {key: settings[key] for key in ANCHOR_SETTINGS}             # (two runs share it where these are equal)
    return pathlib.Path(output) / settings["dataset"] / folder_name("anchor", own, defaults) / f"seed{seed}"


def check_output(output):
    """Raises OSError where runs could not be written: before anything is learnt, not after."""
    probe = pathlib.Path(output) / f".probe.{os.getpid()}.part"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(bytes(4096))
        free = shutil.disk_usage(output).free
    except OSError as error:
        raise OSError(f"--output {output} cannot be written ({error.strerror or error}); choose another folder") from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    if free < 2 ** 20:
        raise OSError(f"--output {output} has less than 1 MB left on its disk; make room or choose another folder")


def resume(path, parts, device="cpu"):
    """Puts the parts (name -> what has load_state_dict) back to the last finished epoch. Returns the log, [] for no file.

    Raises ValueError for a file that is damaged or of another run; the parts are then to be thrown away.
    """
    if not os.path.isfile(path):
        return []
    try:
        saved = read_as_data(path, device)
        for key, part in parts.items():
            groups = [dict(group) for group in getattr(part, "param_groups", [])]
            part.load_state_dict(saved[key])
            for group, own in zip(getattr(part, "param_groups", []), groups):       # numbers of the command, not of the file
                group.update(own)
            for p, state in getattr(part, "state", {}).items():
                if not all(torch.is_tensor(value) and value.shape == p.shape for value in state.values()):
                    raise ValueError("a momentum of another shape")
        log = saved["log"]
        if [row["epoch"] for row in log] != list(range(1, len(log) + 1)) or len(set(map(tuple, log))) > 1:
            raise ValueError("epochs are missing")
        return log
    except (PermissionError, torch.OutOfMemoryError):
        raise
    except Exception as error:                        # load_state_dict fails in many ways, too
        raise ValueError(f"{path}, which keeps the finished epochs, is damaged or of another run "
                         f"({' '.join(str(error).split())[:160]}); delete it to begin anew") from error


class Unchanged:
    """A part for `resume` that is not put back but compared: refuses a file that was begun with another `value`."""

    def __init__(self, what, value):
        self.what, self.value = what, value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        if state["value"] != self.value:
            raise ValueError(f"it was begun with {self.what} that have changed since")


def save_log(path, rows):
    """Rows (dicts with the same keys) as CSV."""
    with written_aside(path) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["epoch"])
        writer.writeheader()
        writer.writerows(rows)


@contextlib.contextmanager
def locked(folder, wait, what):
    """Holds an operating-system lock on a folder, which dies with its process, however that ends.

    wait: another process that holds it is waited for; else BlockingIOError says that it is at work. Raises
    OSError where the folder cannot be written to: before anything is learnt.
    """
    folder = pathlib.Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")
    except OSError as error:
        raise OSError(f"cannot write to {folder} ({error.strerror}); mend that, or choose another --output") from error
    with file:
        try:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if not wait:
                raise BlockingIOError(f"another process is at work on {what} in {folder}; wait for it, or choose "
                                      "another --output") from error
            print(f"{what}: waiting for the process that is at work on it in {folder}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError):                   # Windows, and file systems without such locks
            print(f"note: no file locks in {folder}: start only one process for a run", flush=True)
        for litter in folder.glob(".*.part*"):           # of processes that were killed while they wrote
            litter.unlink(missing_ok=True)
        yield


def load_prompt(path, device="cpu"):
    """Reads a run's prompt.pt: dict with `state` (learnt tensors), `settings`, `class_names`, `seed`.

    Raises FileNotFoundError, or ValueError for a file that is damaged or something else.
    """
    try:
        content = read_as_data(path, device)
    except ValueError as error:
        raise ValueError(f"{path} could not be read ({error}); train it again with --overwrite") from error
    kinds = {"state": dict, "settings": dict, "class_names": list, "seed": int}
    if not isinstance(content, dict) or not all(isinstance(content.get(key), kind) for key, kind in kinds.items()) \
            or not {"dataset", "baseline", "template", "clip", "dtype", "classes"} <= set(content["settings"]):
        raise ValueError(f"{path} is not a prompt.pt of stage2.py")
    return content


def anchor_features(clip_model, class_names, tokens, settings):
    """Unit features (C, d) of the anchor prompts of these classes, for frozen anchor tokens (N, d_t)."""
    prompt = AnchorPrompt(clip_model, class_names, len(tokens), settings["preposition"], settings.get("class_chunk", 0))
    prompt.tokens.data.copy_(tokens)
    with torch.no_grad():
        return prompt()


# ------------------------------------------------------------------- cross-dataset and domain generalization

VARIANTS = ("imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r")
ELEVEN = tuple(name for name in data.DATASETS if name not in (*VARIANTS, "toy"))


def prompt_folders(paths):
    """The run folders (those that hold a prompt.pt) at and under `paths`. Raises FileNotFoundError for none."""
    found = {}
    for path in map(pathlib.Path, paths):
        files = [path] if path.is_file() else sorted(path.rglob("prompt.pt"))
        if not files:
            raise FileNotFoundError(f"{path} holds no prompt.pt; give a run of stage2.py, such as "
                                    "output/imagenet/coop-anchoropt,classes=all/seed1")
        found |= {file.resolve(): file.parent for file in files}
    return list(found.values())


def load_learner(path, saved, clip_model, class_chunk=0):
    """The learner of a prompt.pt, on the classes it was trained on, and its anchor tokens (N, d_t), or None.

    saved: from `load_prompt(path)`. Raises ValueError where state, settings and CLIP do not fit together.
    """
    anchor_tokens = saved["state"].get("template.anchor_tokens")
    try:
        settings = saved["settings"] | {"class_chunk": class_chunk}
        learner = build_learner(settings, clip_model, saved["class_names"], anchor_tokens)
        learner.load_state_dict(saved["state"])
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} does not fit its own settings or this CLIP ({' '.join(str(error).split())[:200]}); "
                         "give the --clip it was trained with, or train it again with --overwrite") from error
    return learner, anchor_tokens


def load_clip_of(settings, path, args):
    """The CLIP that a run was trained with; its settings win over --dtype. Raises ValueError for another --clip."""
    name, dtype = settings["clip"], settings["dtype"]
    if args.clip and clip_identity(args.clip) != name:
        raise ValueError(f"{path} was trained with CLIP {name}, but --clip is {clip_identity(args.clip)}; "
                         "give the one it was trained with (none is needed for a CLIP that has a name)")
    if dtype == "default":
        dtype = args.dtype
    elif args.dtype not in (None, dtype):
        print(f"note: {path} was trained in {dtype}, which is used instead of --dtype {args.dtype}")
    try:
        return load_clip(args.clip or name, args.device, dtype and getattr(torch, dtype))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} was trained with CLIP {name}: give its file with --clip ({error})") from error


def load_transfer(folder, target):
    """A run's eval-<target>.json; None where there is none, or it was made from another prompt.pt than today's.

    Raises ValueError for a damaged one.
    """
    path, prompt = folder / f"eval-{target}.json", folder / "prompt.pt"
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        sound, stale = is_accuracies(result["accuracy"]), prompt.exists() and result["prompt"] != sha256(prompt)[:8]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise ValueError(f"{path} is damaged; make it again: python eval.py {folder} --dataset {target} --overwrite")
    return None if stale else result


def evaluate_run(folder, dataset, args, clips):
    """A run's learnt prompt and anchor on all classes of a dataset; writes eval-<dataset>.json, returns its content.

    The inference rule: final is the ensemble for foreign classes, and the normal prompt for the classes that the run
    learnt on, ImageNet's in its variants after training with --classes all. dataset: a `data.Dataset`; clips: a dict
    that keeps the loaded CLIP, with its image features, between calls.
    """
    target, file = dataset.name, folder / f"eval-{dataset.name}.json"
    saved = load_prompt(folder / "prompt.pt")
    settings = saved["settings"]
    done = None if args.overwrite else load_transfer(folder, target)
    if done:
        print(f"finished already: {file} (--overwrite to make it again)", flush=True)
        return done
    if dataset.notes and target == settings["dataset"]:      # a split made here depends on the seed: the run's own
        dataset = data.load_dataset(target, args.root, saved["seed"])
    known = target in (settings["dataset"], *(VARIANTS if settings["dataset"] == "imagenet" else ()))
    if settings["classes"] != "all":
        known = False
        print(f"note: {folder} has learnt on base classes alone, so final is the ensemble for all of {target}; "
              "Tables 2 and 4 are of runs with --classes all", flush=True)
    key = (settings["clip"], settings["dtype"])
    if key not in clips:
        clips.clear()                                        # one CLIP at a time on the device
        clips[key] = load_clip_of(settings, folder / "prompt.pt", args), {}
    clip_model, test_sets = clips[key]
    learner, anchor_tokens = load_learner(folder / "prompt.pt", saved, clip_model, args.class_chunk)
    accuracy = evaluate_items(learner.set_classes(dataset.class_names), settings | {"class_chunk": args.class_chunk},
                              dataset.test, anchor_tokens, known, test_sets, args.workers, args.test_batch, args.feature_cache)
    result = {"dataset": settings["dataset"], "target": target, "run": folder.resolve().parent.name, "seed": saved["seed"],
              "prompt": sha256(folder / "prompt.pt")[:8], "settings": settings, "accuracy": accuracy, "known": known,
              "classes": len(dataset.class_names), "images": len(dataset.test)}
    with written_aside(file) as aside:
        aside.write_text(json.dumps(result, indent=1) + "\n")
    return result


def evaluate_runs(args):
    """`python eval.py RUN ... --dataset NAME ...`: every run on every dataset, and a table of them."""
    folders, clips = prompt_folders(args.paths), {}
    datasets = [data.load_dataset(name, args.root) for name in args.dataset]            # first what costs nothing
    for note in [note for dataset in datasets for note in dataset.notes]:
        print(f"note: {note}", flush=True)
    results = [evaluate_run(folder, dataset, args, clips) for folder in folders for dataset in datasets]
    keys = ("run", "seed", "target", "classes", "images")
    print("\n" + "\n".join(markdown_table([*keys, *READINGS], [
        [*(result[key] for key in keys), *(two_digits(result["accuracy"].get(reading)) for reading in READINGS)]
        for result in results])))
    if any("toy" in (result["dataset"], result["target"]) for result in results):
        print(f"\n{TOY_WARNING}")


# --------------------------------------------------------------------------------------------- results of runs

def is_accuracies(value):
    """Is this what `evaluate` returns: a dict reading -> percent, with at least the final one?"""
    return "final" in value and all(isinstance(number, (int, float)) and 0 <= number <= 100 for number in value.values())


def load_results(paths):
    """All results.json under the given files and folders, sorted by path. Raises ValueError for a damaged one."""
    found = {}
    for path in map(pathlib.Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; give the folder that stage2.py wrote to (--output)")
        found |= {file.resolve(): file for file in (sorted(path.rglob("results.json")) if path.is_dir() else [path])}
    results = []
    for path in found.values():
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            sides = [side for side in (result["base"], result["novel"]) if side is not None]
            sound = all(map(is_accuracies, sides)) and result["base"].keys() == sides[-1].keys()
            sound = sound and isinstance(result["settings"], dict) and isinstance(result["seed"], int)
            sound = sound and isinstance(result["dataset"], str)
            result |= {"run": path.resolve().parent.parent.name, "folder": path.parent, "dataset": result["dataset"]}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            sound = False
        if not sound:
            raise ValueError(f"{path} is not a results.json of stage2.py; run it again with --overwrite")
        results.append(result)
    return results


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def two_digits(value):
    return "" if value is None else f"{value:.2f}"


def listed_seeds(results):
    return f"seed{'s' if len(results) > 1 else ''} {', '.join(map(str, sorted(result['seed'] for result in results)))}"


def markdown_table(header, rows):
    """Lines of a Markdown table: the first column to the left, the others to the right, "-" for an empty cell."""
    rows = [[str(cell) or "-" for cell in row] for row in rows]
    widths = [max(5, *map(len, column)) for column in zip(header, *rows)]

    def line(cells):
        return f"| {cells[0]:{widths[0]}} |" + "".join(f" {cell:>{w}} |" for cell, w in zip(cells[1:], widths[1:]))
    rule = f"|:{'-' * (widths[0] + 1)}|" + "".join(f"{'-' * (w + 1)}:|" for w in widths[1:])
    return [line(header), rule, *map(line, rows)]


def group(result):
    """What the seeds of one run share: dataset, the run's name, its folder where it was read from one."""
    return result["dataset"], result["run"], str(result["folder"].parent if "folder" in result else "")


def results_table(results):
    """Table S1's rows for every group of seeds: lines of Markdown. HM is that of the mean base and mean novel."""
    groups = {}
    for result in results:
        groups.setdefault(group(result), []).append(result)
    lines = []
    for (dataset, run, _), seeds in groups.items():
        rows = []
        for reading in [reading for reading in READINGS if reading in seeds[0]["base"]]:
            values = {side: mean(seed[side][reading] for seed in seeds) for side in ("base", "novel") if seeds[0][side]}
            rows.append([reading, *(two_digits(with_hm(values).get(key)) for key in ("base", "novel", "hm"))])
        lines += ["", f"{dataset}, {run}, {listed_seeds(seeds)}", "", *markdown_table(["prompt  ", "base", "novel", "HM"], rows)]
    return lines


def summary_table(results, reading):
    """One row per group of seeds: base, novel and HM of one reading, mean and standard deviation over seeds, as Markdown.

    The mean HM is that of the mean base and mean novel; its deviation is that of the seeds' own HMs.
    """
    groups, rows = {}, []
    for result in results:
        if reading in result["base"] and result["novel"]:
            groups.setdefault(group(result), []).append(result)
    for (dataset, run, _), seeds in groups.items():
        base, novel = ([seed[side][reading] for seed in seeds] for side in ("base", "novel"))
        hm = [harmonic_mean(b, n) for b, n in zip(base, novel)]
        spread = [f" ± {statistics.stdev(values):.2f}" if len(seeds) > 1 else "" for values in (base, novel, hm)]
        centre = (mean(base), mean(novel), harmonic_mean(mean(base), mean(novel)))
        rows.append([f"{dataset}, {run}", *(two_digits(c) + s for c, s in zip(centre, spread)), str(len(seeds))])
    return markdown_table([f"run ({reading})", "base", "novel", "HM", "seeds"], rows)


def with_hm(values):
    """Adds HM, of the averaged base and novel as the paper does, where there are both."""
    return values | ({"hm": harmonic_mean(values["base"], values["novel"])} if "novel" in values else {})


TOY_WARNING = ("These are figures of the toy world: they check the machinery and are no evidence for or against "
               "the paper's claims.")


def print_table(results, summary=None):
    print("\n".join(summary_table(results, summary) if summary else results_table(results)))
    if any(result["dataset"] == "toy" for result in results):
        print(f"\n{TOY_WARNING}")


def draw_figure4(results, path):
    """Fig. 4: the learnt W (without noise) of every run found, the lowest seed of each, side by side in one picture."""
    first = {}
    for result in sorted(results, key=lambda result: result["seed"]):
        if result.get("position_matrix"):
            first.setdefault(group(result), result)
    lengths = sorted({result["settings"]["anchor_length"] for result in first.values()})
    if len(lengths) != 1:
        raise ValueError(f"runs with {' and '.join(map(str, lengths))} anchor tokens do not go into one picture; name fewer runs"
                         if lengths else "no run with a learnt position matrix here; make one: python stage2.py")
    datasets, runs = ({key[:n] for key in first} for n in (1, 2))             # titles: as short as tells them apart
    labels = {key: key[0] if len(datasets) == len(first) else f"{key[0]}\n{key[1] if len(runs) == len(first) else key[2]}"
              for key in first}
    panels = {labels[key]: first[key]["position_matrix"]["end"] for key in sorted(first)}
    with written_aside(path) as aside:
        plot_position_matrix(panels, aside, lengths[0])
    print(f"{path}: " + ", ".join(str(first[key]["folder"]) for key in sorted(first)))


# ----------------------------------------------------------------------------------------- the paper's tables

PAPER_FILE = SETTINGS_FILE.with_name("paper_tables.csv")
MACHINE = ("clip", "dtype", "descriptions")        # a cell takes runs whatever these are, and a note says what they were


class Row(NamedTuple):
    """A row of a table: its label in the paper, the runs that belong in it, and the prompt whose accuracy it shows."""
    label: str
    baseline: str = "coop"
    template: str = "anchoropt"
    changed: dict = {}                             # settings, beside the defaults of baseline, template and dataset
    reading: str = "final"


class Table(NamedTuple):
    title: str
    rows: list
    datasets: tuple = ("imagenet",)                # that need a run, or a target of one where `source` is set
    blocks: tuple = ("imagenet",)                  # that are shown, one below the other
    source: str = ""                               # Tables 2 and 4: where the prompts were learnt

    @property
    def measures(self):
        return ("accuracy",) if self.source else ("base", "novel", "hm")


class Cell(NamedTuple):
    values: dict                                   # measure -> percent
    runs: str                                      # what they are the mean of, in words
    whole: bool = True                             # False: an average over fewer datasets than the paper's


def option_rows(key, values, labels=None):
    return [Row(label, changed={key: value}) for label, value in zip(labels or map(str, values), values)]


METHODS = [Row(name + suffix, baseline, template)
           for baseline, name in (("coop", "CoOp"), ("cocoop", "CoCoOp"), ("maple", "MaPLe"), ("dept", "DePT"))
           for template, suffix in zip(TEMPLATES, ("", " + ATPrompt", " + AnchorOPT"))]
TRANSFER = [row._replace(changed={"classes": "all"}) for row in METHODS
            if row.baseline == "coop" or row.label in ("CoCoOp", "MaPLe")]
TABLES = {
    "1": Table("base to novel classes", METHODS, ELEVEN, ("average", *ELEVEN)),
    "2": Table("from ImageNet to ten other datasets", TRANSFER, ELEVEN, (*ELEVEN, "average"), "imagenet"),
    "3": Table("one stage and two", [Row("One-stage", changed={"one_stage": True}), Row("Two-stage")], ELEVEN, ("average",)),
    "4": Table("from ImageNet to its variants", TRANSFER, ("imagenet", *VARIANTS), ("imagenet", *VARIANTS, "average"),
               "imagenet"),
    "5": Table("the normal prompt alone", [Row("ATPrompt", template="atprompt"), Row("AnchorOPT w/o Ensemble", reading="normal")],
               ELEVEN, ("average",)),
    "6": Table("prepositions", option_rows("preposition", ("with", "at", "sun", "sea", "of"))),
    "7": Table("anchor length N", [Row(f"{reading} prompt, N = {n}", changed={"anchor_length": n}, reading=reading)
                                   for reading in ("anchor", "normal") for n in (1, 2, 3, 4)]),
    "8": Table("where the anchor stands", option_rows("arrangement", ("adaptive", "before", "middle", "after-class"), (
        "Position Matrix", "Before Soft Token", "Middle", "After Class Token"))),
    "9": Table("distillation", [Row("without KD", changed={"lambda_2": 0}), Row("with KD")]),
    "S1": Table("each prompt of CoOp + AnchorOPT", [
        Row("CoOp", template="plain"), Row("ATPrompt", template="atprompt"),
        Row("AnchorOPT-One Stage", changed={"one_stage": True}), Row("AnchorOPT-Anchor Prompts", reading="anchor"),
        Row("AnchorOPT-Normal Prompts", reading="normal"), Row("AnchorOPT-Ensemble", reading="ensemble"),
        Row("AnchorOPT-Final")], ELEVEN, ("average", *ELEVEN)),
    "S2": Table("prepositions, and none", option_rows("preposition", ("none", "with", "at", "sun", "sea", "of"))),
    "S3": Table("temperature of Eq. 7", option_rows("tau", (0.1, 0.5, 1, 2, 4), [f"tau = {t}" for t in (0.1, 0.5, 1, 2, 4)])),
}


def load_paper(number):
    """One table of the paper, as printed: dict (dataset or "average", label) -> dict measure -> str, and `note`."""
    with open(PAPER_FILE, newline="", encoding="utf-8") as file:
        return {(row["dataset"], row["method"]): row for row in csv.DictReader(file) if row["table"] == number}


def find_seeds(results, settings):
    """The results, one per seed, of the run with these settings (all but MACHINE must agree), and remarks on them.

    Where several folders fit: the one with the fewest MACHINE settings off the defaults, then the one with most seeds.
    """
    def method(some):
        return {key: value for key, value in some.items() if key not in MACHINE}
    fits = {}
    for result in results:
        if method(result["settings"]) == method(settings):
            off = [f"{key} {value}" for key, value in result["settings"].items() if value != settings.get(key)]
            fits.setdefault((len(off), result["folder"].parent, *off), []).append(result)
    order = sorted(fits, key=lambda fit: (fit[0], -len(fits[fit]), fit))
    if not order:
        return [], []
    return fits[order[0]], ([f"some runs are with {off}" for off in order[0][2:]] +
                            [f"{order[0][1]} is shown, {left[1]} ({' '.join(left[2:])}) is left out" for left in order[1:]])


def fill(table, results, output):
    """The cells of a table that these results fill, and what is missing.

    Returns cells, a dict (dataset, label) -> Cell, with "average" among the datasets; commands, the lines that fill the
    empty ones, for runs in the folder `output`; and notes.
    """
    cells, commands, notes = {}, [], []
    for row in table.rows:
        absent = []
        for dataset in table.datasets:
            learnt_on = table.source or dataset
            settings = default_settings(learnt_on, row.baseline, row.template, "one_stage" in row.changed) | row.changed
            seeds, remarks = find_seeds(results, settings)
            notes += remarks
            if seeds:
                run = shlex.quote(str(seeds[0]["folder"].parent))
            else:                                            # * stands for what is not known yet (descriptions, clip)
                run = shlex.quote(str(run_folder(output, settings, 1).parent)) + "*"
                commands.append(train_command(row, settings, output))
            if dataset != learnt_on:
                seeds = [result for result in (load_transfer(seed["folder"], dataset) for seed in seeds) if result]
                values = {"accuracy": [result["accuracy"]["final"] for result in seeds]}
                absent += [] if seeds else [dataset]
            else:
                values = {measure: [seed[measure.replace("accuracy", "base")][row.reading] for seed in seeds]
                          for measure in table.measures if measure != "hm"}
            if seeds:
                means = {key: mean(value) for key, value in values.items()}
                cells[dataset, row.label] = Cell(with_hm(means), listed_seeds(seeds))
        if absent:
            commands.append(f"python eval.py {run} --dataset {' '.join(absent)} --root $DATA")
        targets = [dataset for dataset in table.datasets if dataset != table.source]
        present = [cells[dataset, row.label].values for dataset in targets if (dataset, row.label) in cells]
        if present:
            average = {key: mean(values[key] for values in present) for key in table.measures if key != "hm"}
            runs = f"{len(present)} of {len(targets)} datasets"
            cells["average", row.label] = Cell(with_hm(average), runs, len(present) == len(targets))
    return cells, list(dict.fromkeys(commands)), list(dict.fromkeys(notes))


def train_command(row, settings, output):
    """The line of a shell that makes a cell's runs. $DATA and $DESCRIPTIONS are the user's folders."""
    dataset, defaults = settings["dataset"], default_settings(settings["dataset"], row.baseline, row.template)
    words = ["python stage2.py --dataset", dataset, "--baseline", row.baseline, "--template", row.template]
    for key, value in row.changed.items():
        if value != defaults[key]:
            words += ["--" + key.replace("_", "-")] + ([] if value is True else [str(value)])
    if row.template == "anchoropt" and not os.path.isfile(os.path.join(data.SHIPPED, f"{dataset}.json")):
        words.append(f"--descriptions $DESCRIPTIONS/{dataset}.json")
    words += ["--seeds 1 2 3"] + ([] if dataset == "toy" else ["--root $DATA"])
    return " ".join(words + ([] if os.path.normpath(output) == "output" else ["--output", shlex.quote(str(output))]))


def table_records(number, table, cells):
    """A dict of text per line: table, dataset, method, then per measure ours, the paper's and the difference; runs.

    Empty where there is no figure. An average over fewer datasets than the paper's has no difference.
    """
    paper, records = load_paper(number), []
    for dataset in table.blocks:
        printed = [label for block, label in paper if block == dataset]
        for label in dict.fromkeys(printed + [row.label for row in table.rows]):
            mine = label in [row.label for row in table.rows]
            cell = cells.get((dataset, label), Cell({}, "none yet" if mine else "paper only"))
            record = {"table": number, "dataset": dataset, "method": label}
            for measure in table.measures:
                ours, theirs = cell.values.get(measure), paper.get((dataset, label), {}).get(measure, "")
                difference = f"{ours - float(theirs):+.2f}" if ours is not None and theirs and cell.whole else ""
                record |= {measure: two_digits(ours), f"{measure}_paper": theirs, f"{measure}_difference": difference}
            records.append(record | {"runs": cell.runs})
    return records


def print_paper_table(args):
    """`python eval.py --table N OUTPUT`: Markdown to stdout, or CSV (see --csv)."""
    results, table = load_results(args.paths), TABLES[args.table]
    output = os.path.relpath(results[0]["folder"].resolve().parent.parent.parent) if results else args.paths[0]
    if args.on and (table.source or args.on not in (*ELEVEN, "toy")):
        raise ValueError(f"--on {args.on}: " + ("Tables 2 and 4 are of runs on imagenet" if table.source else
                                                f"give one of {', '.join((*ELEVEN, 'toy'))}, which have training images"))
    tables = [table._replace(datasets=(args.on,), blocks=(args.on,)) if args.on else table]
    toy = table._replace(datasets=("toy",), blocks=("toy",))
    if "average" in table.blocks and not table.source and not args.on and fill(toy, results, output)[0]:
        tables.append(toy)                                               # a practitioner's first runs, below the paper's
    records, commands, lines = [], [], [f"## Table {args.table}: {table.title}"]
    notes = [f"the paper's {label}, {dataset}: {row['note']}" for (dataset, label), row in load_paper(args.table).items()
             if row["note"] and dataset in tables[0].blocks]
    header = ["method", *(name for m in table.measures for name in (m.replace("hm", "HM"), "paper", "diff")), "runs"]
    for one in tables:
        cells, missing, remarks = fill(one, results, output)
        commands, notes, records = commands + missing, notes + remarks, records + table_records(args.table, one, cells)
    for dataset in dict.fromkeys(record["dataset"] for record in records):
        rows = [list(record.values())[2:] for record in records if record["dataset"] == dataset]
        lines += ["", f"### {dataset}", "", *markdown_table(header, rows)]
    if args.csv == "-":
        writer = csv.DictWriter(sys.stdout, list(records[0]), lineterminator="\n")
        writer.writeheader()
        return writer.writerows(records)
    if args.csv:
        save_log(args.csv, records)
    if any(record["dataset"] == "toy" and record["base"] for record in records if "base" in record):
        lines += ["", TOY_WARNING]
    if notes:
        lines += ["", "Notes", "", *(f"- {note}" for note in dict.fromkeys(notes))]
    if commands:
        lines += ["", "Empty cells, and what fills them ($DATA: the folder of the datasets, $DESCRIPTIONS: of their description "
                  "files)", "", "```", *commands, "```"]
    print("\n".join(lines))


# ----------------------------------------------------------------------------------------------- command line

_at_work_on = ["the preparation"]


def at_work_on(what):
    """Tells `run_script` what a Ctrl-C stops from here on."""
    _at_work_on[0] = what


def run_script(name, run, device=None):
    """Runs a script's body; what a user can mend ends in one line on stderr. Returns the exit code."""
    try:
        run()
        return 0
    except KeyboardInterrupt:
        print("\n" * sys.stderr.isatty() + f"{name}: stopped in {_at_work_on[0]}; finished epochs are kept, the same command "
              f"goes on from there: {shlex.join(['python', *sys.argv])}", file=sys.stderr)
        return 130
    except torch.OutOfMemoryError as error:
        print(f"{name}: out of memory on {device} ({str(error).split('.')[0]}); lower --test-batch or --batch-size, "
              "or set --class-chunk 100", file=sys.stderr)
    except (ValueError, OSError, ImportError) as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", metavar="OUTPUT", help="folders written by stage2.py, with all that is under them")
    group = parser.add_argument_group("what to do (default: list all runs found)").add_mutually_exclusive_group()
    group.add_argument("--dataset", nargs="+", metavar="NAME", help="evaluate learnt prompts on all classes of these datasets")
    group.add_argument("--table", type=str.upper, choices=list(TABLES), help="collect the runs into this table of the paper")
    group.add_argument("--summary", choices=READINGS, help="a row per run with the standard deviation over seeds")
    group.add_argument("--figure", choices=["4"], help="draw the learnt position matrices")
    group = parser.add_argument_group("tables and figures")
    group.add_argument("--on", metavar="NAME", help="with --table: the runs on this dataset instead (default: the paper's)")
    group.add_argument("--csv", nargs="?", const="-", metavar="FILE",
                       help="with --table: write it as CSV too; without FILE only CSV, to stdout (default: Markdown)")
    group.add_argument("--output", metavar="FILE", help="with --figure: the picture (default: figure4.png)")
    group = parser.add_argument_group("with --dataset")
    group.add_argument("--root", help="folder that holds the datasets (default: the environment's DATA, else ./data)")
    group.add_argument("--clip", metavar="FILE", help="CLIP checkpoint that the runs were trained with (default: as they say)")
    group.add_argument("--device", default=default_device(), help="cpu, cuda, cuda:1, mps (default: %(default)s)")
    group.add_argument("--dtype", choices=("float32", "float16", "bfloat16"),
                       help="of the frozen CLIP (default: the run's; else float16 on CUDA, float32 elsewhere)")
    group.add_argument("--class-chunk", type=int, default=0, help="encode this many classes at a time (default: 0, all)")
    group.add_argument("--workers", type=int, help="processes that load images (default: 8 or fewer on a GPU, else 0)")
    group.add_argument("--test-batch", type=int,
                       help="test images at a time where prompts depend on them (default: 100; maple 200)")
    group.add_argument("--feature-cache", metavar="DIR", help="keep the frozen CLIP's test features here (default: nowhere)")
    group.add_argument("--overwrite", action="store_true", help="evaluate again what is finished (default: skip it)")
    args = parser.parse_args(argv)
    for option, needs in (("on", "table"), ("csv", "table"), ("output", "figure"), ("overwrite", "dataset")):
        if getattr(args, option) and not getattr(args, needs):
            parser.error(f"--{option} goes with --{needs}")
    if (args.test_batch or 1) < 1 or args.class_chunk < 0:
        parser.error("--test-batch must be positive and --class-chunk at least 0")
    if args.workers is None:
        args.workers = min(8, os.cpu_count() or 1) if args.device.startswith("cuda") else 0
    return args


def default_device():
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def main(argv=None):
    args = parse(argv)

    def run():
        if args.dataset:
            return evaluate_runs(args)
        if args.table:
            return print_paper_table(args)
        results = load_results(args.paths)
        if not results:
            raise FileNotFoundError(f"no results.json under {', '.join(args.paths)}; train with: python stage2.py --dataset toy")
        return draw_figure4(results, args.output or "figure4.png") if args.figure else print_table(results, args.summary)
    return run_script("eval.py", run, args.device)


if __name__ == "__main__":
    sys.exit(main())
