"""A step of Stage II on a GPU, checked without one.

torch's FakeTensorMode computes shapes, types and devices, and no values: tensors can be `on cuda`
where there is none. Mixed devices and values that are read back to the host raise. Its one gap is
`backward`, which asks for a real device: on the fake GPU gradients are zeros, and the whole step,
with backward, runs on fake CPU tensors as well, where a value that is read raises all the same.
"""

import argparse
import pathlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

import anchor
import data
import losses
import prompts
import stage1
import stage2
from reference import tiny_clip

NAMES = ["ant", "water lilly", "yin yang"]
BASELINES = ("coop", "cocoop", "maple", "dept")
CELLS = [(baseline, template, False) for baseline in BASELINES for template in prompts.TEMPLATES]
CELLS += [("coop", "anchoropt", True), ("maple", "anchoropt", True)]            # one stage
N, STEPS, BATCH = 10, 2, 4


# ------------------------------------------------------------------------------ the fake device

def move(module, to):
    """Puts all tensors of a module elsewhere, its plain attributes too. `.to` cannot."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                moved = to(parameter).detach()
                part._parameters[name] = torch.nn.Parameter(moved, parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = to(buffer)
        for name, value in list(vars(part).items()):
            if torch.is_tensor(value):
                object.__setattr__(part, name, to(value))
            if name == "words":                             # a list of them, AttributeTemplate's
                part.words = [to(each) for each in value]


class IndicesAreThere(TorchDispatchMode):
    """A GPU takes an index from the CPU, but the step waits until it is copied."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.index.Tensor:
            on = {index.device for index in args[1] if index is not None}
            assert on == {args[0].device}, f"an index on {on}"
        return function(*args, **kwargs or {})


def fake_constants(mode, function, device):
    """A cached function of constants on the fake device: made once a real run, in no step."""
    def constants(*args):
        with unset_fake_temporarily():
            there = list(function.__wrapped__(*args[:-1], torch.device("meta")))
            made = list(function.__wrapped__(*args[:-1], torch.device("cpu")))
        assert all(each.is_meta for each in there) and args[-1] == torch.device(device)
        return [mode.from_tensor(each).to(device) for each in made]
    return constants


def zero_gradients(learnt):
    """Stands for `Tensor.backward` on the fake GPU."""
    def backward(loss):
        for parameter in learnt:
            parameter.grad = torch.zeros_like(parameter)
    return backward


def world(baseline, template, one_stage, dtype):
    """A real small CLIP in this precision, a run's settings, a learner and an anchor prompt."""
    clip_model = tiny_clip(layers=2, width=64)
    if dtype == torch.float16:
        prompts.clip.model.convert_weights(clip_model)
    given = {"one_stage": one_stage}
    settings = stage1.default_settings("caltech101", baseline, template, given)
    settings |= given | {"batch_size": BATCH}
    if baseline == "maple":
        settings["depth"] = 2
    width = clip_model.token_embedding.weight.shape[1]
    learner = prompts.build_learner(settings, clip_model, NAMES, torch.randn(1, width))
    return clip_model, settings, learner.train(), anchor.AnchorPrompt(clip_model, NAMES)


def steps_on(device, dtype, cell):
    """Two steps of Stage II on fake tensors: what a test wants to know of them."""
    clip_model, settings, learner, prompt = world(*cell, dtype)
    mode = FakeTensorMode()
    with mode, pytest.MonkeyPatch.context() as patch:
        def to(tensor):
            return mode.from_tensor(tensor).detach().to(device)
        for module in (clip_model, learner, prompt):
            move(module, to)
        for module, name in ((prompts, "_places"), (data, "_mean_and_std")):
            patch.setattr(module, name, fake_constants(mode, getattr(module, name), device))
        patch.setattr(stage2, "in_words", lambda *W: "")    # read once an epoch, after its steps
        patch.setattr(stage2, "learnt_W", lambda learner: None)
        learnt = [*learner.parameters(), prompt.tokens]
        if device != "cpu":
            patch.setattr(torch.Tensor, "backward", zero_gradients(learnt))
        with IndicesAreThere():
            terms = run_steps(device, clip_model, settings, learner, prompt)
    return {"losses": {(str(term.device), term.dtype, term.shape) for term in terms},
            "learnt": {(str(parameter.device), parameter.dtype) for parameter in learnt},
            "without a gradient": [name for name, parameter in learner.named_parameters()
                                   if parameter.grad is None]}


def run_steps(device, clip_model, settings, learner, prompt):
    """An epoch of `stage2.adapt`; returns the three losses of its last step."""
    d, R = clip_model.text_projection.shape[1], clip_model.visual.input_resolution
    f, targets = torch.randn(N, d, device=device), torch.randn(len(NAMES), d, device=device)
    labels = torch.zeros(N, dtype=torch.long, device=device)
    crops = torch.zeros(N, 3, R, R, dtype=torch.uint8) if learner.needs_images else None
    parts = {"optimizer": stage1.sgd(learner.parameters(), settings["lr"])}
    teacher = None
    if settings.get("one_stage"):
        parts["anchor's optimizer"] = stage1.sgd([prompt.tokens], 0.002)
        teacher = prompt, targets, parts["anchor's optimizer"], settings["anchor_weight"]
    elif settings["template"] == "anchoropt":
        teacher = targets
    epochs = OneEpoch("as if", 1, STEPS, parts, pathlib.Path("no/such/last.pt"), {})
    run = stage1.Run(settings, {}, 1, argparse.Namespace())
    stage2.adapt(learner, run, epochs, iter([(f, crops)]), labels, teacher)
    assert len(epochs.terms) == STEPS
    return epochs.last


class OneEpoch(stage1.Epochs):
    """`Epochs` without the end of an epoch, where the losses are read."""

    def note(self, **terms):
        super().note(**terms)
        self.last = list(terms.values())

    def _finish(self, epoch, seconds):
        pass


# ------------------------------------------------------------------------------------ the claims

@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_step_mixes_no_devices_and_reads_no_value_back(cell, device):
    assert steps_on(device, torch.float16, cell) == {
        "losses": {(device, torch.float32, torch.Size([]))},
        "learnt": {(device, torch.float32)}, "without a gradient": []}


# ------------------------------------------------------------------- and that they can be broken

ON_CPU = torch.zeros(BATCH, dtype=torch.long)


@pytest.mark.parametrize("owner, name, change, said", [
    (prompts.CoOp, "logits", lambda logits, *_: logits + torch.ones(3), "at least two devices"),
    (losses, "cross_entropy", lambda loss, *_: loss * (loss.item() < 100), "DataDependentOutput"),
    (losses, "cross_entropy", lambda loss, logits, labels: loss + logits[labels >= 0].sum(),
     "DynamicOutputShape"),
    (losses, "cross_entropy", lambda loss, logits, _: loss + logits[ON_CPU].sum(), "an index on")])
def test_a_step_that_would_mix_devices_or_wait_is_caught(monkeypatch, owner, name, change, said):
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args: change(real(*args), *args[-2:]))
    with pytest.raises(Exception) as error:
        steps_on("cuda:0", torch.float16, ("coop", "anchoropt", False))
    assert said in f"{error.type.__name__}: {error.value}"
