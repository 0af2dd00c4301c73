"""stage1.py and stage2.py as a user runs them: a few toy pictures, small trees of the datasets."""

import csv
import functools
import json
import math
import os
import pathlib
import subprocess
import sys

import pytest
import torch

import anchor
import data
import eval as evaluation
import losses
import prompts
import stage1
import stage2
import worlds
from reference import relative, tiny_clip

ROOT = pathlib.Path(stage2.__file__).parent
QUICK = ["--epochs", 1, "--anchor-epochs", 1]
LEARNT = ["coop", "cocoop", "maple", "dept"]
load_toy_clip = functools.cache(prompts.load_clip)
load_whole = data.load_dataset


def few_pictures(name, root=None, seed=1):
    """`data.load_dataset`, but of the toy world 12 classes with 4 + 1 + 4 pictures each."""
    dataset = load_whole(name, root, seed)
    if dataset.name != "toy":
        return dataset
    kept = range(0, 48, 4)

    def first(items, n):
        items = data.take(items, kept)
        return [item for label in range(12)
                for item in [item for item in items if item.label == label][:n]]
    return dataset._replace(class_names=[dataset.class_names[label] for label in kept],
                            train=first(dataset.train, 4), val=first(dataset.val, 1),
                            test=first(dataset.test, 4))


BASE = 6                            # classes of few_pictures
TRAIN, TEST = 4 * BASE, 4 * BASE    # pictures of a side
STEPS = TRAIN // 8                  # an epoch, in both stages


@functools.cache
def toy_names():
    return few_pictures("toy").class_names


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
    torch.save(tiny_clip().state_dict(), path)
    return path


def run(script, *argv, plot=False):
    """The exit code of a script's main, also where argparse leaves by itself."""
    words = [str(word) for word in argv]
    if script is stage2 and not plot:
        words.append("--no-plot")
    try:
        return script.main(words)
    except SystemExit as leave:
        return leave.code


def refused(capsys, script, *argv):
    """The one clear line in which a script says no, with exit code 2."""
    assert run(script, *argv) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"{script.__name__}.py: ")
    return worlds.one_line(line)


def results(folder):
    return json.loads((folder / "results.json").read_text())


def one_run(output):
    (path,) = pathlib.Path(output).rglob("results.json")
    return path.parent


def figures(output):
    """What a run has found, without its surroundings."""
    result = results(one_run(output))
    del result["environment"]
    return result


def learnt(output):
    return torch.load(one_run(output) / "prompt.pt", weights_only=True)["state"]


def assert_same_to_the_bit(a, b):
    assert figures(a) == figures(b)
    assert not changed(learnt(a), learnt(b))


def changed(before, after):
    assert before.keys() == after.keys()
    return {key for key in before if not torch.equal(before[key], after[key])}


def logs(output):
    with open(one_run(output) / "log.csv") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------------- the main job

@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """(output folder, printed text) of `python stage2.py`."""
    output = tmp_path_factory.mktemp("first") / "o"
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *text, **_: printed.append(" ".join(map(str, text))))
        assert run(stage2, "--output", output, *QUICK, plot=True) == 0
    return output, "\n".join(printed)


def test_stage2_learns_the_anchor_first_and_says_so(first_run):
    output, printed = first_run
    assert printed.index("no anchor at") < printed.index("Stage I done") < printed.index("| final")
    assert (output / "toy" / "anchor,anchor_epochs=1" / "seed1" / "anchor.pt").is_file()


def test_a_run_leaves_its_files_and_no_others(first_run):
    output, _ = first_run
    folder = output / "toy" / "coop-anchoropt,anchor_epochs=1,epochs=1" / "seed1"
    left = {path.name for path in folder.iterdir()} - {".lock"}
    assert left == {"results.json", "prompt.pt", "log.csv", "position.png"}
    assert (folder / "position.png").read_bytes().startswith(b"\x89PNG")
    assert list(logs(output)[0]) == ["epoch", "lr", "loss", "ce", "kl", "seconds"]


def test_the_printed_table_holds_the_results(first_run):
    output, printed = first_run
    result = figures(output)
    table = [line.split("|")[1:5] for line in printed.splitlines() if line.startswith("| ")]
    assert [row[0].strip() for row in table] == ["prompt", *evaluation.READINGS]
    for row in table[1:]:
        reading = row[0].strip()
        values = [result[side][reading] for side in ("base", "novel", "hm")]
        assert [cell.strip() for cell in row[1:]] == [f"{value:.2f}" for value in values]


def test_final_is_the_normal_prompt_on_base_and_the_ensemble_on_novel_classes(first_run):
    result = figures(first_run[0])
    assert result["base"]["final"] == result["base"]["normal"]
    assert result["novel"]["final"] == result["novel"]["ensemble"]


def test_results_hold_all_that_made_them(first_run):
    result = results(one_run(first_run[0]))
    assert set(result["facts"]) == {"class names", "training images", "test images",
                                    "descriptions' sentences"}
    import numpy
    import PIL
    import torchvision
    for module in (torch, torchvision, PIL, numpy):
        key = {"PIL": "pillow"}.get(module.__name__, module.__name__)
        assert result["environment"][key] == module.__version__
    saved = torch.load(one_run(first_run[0]) / "prompt.pt", weights_only=True)
    assert saved["settings"] == result["settings"] and saved["class_names"] == toy_names()[:BASE]


def test_results_hold_the_position_matrix_before_and_after(first_run):
    matrices = figures(first_run[0])["position_matrix"]
    assert set(matrices) == {"start", "end"}
    for W in matrices.values():
        assert len(W) == 5 and all(sorted(row) == [0, 0, 0, 0, 1] for row in W)


def test_a_finished_run_is_not_run_again(first_run, capsys):
    output, printed = first_run
    assert run(stage2, "--output", output, *QUICK) == 0
    out = capsys.readouterr().out
    assert "finished already" in out and "Stage I" not in out
    assert out[out.index("| prompt"):].split() == printed[printed.index("| prompt"):].split()


def test_overwrite_runs_again_with_the_anchor_that_is_there(first_run, capsys):
    output, _ = first_run
    before, state = figures(output), learnt(output)
    assert run(stage2, "--output", output, "--overwrite", *QUICK, plot=True) == 0
    assert "anchor found" in capsys.readouterr().out
    assert figures(output) == before and not changed(learnt(output), state)


@pytest.mark.parametrize("baseline", LEARNT)
def test_the_same_seed_twice_gives_the_same_bits(tmp_path, baseline):
    for output in ("a", "b"):
        assert run(stage2, "--output", tmp_path / output, "--baseline", baseline, *QUICK) == 0
    assert_same_to_the_bit(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("template", prompts.TEMPLATES)
@pytest.mark.parametrize("baseline", LEARNT)
def test_every_cell_ends_in_its_table(tmp_path, capsys, baseline, template):
    options = ["--epochs", 1]
    readings = ("normal", "final")
    if template == "anchoropt":
        options, readings = QUICK, evaluation.READINGS
    assert run(stage2, "--output", tmp_path, "--baseline", baseline, "--template", template,
               *options) == 0
    result = figures(tmp_path)
    for side in ("base", "novel", "hm"):
        assert tuple(result[side]) == readings
    assert (result["position_matrix"] is not None) == (template == "anchoropt")
    assert f"toy, {baseline}-{template}," in capsys.readouterr().out


@pytest.mark.parametrize("baseline", LEARNT)
def test_one_stage_training_needs_no_anchor_of_stage_1(tmp_path, baseline):
    assert run(stage2, "--output", tmp_path, "--baseline", baseline, "--one-stage",
               "--epochs", 1) == 0
    assert one_run(tmp_path).parent.name == f"{baseline}-anchoropt,epochs=1,one_stage=True"
    assert tuple(figures(tmp_path)["novel"]) == evaluation.READINGS
    assert not list(tmp_path.rglob("anchor.pt"))


def test_zero_shot_clip_is_a_row_of_its_own(tmp_path):
    assert run(stage2, "--output", tmp_path, "--baseline", "clip") == 0
    result = figures(tmp_path)
    assert one_run(tmp_path).parent.name == "clip" and "epochs" not in result["settings"]
    assert tuple(result["base"]) == ("normal", "final")


def test_zero_shot_accuracy_is_that_of_clips_own_encoders(tmp_path):
    assert run(stage2, "--output", tmp_path, "--baseline", "clip") == 0
    dataset, model = data.load_dataset("toy"), prompts.load_clip("toy")
    crops = [data.test_transform(32)(data.load_image(item.source)) for item in dataset.test]
    texts = prompts.clip.tokenize([f"a photo of a {name}." for name in dataset.class_names])
    with torch.no_grad():
        u = prompts.unit(model.encode_image(data.normalize(torch.stack(crops))))
        similarity = u @ prompts.unit(model.encode_text(texts)).T
    labels = torch.tensor([item.label for item in dataset.test])
    for side, known, first in (("base", labels < BASE, 0), ("novel", labels >= BASE, BASE)):
        picks = similarity[known][:, first:first + BASE].argmax(-1) + first
        right = 100 * (picks == labels[known]).double().mean().item()
        assert figures(tmp_path)[side]["final"] == pytest.approx(right)


@pytest.mark.parametrize("switch", [
    ["--arrangement", "before"], ["--arrangement", "middle"], ["--arrangement", "after-class"],
    ["--lambda-2", "0"], ["--tau", "0.1"], ["--soft-tokens", "2"], ["--feature-at", "released"],
    ["--test-position", "sample"], ["--anchor-length", "3"], ["--preposition", "none"],
    ["--one-stage", "--arrangement", "after-class"]])
def test_every_ablation_runs_in_a_folder_of_its_own(tmp_path, switch):
    epochs = ["--epochs", 1] if "--one-stage" in switch else QUICK
    assert run(stage2, "--output", tmp_path, *epochs, *switch) == 0
    key, value = switch[-2].removeprefix("--").replace("-", "_"), switch[-1]
    named = one_run(tmp_path).parent.name.split(",")
    assert any(part in (f"{key}={value}", f"{key}={value}.0") for part in named)
    assert ("one_stage=True" in named) == ("--one-stage" in switch)


@pytest.mark.parametrize("baseline", LEARNT)
def test_switches_of_how_it_is_computed_leave_the_figures(tmp_path, baseline, monkeypatch):
    logits, steps, found = prompts.CoOp.logits, [], []
    monkeypatch.setattr(prompts.CoOp, "logits",
                        lambda *args: steps.append(logits(*args)) or steps[-1])
    switches = ["--class-chunk", 7, "--test-batch", 5]
    for name, options in (("a", []), ("b", switches)):
        steps.clear()
        assert run(stage2, "--output", tmp_path / name, "--baseline", baseline, *QUICK,
                   *options) == 0
        found.append(steps[0].detach())
    assert relative(found[1], found[0]) < 1e-5
    a, b = figures(tmp_path / "a"), figures(tmp_path / "b")
    assert a["settings"] == b["settings"]
    one_image = 100 / TEST + 1e-9
    for side in ("base", "novel"):
        for reading in evaluation.READINGS:
            assert abs(a[side][reading] - b[side][reading]) <= one_image
    loss = [float(logs(tmp_path / name)[0]["loss"]) for name in ("a", "b")]
    assert loss[0] == pytest.approx(loss[1], rel=1e-4)


def test_a_seed_that_is_given_twice_counts_once(tmp_path, capsys):
    assert run(stage2, "--output", tmp_path, "--seeds", 2, 2, "--template", "plain",
               "--epochs", 1) == 0
    out = capsys.readouterr().out
    assert "coop-plain,epochs=1, seed 2\n" in out and "finished already" not in out


def test_what_is_said_of_descriptions_is_said_once_for_all_seeds(tmp_path, capsys,
                                                                 own_descriptions):
    path, sentences = own_descriptions
    name = toy_names()[0]
    path.write_text(json.dumps(sentences | {name: [*sentences[name], "..."]}))
    command = ["--output", tmp_path / "o", *QUICK, "--seeds", 1, 2]
    assert run(stage2, *command) == 0
    assert capsys.readouterr().out.count("sentences without a letter or digit") == 1


def test_several_seeds_end_in_the_mean_and_the_hm_of_the_means(tmp_path, capsys):
    assert run(stage2, "--output", tmp_path, "--seeds", 1, 2, 3, "--template", "plain",
               "--epochs", 1) == 0
    found = [results(tmp_path / "toy" / "coop-plain,epochs=1" / f"seed{k}") for k in (1, 2, 3)]
    base, novel = (sum(result[side]["final"] for result in found) / 3 for side in ("base", "novel"))
    hm = 2 * base * novel / (base + novel)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| final")]
    expected = [f"{value:.2f}" for value in (base, novel, hm)]
    assert [cell.strip() for cell in line.split("|")[2:5]] == expected


# ----------------------------------------------------------------------------------- Stage I

@functools.cache
def toy_descriptions():
    """The toy CLIP, the class names, and the features of their descriptions."""
    model, names = load_toy_clip("toy"), toy_names()
    sentences = data.load_descriptions(data.default_descriptions("toy"), names)
    return model, names, stage1.description_features(model, sentences, names)


def learn_toy_anchor(seed, epochs, steps=6):
    """An anchor prompt of the base classes before and after Stage I, and Stage I's log."""
    model, names, features = toy_descriptions()
    targets = torch.stack([f.mean(0) for f in features[:BASE]])
    torch.manual_seed(seed)
    prompt = anchor.AnchorPrompt(model, names[:BASE])
    start = prompt.tokens.detach().clone()
    stage = stage1.Epochs("stage I", epochs, steps, [stage1.sgd([prompt.tokens], 0.002)])
    stage1.learn_anchor(prompt, targets, stage, 1000)
    return prompt, start, stage.log


def test_stage1_brings_the_anchor_prompts_of_base_classes_to_their_descriptions():
    prompt, start, log = learn_toy_anchor(seed=0, epochs=10)
    features = toy_descriptions()[2][:BASE]
    end = stage1.cosine(prompt, features)
    prompt.tokens.data.copy_(start)
    assert end > stage1.cosine(prompt, features)
    assert log[-1]["loss"] < log[0]["loss"]


def test_stage1_lowers_its_loss_from_every_start():
    for seed in range(3):
        _, _, log = learn_toy_anchor(seed, epochs=4)
        loss = [row["loss"] for row in log]
        assert loss == sorted(loss, reverse=True) and loss[-1] < loss[0]


def test_stage1s_gradient_against_the_mean_description_is_that_against_all():
    model, names, features = toy_descriptions()
    prompt = anchor.AnchorPrompt(model, names[:5])
    ragged = [features[0][:2], *features[1:5]]
    means = torch.stack([f.mean(0) for f in ragged])
    full, short = (torch.autograd.grad(losses.anchor_mse(prompt(), f_des), prompt.tokens)[0]
                   for f_des in (ragged, means))
    assert relative(short, full) < 1e-4


def test_stage1s_gradient_is_eq5s_and_holds_in_float16_for_many_classes():
    """weight / (C d) as for 1,000 classes of ViT-B/16: plain backward() loses digits in float16."""
    grads = {}
    names = toy_names()[:BASE]
    for dtype in (torch.float32, torch.float16):
        torch.manual_seed(0)
        model = load_toy_clip("toy", "cpu", dtype)
        prompt = anchor.AnchorPrompt(model, names)
        targets = prompts.unit(torch.randn(BASE, model.text_projection.shape[1]))
        weight = 1000 / (1000 * 512) * targets.numel()
        for scaled in (False, True):
            prompt.tokens.grad = None
            loss = weight * losses.anchor_mse(prompt(), targets)
            if scaled:
                stage1.scaled_backward(loss, prompt.tokens)
            else:
                loss.backward()
            grads[dtype, scaled] = prompt.tokens.grad.clone()
    exact = grads[torch.float32, False]
    assert torch.equal(grads[torch.float32, True], exact)               # a power of two: exact
    assert relative(grads[torch.float16, True], exact) < 0.01
    assert relative(grads[torch.float16, False], exact) > 0.01


def test_stage1_reads_no_image(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "load_image", lambda path: pytest.fail("Stage I read an image"))
    assert run(stage1, "--anchor-epochs", 1, "--output", tmp_path) == 0


def test_stage1_reads_no_description_of_a_novel_class(tmp_path):
    names = toy_names()
    sentences = json.loads(pathlib.Path(data.default_descriptions("toy")).read_text())
    other = sentences | {name: ["This is about something else."] for name in names[BASE:]}
    tokens = []
    for name, content in (("a", sentences), ("b", other)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        assert run(stage1, "--anchor-epochs", 2, "--output", tmp_path / name,
                   "--descriptions", tmp_path / f"{name}.json") == 0
        (path,) = (tmp_path / name).rglob("anchor.pt")
        tokens.append(anchor.load_anchor(path)[0])
    assert torch.equal(*tokens)


def test_stage1_takes_as_many_steps_as_if_images_came_in_batches_of_32(tmp_path, monkeypatch):
    lengths = []
    monkeypatch.setattr(stage1, "learn_anchor",
                        lambda prompt, targets, epochs, weight: lengths.append(epochs.steps))
    for shots in (32, 1):
        assert run(stage1, "--shots", shots, "--output", tmp_path) == 0
    assert lengths == [32 * BASE // 32, 1]


def test_nearest_words_are_printed_with_a_warning(tmp_path, capsys):
    assert run(stage1, "--anchor-epochs", 1, "--anchor-length", 2, "--nearest", 4,
               "--output", tmp_path) == 0
    *_, warning, first, second = capsys.readouterr().out.strip().splitlines()
    assert "make no sense" in warning
    for i, line in enumerate((first, second)):
        assert line.split()[0] == f"[Anc_{i + 1}]" and len(line.split()) == 1 + 2 * 4


def test_the_schedule_is_a_warm_up_epoch_and_a_cosine():
    lr = [stage1.learning_rate(epoch, 20, 0.002) for epoch in range(1, 21)]
    assert lr[0] == 1e-5 and lr[1] == 0.002
    assert lr[11] == pytest.approx(0.5 * 0.002 * (1 + math.cos(math.pi * 10 / 20)))
    assert lr[1:] == sorted(lr[1:], reverse=True) and lr[-1] > 0


# --------------------------------------------------------------------------------- one stage

def test_a_one_stage_step_moves_one_side_and_leaves_the_other_bit_identical(monkeypatch):
    model, names, features = toy_descriptions()
    settings = stage1.default_settings("toy", "coop", "anchoropt", one_stage=True)
    torch.manual_seed(0)
    prompt = anchor.AnchorPrompt(model, names[:BASE])
    learner = prompts.build_learner(settings, model, names[:BASE], prompt.tokens)
    targets = torch.stack([f.mean(0) for f in features[:BASE]])
    step = stage2.OneStage(prompt, targets, learner, settings)
    states = []

    def state():
        states.append({key: value.clone() for key, value in learner.state_dict().items()})

    def first_half():
        state()
        step()
        state()
    optimizer = stage1.sgd(learner.parameters(), settings["lr"])
    f, labels = torch.randn(BASE, features[0].shape[1]), torch.arange(BASE)
    settings["batch_size"] = BASE
    epochs = stage1.Epochs("a step", 1, 1, [optimizer])
    stage2.adapt(learner, epochs, [(f, None)], labels, settings, 1, anchor_step=first_half)
    state()
    assert changed(states[0], states[1]) == {"template.anchor_tokens"}
    soft = {key for key in states[0] if "soft_tokens" in key or "position_matrix" in key}
    assert len(soft) == 2 and changed(states[1], states[2]) == soft


def test_both_optimizers_of_one_stage_training_follow_the_schedule(tmp_path, monkeypatch):
    rates = []
    step = stage2.OneStage.__call__

    def watched(self):
        rates.append(self.optimizer.param_groups[0]["lr"])
        step(self)
    monkeypatch.setattr(stage2.OneStage, "__call__", watched)
    assert run(stage2, "--output", tmp_path, "--one-stage", "--epochs", 3) == 0
    lr = figures(tmp_path)["settings"]["anchor_lr"]
    assert rates[::STEPS] == [stage1.learning_rate(epoch, 3, lr) for epoch in (1, 2, 3)]


# -------------------------------------------------------------------- interruption and faults

@pytest.mark.parametrize("options", [["--epochs", 3, "--anchor-epochs", 3],
                                     ["--baseline", "maple", "--one-stage", "--epochs", 3]])
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, monkeypatch, capsys, options):
    assert run(stage2, "--output", tmp_path / "unbroken", *options) == 0
    rename, renamed = os.replace, []

    def stop_now_and_then(*paths):
        renamed.append(paths)
        if len(renamed) % 4 == 0:
            raise KeyboardInterrupt
        rename(*paths)
    monkeypatch.setattr(data.os, "replace", stop_now_and_then)
    codes = [130]
    while codes[-1] == 130:
        codes.append(run(stage2, "--output", tmp_path / "broken", *options))
    assert codes[1:].count(130) >= 2 and codes[-1] == 0
    stopped = capsys.readouterr().err.splitlines()
    assert {"stage2.py: stopped; what is finished is kept, the same command goes on from there"} \
        == set(stopped)
    assert_same_to_the_bit(tmp_path / "unbroken", tmp_path / "broken")


def stop_at(monkeypatch, name, n):
    """Ctrl-C at the n-th call of `losses.<name>`, once."""
    real, calls = getattr(losses, name), []

    def stops(*args):
        calls.append(1)
        if len(calls) == n:
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(losses, name, stops)


def test_a_run_that_was_begun_with_another_anchor_does_not_go_on(tmp_path, monkeypatch, capsys):
    stop_at(monkeypatch, "cross_entropy", STEPS + 2)
    command = ["--output", tmp_path, "--epochs", 2, "--anchor-epochs", 2]
    assert run(stage2, *command) == 130
    capsys.readouterr()
    (file,) = tmp_path.rglob("anchor.pt")
    tokens, settings = anchor.load_anchor(file)
    anchor.save_anchor(file, tokens + 0.1, settings)
    (last,) = tmp_path.rglob("last.pt")
    worlds.one_line(refused(capsys, stage2, *command), f"{last} was made with other anchor tokens",
                    f"to begin anew, remove {last}")
    anchor.save_anchor(file, tokens, settings)
    assert run(stage2, *command) == 0
    assert "stage II: going on after epoch 1" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_is_named_and_the_last_good_epoch_stays(tmp_path, capsys,
                                                                          monkeypatch):
    real, calls = losses.cross_entropy, []

    def breaks(logits, labels):
        calls.append(1)
        return real(logits, labels) * (math.nan if len(calls) == STEPS + 2 else 1)
    monkeypatch.setattr(losses, "cross_entropy", breaks)
    line = refused(capsys, stage2, "--output", tmp_path, "--epochs", 3, "--anchor-epochs", 1)
    worlds.one_line(line, "stage II: the loss is not finite in epoch 2, step 2; epoch 1 is kept; "
                    "lower --lr")
    (last,) = tmp_path.rglob("last.pt")
    kept = torch.load(last, weights_only=True)
    assert [row["epoch"] for row in kept["log"]] == [1]
    assert all(torch.isfinite(value).all() for value in kept["learner"].values())


def test_a_stage_1_that_is_not_finite_is_named(tmp_path, capsys):
    line = refused(capsys, stage1, "--output", tmp_path, "--anchor-epochs", 2, "--anchor-lr", 1e38)
    worlds.one_line(line, "stage I: the loss is not finite in epoch 2", "lower --anchor-lr")


# ------------------------------------------------------------------------------- stale results

def eurosat(root, classes, split=True, per_class=12):
    """A eurosat tree as it lies on a disk that is being filled."""
    worlds.eurosat_tree(root, per_class, classes)
    if not split:
        os.remove(root / "eurosat" / "split_zhou_EuroSAT.json")


@pytest.fixture
def eurosat_command(tmp_path, clip_file):
    return ["--dataset", "eurosat", "--root", tmp_path / "data", "--clip", clip_file, "--shots", 4,
            "--output", tmp_path / "o"]


@pytest.mark.parametrize("template", ["plain", "anchoropt"])
def test_case_02_a_result_of_half_unpacked_data_is_not_shown_for_the_whole(
        tmp_path, capsys, eurosat_command, template):
    command = [*eurosat_command, "--template", template, "--epochs", 1]
    if template == "anchoropt":
        command += ["--anchor-epochs", 1]
    eurosat(tmp_path / "data", classes=4, split=False)
    assert run(stage2, *command) == 0
    eurosat(tmp_path / "data", classes=6)
    capsys.readouterr()
    changed = "class names and training images and test images"
    if template == "anchoropt":
        changed += " and descriptions' sentences"
    worlds.one_line(refused(capsys, stage2, *command), "results.json was made with other "
                    f"{changed} than there are now; to run it again: --overwrite")

    # What the line says to do works, and gives what a fresh folder gives.
    assert run(stage2, *command, "--overwrite") == 0
    assert run(stage2, *command, "--output", tmp_path / "fresh") == 0
    assert_same_to_the_bit(tmp_path / "o", tmp_path / "fresh")


def test_a_run_that_was_begun_with_other_images_does_not_go_on(tmp_path, capsys, monkeypatch,
                                                               eurosat_command):
    eurosat(tmp_path / "data", classes=6, split=False)
    stop_at(monkeypatch, "cross_entropy", 3)                            # 2 steps an epoch
    command = [*eurosat_command, "--template", "plain", "--epochs", 2, "--batch-size", 6]
    assert run(stage2, *command) == 130
    capsys.readouterr()
    eurosat(tmp_path / "data", classes=6)
    worlds.one_line(refused(capsys, stage2, *command), "last.pt was made with other training "
                    "images and test images than there are now; to begin anew, remove ")
    assert run(stage2, *command, "--overwrite") == 0


@pytest.fixture
def own_descriptions(tmp_path, monkeypatch):
    """A copy of the toy's description file where the project looks for it: (path, content)."""
    shipped = json.loads(pathlib.Path(data.default_descriptions("toy")).read_text())
    monkeypatch.setattr(data, "SHIPPED", str(tmp_path))
    path = tmp_path / "toy.json"
    path.write_text(json.dumps(shipped))
    return path, shipped


def test_a_result_of_other_descriptions_is_refused(tmp_path, capsys, own_descriptions):
    path, sentences = own_descriptions
    command = ["--output", tmp_path / "o", *QUICK]
    assert run(stage2, *command) == 0
    path.write_text(json.dumps(sentences | {toy_names()[0]: ["A picture of something else."]}))
    worlds.one_line(refused(capsys, stage2, *command), "results.json was made with other "
                    "descriptions' sentences than there are now; to run it again: --overwrite")
    assert run(stage2, *command, "--overwrite") == 0
    assert "Stage I learns the anchor now" in capsys.readouterr().out


def test_an_anchor_of_other_descriptions_is_refused(tmp_path, capsys, own_descriptions):
    path, sentences = own_descriptions
    command = ["--anchor-epochs", 1, "--output", tmp_path / "o"]
    assert run(stage1, *command) == 0
    path.write_text(json.dumps(sentences | {toy_names()[0]: ["A picture of something else."]}))
    (file,) = tmp_path.rglob("anchor.pt")
    worlds.one_line(refused(capsys, stage1, *command), f"{file} was made with other descriptions' "
                    f"sentences than there are now; choose another --output, or remove "
                    f"{file.parent}")


@pytest.fixture
def changed_table(monkeypatch):
    """A function that changes a setting of every row of assets/settings.csv, as an update would."""
    def change(**values):
        rows = [(cell, old | {key: value for key, value in values.items() if key in old})
                for cell, old in stage1.settings_rows()]
        monkeypatch.setattr(stage1, "settings_rows", lambda: rows)
    return change


def test_what_was_begun_with_another_table_of_settings_does_not_go_on(tmp_path, capsys, monkeypatch,
                                                                      changed_table):
    command = ["--template", "plain", "--output", tmp_path]
    stop_at(monkeypatch, "cross_entropy", 5)
    assert run(stage2, *command, "--batch-size", TRAIN) == 130
    capsys.readouterr()
    changed_table(lr=0.5)
    line = refused(capsys, stage2, *command, "--batch-size", TRAIN)
    worlds.one_line(line, "last.pt was made with other lr than there are now", "to begin anew")


def test_an_anchor_of_another_table_of_settings_is_refused(tmp_path, capsys, changed_table):
    command = ["--output", tmp_path]
    changed_table(anchor_epochs=1)
    assert run(stage1, *command) == 0
    capsys.readouterr()
    changed_table(anchor_epochs=2)
    line = refused(capsys, stage1, *command)
    worlds.one_line(line, "anchor.pt was made with other anchor_epochs")


def test_overwrite_removes_nothing_before_the_run_can_begin(tmp_path, capsys, monkeypatch,
                                                            own_descriptions):
    command = [*QUICK, "--output", tmp_path]
    assert run(stage2, *command) == 0
    before = results(one_run(tmp_path))
    refused(capsys, stage2, *command, "--overwrite", "--device", "cuda:77")
    (anchor_file,) = tmp_path.rglob("anchor.pt")
    anchor_file.write_bytes(b"damaged")
    path, _ = own_descriptions
    path.write_text("{}")
    monkeypatch.chdir(tmp_path)                 # an aliases file is written here
    worlds.one_line(refused(capsys, stage2, *command, "--overwrite"), "no description of")
    assert results(one_run(tmp_path)) == before


def test_a_run_that_is_stopped_in_its_evaluation_draws_the_same_W_again(tmp_path, capsys,
                                                                        monkeypatch):
    command = ["--test-position", "sample", "--epochs", 3, "--anchor-epochs", 1, "--output"]
    assert run(stage2, *command, tmp_path / "a") == 0

    def stops(*args):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluate", stops)
        assert run(stage2, *command, tmp_path / "b") == 130
    assert run(stage2, *command, tmp_path / "b") == 0
    assert "stage II: going on after epoch 3" in capsys.readouterr().out
    assert_same_to_the_bit(tmp_path / "a", tmp_path / "b")


def test_an_anchor_that_knows_novel_classes_is_refused(tmp_path, capsys):
    command = ["--anchor-epochs", 1, "--output", tmp_path]
    assert run(stage1, "--classes", "all", *command) == 0
    (file,) = tmp_path.rglob("anchor.pt")
    line = refused(capsys, stage2, "--anchor", file, "--epochs", 1, "--output", tmp_path / "o")
    worlds.one_line(line, f"learnt from descriptions of {BASE} classes that are novel here",
                    "--classes all")
    assert run(stage2, "--anchor", file, "--epochs", 1, "--classes", "all", "--output",
               tmp_path / "o") == 0


def test_two_classes_are_no_base_and_novel(tmp_path, capsys, clip_file):
    for name in ("cat", "dog"):
        for i in range(6):
            worlds.write_image(str(tmp_path / "pets" / name / f"{i}.jpg"), len(name), i)
    command = ["--dataset", tmp_path / "pets", "--clip", clip_file, "--template", "plain",
               "--epochs", 1, "--output", tmp_path / "o"]
    worlds.one_line(refused(capsys, stage2, *command), "pets has 2 classes", "--classes all")
    assert run(stage2, *command, "--classes", "all") == 0


def test_workers_without_shared_memory_end_in_one_line(capsys):
    def no_shared_memory(args):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error.")
    assert stage1.run_script("stage2.py", no_shared_memory, stage2.parse([])) == 2
    worlds.one_line(capsys.readouterr().err, "Bus error", "--workers 0", "--shm-size")

    def other_fault(args):
        raise RuntimeError("a fault of ours")
    with pytest.raises(RuntimeError, match="of ours"):
        stage1.run_script("stage2.py", other_fault, stage2.parse([]))


def test_only_a_reader_of_the_output_may_leave_without_a_word(capsys):
    def worker_gone(args):
        raise BrokenPipeError(32, "Broken pipe")
    assert stage1.run_script("stage2.py", worker_gone, stage2.parse([])) == 2
    worlds.one_line(capsys.readouterr().err, "stage2.py: [Errno 32] Broken pipe")


def test_advice_names_options_that_the_script_has(capsys):
    def out_of_memory(args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    def stopped(args):
        raise KeyboardInterrupt
    stage1.run_script("stage2.py", out_of_memory, stage2.parse([]))
    assert "lower --test-batch, lower --batch-size, set --class-chunk" in capsys.readouterr().err
    stage1.run_script("eval.py", out_of_memory, evaluation.parse(["x"]))
    assert "--batch-size" not in capsys.readouterr().err
    assert stage1.run_script("stage2.py", stopped, stage2.parse(["--overwrite"])) == 130
    assert "the same command begins anew, for its --overwrite" in capsys.readouterr().err


def test_an_anchor_outlives_the_descriptions_of_novel_classes(tmp_path, capsys, own_descriptions):
    path, sentences = own_descriptions
    command = ["--anchor-epochs", 1, "--output", tmp_path / "o"]
    assert run(stage1, *command) == 0
    fewer = {name: sentences[name][1:] for name in toy_names()[BASE:]}
    path.write_text(json.dumps(sentences | fewer))
    assert run(stage1, *command) == 0
    assert capsys.readouterr().out.count("anchor found") == 1


def test_a_stage_1_that_was_begun_with_other_descriptions_does_not_go_on(
        tmp_path, capsys, monkeypatch, own_descriptions):
    path, sentences = own_descriptions
    stop_at(monkeypatch, "anchor_mse", STEPS + 2)
    command = ["--anchor-epochs", 2, "--output", tmp_path / "o"]
    assert run(stage1, *command) == 130
    capsys.readouterr()
    path.write_text(json.dumps(sentences | {toy_names()[0]: ["A picture of something else."]}))
    line = refused(capsys, stage1, *command)
    worlds.one_line(line, "last.pt was made with other descriptions' sentences")
    path.write_text(json.dumps(sentences))
    assert run(stage1, *command) == 0
    assert "stage I: going on after epoch 1" in capsys.readouterr().out


def test_a_result_of_other_aliases_is_refused(tmp_path, capsys, own_descriptions):
    path, sentences = own_descriptions
    first, second = toy_names()[:2]
    aliases = tmp_path / "aliases.json"
    command = ["--output", tmp_path / "o", *QUICK, "--aliases", aliases]
    aliases.write_text(json.dumps({first: second}))
    assert run(stage2, *command) == 0
    aliases.write_text(json.dumps({first: first}))
    worlds.one_line(refused(capsys, stage2, *command), "results.json was made with other "
                    "descriptions' sentences than there are now; to run it again: --overwrite")


# ---------------------------------------------------------------------------------- folders

def test_no_two_experiments_share_a_folder():
    base = stage1.default_settings("toy", "coop", "anchoropt")
    one_stage = stage1.default_settings("toy", "coop", "anchoropt", one_stage=True)
    experiments = [base, one_stage] + [base | change for change in (
        {"tau": 0.5}, {"tau": 0.05}, {"epochs": 1}, {"anchor_epochs": 1}, {"lambda_2": 0},
        {"clip": "x-12"}, {"preposition": "of the"}, {"preposition": "of-the"},
        {"classes": "all"})]
    names = {str(stage1.run_folder("o", settings, 1)) for settings in experiments}
    assert len(names) == len(experiments)


def test_a_folder_is_named_after_what_differs():
    settings = stage1.default_settings("toy", "coop", "anchoropt") | {"tau": 0.5, "epochs": 1}
    assert stage1.run_folder("o", settings, 1) == pathlib.Path(
        "o/toy/coop-anchoropt,epochs=1,tau=0.5/seed1")


def test_case_07_a_folder_name_too_long_for_a_disk_ends_in_a_digest(tmp_path, capsys, clip_file):
    long_clip = tmp_path / "biomedclip_vit_b16_finetuned_epoch32.pt"
    long_clip.write_bytes(clip_file.read_bytes())
    sentences = tmp_path / "my_dataset_descriptions_gpt4o.json"
    sentences.write_bytes(pathlib.Path(data.default_descriptions("toy")).read_bytes())
    command = ["--clip", long_clip, "--descriptions", sentences, "--soft-tokens", 8, "--lambda-1",
               10, "--lambda-2", 500, "--temperature", 4, "--anchor-weight", 2000, "--shots", 8,
               "--classes", "all", *QUICK, "--lr", 0.002, "--batch-size", 64]
    assert run(stage2, *command, "--output", tmp_path / "o") == 0
    assert run(stage2, *command, "--output", tmp_path / "o") == 0
    assert "finished already" in capsys.readouterr().out
    assert run(stage2, *command, "--tau", 2, "--output", tmp_path / "o") == 0
    names = {path.parent.parent.name for path in tmp_path.rglob("results.json")}
    assert len(names) == 2 and all(len(os.fsencode(name)) <= 200 for name in names)


# ------------------------------------------------------------------------ the feature cache

def cached(monkeypatch, *argv):
    """Runs stage2.py as a process of its own would: returns how many pictures were opened."""
    opened, real = [], data.load_image
    evaluation.frozen_features.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(data, "load_image", lambda path: opened.append(path) or real(path))
        assert run(stage2, *argv) == 0
    return len(opened)


EPOCHS_2 = ["--epochs", 2, "--anchor-epochs", 1]


def test_the_second_method_opens_no_picture_and_finds_the_same_bits(tmp_path, monkeypatch):
    cells = [["--baseline", "coop"], ["--baseline", "dept", "--batch-size", 5],
             ["--baseline", "cocoop", "--batch-size", 4]]
    opened = []
    for i, cell in enumerate(cells):
        command = [*cell, *EPOCHS_2, "--output"]
        cached(monkeypatch, *command, tmp_path / f"without{i}")
        opened.append(cached(monkeypatch, *command, tmp_path / f"with{i}", "--feature-cache",
                             tmp_path / "cache"))
        assert_same_to_the_bit(tmp_path / f"with{i}", tmp_path / f"without{i}")
    assert opened == [2 * TRAIN + 2 * TEST, 0, 0]


@pytest.mark.parametrize("template", ["plain", "anchoropt"])
def test_maple_opens_pictures_and_finds_the_same_bits(tmp_path, monkeypatch, template):
    command = ["--baseline", "maple", "--template", template, "--epochs", 2, "--output"]
    cache = ["--feature-cache", tmp_path / "cache"]
    cached(monkeypatch, "--epochs", 2, "--template", "plain", "--output", tmp_path / "coop", *cache)
    cached(monkeypatch, *command, tmp_path / "without")
    opened = cached(monkeypatch, *command, tmp_path / "with", *cache)
    assert opened == 2 * TRAIN + 2 * TEST
    assert_same_to_the_bit(tmp_path / "with", tmp_path / "without")


def test_maple_takes_the_frozen_features_of_its_anchor_prompts_from_the_cache(tmp_path,
                                                                              monkeypatch):
    cache = ["--feature-cache", tmp_path / "cache", "--output", tmp_path / "o", *EPOCHS_2]
    cached(monkeypatch, *cache)
    encoded = []
    for module in (stage2, evaluation):
        monkeypatch.setattr(module, "encode_image", lambda *args: encoded.append(args))
    cached(monkeypatch, "--baseline", "maple", *cache)
    assert not encoded


def test_the_disk_use_of_the_cache_is_printed(tmp_path, monkeypatch, capsys):
    cached(monkeypatch, "--template", "plain", "--epochs", 2, "--output", tmp_path / "o",
           "--feature-cache", tmp_path / "cache")
    printed = capsys.readouterr().out
    kept = list((tmp_path / "cache").iterdir())
    assert {path.suffix for path in kept} == {".npz"} and len(kept) == 4    # 2 epochs, 2 sides
    size = sum(path.stat().st_size for path in kept) / 1e6
    assert f"features kept: 4 files, {size:.1f} MB in {tmp_path / 'cache'}\n" in printed


DAMAGES = {"cut in half": lambda content, other: content[:len(content) // 2],
           "empty": lambda content, other: b"",
           "of another epoch": lambda content, other: other,
           "a flipped byte": lambda content, other: content[:200] + bytes([content[200] ^ 0xff])
           + content[201:]}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_kept_file_is_made_anew(tmp_path, monkeypatch, damage):
    command = ["--template", "plain", "--epochs", 2, "--output"]
    cache = ["--feature-cache", tmp_path / "cache"]
    cached(monkeypatch, *command, tmp_path / "a", *cache)
    sound = {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    contents = list(sound.values())
    for path, other in zip(sound, contents[1:] + contents[:1]):
        path.write_bytes(DAMAGES[damage](sound[path], other))
    opened = cached(monkeypatch, *command, tmp_path / "b", *cache)
    assert opened == 2 * TRAIN + 2 * TEST
    assert_same_to_the_bit(tmp_path / "a", tmp_path / "b")
    assert {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()} == sound


def test_no_flipped_bit_of_a_kept_file_is_believed_or_stops_a_run(tmp_path):
    (tmp_path / "picture.jpg").write_bytes(b"its size and time are all that count here")
    items = [data.Item(str(tmp_path / "picture.jpg"), 0)] * 2
    kept = data.KeptFeatures(tmp_path, ["clip"], data.Images(items, data.test_transform(32)))
    features = torch.randn(2, 3)
    kept.write(1, features)
    content = kept.path(1).read_bytes()
    for i in range(len(content)):
        for mask in (0x01, 0x20):
            flipped = bytearray(content)
            flipped[i] ^= mask
            kept.path(1).write_bytes(bytes(flipped))
            found = kept.read(1)
            assert found is None or torch.equal(found, features)


def test_a_changed_picture_is_read_again(tmp_path, monkeypatch, eurosat_command):
    eurosat(tmp_path / "data", classes=4, per_class=8)
    command = [*eurosat_command, "--template", "plain", "--epochs", 2]
    cache = ["--feature-cache", tmp_path / "cache"]
    cached(monkeypatch, *command, *cache)
    before = learnt(tmp_path / "o")
    dataset = data.load_dataset("eurosat", tmp_path / "data")
    picture = data.few_shot_task(dataset, shots=4).train[0].source
    worlds.write_image(picture, label=9, index=9)
    cached(monkeypatch, *command, *cache, "--output", tmp_path / "with")
    cached(monkeypatch, *command, "--output", tmp_path / "without")
    assert_same_to_the_bit(tmp_path / "with", tmp_path / "without")
    assert changed(learnt(tmp_path / "with"), before)


def test_loader_processes_start_once_a_run(tmp_path, monkeypatch):
    import torch.utils.data.dataloader as dataloader
    started, real = [], dataloader._MultiProcessingDataLoaderIter

    class Counted(real):
        def __init__(self, loader):
            started.append(len(loader.dataset))
            super().__init__(loader)
    monkeypatch.setattr(dataloader, "_MultiProcessingDataLoaderIter", Counted)
    cached(monkeypatch, "--template", "plain", "--epochs", 4, "--workers", 1, "--output",
           tmp_path / "workers")
    assert started == [TRAIN, TEST, TEST]           # one set for all epochs, one a test side
    cached(monkeypatch, "--template", "plain", "--epochs", 4, "--output", tmp_path / "none")
    assert len(started) == 3
    assert_same_to_the_bit(tmp_path / "workers", tmp_path / "none")


# ------------------------------------------------------ other datasets, CLIPs and anchors

def test_caltech101_with_a_clip_from_a_file_says_what_does_not_compare(tmp_path, capsys, clip_file):
    worlds.caltech101_tree(tmp_path / "data", per_class=2)
    assert run(stage2, "--dataset", "caltech101", "--root", tmp_path / "data", "--clip", clip_file,
               "--output", tmp_path / "o", *QUICK) == 0
    out, result = capsys.readouterr().out, figures(tmp_path / "o")
    for note in ("have fewer than 16 training images", "is a checkpoint of your own"):
        assert note in out and any(note in kept for kept in result["notes"])
    assert result["comparable"] is False and result["clip"].startswith("clip-")
    saved = torch.load(one_run(tmp_path / "o") / "prompt.pt", weights_only=True)
    assert len(saved["class_names"]) == 50


@pytest.mark.parametrize("options, found, wanted", [
    (["--clip", "OTHER"], "has clip clip-", "asked for is other-"),
    (["--anchor-length", 2], "has anchor length 1", "asked for is 2"),
    (["--preposition", "at"], "has preposition of", "asked for is at")])
def test_an_anchor_of_another_kind_is_refused_with_both_values(tmp_path, capsys, clip_file, options,
                                                               found, wanted):
    torch.save(tiny_clip(seed=1).state_dict(), tmp_path / "other.pt")
    options = [tmp_path / "other.pt" if word == "OTHER" else word for word in options]
    assert run(stage1, "--clip", clip_file, "--anchor-epochs", 1, "--output", tmp_path) == 0
    (file,) = tmp_path.rglob("anchor.pt")
    line = refused(capsys, stage2, "--clip", clip_file, "--anchor", file, "--epochs", 1,
                   "--output", tmp_path / "o", *options)
    worlds.one_line(line, found, wanted, "python stage1.py --dataset toy --anchor-length")


@pytest.mark.parametrize("name", stage1.ELEVEN)
def test_stage2_runs_on_each_of_the_eleven_datasets(tmp_path, clip_file, name):
    worlds.TREES[name](tmp_path / "data")
    names = data.load_dataset(name, tmp_path / "data").class_names
    worlds.write_descriptions(tmp_path / "descriptions.json", names)
    assert run(stage2, "--dataset", name, "--root", tmp_path / "data", "--clip", clip_file, *QUICK,
               "--output", tmp_path / "o", "--descriptions", tmp_path / "descriptions.json") == 0
    result = figures(tmp_path / "o")
    assert result["dataset"] == name
    assert tuple(result["base"]) == tuple(result["novel"]) == evaluation.READINGS


def test_an_anchor_in_the_authors_format_drives_stage2(tmp_path):
    tokens = torch.randn(1, 128).half()
    released = {"state_dict": {"anchor_ctx_1": tokens}, "epoch": 3}
    torch.save(released, tmp_path / "model.pth.tar")
    assert run(stage2, "--anchor", tmp_path / "model.pth.tar", "--epochs", 1,
               "--output", tmp_path) == 0
    identity = prompts.clip_identity(tmp_path / "model.pth.tar")
    assert one_run(tmp_path).parent.name == f"coop-anchoropt,anchor={identity},epochs=1"
    assert torch.equal(learnt(tmp_path)["template.anchor_tokens"], tokens.float())


# ------------------------------------------------------------------------------ real processes

def start(script, *argv, cwd, **environment):
    words = [sys.executable, str(ROOT / script), *map(str, argv)]
    return subprocess.Popen(words, cwd=cwd, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=os.environ | environment)


def test_both_stages_run_as_processes(tmp_path, clip_file):
    worlds.eurosat_tree(tmp_path / "data", per_class=4)
    options = ["--dataset", "eurosat", "--root", tmp_path / "data", "--clip", clip_file,
               "--anchor-epochs", 1]
    commands = [["stage1.py", *options, "--output", "a"],
                ["stage2.py", *options, "--epochs", 1, "--output", "b"]]
    for process in [start(*command, cwd=tmp_path) for command in commands]:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0 and out and not err, err


SCRIPTS = ("stage1.py", "stage2.py", "eval.py")
WITHOUT_PKG_RESOURCES = f"""
import runpy, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "pkg_resources":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
for script in {SCRIPTS}:
    sys.modules.pop("stage1", None)
    sys.argv = [script]
    try:
        runpy.run_path({str(ROOT)!r} + "/" + script, run_name="__main__")
    except SystemExit as end:
        print(script, end.code)
"""


def test_a_missing_pkg_resources_is_one_line(tmp_path):
    """In one process, which imports torch once for all three scripts."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_PKG_RESOURCES], cwd=tmp_path, timeout=60,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
                          capture_output=True)
    assert done.stdout.splitlines() == [f"{script} 2" for script in SCRIPTS]
    lines = done.stderr.splitlines(keepends=True)
    assert len(lines) == 3
    for script, line in zip(SCRIPTS, lines):
        assert line.startswith(f"{script}: ")
        worlds.one_line(line, "pkg_resources", "pip install 'setuptools<81'")


# -------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("argv, said", [
    (["--dataset", "caltech1"], "did you mean caltech101"),
    (["--clip", "ViT-B16"], "ViT-B/16"),
    (["--dataset", "caltech101", "--root", "nowhere"], "data root nowhere is missing"),
    (["--dataset", "caltech101", "--root", "EMPTY"], "caltech-101 is missing"),
    (["--device", "cuda:77"], "device cuda:77 cannot be used here"),
    (["--template", "plain", "--tau", "2"], "--tau has no meaning for coop-plain"),
    (["--template", "plain", "--one-stage"], "use --template anchoropt"),
    (["--one-stage", "--anchor-epochs", "3"], "--anchor-epochs has no meaning"),
    (["--one-stage", "--epochs", "0"], "learns its anchor in Stage II: --epochs must be at"),
    (["--baseline", "coop", "--depth", "2"], "--depth has no meaning for coop"),
    (["--tau", "0"], "--tau: must be a positive number, not 0"),
    (["--epochs", "-1"], "--epochs: must be at least 0"),
    (["--baseline", "clip", "--epochs", "3"], "--epochs has no meaning for clip"),
    (["--baseline", "dept", "--w-cat", "2"], "--w-cat: must be from 0 to 1, not 2"),
    (["--epochs", "many"], "--epochs: must be whole numbers"),
    (["--seeds", "1,2,3"], "must be whole numbers, parted by spaces where there are several"),
    (["--lr", "nan"], "--lr: must be a positive number, not nan"),
    (["--one-stage", "--lr", "0"], "--lr: must be a positive number"),
    (["--lambda-2", "-1"], "--lambda-2: must be 0 or a positive number"),
    (["--baseline", "cop"], "invalid choice: 'cop'"),
    (["--no-such-option"], "unrecognized arguments: --no-such-option"),
    (["--one-stage", "--lambda-2", "10"],
     "--lambda-2 has no meaning for coop-anchoropt with --one-stage"),
    (["--anchor", __file__, "--anchor-epochs", "3"],
     "--anchor-epochs has no meaning with --anchor"),
    (["--anchor", "nowhere.pt"], "--anchor nowhere.pt does not exist"),
    (["--descriptions", "nowhere.json"], "--descriptions nowhere.json does not exist"),
    (["--template", "atprompt", "--attributes", "shape", " "],
     "attributes ['shape', ' ']: each must"),
    (["--anchor-length", "80"], "85 tokens around each class name leave too little of CLIP's 77"),
    (["--anchor-length", "80", "--arrangement", "after-class"], "85 tokens around each class name"),
    (["--arrangement", "before", "--tau", "0.1"], "--tau has no meaning with --arrangement before"),
])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, argv, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    assert said in refused(capsys, stage2, *argv, "--output", tmp_path / "o")


def resnet_clip():
    from clip.model import CLIP
    torch.manual_seed(0)
    return CLIP(64, 32, (1, 1, 1, 1), 2, None, 77, 49408, 64, 1, 2)


@pytest.mark.parametrize("make_clip, options, said", [
    (tiny_clip, ["--depth", 9], "depth 9: this CLIP's towers share"),
    (resnet_clip, [], "this CLIP's image tower is a ResNet")])
def test_case_13_what_maple_cannot_prompt_is_refused_before_stage_1(tmp_path, capsys, make_clip,
                                                                    options, said):
    torch.save(make_clip().state_dict(), tmp_path / "clip.pt")
    line = refused(capsys, stage2, "--baseline", "maple", "--clip", tmp_path / "clip.pt",
                   "--anchor-epochs", 5, "--output", tmp_path / "o", *options)
    assert said in line and not list(tmp_path.rglob("anchor*"))


@pytest.mark.parametrize("name, said", [("caltech1", "did you mean caltech101"),
                                        ("imagenetv2", "imagenetv2 is for testing alone")])
def test_stage1_names_a_dataset_that_it_cannot_learn_on(tmp_path, capsys, name, said):
    worlds.imagenetv2_tree(tmp_path / "data")
    assert said in refused(capsys, stage1, "--dataset", name, "--root", tmp_path / "data",
                           "--output", tmp_path / "o")


def test_stage2_names_a_dataset_that_it_cannot_learn_on(tmp_path, capsys, clip_file):
    worlds.imagenetv2_tree(tmp_path / "data")
    line = refused(capsys, stage2, "--dataset", "imagenetv2", "--root", tmp_path / "data",
                   "--clip", clip_file, "--output", tmp_path / "o")
    worlds.one_line(line, "python eval.py RUN --dataset imagenetv2")


def test_missing_descriptions_are_named(tmp_path, capsys, clip_file):
    worlds.caltech101_tree(tmp_path / "data", per_class=2)
    sentences = json.loads(pathlib.Path(data.default_descriptions("caltech101")).read_text())
    del sentences["accordion"], sentences["barrel"]
    (tmp_path / "short.json").write_text(json.dumps(sentences))
    line = refused(capsys, stage2, "--dataset", "caltech101", "--root", tmp_path / "data", "--clip",
                   clip_file, "--descriptions", tmp_path / "short.json", "--output", tmp_path / "o")
    worlds.one_line(line, tmp_path / "short.json", "accordion", "barrel")


def test_a_broken_picture_is_named(tmp_path, capsys, eurosat_command):
    eurosat(tmp_path / "data", classes=4)
    dataset = data.load_dataset("eurosat", tmp_path / "data")
    broken = data.few_shot_task(dataset, shots=4).train[3].source
    pathlib.Path(broken).write_bytes(b"\xff\xd8\xff not a picture")
    line = refused(capsys, stage2, *eurosat_command, "--template", "plain", "--epochs", 1)
    assert broken in line


def test_an_output_that_cannot_be_written_is_said_before_anything_is_learnt(tmp_path, capsys):
    (tmp_path / "in_the_way").write_text("mine")
    line = refused(capsys, stage2, "--output", tmp_path / "in_the_way", *QUICK)
    worlds.one_line(line, f"cannot write to {tmp_path / 'in_the_way'}", "choose another --output")
    assert (tmp_path / "in_the_way").read_text() == "mine"
