"""stage1.py and stage2.py as a user runs them, on a small toy world and on generated Caltech101 trees."""

import csv
import functools
import json
import math
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

import anchor
import data
import eval as evaluation
import prompts
import stage1
import stage2
import worlds
from reference import relative, tiny_clip

ROOT = pathlib.Path(stage2.__file__).parent
QUICK = ["--epochs", "1", "--anchor-epochs", "1"]
WHOLE_TOY = data.toy_dataset
ANCHOROPT = [("coop", []), ("cocoop", []), ("maple", []), ("dept", [])]


LOAD_TOY_ONCE = functools.cache(lambda device, dtype: prompts.load_clip("toy", device, dtype))


@pytest.fixture(autouse=True)
def small_toy(monkeypatch):
    """Few images a class, and one frozen toy CLIP for all runs: the whole path in about a second."""
    def load_clip(name, device="cpu", dtype=None):
        return LOAD_TOY_ONCE(device, dtype) if name == "toy" and device == "cpu" else prompts.load_clip(name, device, dtype)
    monkeypatch.setattr(data, "toy_dataset", functools.partial(WHOLE_TOY, n_train=4, n_val=1, n_test=2))
    monkeypatch.setattr(stage1, "load_clip", load_clip)
    monkeypatch.setattr(stage2, "load_clip", load_clip)


def run(script, *argv, plot=False):
    return script.main([str(word) for word in argv] + ["--no-plot"] * (script is stage2 and not plot))


def results(folder):
    return json.loads((folder / "results.json").read_text())


def one_run(output):
    (path,) = pathlib.Path(output).rglob("results.json")
    return path.parent


# ------------------------------------------------------------------------------------------------ the main job

def test_stage2_runs_stage1_first_and_leaves_what_the_readme_names(tmp_path, capsys):
    assert run(stage2, "--output", tmp_path, *QUICK, plot=True) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "toy" / "coop-anchoropt,anchor_epochs=1,epochs=1" / "seed1"
    assert "no anchor at" in out and "Stage I done" in out and evaluation.TOY_WARNING in out
    result, table = results(folder), [line for line in out.splitlines() if line.startswith("| ")]
    assert [line.split()[1] for line in table] == ["prompt", "anchor", "normal", "ensemble", "final"]
    for line, reading in zip(table[1:], evaluation.READINGS):
        numbers = [float(cell) for cell in line.split("|")[2:5]]
        assert numbers == [round(result[side][reading], 2) for side in ("base", "novel", "hm")]
    assert result["base"]["final"] == result["base"]["normal"] and result["novel"]["final"] == result["novel"]["ensemble"]
    assert set(result) >= {"dataset", "baseline", "template", "seed", "clip", "settings", "seconds", "base", "novel", "hm",
                           "position_matrix", "environment"}
    assert set(result["seconds"]) == {"stage1", "stage2", "eval"}
    for W in result["position_matrix"].values():
        assert len(W) == 5 and all(sorted(row) == [0, 0, 0, 0, 1] for row in W)
    with open(folder / "log.csv") as file:
        assert list(csv.DictReader(file))[0].keys() == {"epoch", "lr", "loss", "ce", "kl", "seconds"}
    saved = torch.load(folder / "prompt.pt", weights_only=True)
    assert saved["settings"] == result["settings"] and len(saved["class_names"]) == 24
    assert (folder / "position.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "toy" / "anchor,anchor_epochs=1" / "seed1" / "anchor.pt").exists()
    assert not list(tmp_path.rglob("*.part*")) and not list(tmp_path.rglob("last.pt"))
    assert run(stage2, "--output", tmp_path, *QUICK) == 0 and "finished already" in capsys.readouterr().out
    assert run(evaluation, tmp_path) == 0 and capsys.readouterr().out.splitlines()[1:] == out[out.index("toy, coop"):].splitlines()


def test_the_same_seed_twice_gives_the_same_figures_bit_for_bit(tmp_path):
    for baseline, _ in ANCHOROPT:
        for output in ("a", "b"):
            assert run(stage2, "--output", tmp_path / output / baseline, "--baseline", baseline, *QUICK) == 0
        a, b = (one_run(tmp_path / output / baseline) for output in ("a", "b"))
        first, second = results(a), results(b)
        for volatile in ("seconds", "environment"):
            first.pop(volatile), second.pop(volatile)
        assert first == second
        states = [torch.load(folder / "prompt.pt", weights_only=True)["state"] for folder in (a, b)]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("template", prompts.TEMPLATES)
@pytest.mark.parametrize("baseline", ["coop", "cocoop", "maple", "dept"])
def test_every_baseline_with_every_template_ends_in_its_table(tmp_path, capsys, baseline, template):
    options = ["--epochs", 1] + (["--anchor-epochs", 1] if template == "anchoropt" else [])
    assert run(stage2, "--output", tmp_path, "--baseline", baseline, "--template", template, *options) == 0
    result = results(one_run(tmp_path))
    expected = evaluation.READINGS if template == "anchoropt" else ("normal", "final")
    assert set(result["base"]) == set(result["novel"]) == set(result["hm"]) == set(expected)
    assert (result["position_matrix"] is not None) == (template == "anchoropt")
    assert f"toy, {baseline}-{template}" in capsys.readouterr().out


@pytest.mark.parametrize("baseline", ["coop", "cocoop", "maple", "dept"])
def test_one_stage_training_works_in_every_baseline(tmp_path, baseline):
    assert run(stage2, "--output", tmp_path, "--baseline", baseline, "--one-stage", "--epochs", 1) == 0
    folder = one_run(tmp_path)
    assert set(results(folder)["base"]) == set(evaluation.READINGS) and folder.parent.name.startswith(f"{baseline}-anchoropt")
    assert not list(tmp_path.rglob("anchor.pt"))


def test_zero_shot_clip_is_a_row_of_its_own(tmp_path):
    assert run(stage2, "--output", tmp_path, "--baseline", "clip") == 0
    folder = one_run(tmp_path)
    result = results(folder)
    assert folder.parent.name == "clip" and set(result["base"]) == {"normal", "final"} and result["settings"]["epochs"] == 0
    items = data.load_dataset("toy").test
    model = prompts.load_clip("toy")
    images = torch.stack([data.test_transform(32)(data.load_image(item.source)) for item in items])
    texts = prompts.clip.tokenize([f"a photo of a {name}." for name in data.TOY_CLASSES])
    similarity = prompts.unit(model.encode_image(images)) @ prompts.unit(model.encode_text(texts)).T
    labels = torch.tensor([item.label for item in items])
    for side, keep, columns in (("base", labels < 24, slice(0, 24)), ("novel", labels >= 24, slice(24, 48))):
        picks = similarity[keep][:, columns].argmax(-1) + columns.start
        assert result[side]["final"] == pytest.approx(100 * (picks == labels[keep]).double().mean().item())


@pytest.mark.parametrize("switch", [["--arrangement", "before"], ["--arrangement", "middle"], ["--arrangement", "after-class"],
                                    ["--lambda-2", "0"], ["--tau", "0.1"], ["--soft-tokens", "2"], ["--feature-at", "released"],
                                    ["--test-position", "sample"], ["--anchor-length", "3"], ["--preposition", "none"],
                                    ["--class-chunk", "7"], ["--one-stage", "--arrangement", "after-class"]])
def test_every_ablation_switch_runs_in_a_folder_of_its_own(tmp_path, switch):
    epochs = ["--epochs", 1] if "--one-stage" in switch else QUICK
    assert run(stage2, "--output", tmp_path, *epochs, *switch) == 0
    name = one_run(tmp_path).parent.name
    if switch[0] != "--class-chunk":                                    # that one changes no figure
        assert all(f"{key.removeprefix('--').replace('-', '_')}=" in name for key in switch if key.startswith("--"))


@pytest.mark.parametrize("baseline", ["coop", "cocoop", "maple", "dept"])
def test_switches_that_only_change_how_it_is_computed_leave_the_figures_within_one_image(tmp_path, baseline, monkeypatch):
    command, logits, steps, found = ["--baseline", baseline, *QUICK], prompts.CoOp.logits, [], []
    monkeypatch.setattr(prompts.CoOp, "logits", lambda *args: steps.append(logits(*args)) or steps[-1])
    for i, switch in enumerate([[], ["--class-chunk", 7, "--test-batch", 5, "--cache-images", 0] + ["--workers", 1] * (baseline == "coop")]):
        steps.clear()
        assert run(stage2, "--output", tmp_path / str(i), *command, *switch) == 0
        found.append(results(one_run(tmp_path / str(i))) | {"first step": steps[0].detach()})
    assert relative(found[1]["first step"], found[0]["first step"]) < 1e-5
    for side in ("base", "novel"):
        for reading in evaluation.READINGS:
            assert abs(found[0][side][reading] - found[1][side][reading]) <= 100 / 48 + 1e-9
    logs = [list(csv.DictReader(open(one_run(tmp_path / str(i)) / "log.csv"))) for i in range(2)]
    assert float(logs[0][0]["loss"]) == pytest.approx(float(logs[1][0]["loss"]), rel=1e-4)


def test_stage1s_gradient_is_eq5s_and_holds_in_float16_for_many_classes():
    """weight / (C d) as for 1,000 classes of ViT-B/16: plain backward() loses a few percent of it in float16."""
    found = {}
    for dtype in (torch.float32, torch.float16):
        torch.manual_seed(0)
        model = prompts.load_clip("toy", dtype=dtype)
        prompt = anchor.AnchorPrompt(model, data.TOY_CLASSES[:24])
        targets = prompts.unit(torch.randn(24, model.text_projection.shape[1]))
        for backward in (lambda loss: loss.backward(), lambda loss: stage1.scaled_backward(loss, prompt.tokens)):
            prompt.tokens.grad = None
            backward(1000 / (1000 * 512) * 24 * targets.shape[1] * stage1.losses.anchor_mse(prompt(), targets))
            found.setdefault(dtype, []).append(prompt.tokens.grad.clone())
    assert torch.equal(*found[torch.float32])                                         # a power of two: exact
    (exact, _), (plain, scaled) = found.values()
    assert relative(scaled, exact) < 0.01 < relative(plain, exact)


def test_several_seeds_give_their_mean_and_hm_of_the_means(tmp_path, capsys):
    assert run(stage2, "--output", tmp_path, "--seeds", 1, 2, 3, *QUICK) == 0
    runs = [results(tmp_path / "toy" / "coop-anchoropt,anchor_epochs=1,epochs=1" / f"seed{k}") for k in (1, 2, 3)]
    base, novel = (sum(r[side]["final"] for r in runs) / 3 for side in ("base", "novel"))
    line = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| final")][0]
    assert [float(cell) for cell in line.split("|")[2:5]] == [round(base, 2), round(novel, 2),
                                                              round(2 * base * novel / (base + novel), 2)]


# --------------------------------------------------------------------------------------------------- Stage I

def toy_anchor():
    model, names = prompts.load_clip("toy"), data.TOY_CLASSES
    sentences = data.load_descriptions(data.default_descriptions("toy"), names)
    return model, names, stage1.description_features(model, sentences)


def test_stage1_learns_cosines_rise_on_base_and_novel_classes_above_random_anchors():
    model, names, features = toy_anchor()
    base, novel = slice(0, 24), slice(24, 48)
    targets = torch.stack([f.mean(0) for f in features[base]])

    def cosines(prompt):
        rows = []
        for which in (novel, base):
            with torch.no_grad():
                unit = prompt.set_classes(names[which])()
            rows.append(torch.stack([(a * f).sum(-1).mean() for a, f in zip(unit, features[which])]).mean().item())
        return rows                                                            # and is left on the base classes

    random, learnt = [], []
    for seed in range(4):
        torch.manual_seed(seed)
        prompt = anchor.AnchorPrompt(model, names[base])
        random.append(cosines(prompt))
        log = stage1.learn_anchor(prompt, targets, 20, 12, 0.002, 1000)
        learnt.append(cosines(prompt))
        assert log[-1]["loss"] < log[0]["loss"] and learnt[-1][1] > random[-1][1]
    assert torch.tensor(learnt)[:, 1].min() > torch.tensor(random)[:, 1].max()                     # base classes
    assert torch.tensor(learnt)[:, 0].mean() > torch.tensor(random)[:, 0].mean()                   # novel classes


def test_stage1_gradient_against_the_mean_description_equals_that_against_all():
    import losses
    model, names, features = toy_anchor()
    prompt, features = anchor.AnchorPrompt(model, names[:5]), features[:5]
    features[0] = features[0][:2]                                                           # ragged
    full = torch.autograd.grad(losses.anchor_mse(prompt(), features), prompt.tokens)[0]
    short = torch.autograd.grad(losses.anchor_mse(prompt(), torch.stack([f.mean(0) for f in features])), prompt.tokens)[0]
    torch.testing.assert_close(full, short, rtol=1e-4, atol=1e-8)


def test_stage1_reads_no_image_and_no_description_of_a_novel_class(tmp_path, monkeypatch):
    def fail(*_):
        raise AssertionError("Stage I read an image")
    monkeypatch.setattr(data, "load_image", fail)
    monkeypatch.setattr(data, "draw_toy", fail)
    sentences = json.loads(pathlib.Path(data.default_descriptions("toy")).read_text())
    tokens = []
    for i, text in enumerate((None, "This is about something else.")):
        changed = {name: value if text is None or name in data.TOY_CLASSES[:24] else [text] for name, value in sentences.items()}
        (tmp_path / f"{i}.json").write_text(json.dumps(changed))
        assert run(stage1, "--anchor-epochs", 2, "--output", tmp_path / str(i), "--descriptions", tmp_path / f"{i}.json") == 0
        (path,) = (tmp_path / str(i)).rglob("anchor.pt")
        tokens.append(anchor.load_anchor(path)[0])
    assert torch.equal(*tokens)


def test_nearest_words_are_printed_with_a_warning(tmp_path, capsys):
    assert run(stage1, "--anchor-epochs", 1, "--anchor-length", 2, "--nearest", 4, "--output", tmp_path) == 0
    out = capsys.readouterr().out
    assert "make no sense" in out and out.count("[Anc_") == 2 and len(out.strip().splitlines()[-1].split()) == 1 + 2 * 4


def test_the_schedule_is_a_warm_up_epoch_and_a_cosine():
    lr = [stage1.learning_rate(epoch, 20, 0.002) for epoch in range(1, 21)]
    assert lr[0] == 1e-5 and lr[1] == 0.002
    assert lr[11] == pytest.approx(0.5 * 0.002 * (1 + math.cos(math.pi * 10 / 20))) == pytest.approx(0.001)
    assert all(a > b for a, b in zip(lr[1:], lr[2:])) and lr[-1] > 0


# ------------------------------------------------------------------------------------------------ one-stage

def test_one_stage_steps_move_one_side_and_leave_the_other_bit_identical(tmp_path):
    settings = evaluation.default_settings("toy", "coop", "anchoropt", one_stage=True) | {"epochs": 1}
    model, names, features = toy_anchor()
    torch.manual_seed(0)
    prompt = anchor.AnchorPrompt(model, names[:24])
    learner = prompts.build_learner(settings, model, names[:24], prompt.tokens)
    step = stage2.OneStage(prompt, torch.stack([f.mean(0) for f in features[:24]]), learner, settings)
    states = []

    def watched(schedule):
        states.append((state(learner), "before the anchor's half"))
        step(schedule)
        states.append((state(learner), "after it"))
    watched.state_dict, watched.load_state_dict = step.state_dict, step.load_state_dict
    items = data.take(data.load_dataset("toy").train, range(24))[:16]
    stage2.train(learner, (items, {}), settings, 1, tmp_path / "last.pt", None, type("Step", (), {
        "__call__": lambda self, s: watched(s), "state_dict": lambda self: {}, "load_state_dict": None})())
    assert len(states) == 4
    for (before, _), (after, _) in zip(states[::2], states[1::2]):                     # first half: theta_a alone
        assert changed(before, after) == {"template.anchor_tokens"}
    (before, _), (after, _) = states[1], states[2]                                     # second half: all but theta_a
    assert changed(before, after) == {"template.soft_tokens", "template.position_matrix.logits"}


def state(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def changed(before, after):
    return {key for key in before if not torch.equal(before[key], after[key])}


# ----------------------------------------------------------------------------------------- interruption and faults

@pytest.mark.parametrize("options", [["--baseline", "coop", "--epochs", "3", "--anchor-epochs", "3"],
                                     ["--baseline", "maple", "--one-stage", "--epochs", "3"]])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_figures(tmp_path, monkeypatch, capsys, options):
    assert run(stage2, "--output", tmp_path / "unbroken", *options) == 0
    rename, count = stage2.evaluation.os.replace, 0

    def stop_now_and_then(*paths):
        nonlocal count
        count += 1
        if count % 4 == 0:
            raise KeyboardInterrupt
        rename(*paths)
    monkeypatch.setattr(evaluation.os, "replace", stop_now_and_then)
    codes = []
    while not codes or codes[-1] == 130:
        codes.append(run(stage2, "--output", tmp_path / "broken", *options))
    assert codes.count(130) >= 2 and codes[-1] == 0
    assert "the same command goes on" in capsys.readouterr().err
    a, b = one_run(tmp_path / "unbroken"), one_run(tmp_path / "broken")
    for key in ("base", "novel", "position_matrix"):
        assert results(a)[key] == results(b)[key]
    x, y = (torch.load(folder / "prompt.pt", weights_only=True)["state"] for folder in (a, b))
    assert not changed(x, y)


def test_a_run_that_was_begun_with_another_anchor_or_other_descriptions_does_not_go_on(tmp_path, monkeypatch, capsys):
    real, calls = stage2.step_losses, []

    def stops(*args):
        calls.append(1)
        if len(calls) == 15:                                                          # 12 steps an epoch
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(stage2, "step_losses", stops)
    command = ["--output", tmp_path, "--epochs", 2, "--anchor-epochs", 2]
    assert run(stage2, *command) == 130
    (file,) = tmp_path.rglob("anchor.pt")
    tokens, settings = anchor.load_anchor(file)
    anchor.save_anchor(file, tokens + 0.1, settings)
    assert run(stage2, *command) == 2
    assert "it was begun with anchor tokens that have changed since); delete it" in capsys.readouterr().err
    anchor.save_anchor(file, tokens, settings)
    assert run(stage2, *command) == 0 and "going on after epoch 1" in capsys.readouterr().out

    prompt, targets = anchor.AnchorPrompt(prompts.load_clip("toy"), ["ant", "rhino"]), torch.zeros(2, 128)
    assert len(stage1.learn_anchor(prompt, targets, 1, 1, 0.002, 1000, 0, tmp_path / "last.pt", "some")) == 1
    with pytest.raises(ValueError, match="begun with descriptions that have changed since"):
        stage1.learn_anchor(prompt, targets, 2, 1, 0.002, 1000, 0, tmp_path / "last.pt", "other")
    assert len(stage1.learn_anchor(prompt, targets, 2, 1, 0.002, 1000, 0, tmp_path / "last.pt", "some")) == 2


def test_a_loss_that_is_not_finite_is_named_and_the_last_good_epoch_stays(tmp_path, capsys, monkeypatch):
    real, calls = stage2.losses.cross_entropy, []

    def breaks(logits, labels):
        calls.append(1)
        return real(logits, labels) * (float("nan") if len(calls) == 15 else 1)       # 12 steps an epoch
    monkeypatch.setattr(stage2.losses, "cross_entropy", breaks)
    assert run(stage2, "--output", tmp_path, "--epochs", 3, "--anchor-epochs", 1) == 2
    assert "not finite in epoch 2, step 3; epoch 1 is kept" in capsys.readouterr().err
    (last,) = tmp_path.rglob("last.pt")
    kept = torch.load(last, weights_only=True)
    assert len(kept["log"]) == 1 and all(torch.isfinite(value).all() for value in kept["learner"].values())
    assert run(stage1, "--output", tmp_path, "--anchor-epochs", 2, "--anchor-lr", 1e38) == 2
    assert "not finite" in capsys.readouterr().err


def test_no_two_experiments_share_a_folder():
    base = evaluation.default_settings("toy", "coop", "anchoropt")
    names = set()
    for key, value in [("tau", 0.5), ("tau", 0.05), ("epochs", 1), ("anchor_epochs", 1), ("lambda_2", 0), ("clip", "x-12"),
                       ("preposition", "of the"), ("preposition", "of-the"), ("classes", "all")]:
        names.add(str(evaluation.run_folder("o", base | {key: value}, 1)))
    names.add(str(evaluation.run_folder("o", base, 1)))
    names.add(str(evaluation.run_folder("o", evaluation.default_settings("toy", "coop", "anchoropt", one_stage=True), 1)))
    assert len(names) == 11
    folder = evaluation.run_folder("o", base | {"tau": 0.5, "epochs": 1}, 1)
    assert folder == pathlib.Path("o/toy/coop-anchoropt,epochs=1,tau=0.5/seed1")


# --------------------------------------------------------------------------------------------------- settings

def test_the_settings_table_has_every_cell_of_table_1():
    datasets = [name for name, row in data.DATASETS.items() if not name.startswith("imagenet_") and name != "imagenetv2"]
    assert len(datasets) == 12
    for dataset in datasets:
        for baseline in ("coop", "cocoop", "maple", "dept"):
            for template in prompts.TEMPLATES:
                settings = evaluation.default_settings(dataset, baseline, template)
                assert None not in settings.values() and settings.get("attributes") != []
                assert ("w_cat" in settings) == (baseline == "dept") and ("depth" in settings) == (baseline == "maple")
    cell = evaluation.default_settings
    caltech = cell("caltech101", "coop", "anchoropt")
    assert [caltech[key] for key in ("soft_tokens", "epochs", "batch_size", "lr", "lambda_1", "lambda_2", "temperature",
                                     "anchor_epochs", "anchor_weight", "anchor_lr")] == [4, 100, 8, 0.0005, 100, 1000, 2, 100, 1000, 0.002]
    assert cell("ucf101", "cocoop", "anchoropt")["temperature"] == 0.1
    assert cell("stanford_cars", "maple", "anchoropt")["lambda_2"] == 0
    assert cell("oxford_flowers", "dept", "anchoropt")["w_cat"] == 0.9 and cell("dtd", "dept", "atprompt")["w_cat"] == 0.6
    assert cell("oxford_flowers", "coop", "atprompt")["attributes"] == ["color", "habitat", "growth"]
    assert cell("ucf101", "maple", "plain")["start_words"] == "a photo of a"


# ------------------------------------------------------------------------------------- Caltech101, and real processes

def test_caltech101_in_the_fields_layout_with_a_clip_from_a_file(tmp_path, capsys):
    worlds.caltech101_tree(tmp_path / "data", per_class=2)
    torch.save(tiny_clip().state_dict(), tmp_path / "clip.pt")
    command = ["--dataset", "caltech101", "--root", tmp_path / "data", "--clip", tmp_path / "clip.pt", "--output", tmp_path / "o"]
    assert run(stage2, *command, "--baseline", "coop", *QUICK) == 0
    out, result = capsys.readouterr(), results(one_run(tmp_path / "o"))
    assert "fewer than 16 training images" in out.out and "checkpoint of your own" in out.out
    saved = torch.load(one_run(tmp_path / "o") / "prompt.pt", weights_only=True)
    assert len(saved["class_names"]) == 50 and result["clip"].startswith("clip-")
    # an anchor of another CLIP, length or preposition is refused with both values and a command
    (anchor_file,) = (tmp_path / "o").rglob("anchor.pt")
    torch.save(tiny_clip(seed=1).state_dict(), tmp_path / "other.pt")
    command[5] = tmp_path / "other.pt"
    for options, found, wanted in [([], "clip clip-", "other-"), (["--anchor-length", 2], "length 1", "2"),
                                   (["--preposition", "at"], "preposition of", "at")]:
        assert run(stage2, *command, "--anchor", anchor_file, "--epochs", 1, *options) == 2
        error = capsys.readouterr().err
        assert found in error and wanted in error and "python stage1.py --dataset caltech101" in error and error.count("\n") == 1


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    torch.save(tiny_clip().state_dict(), path)
    return path


@pytest.mark.parametrize("name", evaluation.ELEVEN)
def test_stage2_runs_on_each_of_the_eleven_datasets(tmp_path, clip_file, name):
    worlds.TREES[name](tmp_path / "data")
    names = data.load_dataset(name, tmp_path / "data").class_names
    worlds.write_descriptions(tmp_path / "descriptions.json", names)
    assert run(stage2, "--dataset", name, "--root", tmp_path / "data", "--clip", clip_file, "--output", tmp_path / "o", *QUICK,
               "--descriptions", tmp_path / "descriptions.json") == 0
    result = results(one_run(tmp_path / "o"))
    assert result["dataset"] == name and set(result["base"]) == set(result["novel"]) == set(evaluation.READINGS)


def test_an_anchor_of_descriptions_that_have_changed_since_is_not_used(tmp_path, monkeypatch, capsys):
    shipped = json.loads(pathlib.Path(data.default_descriptions("toy")).read_text())
    own, command = tmp_path / "toy.json", ["--dataset", "toy", "--anchor-epochs", 1, "--output", tmp_path]
    own.write_text(json.dumps(shipped))
    monkeypatch.setattr(data, "SHIPPED", str(tmp_path))
    assert run(stage1, *command) == 0 and run(stage1, *command) == 0
    assert "anchor found" in capsys.readouterr().out
    own.write_text(json.dumps(shipped | {name: shipped[name][1:] for name in data.TOY_CLASSES[24:]}))
    assert run(stage1, *command) == 0                                   # of novel classes: nothing to the anchor
    own.write_text(json.dumps(shipped | {data.TOY_CLASSES[0]: ["A picture of something else."]}))
    assert run(stage1, *command) == 2
    assert "was learnt from other descriptions than the file holds now" in capsys.readouterr().err
    own.unlink()                                                        # an anchor outlives its descriptions
    assert run(stage1, *command) == 0


def test_an_anchor_in_the_authors_format_drives_stage2(tmp_path):
    torch.save({"state_dict": {"anchor_ctx_1": torch.randn(1, 128).half()}, "epoch": 3}, tmp_path / "model.pth.tar")
    assert run(stage2, "--anchor", tmp_path / "model.pth.tar", "--epochs", 1, "--output", tmp_path) == 0
    assert ",anchor=model.pth-" in str(one_run(tmp_path)) or ",anchor=model" in one_run(tmp_path).parent.name


@pytest.mark.parametrize("command", [["stage1.py", "--anchor-epochs", "1"], ["stage2.py", *QUICK], ["stage2.py", "--help"],
                                     ["stage1.py", "--help"], ["eval.py", "--help"], ["data.py", "--help"]])
def test_each_script_runs_as_a_process(tmp_path, command):
    options = [] if "--help" in command else ["--output", str(tmp_path)]
    done = subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:], *options], cwd=tmp_path,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr and "Warning" not in done.stderr, done.stderr


# --------------------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("argv, said", [
    (["--dataset", "caltech1"], "did you mean caltech101"),
    (["--clip", "ViT-B16"], "ViT-B/16"),
    (["--dataset", "caltech101", "--root", "nowhere"], "nowhere"),
    (["--dataset", "caltech101", "--root", "EMPTY"], "caltech-101 is missing"),
    (["--device", "cuda:77"], "--device cpu"),
    (["--baseline", "maple", "--depth", "9"], "use a depth of 1 to 3"),
    (["--template", "plain", "--tau", "2"], "--tau has no meaning for coop-plain"),
    (["--template", "plain", "--one-stage"], "use --template anchoropt"),
    (["--one-stage", "--anchor-epochs", "3"], "--anchor-epochs has no meaning"),
    (["--baseline", "coop", "--depth", "2"], "--depth has no meaning for coop"),
    (["--tau", "0"], "--tau must be positive"),
    (["--epochs", "-1"], "--epochs must be at least 0"),
    (["--lr", "nan"], "--lr must be positive"),
    (["--one-stage", "--lr", "0"], "--lr must be positive"),
    (["--one-stage", "--lambda-2", "10"], "--lambda-2 has no meaning for coop-anchoropt with --one-stage"),
    (["--anchor", __file__, "--anchor-epochs", "3"], "--anchor-epochs has no meaning with --anchor"),
    (["--anchor", "nowhere.pt"], "nowhere.pt does not exist"),
    (["--descriptions", "nowhere.json"], "nowhere.json does not exist"),
    (["--template", "atprompt", "--attributes", "shape", " "], "has no tokens"),
    (["--anchor-length", "80"], "too long for CLIP's 77 tokens"),
])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, argv, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    assert run(stage2, *argv, "--output", tmp_path / "o") == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and error.startswith("stage2.py: ") and "Traceback" not in error


def test_stage1_names_a_dataset_that_it_cannot_learn_on(tmp_path, capsys):
    worlds.imagenetv2_tree(tmp_path / "data")
    for name, said in (("caltech1", "did you mean caltech101"), ("imagenetv2", "imagenetv2 is for testing alone")):
        assert run(stage1, "--dataset", name, "--root", tmp_path / "data", "--output", tmp_path / "o") == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1 and "--soft-tokens" not in error


def test_missing_descriptions_and_broken_images_are_named(tmp_path, capsys):
    worlds.caltech101_tree(tmp_path / "data", per_class=2)
    torch.save(tiny_clip().state_dict(), tmp_path / "clip.pt")
    command = ["--dataset", "caltech101", "--root", tmp_path / "data", "--clip", tmp_path / "clip.pt", "--output", tmp_path / "o"]
    sentences = json.loads((ROOT / "assets" / "descriptions" / "caltech101.json").read_text())
    del sentences["accordion"], sentences["ant"]
    (tmp_path / "short.json").write_text(json.dumps(sentences))
    assert run(stage2, *command, "--descriptions", tmp_path / "short.json", *QUICK) == 2
    error = capsys.readouterr().err
    assert "accordion" in error and "ant" in error and error.count("\n") == 1
    dataset = data.load_dataset("caltech101", tmp_path / "data")
    broken = data.few_shot(dataset.train, dataset.val)[0][3].source
    pathlib.Path(broken).write_bytes(b"\xff\xd8\xff not a picture")
    assert run(stage2, *command, *QUICK) == 2
    error = capsys.readouterr().err
    assert broken in error and error.count("\n") == 1


def test_an_output_that_cannot_be_written_is_said_before_anything_is_learnt(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert run(stage2, "--output", tmp_path / "file", *QUICK) == 2
    assert "file" in capsys.readouterr().err and shutil.os.path.isfile(tmp_path / "file")
