"""stage1.py and stage2.py as a user runs them: a few toy pictures, small trees of the datasets.

On the device that the environment's ANCHOROPT_DEVICE names, by default the CPU.
"""

import contextlib
import csv
import functools
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

import anchor
import data
import eval as evaluation
import losses
import position
import prompts
import stage1
import stage2
import worlds
from reference import clip, encode_77, encode_image_prompted, relative, tiny_clip, unit

ROOT = pathlib.Path(stage2.__file__).parent
DEVICE = os.environ.get("ANCHOROPT_DEVICE", "cpu")
QUICK = ["--epochs", 1, "--anchor-epochs", 1]
TWO = ["--epochs", 2, "--anchor-epochs", 2]
load_toy_clip = functools.cache(prompts.load_clip)
load_whole = data.load_dataset


def few_pictures(name, root=None):
    """`data.load_dataset`, except that the toy world has 12 classes of 4 + 1 + 4 pictures."""
    dataset = load_whole(name, root)
    if dataset.name != "toy":
        return dataset
    kept = range(0, 48, 4)

    def first(items, n):
        groups = data.group_by(lambda item: item.label, data.take(items, kept))
        return [item for label in range(12) for item in groups[label][:n]]
    return dataset._replace(class_names=[dataset.class_names[label] for label in kept],
                            train=first(dataset.train, 4), val=first(dataset.val, 1),
                            test=first(dataset.test, 4))


BASE = 6                            # classes of few_pictures
TRAIN, TEST = 4 * BASE, 4 * BASE    # pictures of a side
STEPS = TRAIN // 8                  # an epoch, in both stages
CLASSES = few_pictures("toy").class_names


@pytest.fixture(scope="module", autouse=True)
def small_toy():
    """Few pictures, and one frozen toy CLIP for all runs: the whole path in a moment."""
    def load_clip(name, *args):
        return load_toy_clip(name, *args) if name == "toy" else prompts.load_clip(name, *args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load_dataset", few_pictures)
        patch.setattr(stage1, "load_clip", load_clip)
        yield


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    torch.save(tiny_clip(layers=1, width=64).state_dict(), path)
    return path


def run(script, *argv, plot=False):
    """The exit code of a script's main, also where argparse leaves by itself."""
    words = ["--device", DEVICE]
    if script is stage2:
        words += ["--workers", "0"] if plot else ["--workers", "0", "--no-plot"]
    try:
        return script.main(words + [str(word) for word in argv])
    except SystemExit as leave:
        return leave.code


def refused(capsys, script, *argv, says):
    """A script says no: in one line that holds all of `says`, with exit code 2."""
    capsys.readouterr()
    assert run(script, *argv) == 2
    worlds.one_line(capsys.readouterr().err, f"{script.__name__}.py: ", *says)


def one_file(folder, name):
    (path,) = pathlib.Path(folder).rglob(name)
    return path


def figures(output):
    """What a run has found, without its surroundings."""
    result = json.loads(one_file(output, "results.json").read_text())
    return result | {"environment": None, "prompt": None}


def learnt(output):
    file = one_file(output, "prompt.pt")
    return torch.load(file, weights_only=True, map_location="cpu")["state"]


def log(output):
    """The rows of Stage II's log.csv, without the seconds."""
    with open(one_file(output, "prompt.pt").with_name("log.csv")) as file:
        return [row | {"seconds": None} for row in csv.DictReader(file)]


def same(a, b):
    """Are tensors, or dicts of them, equal? On a GPU, whose sums have no fixed order, nearly."""
    tolerance = 0 if DEVICE == "cpu" else 1e-2
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    return True


def assert_same(a, b):
    """Two runs, to the last digit and bit."""
    assert same(learnt(a), learnt(b))
    if DEVICE == "cpu":
        assert figures(a) == figures(b) and log(a) == log(b)


# -------------------------------------------------------- the two loops, step by step, by hand

NAMES = ["ant", "water lilly", "yin yang"]


@functools.cache
def clip_pair():
    """A random CLIP, and the same in float64."""
    return [tiny_clip(layers=2, width=64, dtype=dtype) for dtype in (torch.float32, torch.float64)]


def anchor_feature(tokens):
    """Eq. 4 at 77 positions: unit (C, d)."""
    model = clip_pair()[1]
    of = model.token_embedding.weight[prompts.TOKENIZER.encode("of")]
    return unit(encode_77(model, torch.cat([tokens, of]), NAMES))


def eq_5(tokens, descriptions):
    """1,000 times Eq. 5, against every description: a class's mean, then the classes' mean."""
    pairs = zip(anchor_feature(tokens), descriptions)
    return 1000 * sum((f_anc - f_des.double()).square().mean() for f_anc, f_des in pairs) / 3


def sgd(*parameters):
    return torch.optim.SGD(parameters, lr=0.0, momentum=0.9, weight_decay=5e-4)


def down(optimizer, loss, lr):
    optimizer.zero_grad()
    optimizer.param_groups[0]["lr"] = lr
    loss.backward()
    optimizer.step()


def descriptions_and_prompt():
    """Unit features of 1, 2 and 3 descriptions, their means, and an anchor prompt."""
    torch.manual_seed(3)
    descriptions = [unit(torch.randn(n, 64)) for n in (1, 2, 3)]
    targets = torch.stack([f.mean(0) for f in descriptions])
    return descriptions, targets, anchor.AnchorPrompt(clip_pair()[0], NAMES)


def moved_alike(fast, slow, start):
    """Do both end at the same place, to the rounding of float32 beside the way they went?"""
    return relative(fast.detach().double() - start, slow.detach() - start) < 1e-3


def test_stage_1_is_eq_5_by_sgd_on_the_schedule(tmp_path):
    descriptions, targets, prompt = descriptions_and_prompt()
    start = prompt.tokens.detach().double()
    by_hand = start.clone().requires_grad_()
    optimizer = sgd(by_hand)
    for lr in (1e-5, 1e-5, 0.1, 0.1, 0.075, 0.075):     # 0.1 (1 + cos(pi / 3)) / 2 in epoch 3
        down(optimizer, eq_5(by_hand, descriptions), lr)
    parts = {"optimizer": stage1.sgd([prompt.tokens], 0.1)}
    epochs = stage1.Epochs("stage I", 3, 2, parts, tmp_path / "last.pt", {})
    stage1.learn_anchor(prompt, targets, epochs, 1000)
    assert moved_alike(prompt.tokens, by_hand, start)


CHANGES = [{}, {"ensemble": "probabilities"}, {"soft_W": True}, {"draw": "once"},
           {"lambda_2": 0}, {"one_stage": True}, {"baseline": "maple", "depth": 1}]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_stage_2_is_algorithm_1_step_by_step(change, tmp_path):
    """In float64 and with 77 positions: Eqs. 1 and 5-12, order, noise, schedule, SGD."""
    # Two soft tokens and an anchor token; five images in batches of two, so one is left out.
    settings = {"baseline": "coop", "template": "anchoropt", "one_stage": False, "soft_tokens": 2,
                "arrangement": "adaptive", "tau": 0.7, "test_position": "argmax", "soft_W": False,
                "draw": "step", "ensemble": "logits", "feature_at": "eot", "anchor_length": 1,
                "anchor_weight": 1000, "anchor_lr": 0.002, "batch_size": 2, "lr": 0.02,
                "lambda_1": 2, "lambda_2": 300, "temperature": 3} | change
    one_stage, maple = settings["one_stage"], settings["baseline"] == "maple"
    lambda_2 = 0 if one_stage else settings["lambda_2"]
    model, exact = clip_pair()
    descriptions, targets, prompt = descriptions_and_prompt()
    learner = prompts.build_learner(settings, model, NAMES, prompt.tokens)
    matrix, labels = learner.template.position_matrix, torch.tensor([0, 1, 2, 1, 0])
    f, crops = torch.randn(5, 64), torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8)
    images = data.normalize(crops, prompts.preprocess_of(model)).double()
    learns = [learner.template.soft_tokens, matrix.logits, prompt.tokens]
    if maple:
        learns += [learner.to_visual[0].weight, learner.to_visual[0].bias]

    # By hand.
    starts = [parameter.detach().double() for parameter in learns]
    by_hand = [start.clone().requires_grad_() for start in starts]
    V, log_p, Anc, *linear = by_hand
    of_prompt, of_anchor = sgd(V, log_p, *linear), sgd(Anc)
    scale, T, found = exact.logit_scale.exp(), 3, []
    for epoch, lr, anchor_lr in ((1, 1e-5, 1e-5), (2, 0.02, 0.002)):
        torch.manual_seed(1_000_003 * 7 + epoch)
        order = torch.randperm(5)
        for batch in (order[:2], order[2:4]):
            if one_stage:
                down(of_anchor, eq_5(Anc, descriptions), anchor_lr)
            noise = matrix.noise
            if settings["draw"] == "step":
                noise = -torch.empty(3, 3).exponential_().log()
            soft = ((log_p + noise) / 0.7).softmax(1)                               # Eq. 7
            hard = torch.eye(3).double()[(log_p + noise).argmax(1)]                 # Eq. 6
            W = soft if settings["soft_W"] else hard + soft - soft.detach()
            context = W @ torch.cat([V, Anc.detach()])                              # Eqs. 8, 9
            u = u_norm = unit(f[batch].double())
            if maple:
                tokens = [V @ linear[0].T + linear[1]]
                u_norm = unit(encode_image_prompted(exact, images[batch], tokens))
            l_norm = scale * u_norm @ unit(encode_77(exact, context, NAMES)).T      # Eq. 1
            l_anc = scale * u @ anchor_feature(Anc.detach()).T
            q_ens = ((l_norm + l_anc) / 2 / T).softmax(1)
            if settings["ensemble"] == "probabilities":
                q_ens = ((l_norm.softmax(1) + l_anc.softmax(1)) / 2) ** (1 / T)
                q_ens = q_ens / q_ens.sum(1, keepdim=True)
            q_ens, log_q_norm = q_ens.detach(), (l_norm / T).log_softmax(1)
            ce = -l_norm.log_softmax(1)[[0, 1], labels[batch]].mean()               # Eq. 10
            kl = T ** 2 * (q_ens * (q_ens.log() - log_q_norm)).mean()               # Eq. 11
            found.append(2 * ce + lambda_2 * kl)                                    # Eq. 12
            down(of_prompt, found[-1], lr)

    parts = {"optimizer": stage1.sgd(learner.parameters(), settings["lr"])}
    frozen = None
    if one_stage:
        learner.template.anchor_tokens.copy_(prompt.tokens.detach())
        prompt.tokens.data = learner.template.anchor_tokens
        parts["anchor's"] = stage1.sgd([prompt.tokens], settings["anchor_lr"])
        frozen = prompt, targets, parts["anchor's"], settings["anchor_weight"]
    elif lambda_2:
        frozen = anchor.anchor_features(model, NAMES, prompt.tokens)
    epochs = stage1.Epochs("stage II", 2, 2, parts, tmp_path / "last.pt", {})
    stage2.adapt(learner, stage1.Run(settings, {}, 7, None), epochs, iter([(f, crops)] * 2), labels,
                 frozen)
    for fast, slow, start in zip(learns, by_hand, starts):
        assert moved_alike(fast, slow, start)
    means = [(found[0] + found[1]).item() / 2, (found[2] + found[3]).item() / 2]
    assert [row["loss"] for row in epochs.log] == pytest.approx(means, rel=1e-4)
    assert [row["lr"] for row in epochs.log] == [1e-5, 0.02]


def test_stage_1s_gradient_holds_in_float16_for_many_classes():
    """weight / (C d) as for 1,000 classes of ViT-B/16: plain backward() loses digits in float16."""
    plain, of_step = {}, {}
    for dtype in (torch.float32, torch.float16):
        torch.manual_seed(0)
        prompt = anchor.AnchorPrompt(load_toy_clip("toy", "cpu", dtype), CLASSES[:BASE])
        targets = unit(torch.randn_like(prompt().detach()))
        weight = 1000 / (1000 * 512) * targets.numel()
        loss = weight * losses.anchor_mse(prompt(), targets)
        (plain[dtype],) = torch.autograd.grad(loss, prompt.tokens)
        stage1.anchor_step(prompt, targets, sgd(prompt.tokens), weight)
        of_step[dtype] = prompt.tokens.grad
    exact = plain[torch.float32]
    assert torch.equal(of_step[torch.float32], exact)                   # a power of two: exact
    assert relative(of_step[torch.float16], exact) < 0.01 < relative(plain[torch.float16], exact)


# ---------------------------------------------------------------------------- the main job

@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """(output folder, printed text) of `python stage2.py`."""
    folder = tmp_path_factory.mktemp("first")
    with open(folder / "printed", "w") as printed, contextlib.redirect_stdout(printed):
        assert run(stage2, "--output", folder / "o", *TWO, plot=True) == 0
    return folder / "o", (folder / "printed").read_text()


def test_a_run_leaves_what_it_found_and_what_made_it(first_run):
    output, printed = first_run
    of_run = output / "toy" / "coop-anchoropt,anchor_epochs=2,epochs=2" / "seed1"
    of_anchor = output / "toy" / "anchor,anchor_epochs=2" / "seed1"
    names = ["results.json", "prompt.pt", "log.csv", "position.png"]
    expected = {of_run / name for name in names} | {of_anchor / "anchor.pt", of_anchor / "log.csv"}
    assert {path for path in output.rglob("*") if path.is_file()} - {
        of_run / ".lock", of_anchor / ".lock"} == expected
    assert (of_run / "position.png").read_bytes().startswith(b"\x89PNG")

    result = json.loads((of_run / "results.json").read_text())
    settings = stage1.default_settings("toy", "coop", "anchoropt")
    assert result["settings"] == settings | {"epochs": 2, "anchor_epochs": 2}
    saved = torch.load(of_run / "prompt.pt", weights_only=True)
    assert saved["settings"] == result["settings"] and saved["class_names"] == CLASSES[:BASE]
    assert set(result["facts"]) == {"class names", "training images", "test images",
                                    "descriptions' sentences"}
    assert result["environment"]["torch"] == torch.__version__
    assert len(result["notes"]) == 1                        # that there are four pictures
    assert evaluation.TOY_WARNING in printed and result["notes"][0] in printed

    W, logits = result["position_matrix"], saved["state"]["template.position_matrix.logits"]
    assert W["end"] == torch.eye(5).long()[logits.argmax(1).cpu()].tolist()
    assert all(sorted(row) == [0, 0, 0, 0, 1] for row in W["start"])
    assert W["epochs"] == [row["W"] for row in log(output)]
    assert W["epochs"][-1] == position.in_words(W["end"], 1)


def test_a_finished_run_is_shown_again_and_run_again_with_overwrite_alone(first_run, capsys):
    output, printed = first_run
    before, state = figures(output), learnt(output)
    of_old_prompt = one_file(output, "prompt.pt").with_name("eval-dtd.json")
    of_old_prompt.write_text("{}")
    begun = of_old_prompt.with_name("last.pt")      # as a process leaves it that is killed here
    begun.write_bytes(b"")
    assert run(stage2, "--output", output, *TWO) == 0
    out = capsys.readouterr().out
    assert "finished already" in out and "Stage I" not in out and not begun.exists()
    assert out[out.index("| prompt"):] == printed[printed.index("| prompt"):]
    assert run(stage2, "--output", output, *TWO, "--overwrite", plot=True) == 0
    out = capsys.readouterr().out
    assert "Stage I learns" in out and "finished already" not in out and not of_old_prompt.exists()
    assert same(learnt(output), state) and (figures(output) == before or DEVICE != "cpu")


CELLS = [f"--baseline {baseline} {template}" for baseline in ("coop", "cocoop", "maple", "dept")
         for template in ("--template plain", "--template atprompt", "--anchor-epochs 1",
                          "--one-stage")]
CELLS += ["--baseline clip", *(f"--anchor-epochs 1 --{words}" for words in (
    "arrangement after-class", "arrangement middle", "anchor-length 3", "preposition none",
    "feature-at released", "test-position sample", "batch-size 6"))]


@pytest.mark.parametrize("words", CELLS)
def test_every_cell_and_ablation_ends_in_its_table(tmp_path, capsys, words):
    argv, anchors = words.split(), "-epochs" in words or "one-stage" in words
    argv += [] if "clip" in words else ["--epochs", 1]
    assert run(stage2, "--output", tmp_path, *argv) == 0
    result, out = figures(tmp_path), capsys.readouterr().out
    readings = ["anchor", "normal", "ensemble", "final"] if anchors else ["normal", "final"]
    assert all(f"| {reading} " in out for reading in readings)
    assert all(list(result[side]) == readings for side in ("base", "novel"))
    assert (result["position_matrix"] is not None) == (anchors and "arrangement" not in words)
    # One-stage training needs no Stage I: its anchor is learnt beside the prompt.
    assert bool(list(tmp_path.rglob("anchor.pt"))) == ("anchor-epochs" in words)
    if anchors:
        assert learnt(tmp_path)["template.anchor_tokens"].abs().min() > 0


def test_seeds_have_their_own_pictures_and_one_table(tmp_path, capsys):
    assert run(stage2, "--output", tmp_path, "--seeds", 1, 2, 2, "--template", "atprompt",
               "--epochs", 1, "--shots", 2) == 0
    out = capsys.readouterr().out
    assert out.count("| prompt") == 1 and re.search("seeds? 1, 2\n", out)
    folder = tmp_path / "toy" / "coop-atprompt,epochs=1,shots=2"
    pictures = {json.loads((folder / f"seed{k}" / "results.json").read_text())["facts"][
        "training images"] for k in (1, 2)}
    assert len(pictures) == 2


def test_learning_on_all_classes_prints_accuracy(tmp_path, capsys):
    assert run(stage2, "--output", tmp_path, "--classes", "all", "--template", "plain",
               "--epochs", 1) == 0
    result = figures(tmp_path)
    assert result["novel"] is None
    assert torch.load(one_file(tmp_path, "prompt.pt"))["class_names"] == CLASSES
    final = f"| final | {result['base']['final']:.2f} |"
    assert final in re.sub(" +", " ", capsys.readouterr().out)


# -------------------------------------------------------------------------- Stage I as a script

def test_an_anchor_is_taught_by_the_mean_description_of_each_class(tmp_path, monkeypatch, capsys):
    """In Stage I, as many steps as if images came in batches of 32; and in one-stage training."""
    taught, steps = [], []

    def learn_anchor(prompt, targets, epochs, weight=None):
        taught.append((prompt, targets))
        steps.append(epochs.steps)

    def adapt(learner, run, epochs, features, labels, one_stage):
        learn_anchor(*one_stage[:2], epochs)
        raise KeyboardInterrupt
    monkeypatch.setattr(stage1, "learn_anchor", learn_anchor)
    monkeypatch.setattr(stage2, "adapt", adapt)
    command = ["--preposition", "sun", "--output", tmp_path]
    for shots in (32, 1):
        assert run(stage1, "--shots", shots, *command) == 0
    assert run(stage2, "--one-stage", *command) == 130
    assert steps == [32 * BASE // 32, 1, STEPS] and len(taught) == 3

    model, file = load_toy_clip("toy", "cpu", None), data.default_descriptions("toy")
    sentences = json.loads(pathlib.Path(file).read_text())
    f_des = [unit(model.encode_text(clip.tokenize(sentences[name][:10]))).mean(0)
             for name in CLASSES[:BASE]]
    for prompt, targets in taught:
        assert relative(targets.cpu(), torch.stack(f_des)) < (1e-5 if DEVICE == "cpu" else 0.02)
        of_sun = anchor.anchor_features(prompt.clip_model, CLASSES[:BASE], prompt.tokens, "sun")
        assert same(prompt().detach(), of_sun)
    prompt, targets = taught[0]
    cosine = (prompt() * targets).sum(1).mean().item()
    assert f"descriptions {cosine:.3f} -> {cosine:.3f}" in capsys.readouterr().out


# ------------------------------------------------------------------------ interruption, faults

def stop_at(monkeypatch, name, n, factor=None):
    """At the n-th call of `losses.<name>`: Ctrl-C, or a loss times `factor`. Once."""
    real, calls = getattr(losses, name), []

    def stops(*args):
        calls.append(1)
        if len(calls) != n:
            return real(*args)
        if factor is None:
            raise KeyboardInterrupt
        return real(*args) * factor
    monkeypatch.setattr(losses, name, stops)


@pytest.mark.parametrize("loss, options", [
    ("anchor_mse", ["--anchor-epochs", 2]), ("cross_entropy", ["--anchor-epochs", 1]),
    ("cross_entropy", ["--anchor-epochs", 1, "--test-position", "sample"]),
    ("cross_entropy", ["--one-stage", "--baseline", "maple"])])
def test_a_run_that_is_stopped_goes_on_to_the_same_bits(tmp_path, capsys, monkeypatch, loss,
                                                        options):
    command = [*options, "--epochs", 2, "--output"]
    assert run(stage2, *command, tmp_path / "unbroken") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, loss, STEPS + 2)                     # in the second epoch
        assert run(stage2, *command, tmp_path / "broken") == 130
    worlds.one_line(capsys.readouterr().err, "stage2.py", "stopped", "the same command goes on")
    assert run(stage2, *command, tmp_path / "broken") == 0
    assert capsys.readouterr().out.count("going on after epoch 1") == 1
    assert_same(tmp_path / "unbroken", tmp_path / "broken")


@pytest.mark.parametrize("stage, loss, part", [("stage I", "anchor_mse", "prompt"),
                                               ("stage II", "cross_entropy", "learner")])
def test_a_loss_that_is_not_finite_is_named_and_the_last_good_epoch_stays(
        tmp_path, capsys, monkeypatch, stage, loss, part):
    stop_at(monkeypatch, loss, STEPS + 2, float("nan"))
    refused(capsys, stage2, "--output", tmp_path, *TWO,
            says=[stage, "not finite in epoch 2", "is kept"])
    kept = torch.load(one_file(tmp_path, "last.pt"), weights_only=True)
    assert [row["epoch"] for row in kept["log"]] == [1]
    assert all(torch.isfinite(value).all() for value in kept[part].values())


@pytest.mark.parametrize("error, says", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "--batch-size"),
    (MemoryError(), "--batch-size"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes."), "--batch-size"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), "--batch-size"),
    (PermissionError(13, "Permission denied", "/a/file"), "Permission denied: '/a/file'"),
    (ValueError("two\nlines \x1b[31mred"), "two lines ?[31mred")])
def test_what_a_user_can_mend_is_one_line_and_a_fault_of_ours_keeps_its_traceback(
        capsys, error, says):
    def fails(args):
        raise error
    assert stage1.run_script("stage2.py", fails, None) == 2
    worlds.one_line(capsys.readouterr().err, "stage2.py: ", says)
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal"):
        stage1.run_script("stage2.py", fails, None)


# ---------------------------------------------------------------------------- stale results

@pytest.fixture
def describe(tmp_path, monkeypatch):
    """describe(names) writes the toy's description file, with another text for these classes."""
    sentences = json.loads(pathlib.Path(data.default_descriptions("toy")).read_text())
    monkeypatch.setattr(data, "SHIPPED", str(tmp_path))

    def write(names, text="A picture of something else."):
        other = {name: [text] for name in names}
        (tmp_path / "toy.json").write_text(json.dumps(sentences | other))
    write([])
    return write


def other_descriptions(output, describe, patch):
    describe(CLASSES[:1])


def other_table(output, describe, patch):
    rates = ("lr", "anchor_lr")
    patch.setattr(stage1, "SETTINGS_ROWS", [
        row | {key: "0.5" for key in rates if row[key]} for row in stage1.SETTINGS_ROWS])


def other_data(output, describe, patch):
    """As where an archive was half unpacked."""
    whole = few_pictures("toy")
    part = whole._replace(class_names=whole.class_names[::-1], train=whole.train[1:],
                          test=whole.test[1:])
    patch.setattr(data, "load_dataset", lambda name, root: part)


def other_anchor(output, describe, patch):
    file = one_file(output, "anchor.pt")
    tokens, settings = anchor.load_anchor(file)
    anchor.save_anchor(file, tokens + 0.1, settings)


def empty_prompt(output, describe, patch):
    one_file(output, "prompt.pt").write_bytes(b"")


@pytest.mark.parametrize("script, until, change, says", [
    (stage1, "finished", other_descriptions, ["anchor.pt", "descriptions' sentences"]),
    (stage1, "finished", other_table, ["anchor.pt", "anchor_lr"]),
    (stage1, "begun", other_descriptions, ["last.pt", "descriptions' sentences"]),
    (stage2, "finished", other_descriptions, ["results.json", "descriptions' sentences"]),
    (stage2, "finished", other_table, ["results.json", "settings"]),
    (stage2, "finished", empty_prompt, ["prompt.pt", "damaged"]),
    (stage2, "finished", other_data, ["results.json", "training images", "test images"]),
    (stage2, "begun, plain", other_data, ["last.pt", "training images", "test images"]),
    (stage2, "begun", other_anchor, ["last.pt", "anchor tokens"]),
    (stage2, "begun, plain", other_table, ["last.pt", "other lr"])])
def test_what_was_made_of_something_else_is_refused_until_overwrite(
        tmp_path, capsys, monkeypatch, describe, script, until, change, says):
    output = tmp_path / "o"
    command, loss = (TWO, "cross_entropy") if script is stage2 else (TWO[2:], "anchor_mse")
    if "plain" in until:
        command, loss = [*TWO[:2], "--template", "plain", "--batch-size", 8], "cross_entropy"
    with monkeypatch.context() as patch:
        if "begun" in until:
            stop_at(patch, loss, STEPS + 2)
        assert run(script, *command, "--output", output) == (130 if "begun" in until else 0)
    change(output, describe, monkeypatch)
    refused(capsys, script, *command, "--output", output, says=[*says, output])
    fresh = tmp_path / "fresh"
    for options in ([output, "--overwrite"], [fresh]):
        assert run(script, *command, "--output", *options) == 0
    if script is stage2:
        assert_same(output, fresh)
    else:
        assert same(*[anchor.load_anchor(one_file(folder, "anchor.pt"))[0]
                      for folder in (output, fresh)])


def test_stage_1_reads_no_image_and_no_description_of_a_novel_class(tmp_path, monkeypatch, capsys,
                                                                    describe):
    monkeypatch.setattr(data, "load_image", None)
    command = ["--anchor-epochs", 2, "--nearest", 1, "--output"]
    assert run(stage1, *command, tmp_path / "a") == 0
    describe(CLASSES[BASE:])
    assert run(stage1, *command, tmp_path / "b") == 0
    assert run(stage1, *command, tmp_path / "a") == 0
    tokens, _ = anchor.load_anchor(one_file(tmp_path / "a", "anchor.pt"))
    (((word, distance),),) = anchor.nearest_words(tokens, load_toy_clip("toy", DEVICE, None), 1)
    out = capsys.readouterr().out
    assert out.count("anchor found") == 1
    assert out.count(f"[Anc_1], its nearest words: {word} {distance:.2f}\n") == 3
    assert same(*[anchor.load_anchor(one_file(tmp_path / name, "anchor.pt"))[0] for name in "ab"])


def test_overwrite_removes_nothing_before_the_run_can_begin(tmp_path, capsys, describe):
    command = [*QUICK, "--output", tmp_path / "o"]
    assert run(stage2, *command) == 0
    before = figures(tmp_path)
    refused(capsys, stage2, *command, "--overwrite", "--device", "cuda:77", says=["cuda:77"])
    one_file(tmp_path, "anchor.pt").write_bytes(b"damaged")
    (tmp_path / "toy.json").write_text("{}")
    refused(capsys, stage2, *command, "--overwrite", says=["toy.json", *CLASSES[:BASE]])
    assert figures(tmp_path) == before and learnt(tmp_path)


# ---------------------------------------------------------------------------- folders, caches

def test_runs_that_agree_in_what_an_anchor_depends_on_share_it_and_no_two_runs_a_folder():
    def folders(*argv):
        args = stage2.parse([str(word) for word in argv])
        settings, changed = stage1.resolve(args, "toy", args.baseline, args.template)
        of_run = stage1.Run(settings, changed, 1, args)
        return of_run.folder.as_posix(), of_run.anchor_folder.as_posix()
    usual = folders()
    assert usual == ("output/toy/coop-anchoropt/seed1", "output/toy/anchor/seed1")
    of_prompt = [folders(*words.split()) for words in (
        "--tau 0.5", "--tau 0.05", "--lambda-2 0", "--baseline dept", "--arrangement before")]
    assert {of_anchor for _, of_anchor in of_prompt} == {usual[1]}
    of_anchor = [folders(*words) for words in (
        ["--anchor-epochs", 1], ["--anchor-length", 2], ["--preposition", "of the"],
        ["--preposition", "of-the"], ["--classes", "all"], ["--shots", 4],
        ["--descriptions", __file__], ["--dtype", "float16"], ["--clip", __file__])]
    assert len({anchor for _, anchor in [usual, *of_anchor]}) == 1 + len(of_anchor)
    runs = [usual, *of_prompt, *of_anchor]
    assert len({folder for folder, _ in runs}) == len(runs)


def test_kept_features_give_the_same_bits_and_spare_the_pictures(tmp_path, monkeypatch):
    opened, real = [], data.load_image
    monkeypatch.setattr(data, "load_image", lambda *args: opened.append(args) or real(*args))
    cells = [["coop"], ["dept", "--batch-size", 5], ["cocoop", "--batch-size", 4], ["maple"]]
    all_of = 2 * TRAIN + 2 * TEST           # two epochs, two sides
    for cell, expected in zip(cells, (all_of, 0, 0, all_of)):   # MaPLe prompts the image tower
        command = ["--baseline", *cell, *TWO, "--output"]
        for folder, options in (("", []), ("cached", ["--feature-cache", tmp_path / "cache"])):
            evaluation.frozen_features.cache_clear()            # as in a process of its own
            opened.clear()
            assert run(stage2, *command, tmp_path / cell[0] / folder / "o", *options) == 0
        assert len(opened) == expected
        assert_same(tmp_path / cell[0] / "o", tmp_path / cell[0] / "cached")
    kept = [path.read_bytes() for path in (tmp_path / "cache").iterdir()]
    assert len(kept) == len(set(kept)) == 4                     # each epoch has its own crops


# ------------------------------------------------------ other datasets, CLIPs and anchors

@pytest.mark.parametrize("name", stage1.ELEVEN)
def test_each_of_the_eleven_datasets_runs_with_what_is_shipped(tmp_path, clip_file, name):
    worlds.TREES[name](tmp_path / "data", classes=4)
    assert run(stage2, "--dataset", name, "--root", tmp_path / "data", "--clip", clip_file, *QUICK,
               "--max-descriptions", 1, "--output", tmp_path / "o") == 0
    result = figures(tmp_path / "o")
    assert result["dataset"] == name and set(result["base"]) == set(result["novel"])
    # What does not compare says so: four classes, and another CLIP.
    for fact in ("4 classes", result["settings"]["clip"]):
        assert any(fact in note for note in result["notes"])


def test_a_released_anchor_drives_stage2(tmp_path):
    file, tokens = tmp_path / "model.pth.tar", torch.randn(1, 128).half()
    torch.save({"state_dict": {"anchor_ctx_1": tokens}, "epoch": 3}, file)
    assert run(stage2, "--anchor", file, "--epochs", 1, "--output", tmp_path) == 0
    assert one_file(tmp_path, "prompt.pt").parent.parent.name \
        == f"coop-anchoropt,anchor={prompts.clip_identity(file)},epochs=1"
    assert torch.equal(learnt(tmp_path)["template.anchor_tokens"], tokens.float())


@pytest.mark.parametrize("saved, shape, says", [
    ({"clip": "ViT-B/16"}, (1, 128), ["other clip", "ViT-B/16"]),
    ({}, (2, 128), ["other anchor_length", "2"]),
    ({}, (1, 512), ["token width", "512"]),
    ({"class_names": CLASSES}, (1, 128), [f"{BASE} classes", "--classes all"])])
def test_an_anchor_that_does_not_fit_is_refused(tmp_path, capsys, saved, shape, says):
    anchor.save_anchor(tmp_path / "a.pt", torch.randn(shape), saved)
    refused(capsys, stage2, "--anchor", tmp_path / "a.pt", "--output", tmp_path / "o", says=says)


def test_names_that_the_outputs_encoding_lacks_stop_no_run(tmp_path, clip_file):
    """A process of its own: Café owl on a terminal of ASCII; and no library's warning shows."""
    worlds.own_folders_tree(tmp_path / "birds")
    words = [sys.executable, ROOT / "stage2.py", "--dataset", tmp_path / "birds", "--clip",
             clip_file, "--template", "plain", "--epochs", 1, "--output", tmp_path / "o",
             "--device", "cpu", "--workers", 0]
    done = subprocess.run([str(word) for word in words], cwd=tmp_path, text=True, timeout=300,
                          capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and not done.stderr
    assert "Caf\\xe9 owl" in done.stdout and "| final" in done.stdout


# -------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("words, says", [
    ("--dataset caltech101 --root nowhere", "nowhere/caltech-101 & --root"),
    ("--dataset imagenetv2 --root DATA", "imagenetv2 & python eval.py RUN"),
    ("--clip ViT-B16", "ViT-B/16"),
    ("--output FILE", "in_the_way"),
    ("--seeds 4294967296", "--seeds & 4294967296"),
    ("--anchor-length 80", "77 tokens & crimson striped circle")])
def test_bad_input_is_one_line_before_anything_is_learnt(
        tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stage2, "adapt", lambda *args: pytest.fail("learnt"))
    monkeypatch.setattr(stage1, "learn_anchor", lambda *args: pytest.fail("learnt"))
    places = {"FILE": "in_the_way", "DATA": "data"}
    pathlib.Path("in_the_way").write_text("mine")
    if "DATA" in words:
        worlds.imagenetv2_tree("data", classes=4)
    argv = ["--output", "o", *(places.get(word, word) for word in words.split())]
    refused(capsys, stage2, *argv, says=says.split(" & "))
    assert pathlib.Path("in_the_way").read_text() == "mine"
    if "DATA" in words:                     # Stage I needs images, to count
        refused(capsys, stage1, *argv, says=["imagenetv2"])
