"""The authors' released code beside this project: the same CLIP, noise, inputs, start values.

    python tests/parity.py PATH_TO_ATPROMPT         about two minutes

PATH_TO_ATPROMPT: a checkout of https://github.com/zhengli97/ATPrompt. Its trainers and the Dassl in
it are imported from there; all runs in float32 on the CPU.

Prints a line a check, with ||ours - theirs|| / ||theirs||; the exit code is 1 where one is above
1e-4. The last column names departures of the released code from the paper (README, "Paper and
released code") that a check takes part in, and how the two were brought together: `released` is a
switch of ours, `emulated` is their rule in the place of ours, `mended` is a slip of theirs undone.
"""

import argparse
import collections
import contextlib
import functools
import importlib
import io
import os
import pathlib
import random
import sys
import tempfile
import types
from typing import NamedTuple
from unittest import mock

os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image

import data
import eval as evaluation
import losses
import stage1
import stage2
from anchor import AnchorPrompt, anchor_features, load_anchor
from prompts import (SOS, TOKENIZER, build_learner, clip, embed, encode_image, encode_sentences,
                     preprocess_of, unit)

TOLERANCE = 1e-4
BASE, NOVEL = ["ant", "yin yang", "a name of many words"], ["sea horse", "okapi"]
EPOCHS, IMAGES, BATCH, SEED = 3, 5, 2, 1        # the fifth image is dropped, as by their loader
D, RESOLUTION, LAYERS = 64, 32, 3
D_V, D_T = 768, 512                             # what MaPLe's trainers are written for
LENGTH = 32                                     # positions of a prompt: 77 would take longer
STEPS = EPOCHS * (IMAGES // BATCH)


# ---------------------------------------------------------------------------- their code

class Config(dict):
    """Stands for yacs' CfgNode: a dict whose keys are attributes."""
    __getattr__, __setattr__ = dict.__getitem__, dict.__setitem__


class Scheduler(torch.optim.lr_scheduler._LRScheduler):
    """torch's, with the argument `verbose` of older ones."""

    def __init__(self, optimizer, last_epoch=-1, verbose=False):
        super().__init__(optimizer, last_epoch)


class Evaluator:
    """Stands for Dassl's: keeps the logits, and leaves their `test` when they are complete."""

    def reset(self):
        self.logits = []

    def process(self, logits, labels):
        self.logits.append(logits)

    def evaluate(self):
        raise Complete


class Complete(Exception):
    """All logits of a test are there. What follows in theirs prints, and ends the process."""


# Dassl's own looks whether the file is there.
Datum = collections.namedtuple("Datum", "impath label classname")


def module(name, path=None, **content):
    """Puts an in-memory module in the place of `name`; below a path its submodules are real."""
    new = sys.modules[name] = types.ModuleType(name)
    new.__path__ = [str(path)] if path else []
    vars(new).update(content)
    return new


def import_theirs(checkout):
    """Their trainers, and the parts of Dassl that are compared."""
    checkout = pathlib.Path(checkout).resolve()
    dassl = checkout / "Dassl.pytorch" / "dassl"
    if not (checkout / "trainers" / "coop_anchoropt.py").is_file() or not dassl.is_dir():
        raise SystemExit(f"{checkout} is no checkout of https://github.com/zhengli97/ATPrompt")
    ours = {name: sys.modules.pop(name) for name in list(sys.modules)
            if name.split(".")[0] == "clip"}                # theirs is another package `clip`
    sys.path[:0] = [str(checkout), str(dassl.parent)]
    load = importlib.import_module

    # Dassl, without what asks for packages that nobody needs here.
    module("yacs")
    module("yacs.config", CfgNode=Config)
    module("gdown")
    module("dassl.modeling", build_head=None, build_backbone=None)
    module("dassl.evaluation", build_evaluator=lambda *_, **__: Evaluator())
    module("dassl.data", dassl / "data", DataManager=None)
    register = mock.Mock(register=lambda: lambda dataset: dataset)
    datasets = module("dassl.data.datasets", dassl / "data" / "datasets", Datum=Datum,
                      DATASET_REGISTRY=register)
    engine = module("dassl.engine", dassl / "engine")
    with mock.patch.object(torch.optim.lr_scheduler, "_LRScheduler", Scheduler):
        optim = load("dassl.optim")
    datasets.DatasetBase = load("dassl.data.datasets.base_dataset").DatasetBase
    engine.TRAINER_REGISTRY = load("dassl.engine.build").TRAINER_REGISTRY
    engine.TrainerX = load("dassl.engine.trainer").TrainerX
    engine.TrainerX.build_data_loader = lambda self: vars(self).update(self.cfg.LOADERS)

    endings = ("", "_atp", "_anchoropt")
    names = [name + ending for name in ("coop", "cocoop", "maple", "dept") for ending in endings]
    modules = {name: load(f"trainers.{name}") for name in [*names, "coop_pretrain_anchor"]}
    registry = engine.TRAINER_REGISTRY
    theirs = types.SimpleNamespace(
        modules=modules, optim=optim,
        trainers={name.lower(): registry.get(name) for name in registry.registered_names()},
        defaults=load("dassl.config.defaults")._C,
        transforms=load("dassl.data.transforms.transforms"),
        picker=object.__new__(load("datasets.oxford_pets").OxfordPets),
        anchors=sorted(checkout.glob("anchor_weights/*/*/model.pth.tar")))
    their_clip = load("clip.clip")
    their_clip._download = lambda url: url
    their_clip.tokenize.__defaults__ = LENGTH, False
    sys.modules.update(ours)
    del sys.path[:2]
    return theirs


@contextlib.contextmanager
def their_world(state=None):
    """In here float16 and CUDA do nothing, CLIP's file holds `state`, prints go nowhere."""
    def same(x, *args, **kwargs):
        return x
    no_script = mock.Mock(side_effect=RuntimeError("no TorchScript here"))
    patches = [(torch.Tensor, "half", same), (torch.Tensor, "cuda", same),
               (torch.nn.Module, "half", same), (torch.nn.Module, "cuda", same),
               (torch.jit, "load", no_script), (torch, "load", lambda *_, **__: dict(state))]
    with contextlib.ExitStack() as stack:
        for target, name, value in patches:
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield


def their_config(theirs, settings, names, side):
    """Dassl's defaults, the files under configs/, the options of their scripts."""
    cfg = Config({key: Config(value) if isinstance(value, dict) else value
                  for key, value in theirs.defaults.items()})
    M, attributes = settings["soft_tokens"], settings.get("attributes", [])
    texts = [*attributes, "none", "none"]
    prompt = Config(N_CTX=M, CTX_INIT=settings.get("start_words", ""), CSC=False, PREC="fp32",
                    CLASS_TOKEN_POSITION="end", PROMPT_DEPTH=settings.get("depth", 1))
    cfg.USE_CUDA = False
    cfg.MODEL = Config(BACKBONE=Config(NAME="ViT-B/16"), INIT_WEIGHTS="")
    cfg.DATASET = Config(NAME="Caltech101", SUBSAMPLE_CLASSES=side)
    cfg.INPUT |= {"SIZE": (RESOLUTION, RESOLUTION), "INTERPOLATION": "bicubic",
                  "PIXEL_MEAN": [0.48145466, 0.4578275, 0.40821073],
                  "PIXEL_STD": [0.26862954, 0.26130258, 0.27577711],
                  "TRANSFORMS": ["random_resized_crop", "random_flip", "normalize"]}
    cfg.OPTIM |= {"NAME": "sgd", "LR": settings["lr"], "MAX_EPOCH": settings["epochs"],
                  "LR_SCHEDULER": "cosine", "WARMUP_EPOCH": 1, "WARMUP_TYPE": "constant",
                  "WARMUP_CONS_LR": 1e-5}
    cfg.TRAINER = Config(
        COOP=prompt, COCOOP=prompt, MAPLE=prompt,
        ATPROMPT=Config(USE_ATPROMPT=True, N_ATT1=M, N_ATT2=M, N_ATT3=M, ATT_NUM=len(attributes),
                        ATT1_TEXT=texts[0], ATT2_TEXT=texts[1], ATT3_TEXT="none"),
        ANCHOROPT=Config(N_CTX=M, ANCHOR_LEN=settings.get("anchor_length"),
                         GUMBEL_TEMP=settings.get("tau"), MAX_TEMPLATE_LENGTH=10,
                         PROMPT_CE_WEIGHT=settings["lambda_1"],
                         KD_WEIGHT=settings.get("lambda_2"),
                         KD_TEMPERATURE=settings.get("temperature"),
                         ANCHOR_MSE_WEIGHT=settings.get("anchor_weight")),
        LINEAR_PROBE=Config(TYPE="linear", WEIGHT=settings.get("w_cat"), TEST_TIME_FUSION=True),
        FILM=Config(LINEAR_PROBE=True),
        NAMES_TO_UPDATE=["prompt_learner", "linear_probe", "film"])
    cfg.LOADERS = {"dm": types.SimpleNamespace(dataset=types.SimpleNamespace(classnames=names)),
                   "lab2cname": None, "val_loader": None}
    return cfg


def build_theirs(theirs, world, name, settings, names, side, anchor_tokens=None):
    """Their trainer, as `train.py` builds it. side: "base" or "new"."""
    def load_checkpoint(path):
        return {"state_dict": {"anchor_ctx_1": anchor_tokens}}
    for user in ("coop", "cocoop", "maple"):
        theirs.modules[f"{user}_anchoropt"].load_checkpoint = load_checkpoint
    with their_world(world.state):
        return theirs.trainers[name](their_config(theirs, settings, names, side))


class Report:
    """Prints a line a check."""

    def __init__(self):
        self.differences = []

    def __call__(self, cell, what, ours, theirs, note=""):
        """ours, theirs: tensors or floats; or what is equal or not."""
        if isinstance(theirs, (torch.Tensor, float)):
            a, b = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (ours, theirs))
            difference = float((a - b).norm() / b.norm().clamp_min(1e-30))
        else:
            difference = float(ours != theirs)
        self.differences.append(difference)
        verdict = "" if difference <= TOLERANCE else "DIFFERS"          # so does NaN
        text = f"{cell:27} {what:55} {difference:8.1e} {verdict:8} {note}"
        print(text.rstrip(), flush=True)

    def summary(self):
        """Prints how many checks there are. Returns how many differ."""
        failed = sum(not difference <= TOLERANCE for difference in self.differences)
        print(f"\n{len(self.differences)} checks, the worst {max(self.differences):.1e}; "
              f"{failed} above {TOLERANCE:.0e}")
        return failed


def make_world():
    """A random frozen CLIP, ours and as a state dict; each epoch's images; their labels."""
    torch.manual_seed(0)
    clip_model = clip.model.CLIP(D, RESOLUTION, LAYERS, D_V, 8, LENGTH, 49408, D_T, 8, LAYERS)
    for tower in (clip_model.transformer, clip_model.visual.transformer):
        for parameter in tower.parameters():            # rougher than at the start: all terms count
            parameter.data += 0.02 * torch.randn_like(parameter)
    clip_model = clip_model.eval().requires_grad_(False)
    preprocess = preprocess_of(clip_model)
    epochs = []                                         # the first: the test images
    for _ in range(EPOCHS + 1):
        crops = torch.randint(256, (IMAGES, 3, RESOLUTION, RESOLUTION), dtype=torch.uint8)
        epochs.append((encode_image(clip_model, data.normalize(crops, preprocess)), crops))
    return types.SimpleNamespace(clip_model=clip_model, state=clip_model.state_dict(),
                                 preprocess=preprocess, epochs=epochs,
                                 labels=torch.arange(IMAGES) % len(BASE))


# ---------------------------------------------------------------------------- the twelve cells

class Cell(NamedTuple):
    baseline: str
    template: str
    note: str = ""                  # departures
    ending: str = ""                # of the name, for a variant
    changed: dict = {}              # settings

    @property
    def name(self):
        return f"{self.baseline}-{self.template}{self.ending}"


READ = "1, 2: released"
PETS = {"attributes": ["playfulness", "energy"]}
CELLS = [
    Cell("coop", "plain"),
    Cell("coop", "atprompt"),
    Cell("coop", "atprompt", "9: emulated", ", Pets", PETS),
    Cell("coop", "anchoropt", READ),
    Cell("coop", "anchoropt", READ, ", N = 3", {"anchor_length": 3}),
    Cell("cocoop", "plain"),
    Cell("cocoop", "atprompt"),
    Cell("cocoop", "anchoropt", READ + "; 3: emulated"),
    Cell("cocoop", "anchoropt", READ + "; 3: mended", ", all learnt"),
    Cell("maple", "plain", "10: ours as theirs"),
    Cell("maple", "atprompt"),
    Cell("maple", "anchoropt", READ + "; 4: emulated"),
    Cell("dept", "plain"),
    Cell("dept", "atprompt"),
    Cell("dept", "anchoropt", READ + "; 8: lambda_2 = 0"),
]
# The learnt tensors' names: ours -> theirs.
THEIR_NAMES = {
    "template.soft_tokens": "ctx", "template.position_matrix.logits": "ctx_pos_params",
    "template.attribute_soft_tokens.0": "ctx_att1", "template.attribute_soft_tokens.1": "ctx_att2",
    "meta_net.0": "meta_net.linear1", "meta_net.2": "meta_net.linear2",
    "to_visual.0": "proj", "to_visual.1": "compound_prompt_projections.0",
    "to_visual.2": "compound_prompt_projections.1",
    "deep_tokens.0": "compound_prompts_text.0", "deep_tokens.1": "compound_prompts_text.1",
    "scale_image": "film_lp_img.scale", "bias_image": "film_lp_img.bias",
    "scale_text": "film_lp_text.scale", "bias_text": "film_lp_text.bias",
    "head": "linear_probe_proj"}


def cell_settings(cell):
    """Large rates and weights, so that every term shows."""
    settings = stage1.default_settings("caltech101", cell.baseline, cell.template)
    settings |= {"batch_size": BATCH, "epochs": EPOCHS, "lr": 0.1}
    if cell.baseline == "maple":
        settings["depth"] = 3
    if cell.template == "anchoropt":
        settings |= {"feature_at": "released", "test_position": "sample", "tau": 0.7,
                     "lambda_1": 2, "lambda_2": 300, "temperature": 2}
        if cell.baseline == "dept":
            settings["lambda_2"] = 0                        # departure 8
    return settings | cell.changed


def check_cell(report, theirs, world, cell):
    report = functools.partial(report, cell.name, note=cell.note)
    settings = cell_settings(cell)
    anchor_tokens = None
    if cell.template == "anchoropt":
        generator = torch.Generator().manual_seed(5)
        anchor_tokens = 0.05 * torch.randn(settings["anchor_length"], D_T, generator=generator)
    ending = {"plain": "", "atprompt": "_atp", "anchoropt": "_anchoropt"}[cell.template]
    build = functools.partial(build_theirs, theirs, world, cell.baseline + ending, settings,
                              anchor_tokens=anchor_tokens)
    trainer = build(names=BASE, side="base")
    learner, base, novel = build_ours(world, cell, settings, anchor_tokens)

    def f_anc(names):
        if anchor_tokens is not None:
            return anchor_features(world.clip_model, names, anchor_tokens)

    pairs = pair(learner, trainer)
    if settings.get("start_words"):
        report("start words", learner.template.soft_tokens, pairs["template.soft_tokens"][1])
    start_alike(pairs)
    start = {name: mine.detach().clone() for name, (mine, _) in pairs.items()}
    report("logits, base", *logits(world, learner, trainer, f_anc(base), known=True))

    # Three epochs.
    learnt = which_are_learnt(cell, learner, trainer)
    ours = Watched(stage1.sgd(learnt, settings["lr"]), dict(learner.named_parameters()))
    f_teacher = f_anc(base) if settings.get("lambda_2") else None
    run = stage1.Run(settings, {}, SEED, None)
    stage2.adapt(learner, run, ours, iter(world.epochs[1:]), world.labels, f_teacher)
    other = train_theirs(world, trainer, {name: p for name, (_, p) in pairs.items()})
    if cell.name == "cocoop-anchoropt":                     # departure 3: theirs has none for W
        del ours.gradients["template.position_matrix.logits"]
    report("loss, first step", ours.losses[0], other.losses[0])
    report(f"losses, {STEPS} steps", torch.tensor(ours.losses), torch.tensor(other.losses))
    report("tensors with a gradient", sorted(ours.gradients), sorted(other.gradients))
    for name, gradient in other.gradients.items():
        report(f"gradient, {name}", ours.gradients[name], gradient)
    for name, (mine, p) in pairs.items():
        if any(mine is parameter for parameter in learnt):
            report(f"movement, {name}", mine - start[name], p - start[name])
        else:
            report(f"no movement, {name}", mine.equal(start[name]), p.equal(start[name]))

    # Inference: base classes with the same trainer, novel ones with a new one, as theirs is run.
    report("trained logits, base", *logits(world, learner, trainer, f_anc(base), known=True))
    elsewhere = build(names=NOVEL, side="new")
    state = {name: p for name, p in trainer.model.named_parameters() if "linear_probe" not in name}
    elsewhere.model.load_state_dict(state, strict=False)
    learner.set_classes(novel)
    report("trained logits, novel", *logits(world, learner, elsewhere, f_anc(novel), known=False))


def build_ours(world, cell, settings, anchor_tokens):
    """Our learner, and the names of base and novel classes."""
    if cell.changed is not PETS:
        learner = build_learner(settings, world.clip_model, BASE, anchor_tokens)
        if cell.name == "maple-anchoropt":
            learner.template.deepen = functools.partial(released_deepen, learner)
        return learner, BASE, NOVEL

    # Departure 9: of "playfulness" theirs takes the first token; "energy" and what stands before
    # the class are an X.
    base, novel = ([f"x {name}" for name in names] for names in (BASE, NOVEL))
    learner = build_learner(settings | {"attributes": ["x", "x"]}, world.clip_model, base)
    learner.template.words[0] = embed(world.clip_model, TOKENIZER.encode("playfulness")[:1])
    return learner, base, novel


def released_deepen(learner, W, V_l, hidden):
    """Departure 4: the deep rule as released, for N = 1.

    All rows with the anchor get one state: that of the first such row, read a position early.
    """
    layer = 1 + next(i for i, own in enumerate(learner.deep_tokens) if own is V_l)
    rows = W[:, -1].nonzero()
    if len(rows) == 0:
        return W[:, :-1] @ V_l[None]
    row = int(rows[0])
    state = hidden[:, row - 1:row] if row > 0 else sos_state(learner.clip_model, layer)
    return W @ torch.cat([V_l[None], state], dim=1)


def sos_state(clip_model, layer):
    """The state of [SOS] before a block: (1, 1, d_t). It sees nothing but itself."""
    x = torch.zeros(LENGTH, 1, D_T)
    x[0] = embed(clip_model, [SOS]) + clip_model.positional_embedding[:1]
    return clip_model.transformer.resblocks[:layer](x)[:1]


def pair(learner, trainer):
    """name -> (our parameter, theirs), for all that is learnt."""
    their_parameters, pairs = dict(trainer.model.named_parameters()), {}
    for name, parameter in learner.named_parameters():
        stem, dot, kind = name.rpartition(".")
        other = THEIR_NAMES.get(name) or THEIR_NAMES[stem] + dot + kind
        places = (other, f"prompt_learner.{other}", f"normal_prompt_learner.{other}")
        found, = [their_parameters[place] for place in places if place in their_parameters]
        pairs[name] = parameter, found
    return pairs


def start_alike(pairs):
    """Equal start values, far from the tiny ones of N(0, 0.02^2), so that every term shows."""
    generator = torch.Generator().manual_seed(7)
    for mine, other in pairs.values():
        mine.data += 0.1 * torch.randn(mine.shape, generator=generator)
        other.data.copy_(mine.data)


def which_are_learnt(cell, learner, trainer):
    """Our parameters that move. Departure 3: CoCoOp's trainer leaves out W and the meta-net."""
    if cell.name == "cocoop-anchoropt":
        return [learner.template.soft_tokens]
    if cell.name == "cocoop-anchoropt, all learnt":
        prompt = trainer.model.normal_prompt_learner
        prompt.ctx_pos_params.requires_grad_(True)
        trainer.optim.param_groups[0]["params"] += prompt.meta_net.parameters()
    return list(learner.parameters())


class Watched(stage1.Epochs):
    """`Epochs` that keeps each loss, and the gradients of the first step."""

    def __init__(self, optimizer, named_parameters):
        super().__init__("parity", EPOCHS, IMAGES // BATCH, {"optimizer": optimizer},
                         pathlib.Path(os.devnull), {})
        self.watched, self.losses, self.gradients = named_parameters, [], {}

    def _finish(self, epoch, seconds):
        """Keeps nothing on the disk."""

    def note(self, **terms):
        super().note(**terms)
        self.losses.append(terms["loss"].item())
        self.gradients = self.gradients or gradients_of(self.watched)


def gradients_of(named_parameters):
    return {name: p.grad.clone() for name, p in named_parameters.items() if p.grad is not None}


def train_theirs(world, trainer, named_parameters):
    """Their epochs, in the order and with the noise of `stage2.adapt`."""
    found = types.SimpleNamespace(losses=[], gradients={})
    step = trainer.forward_backward

    def watched(batch):
        summary = step(batch)
        found.losses.append(summary.get("loss", summary.get("loss_val")))
        found.gradients = found.gradients or gradients_of(named_parameters)
        return summary
    trainer.forward_backward = watched
    for trainer.epoch in range(EPOCHS):
        x = data.normalize(world.epochs[trainer.epoch + 1][1], world.preprocess)
        torch.manual_seed(1_000_003 * SEED + trainer.epoch + 1)
        order = torch.randperm(IMAGES)[:IMAGES // BATCH * BATCH]
        trainer.train_loader_x = [{"img": x[batch], "label": world.labels[batch]}
                                  for batch in order.split(BATCH)]
        with their_world():
            trainer.run_epoch()
    return found


def logits(world, learner, trainer, f_anc, known):
    """Of our inference rule, and of their `test`: the test images in batches of 3."""
    f, crops = world.epochs[0]
    x = data.normalize(crops, world.preprocess)
    torch.manual_seed(3)
    learner.eval()
    with torch.no_grad():
        ours = [evaluation.infer(learner, f_part, x_part, f_anc, known)["final"]
                for f_part, x_part in zip(f.split(3), x.split(3))]
    torch.manual_seed(3)
    trainer.test_loader = [{"img": part, "label": torch.zeros(len(part))} for part in x.split(3)]
    with their_world(), contextlib.suppress(Complete):
        trainer.test()
    return torch.cat(ours), torch.cat(trainer.evaluator.logits)


# ---------------------------------------------------------------------------- other checks

def check_stage1(report, theirs, world):
    """Stage I: their CoOp_Pretrain_Anchor and our `learn_anchor`, from the same descriptions."""
    report = functools.partial(report, "stage I", note="6: theirs encodes images in vain")
    settings = stage1.default_settings("caltech101", "coop", "anchoropt")
    settings |= {"epochs": EPOCHS, "lr": 0.1, "anchor_weight": 500.0}
    endings = ("is big", "is red and wide", "is seen in the sea")
    sentences = {name: [f"A {name} {ending}." for ending in endings] for name in BASE}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        data.save_json("templates/cal_prompts_full.json", sentences)
        trainer = build_theirs(theirs, world, "coop_pretrain_anchor", settings, BASE, "base")

    prompt = AnchorPrompt(world.clip_model, BASE)
    theirs_tokens = trainer.model.anchor_prompt_learner.anchor_ctx_1
    start_alike({"anchor": (prompt.tokens, theirs_tokens)})
    start = prompt.tokens.detach().clone()
    targets = stage1.description_means(world.clip_model, list(sentences.values()))
    ours = Watched(stage1.sgd([prompt.tokens], settings["lr"]), {"anchor": prompt.tokens})
    stage1.learn_anchor(prompt, targets, ours, settings["anchor_weight"])
    other = train_theirs(world, trainer, {"anchor": theirs_tokens})
    # Theirs is the loss to all descriptions; to their mean it is less by a constant.
    f_des = [unit(encode_sentences(world.clip_model, own)) for own in sentences.values()]
    constant = settings["anchor_weight"] * losses.anchor_mse(targets, f_des)
    found = torch.tensor(ours.losses) + constant
    report(f"losses, {STEPS} steps", found, torch.tensor(other.losses))
    report("gradient, anchor", ours.gradients["anchor"], other.gradients["anchor"])
    report("movement, anchor", prompt.tokens - start, theirs_tokens - start)


def check_picks(report, theirs, world):
    """CoOp's few-shot picks, and the split into base and novel classes."""
    names, rng, parts = [f"class {label}" for label in range(9)], random.Random(0), []
    for n in (20, 6, 5):                                    # train, val, test; scarce classes, too
        part = [data.Item(f"{label}/{i}", label) for label in range(9) for i in range(n - label)]
        parts.append(rng.sample(part, len(part)))
    dataset = data.Dataset(names, *parts)
    picker = theirs.picker
    for seed in (1, 2, 3):
        task = data.few_shot_task(dataset, "base", 16, seed)
        picked = data.few_shot(dataset.train, 16, seed)
        their_parts = [[Datum(*item[:2], names[item.label]) for item in part] for part in parts]
        with their_world():
            random.seed(seed)
            their_train = picker.generate_fewshot_dataset(their_parts[0], num_shots=16)
            base, novel = (picker.subsample_classes(their_train, their_parts[2], subsample=side)
                           for side in ("base", "new"))
        for what, ours, other in (("training images, all", picked, their_train),
                                  ("training images", task.train, base[0]),
                                  ("test images, base", task.test_base, base[1]),
                                  ("test images, novel", task.test_novel, novel[1])):
            report("few-shot picks", f"seed {seed}, {what}", [item[:2] for item in ours],
                   [(item.impath, item.label) for item in other])


def check_optimizer(report, theirs, world):
    """Learning rates of whole runs, and SGD's other values."""
    for epochs in (5, 10, 20, 50, 100, 200):
        settings = stage1.default_settings("caltech101", "coop", "plain") | {"epochs": epochs}
        cfg, rates = their_config(theirs, settings, BASE, "base"), []
        parameter = torch.nn.Parameter(torch.zeros(1))
        with their_world():
            optimizer = theirs.optim.build_optimizer([parameter], cfg.OPTIM)
            scheduler = theirs.optim.build_lr_scheduler(optimizer, cfg.OPTIM)
            for _ in range(epochs):
                rates.append(optimizer.param_groups[0]["lr"])
                optimizer.step()
                scheduler.step()
        ours = [stage1.learning_rate(i + 1, epochs, settings["lr"]) for i in range(epochs)]
        report("learning rate", f"{epochs} epochs", torch.tensor(ours), torch.tensor(rates))
    keys = ("momentum", "weight_decay", "dampening", "nesterov")
    ours, other = ([each.defaults[key] for key in keys]
                   for each in (stage1.sgd([parameter], 0.1), optimizer))
    report("optimizer", ", ".join(keys), ours, other)


def check_crops(report, theirs, world):
    """The pixels that CLIP gets."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 47, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).resize((140, 97), Image.Resampling.BICUBIC)
    settings = stage1.default_settings("caltech101", "coop", "plain")
    cfg = their_config(theirs, settings, BASE, "base")
    for what, own in (("training", data.train_transform), ("test", data.test_transform)):
        with contextlib.redirect_stdout(None):
            transform = theirs.transforms.build_transform(cfg, is_train=what == "training")
        torch.manual_seed(2)
        ours = [own(world.preprocess)(picture) for _ in range(5)]
        ours = data.normalize(torch.stack(ours), world.preprocess)
        torch.manual_seed(2)
        report("crops", what, ours, torch.stack([transform(picture) for _ in range(5)]))


def check_anchors(report, theirs, world):
    """The released anchors, beside what `torch.load` unpickles, as their trainers do it."""
    for path in theirs.anchors:
        other = torch.load(path, "cpu", weights_only=False)["state_dict"]["anchor_ctx_1"]
        report("released anchor", path.parent.parent.name, load_anchor(path)[0], other)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", help="a checkout of the authors' repository, ATPrompt")
    args = parser.parse_args()
    torch.set_num_threads(1)            # so small that a second one costs more than it brings
    theirs, world, report = import_theirs(args.checkout), make_world(), Report()
    print(f"{'cell':27} {'check':55} {'differ by':17} departures")
    for cell in CELLS:
        check_cell(report, theirs, world, cell)
    for check in (check_stage1, check_picks, check_optimizer, check_crops, check_anchors):
        check(report, theirs, world)
    return int(report.summary() > 0)


if __name__ == "__main__":
    sys.exit(main())
