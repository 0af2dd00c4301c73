"""A step of Stage II on a GPU, checked without one.

torch's FakeTensorMode computes shapes, types and devices, and no values: tensors can be `on cuda`
where there is none. Mixed devices and values that are read back to the host raise. Its one gap is
`backward`, which asks for a real device: on the fake GPU gradients are zeros, and the whole step,
with backward, runs on fake CPU tensors as well, where a value that is read raises all the same.
"""

import concurrent.futures
import copy
import multiprocessing

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

import anchor
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

PROCESSES = multiprocessing.get_context("spawn")
if "forkserver" in multiprocessing.get_all_start_methods():
    PROCESSES = multiprocessing.get_context("forkserver")
    PROCESSES.set_forkserver_preload(["stage2", "torch._subclasses.fake_tensor"])


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


def fake_places(mode, device):
    """`prompts._places` on the fake device: made once a run of real numbers, in no step."""
    real = prompts._places.__wrapped__

    def places(*args):
        with unset_fake_temporarily():
            indices = real(*args[:-1], torch.device("cpu"))
        return [mode.from_tensor(index).to(device) for index in indices]
    return places


def zero_gradients(learnt):
    """Stands for `Tensor.backward` on the fake GPU."""
    def backward(loss):
        for parameter in learnt:
            parameter.grad = torch.zeros_like(parameter)
    return backward


def world(baseline, template, one_stage, dtype):
    """A real small CLIP in this precision, settings, a learner and an anchor prompt."""
    clip_model = tiny_clip(layers=2, width=64)
    prompts._set_precision(clip_model, dtype)
    clip_model.eval().requires_grad_(False)
    settings = stage1.default_settings("caltech101", baseline, template, one_stage=one_stage)
    settings |= {"batch_size": BATCH, "lambda_2": settings.get("lambda_2", 0), "temperature": 2}
    if baseline == "maple":
        settings["depth"] = 2
    width = clip_model.token_embedding.weight.shape[1]
    learner = prompts.build_learner(settings, clip_model, NAMES, torch.randn(1, width))
    return clip_model, settings, learner.train(), anchor.AnchorPrompt(clip_model, NAMES)


def steps_on(device, dtype, baseline, template, one_stage, break_it=None):
    """Two steps of Stage II on fake tensors: what a test wants to know of them.

    break_it: a function that breaks the step first. An error comes back as its text.
    """
    clip_model, settings, learner, prompt = world(baseline, template, one_stage, dtype)
    mode = FakeTensorMode()
    with mode, pytest.MonkeyPatch.context() as patch:
        def to(tensor):
            return mode.from_tensor(tensor).detach().to(device)
        for module in (clip_model, learner, prompt):
            move(module, to)
        patch.setattr(prompts, "_places", fake_places(mode, device))
        learnt = [*learner.parameters(), prompt.tokens]
        if device != "cpu":
            patch.setattr(torch.Tensor, "backward", zero_gradients(learnt))
        if break_it is not None:
            break_it(patch)
        try:
            terms = run_steps(device, clip_model, settings, learner, prompt)
        except Exception as error:                  # torch's own do not all pickle
            return f"{type(error).__name__}: {error}"
    return {"losses": {(str(term.device), term.dtype, term.shape) for term in terms},
            "learnt": {(str(parameter.device), parameter.dtype) for parameter in learnt},
            "without a gradient": [name for name, parameter in learner.named_parameters()
                                   if parameter.grad is None]}


def run_steps(device, clip_model, settings, learner, prompt):
    """An epoch of `stage2.adapt`; returns the three losses of its last step."""
    optimizers = [stage1.sgd(learner.parameters(), settings["lr"])]
    d, R = clip_model.text_projection.shape[1], clip_model.visual.input_resolution
    f, targets = torch.randn(N, d, device=device), torch.randn(len(NAMES), d, device=device)
    labels = torch.zeros(N, dtype=torch.long, device=device)
    f_anc = anchor_step = crops = None
    if learner.needs_images:
        crops = torch.zeros(N, 3, R, R, dtype=torch.uint8)
    if settings.get("one_stage"):
        anchor_step = stage2.OneStage(prompt, targets, learner, settings)
        optimizers.append(anchor_step.optimizer)
    elif settings["template"] == "anchoropt":
        f_anc = targets
    epochs = OneEpoch("as if", 1, STEPS, optimizers)
    settings = settings | {"batch_size": BATCH}
    stage2.adapt(learner, epochs, [(f, crops)], labels, settings, 1, f_anc, anchor_step)
    assert len(epochs.terms) == STEPS
    return epochs.last


class OneEpoch(stage1.Epochs):
    """`Epochs` without the end of an epoch, where the losses are read."""

    def note(self, **terms):
        super().note(**terms)
        self.last = list(terms.values())

    def _finish(self, epoch, seconds):
        pass


def in_a_process(devices, *args):
    """`steps_on` these in a process of its own: a crash of torch's ends that process alone."""
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=PROCESSES) as pool:
        return [pool.submit(steps_on, *on, *args).result(timeout=120) for on in devices]


# ------------------------------------------------------------------------------------ the claims

@pytest.mark.parametrize("baseline, template, one_stage", CELLS)
def test_a_step_mixes_no_devices_and_reads_no_value_back(baseline, template, one_stage):
    devices = [("cuda:0", torch.float16), ("cpu", torch.float16)]
    for (device, _), found in zip(devices, in_a_process(devices, baseline, template, one_stage)):
        assert found == {"losses": {(device, torch.float32, torch.Size([]))},
                         "learnt": {(device, torch.float32)}, "without a gradient": []}


# ------------------------------------------------------------------- and that they can be broken

def make_a_tensor_on_the_cpu(patch):
    real = prompts.CoOp.logits
    patch.setattr(prompts.CoOp, "logits", lambda *args: real(*args) + torch.ones(len(NAMES)))


def read_the_loss(patch):
    real = losses.cross_entropy

    def cross_entropy(logits, labels):
        loss = real(logits, labels)
        return loss if loss.item() < 100 else 0 * loss
    patch.setattr(losses, "cross_entropy", cross_entropy)


def choose_by_a_value(patch):
    real = losses.cross_entropy
    patch.setattr(losses, "cross_entropy", lambda logits, labels: real(logits[labels >= 0], labels))


@pytest.mark.parametrize("break_it, said", [
    (make_a_tensor_on_the_cpu, "at least two devices, cuda:0 and cpu"),
    (read_the_loss, "DataDependentOutputException"),
    (choose_by_a_value, "DynamicOutputShapeException")])
def test_a_step_that_would_mix_devices_or_wait_is_caught(break_it, said):
    on_a_gpu = [("cuda:0", torch.float16)]
    (found,) = in_a_process(on_a_gpu, "coop", "anchoropt", False, break_it)
    assert said in found


def test_the_fake_gpu_does_what_the_real_cpu_does():
    """The same shapes and types come out of a step on real tensors."""
    clip_model, settings, learner, _ = world("coop", "anchoropt", False, torch.float32)
    f = torch.randn(BATCH, clip_model.text_projection.shape[1])
    labels = torch.arange(BATCH) % len(NAMES)
    before = copy.deepcopy(learner.state_dict())
    optimizer = stage1.sgd(learner.parameters(), settings["lr"])
    f_anc = prompts.unit(torch.randn(len(NAMES), f.shape[1]))
    epochs = OneEpoch("as if", 1, 1, [optimizer])
    stage2.adapt(learner, epochs, [(f, None)], labels, settings | {"batch_size": BATCH}, 1, f_anc)
    assert {(str(t.device), t.dtype, t.shape) for t in epochs.last} \
        == {("cpu", torch.float32, torch.Size([]))}
    moved = {key for key, value in learner.state_dict().items()
             if not torch.equal(value, before[key])}
    assert {key.split(".")[1] for key in moved} == {"soft_tokens", "position_matrix"}
