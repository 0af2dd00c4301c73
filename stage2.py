"""Stage II, adaptation (Sec. 3.2.2, Fig. 2b, Algorithm 1's second loop); one-stage training.

    python stage2.py                                                    the toy world, 30 seconds
    python stage2.py --dataset caltech101 --baseline coop --root $DATA  a cell of Table 1
    python stage2.py --baseline maple --template atprompt --seeds 1 2 3

Freezes the anchor of Stage I (and runs Stage I first where it is missing), learns soft tokens and
position matrix on the base classes, and evaluates on base and novel test images. Prints Table S1's
rows; writes prompt.pt (what was learnt, with its settings), results.json, log.csv and
position.png (Fig. 4) to output/<dataset>/<baseline>-<template>[,changed settings]/seed<k>/.
"""

import functools
import platform
import sys

import stage1                       # first: it says what is missing

import PIL
import torch
import torchvision

import data
import eval as evaluation
import losses
from anchor import AnchorPrompt, anchor_features, load_anchor
from position import hard_assignment, in_words, plot_position_matrix
from prompts import build_learner, preprocess_of, sha256


# -------------------------------------------------------------------- the method

def adapt(learner, run, epochs, features, labels, anchor=None):
    """Stage II: minimises Eq. 12 over theta_s, theta_pos and what the baseline adds.

    learner: from `prompts.build_learner`, on the C base classes. run: a `stage1.Run`, of whose
    settings it needs batch_size, lambda_1, lambda_2, temperature and anchor_length; all chance in
    an epoch comes from its seed and the epoch's number. epochs: the `stage1.Epochs` to go through;
    their first optimizer has the learner's parameters. features: gives for each of these epochs the
    n few-shot images' f (n, d), the frozen CLIP's features, and their crops (n, 3, R, R), uint8 on
    the CPU; f is None for MaPLe without distillation, crops are None except for MaPLe (see
    `data.epoch_features`). labels (n,): on CLIP's device. anchor: the unit features f_anc (C, d) of
    the frozen anchor prompts, whose ensemble with the prompt teaches it; or, for one-stage training
    (Sec. 3.2.4, S1), what `stage1.anchor_step` takes, a tuple; or None.
    Raises ValueError for a loss that is not finite, and for an image that cannot be read.
    """
    settings, device = run.settings, labels.device
    optimizer = epochs.optimizers[0]
    preprocess = preprocess_of(learner.clip_model)
    batch_size = settings["batch_size"]
    f_anc = anchor if torch.is_tensor(anchor) else None
    one_stage = isinstance(anchor, tuple)
    learner.train()                                         # so W is sampled: Eq. 6 with its noise

    # stage 2: adaptation
    for epoch in epochs:                                    # sets this epoch's learning rate
        # f_I(x) of this epoch's crops: the frozen tower, in large batches, or kept from before.
        f_all, crops = next(features)
        f_all = None if f_all is None else f_all.to(device)
        torch.manual_seed(1_000_003 * run.seed + epoch)     # this epoch's order and Gumbel noise
        order = torch.randperm(len(labels))[:epochs.steps * batch_size]     # whole batches alone
        # On both sides: crops are on the CPU, and no step shall wait for an index to be copied.
        for on_cpu, i in zip(order.split(batch_size), order.to(device).split(batch_size)):
            y = labels[i]                                                   # (B,)
            f = None if f_all is None else f_all[i]                         # (B, d)
            x = None if crops is None else data.normalize(crops[on_cpu], preprocess, device)
            if one_stage:                   # the first half of its step: theta_a, by Eq. 5
                stage1.anchor_step(*anchor)
                if learner.template.anchor_in_suffix:       # among the class tokens: bind anew
                    learner.set_classes(learner.class_names)

            # The normal prompt's answer. Its W is drawn in AnchorTemplate.forward, in every step
            # anew, once for all classes, images, layers (Algorithm 1 shows it above its loop). Only
            # CoCoOp's prompts depend on the image. `logits` makes features unit.
            f_img = learner.image_features(f, x)            # f_I(x): f itself, except for MaPLe
            f_norm = learner.text_features(f_img)           # f_T(t_norm), Eqs. 6-9 (or 2, or 3)
            l_norm = learner.logits(f_img, f_norm)          # logits of q_norm, Eq. 1: (B, C)
            ce = losses.cross_entropy(l_norm, y)            # Eq. 10
            ce = learner.own_loss(ce, f_img, f_norm, y)     # DePT mixes in its base-class head's

            # The ensemble with the anchor prompt teaches it.
            kl = torch.zeros_like(ce)
            if f_anc is not None:
                # Anchor prompts meet CLIP as it is: f, also where MaPLe prompts the image tower.
                l_anc = learner.logits(f, f_anc)            # logits of q_anc, Eq. 1: (B, C)
                # logits of q_ens
                l_ens = losses.ensemble_logits(l_norm, l_anc, learner.ensemble)
                kl = losses.distillation_kl(l_norm, l_ens, settings["temperature"])     # Eq. 11

            # Eq. 12. (Algorithm 1 calls lambda_1, lambda_2 alpha and beta.)
            loss = losses.total_loss(ce, kl, settings["lambda_1"], settings.get("lambda_2", 0))

            optimizer.zero_grad()
            loss.backward()
            optimizer.step()                                # theta_s and theta_pos move
            epochs.note(loss=loss, ce=ce, kl=kl)
        if learner.template.position_matrix is not None:    # when did W settle?
            epochs.of_epoch = {"W": in_words(learnt_W(learner), settings["anchor_length"])}


# -------------------------------------------------------------------- a run

def run_seed(run, dataset, task, descriptions, get_clip):
    """One run: the anchor, the learner, training, the inference rule, saving. Returns its results.

    run: a `stage1.Run`. dataset: a `data.Dataset`. task: its `data.Task` of this seed.
    descriptions: C lists of sentences, or None where no anchor is learnt. get_clip: a function that
    loads CLIP, once. A run that is finished is not run again. Raises ValueError and OSError
    (BlockingIOError where another process is at work on it) in one line.
    """
    settings, folder = run.settings, run.folder
    # What the run depends on beside its settings, which hold the digest of an --anchor file.
    facts = data.digests(dataset, task)
    if descriptions is not None:
        facts |= {"descriptions' sentences": data.digest(descriptions)}

    with data.only_process(folder, wait=False, what=f"seed {run.seed}"):
        # CLIP is loaded only for a run that needs it.
        if (folder / "results.json").exists() and not run.args.overwrite:
            return finished_run(folder, settings, facts)
        if dataset.name not in data.DATASETS:   # one's own: a broken picture is found now
            data.check_pictures(task.train + task.test_base + task.test_novel)
        clip_model = get_clip()

        # The learner: a template in a baseline, with this seed's start values. Zeros hold the
        # anchor's place: a CLIP, or names, that do not suit the method are found before Stage I.
        torch.manual_seed(run.seed)
        learner = build_learner(settings, clip_model, task.base_names)
        learner.set_classes(task.novel_names or task.base_names)
        # Algorithm 1, stage 1: the anchor, where it was not learnt before.
        if settings["template"] == "anchoropt" and not settings["one_stage"]:
            tokens = find_anchor(run, clip_model, task, descriptions)
            learner.template.anchor_tokens.copy_(tokens)
        W_start, W = learnt_W(learner), None
        if run.args.overwrite:                  # now that nothing is missing any more
            remove_run(folder)

        # Algorithm 1, stage 2: adaptation. Zero-shot CLIP has none.
        log = []
        if "epochs" in settings:
            log = learn_prompt(run, learner, task, descriptions, facts)
        # prompt.pt: what was learnt, and all that building the learner anew takes.
        with data.written_aside(folder / "prompt.pt") as aside:
            torch.save({"state": learner.state_dict(), "settings": settings,
                        "class_names": task.base_names, "seed": run.seed}, aside)

        if W_start:
            W = {"start": W_start, "end": learnt_W(learner), "epochs": [row["W"] for row in log]}
        if W and not run.args.no_plot:
            with data.written_aside(folder / "position.png") as aside:
                plot_position_matrix({"start": W["start"], "end of training": W["end"]}, aside,
                                     settings["anchor_length"])
        # results.json is the last file to come: where it stands, everything else does.
        result = test(run, learner, task) | {
            "dataset": settings["dataset"], "seed": run.seed, "settings": settings, "facts": facts,
            "position_matrix": W, "notes": what_to_know(task, settings),
            "environment": environment(clip_model), "prompt": sha256(folder / "prompt.pt")[:8]}
        data.save_json(folder / "results.json", result)
        (folder / "last.pt").unlink(missing_ok=True)
        stage1.say(f"saved to {folder}")
        return evaluation.read_result(folder / "results.json")


def find_anchor(run, clip_model, task, descriptions):
    """The anchor tokens (N, d_t) that Stage II begins with: Stage I's, or those of --anchor FILE.

    Raises ValueError for a file that is not of these settings, or has seen novel classes.
    """
    file = run.args.anchor
    if not file:
        return stage1.get_anchor(run, clip_model, task.base_names, descriptions)
    # It may be of another length, word or CLIP than this run asks for. (Of the last two the
    # authors' files say nothing.)
    tokens, saved = load_anchor(file)
    now = run.settings | {"token width": len(clip_model.ln_final.weight)}
    found = {"anchor_length": len(tokens), "token width": tokens.shape[1]}
    found |= {key: saved[key] for key in ("preposition", "clip") if key in saved}
    data.check_unchanged(file, found, {key: now[key] for key in found}, f"it has {found}")
    seen = set(saved.get("class_names", [])) & set(task.novel_names)
    if seen:
        raise ValueError(f"{file} was learnt from descriptions of {len(seen)} classes that are "
                         f"novel here, such as {min(seen)!r}; or --classes all")
    return tokens


def test(run, learner, task):
    """Inference (Sec. 3.2.2): normal prompt for base classes, the ensemble for novel ones.

    Returns base and novel: each a dict reading -> percent; or novel None without novel classes. The
    learner stays bound to the classes that were tested last.
    """
    torch.manual_seed(run.seed)                 # of W, with --test-position sample
    learner.set_classes(task.base_names)
    base = evaluation.evaluate_items(run, learner, task.test_base, known=True)
    novel = None
    if task.novel_names:
        learner.set_classes(task.novel_names)
        novel = evaluation.evaluate_items(run, learner, task.test_novel, known=False)
    return {"base": base, "novel": novel}


def finished_run(folder, settings, facts):
    """The results of a run that is finished. ValueError where its data have changed."""
    result = evaluation.read_result(folder / "results.json")
    evaluation.load_prompt(folder / "prompt.pt")            # is it sound?
    # The folder's name says the settings off the table, and the table may change.
    saved = result["facts"] | {"settings": result["settings"]}
    data.check_unchanged(folder / "results.json", saved, facts | {"settings": settings},
                         "to run it again: --overwrite, or choose another --output")
    (folder / "last.pt").unlink(missing_ok=True)    # of a process killed just before it did so
    stage1.say(f"finished already: {folder} (--overwrite to run it again)")
    return result


def remove_run(folder):
    """Takes away what a run and its evaluations have left, to begin anew."""
    # results.json goes first: without it nobody takes the rest for a finished run.
    for name in ("results.json", "prompt.pt", "last.pt", "log.csv", "position.png"):
        (folder / name).unlink(missing_ok=True)
    for file in folder.glob("eval-*.json"):
        file.unlink()


def what_to_know(task, settings):
    """What a reader of the figures must know: a list of str.

    They are saved with the results, so that no table shows a figure without them.
    """
    notes = list(task.notes)
    if settings["clip"] not in ("toy", "ViT-B/16"):
        notes.append(f"CLIP {settings['clip']} is another than the paper's: figures do not compare "
                     "with published ones")
    if settings.get("epochs") == 1:
        notes.append("one epoch is the schedule's first, at a learning rate of 1e-5")
    return notes


def learn_prompt(run, learner, task, descriptions, facts):
    """`adapt` with what surrounds it: optimizer, anchor prompts, images, the kept epochs.

    Changes the learner in place, and returns the epochs' log. The others are `run_seed`'s;
    descriptions are needed for one-stage training alone. Raises what `adapt`, `stage1.Epochs` do.
    """
    settings, args = run.settings, run.args
    clip_model = learner.clip_model
    # theta_s, theta_pos, and what the baseline learns beside.
    optimizer = stage1.sgd(learner.parameters(), settings["lr"])
    parts = {"learner": learner, "optimizer": optimizer}

    # The anchor: f_T(t_anc) of a frozen one, or a step for one that is learnt beside.
    anchor = None
    if settings.get("one_stage"):
        prompt = AnchorPrompt(clip_model, task.base_names, settings["anchor_length"],
                              settings["preposition"])
        # One memory for both: what the template holds frozen follows theta_a.
        learner.template.anchor_tokens.copy_(prompt.tokens.detach())
        prompt.tokens.data = learner.template.anchor_tokens
        targets = stage1.description_means(clip_model, descriptions)
        of_anchor = stage1.sgd([prompt.tokens], settings["anchor_lr"])              # theta_a
        anchor = prompt, targets, of_anchor, settings["anchor_weight"]
        parts |= {"anchor": prompt, "anchor's optimizer": of_anchor}
    elif settings["template"] == "anchoropt":
        anchor_tokens = learner.template.anchor_tokens
        facts = facts | {"anchor tokens": data.digest(anchor_tokens.tolist())}
        if settings["lambda_2"]:                                    # else nothing is distilled
            anchor = anchor_features(clip_model, task.base_names, anchor_tokens,
                                     settings["preposition"])

    # The epochs, from where an earlier process was stopped.
    steps = max(1, len(task.train) // settings["batch_size"])       # whole batches, or the only one
    epochs = stage1.Epochs("stage II", settings["epochs"], steps, parts, run.folder / "last.pt",
                           settings | facts)
    learner.set_classes(task.base_names)        # after-class: with the anchor of kept epochs

    # f_I(x) of the epochs to come, frozen. It runs in large batches and in the order of the items,
    # so that features are the same to the bit for every method and batch size.
    images = data.Images(task.train, data.train_transform(preprocess_of(clip_model)), run.seed)
    encode = stage1.frozen_tower(clip_model)
    kept = stage1.kept_features(clip_model, settings["clip"], images, args.feature_cache)
    if learner.needs_images and not torch.is_tensor(anchor):    # MaPLe without distillation
        encode = kept = None
    to_come = range(len(epochs.log) + 1, settings["epochs"] + 1)
    features = data.epoch_features(images, to_come, encode, kept, learner.needs_images,
                                   args.workers)
    labels = torch.tensor([item.label for item in task.train],
                          device=clip_model.logit_scale.device)
    adapt(learner, run, epochs, features, labels, anchor)
    return epochs.log


def learnt_W(learner):
    """The learnt W without noise, as rows of 0 and 1; None where no W is learnt."""
    matrix = learner.template.position_matrix
    if matrix is None:
        return None
    return hard_assignment(matrix.scores().detach()).int().tolist()


def environment(clip_model):
    """What the figures were made with: versions, device, command."""
    device = clip_model.logit_scale.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = {module.__name__: module.__version__ for module in (torch, torchvision, PIL)}
    return versions | {"device": f"{device} ({name})", "command": " ".join(sys.argv)}


# -------------------------------------------------------------------- command line

def run(args):
    dataset = data.load_dataset(args.dataset, args.root)
    if not dataset.train and args.baseline != "clip":
        raise ValueError(f"{dataset.name} has no training images: train on another dataset, then "
                         "test here with: python eval.py RUN --dataset NAME")
    settings, changed = stage1.resolve(args, dataset.name, args.baseline, args.template)
    if dataset.name not in data.DATASETS:
        evaluation.print_names(dataset.class_names)
    get_clip = functools.cache(lambda: stage1.load_clip_for(settings, args))
    runs = []
    for seed in dict.fromkeys(args.seeds):
        task = data.few_shot_task(dataset, settings["classes"], settings["shots"], seed)
        runs.append((stage1.Run(settings, changed, seed, args), task))
    descriptions = None
    if settings["template"] == "anchoropt" and not args.anchor:
        # The classes are the same for all seeds.
        descriptions = stage1.read_descriptions(task.base_names, args, settings)
    results = [run_seed(one, dataset, task, descriptions, get_clip) for one, task in runs]
    evaluation.print_results(results)


GROUPS = ("run", "method", "files", "machine", "images", "task", "clip", "prompt", "anchor",
          "anchor's learning", "stage I", "anchoropt", "stage II", "W", "atprompt", "maple", "dept")


def parse(argv):
    return stage1.make_parser("stage2.py", __doc__, GROUPS).parse_args(argv)


def main(argv=None):
    return stage1.run_script("stage2.py", run, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
