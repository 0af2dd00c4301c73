"""eval.py: the inference rule, learnt prompts on other datasets and pictures, the paper's tables.

Wherever a run asks for the paper's CLIP, ViT-B/16, it gets a tiny random one.
"""

import copy
import csv
import itertools
import json
import pathlib
import re
import shlex
import shutil
import statistics
import subprocess
import sys

import clip
import pytest
import torch

import data
import eval as evaluation
import prompts
import stage1
import stage2
import worlds
from anchor import anchor_features
from reference import NAMES, TOKENIZER, encode_77, exact, relative, tiny_clip, unit

MODEL = tiny_clip(layers=2, width=64)
MODEL.logit_scale.fill_(4.605)                          # exp of it is 100, as of trained CLIPs
EXACT = exact(copy.deepcopy(MODEL))                     # the same weights in float64
READINGS = ("anchor", "normal", "ensemble", "final")


@pytest.fixture(scope="module", autouse=True)
def loads():
    """ViT-B/16 is MODEL. Gives the precisions in which it was asked for."""
    asked, load_clip = [], prompts.load_clip

    def load(name, device="cpu", dtype=None):
        if name != "ViT-B/16":
            return load_clip(name, device, dtype)
        asked.append(dtype)
        model = copy.deepcopy(MODEL)
        prompts._set_precision(model, dtype or torch.float32)
        return model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage1, "load_clip", load)
        yield asked


def run(script, *argv):
    return script.main([str(word) for word in argv])


def refused(capsys, argv, *parts):
    """eval.py ends with exit code 2 and one line that holds these parts."""
    capsys.readouterr()
    try:
        code = run(evaluation, *argv)
    except SystemExit as parser_says:
        code = parser_says.code
    assert code == 2
    return worlds.one_line(capsys.readouterr().err, *parts)


# ---------------------------------------------------------------------------- learnt prompts

def learnt(baseline="coop", template="anchoropt", names=NAMES, seed=1, **changed):
    """A learner far from its start, so that no two readings agree by accident; its settings."""
    settings = stage1.default_settings("imagenet", baseline, template, "all")
    settings |= {"depth": 2} if baseline == "maple" else {}
    settings |= changed
    torch.manual_seed(seed)
    anchor_tokens = 0.5 * torch.randn(settings.get("anchor_length", 1), 64)
    learner = prompts.build_learner(settings, MODEL, names, anchor_tokens)
    for parameter in learner.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    return learner.eval(), settings


def save_prompt(folder, names, seed=1, file="prompt.pt", **given):
    """What stage2.py leaves of a run on all of ImageNet's classes, without its results.json."""
    learner, settings = learnt(names=names, seed=seed, **given)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"state": learner.state_dict(), "settings": settings, "class_names": names,
                "seed": seed}, folder / file)
    return folder


def logits_by_hand(saved, names, u, model=EXACT):
    """The readings' logits (n, C) of unit image features u, by CLIP's own 77-position encoder."""
    state = {key: value.double() for key, value in saved["state"].items()}
    anchors = state["template.anchor_tokens"]
    W = state["template.position_matrix.logits"]
    W = torch.eye(len(W)).double()[W.argmax(-1)]
    normal_context = W @ torch.cat([state["template.soft_tokens"], anchors])            # Eq. 9
    of = model.token_embedding.weight[TOKENIZER.encode(saved["settings"]["preposition"])]
    logits = {}
    for reading, context in (("normal", normal_context), ("anchor", torch.cat([anchors, of]))):
        f = unit(encode_77(model, context, names))
        logits[reading] = model.logit_scale.exp() * u @ f.T                             # Eq. 1
    both = logits["normal"], logits["anchor"]
    logits["ensemble"] = sum(both) / 2
    if saved["settings"]["ensemble"] == "probabilities":
        logits["ensemble"] = (sum(l.softmax(-1) for l in both) / 2).log()
    return logits


def images_by_clip(paths):
    """(n, 3, 32, 32) float32, as OpenAI's CLIP prepares pictures."""
    transform = clip.clip._transform(32)
    return torch.stack([transform(data.load_image(path)) for path in paths])


def labels_of(items):
    return torch.tensor([item.label for item in items])


@pytest.fixture
def scored(monkeypatch):
    """The logits and labels of which accuracies were computed, in their order."""
    seen, accuracy = [], evaluation.accuracy

    def note(logits, labels):
        seen.append((logits, labels))
        return accuracy(logits, labels)
    monkeypatch.setattr(evaluation, "accuracy", note)
    return seen


def hold_by_hand(scored, scores, path, items, names, rule):
    """Are four accuracies those of the learnt prompt and its anchor on these images and classes?

    scored: takes them out of it. rule: the reading that final is.
    """
    saved = torch.load(path / "prompt.pt", weights_only=True)
    u = unit(EXACT.encode_image(images_by_clip([item.source for item in items]).double()))
    expected = logits_by_hand(saved, names, u)
    expected["final"] = expected[rule]
    for reading, (logits, labels) in zip(READINGS, [scored.pop(0) for _ in READINGS]):
        assert relative(logits.double(), expected[reading]) < 1e-5
        assert torch.equal(labels, labels_of(items))
        right = sum(row.index(max(row)) == label for row, label in zip(logits.tolist(), labels))
        assert scores[reading] == 100 * right / len(items)
    assert relative(expected["normal"], expected["ensemble"]) > 1e-3


# ---------------------------------------------------------------------------- the inference rule

def test_accuracy_and_harmonic_mean_by_hand():
    logits = torch.tensor([[2.0, 1, 0], [0, 3, 1], [5, 4, 6], [1, 0, 0]])
    assert evaluation.accuracy(logits, torch.tensor([0, 1, 0, 0])) == 75.0
    assert evaluation.harmonic_mean(60, 40) == 48.0
    assert evaluation.harmonic_mean(0, 0) == 0.0 and evaluation.harmonic_mean(50, 0) == 0.0


def some_features(n=200):
    torch.manual_seed(2)
    return torch.randn(n, 64), torch.randint(0, len(NAMES), (n,))


def batches(f, y, size):
    return [(f_part, None, y_part) for f_part, y_part in zip(f.split(size), y.split(size))]


@pytest.mark.parametrize("ensemble", ["logits", "probabilities"])
@pytest.mark.parametrize("known, rule", [(True, "normal"), (False, "ensemble")])
def test_the_readings_are_those_of_a_plain_loop_and_final_follows_the_rule(known, rule, ensemble):
    learner, settings = learnt(ensemble=ensemble, anchor_length=2, preposition="with")
    f, y = some_features()
    f_anc = evaluation.anchor_prompts(learner, settings)
    found = evaluation.infer(learner, f, None, f_anc, known)
    saved = {"state": learner.state_dict(), "settings": settings}
    expected = logits_by_hand(saved, NAMES, unit(f.double()))
    for reading, logits in expected.items():
        assert relative(found[reading].double(), logits) < 1e-5
    assert found["final"] is found[rule] and set(found) == set(READINGS)

    scores = evaluation.evaluate(learner, batches(f, y, 64), f_anc, known)
    for reading, logits in found.items():
        right = sum(row.index(max(row)) == label for row, label in zip(logits.tolist(), y))
        assert scores[reading] == 100 * right / len(y)
    assert len({scores[reading] for reading in expected}) == 3


def test_without_an_anchor_final_is_the_normal_prompt():
    learner, settings = learnt(template="plain")
    assert evaluation.anchor_prompts(learner, settings) is None
    found = evaluation.evaluate(learner, batches(*some_features(), 100), None, known=False)
    assert set(found) == {"normal", "final"} and found["final"] == found["normal"]


def test_an_evaluation_in_batches_equals_one_batch_and_the_learners_mode_comes_back():
    learner, settings = learnt("cocoop")
    f_anc, found = evaluation.anchor_prompts(learner, settings), []
    for size, training in ((23, True), (7, False), (1, True)):
        learner.train(training)
        found.append(evaluation.evaluate(learner, batches(*some_features(23), size), f_anc, False))
        assert learner.training == training
    assert found[0] == found[1] == found[2]


def test_there_is_no_accuracy_of_no_images_nor_of_logits_that_are_not_finite():
    learner, settings = learnt()
    f, y = some_features(20)
    for nothing in ([], batches(f[:0], y[:0], 1)):
        with pytest.raises(ValueError, match="no images"):
            evaluation.evaluate(learner, nothing)
    f_anc = evaluation.anchor_prompts(learner, settings)
    f_anc[1] = torch.nan                                                # of one class
    with pytest.raises(ValueError, match=f"20 of 20 images and 1 of 5 classes.*{NAMES[1]}"):
        evaluation.evaluate(learner, batches(f, y, 7), f_anc)
    f[3] = torch.inf                                                    # of one image
    with pytest.raises(ValueError, match="1 of 20 images and 5 of 5 classes"):
        evaluation.evaluate(learner, batches(f, y, 7))


# ---------------------------------------------------------------------------- test images

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Small trees: ImageNet, its variants, and DTD. Their folder, and the class names of each."""
    folder = tmp_path_factory.mktemp("world")
    names = {"imagenet": worlds.imagenet_tree(folder, per_class=4, classes=10),
             "dtd": worlds.dtd_tree(folder, per_class=8, classes=5)}
    for variant in stage1.VARIANTS:
        names[variant] = worlds.TREES[variant](folder)
    return folder, names


def a_run(settings, *options):
    argv = ["RUN", "--dataset", "dtd", "--device", "cpu", *map(str, options)]
    return stage1.Run(settings, {}, 1, evaluation.parse(argv))


@pytest.mark.parametrize("baseline, test_position, options, sizes", [
    ("coop", "argmax", ["--test-batch", 7], [20]),
    ("coop", "sample", ["--test-batch", 7], [7, 7, 6]),
    ("cocoop", "argmax", ["--test-batch", 19], [19, 1]),
    ("maple", "argmax", ["--test-batch", 7], [7, 7, 6]),
    ("dept", "argmax", ["--test-batch", 7], [20]),
    ("cocoop", "argmax", [], [100, 100, 20]),
    ("maple", "argmax", [], [200, 20])])
def test_batches_of_test_images_are_cut_only_where_something_depends_on_them(
        world, baseline, test_position, options, sizes):
    items = data.load_dataset("imagenet", world[0]).test * (1 if options else 11)
    learner, settings = learnt(baseline, test_position=test_position)
    f_anc = evaluation.anchor_prompts(learner, settings)
    found = list(evaluation.test_batches(a_run(settings, *options), learner, items, f_anc))
    assert [len(y) for _, _, y in found] == sizes
    images = images_by_clip([item.source for item in items])
    f = torch.cat([f for f, _, _ in found])
    assert relative(f.double(), EXACT.encode_image(images.double())) < 1e-5
    assert torch.equal(torch.cat([y for _, _, y in found]), labels_of(items))
    if baseline == "maple":
        assert relative(torch.cat([x for _, x, _ in found]), images) < 1e-5
    else:
        assert all(x is None for _, x, _ in found)


def test_a_sampled_position_matrix_is_drawn_anew_for_each_batch():
    for test_position, samples in (("argmax", 1), ("sample", 4)):
        learner, _ = learnt(test_position=test_position)
        drawn = []
        W = learner.template.position_matrix
        W.register_forward_hook(lambda module, inputs, output: drawn.append(output))    # noqa: B023
        evaluation.evaluate(learner, batches(*some_features(23), 7))
        assert len(drawn) == 4 and len({str(W.tolist()) for W in drawn}) == samples


def test_maple_without_an_anchor_encodes_no_image_twice(world, monkeypatch, scored):
    learner, settings = learnt("maple", "plain", names=world[1]["imagenet"])
    monkeypatch.delattr(evaluation, "frozen_features")
    items = data.load_dataset("imagenet", world[0]).test
    evaluation.evaluate_items(a_run(settings), learner, items, known=True)
    images = images_by_clip([item.source for item in items])
    assert relative(scored[0][0], learner(None, images)) < 1e-5


def test_images_are_encoded_once_for_all_runs_of_one_clip_and_kept_where_asked(
        world, tmp_path, monkeypatch):
    folder, names = world
    encoded, encode = [], stage1.encode_image
    monkeypatch.setattr(stage1, "encode_image", lambda *given: encoded.append(1) or encode(*given))
    for seed in (1, 2):
        save_prompt(tmp_path / f"seed{seed}", names["imagenet"], seed)
    save_prompt(tmp_path / "half", names["imagenet"], dtype="bfloat16")

    def figures(path, *options):
        encoded.clear()
        assert run(evaluation, *on_others(path, folder, "dtd"), "--overwrite", *options) == 0
        return evaluated(path, "dtd")["base"], len(encoded)
    assert run(evaluation, *on_others(tmp_path, folder, "dtd")) == 0
    assert len(encoded) == 2                                    # two precisions, not three runs
    cache = ["--feature-cache", tmp_path / "cache"]
    first, times = figures(tmp_path / "seed1", *cache)
    assert times == 1
    assert figures(tmp_path / "seed1", *cache) == (first, 0)
    assert figures(tmp_path / "half", *cache)[1] == 1           # another precision's are others


# ---------------------------------------------------------------------------- other datasets

def on_others(path, root, *targets):
    return [path, "--root", root, "--device", "cpu", "--dataset", *targets]


def evaluated(path, target):
    return json.loads((path / f"eval-{target}.json").read_text())


@pytest.mark.parametrize("source, known, foreign", [
    ("imagenet", ("imagenet", *stage1.VARIANTS), ("dtd",)), ("dtd", ("dtd",), ("imagenet_a",))])
def test_a_prompt_and_its_anchor_go_to_other_datasets_by_the_inference_rule(
        world, tmp_path, capsys, scored, source, known, foreign):
    folder, names = world
    path = save_prompt(tmp_path / "coop-anchoropt" / "seed3", names[source], 3, dataset=source)
    assert run(evaluation, *on_others(path, folder, *known, *foreign)) == 0
    blocks = capsys.readouterr().out.strip().split("\n\n")
    for target in (*known, *foreign):
        result = evaluated(path, target)
        assert (result["dataset"], result["novel"], result["seed"]) == (target, None, 3)
        hold_by_hand(scored, result["base"], path, data.load_dataset(target, folder).test,
                     names[target], "normal" if target in known else "ensemble")
        at = blocks.index(f"{target}, coop-anchoropt, seed 3")
        shown = [line.strip("| ").split() for line in blocks[at + 1].splitlines()[2:]]
        assert shown == [[reading, "|", f"{result['base'][reading]:.2f}"] for reading in READINGS]
    assert not scored and len(names["imagenet_a"]) == len(names["dtd"])


def test_a_run_on_base_classes_answers_with_the_ensemble_elsewhere_and_says_so(
        world, tmp_path, scored):
    """And its own figures follow from its prompt.pt: base and novel, each by its rule."""
    folder, names = world
    assert run(stage2, "--dataset", "imagenet", "--root", folder, "--device", "cpu", "--no-plot",
               "--epochs", 2, "--anchor-epochs", 2, "--output", tmp_path) == 0
    (path,) = (tmp_path / "imagenet").glob("coop-*/seed1")
    result = evaluation.read_result(path / "results.json")
    test = data.load_dataset("imagenet", folder).test
    for side, rule, first in (("base", "normal", 0), ("novel", "ensemble", 5)):
        items = [item._replace(label=item.label - first) for item in test
                 if 0 <= item.label - first < 5]
        hold_by_hand(scored, result[side], path, items, names["imagenet"][first:first + 5], rule)
    assert result["hm"]["final"] == evaluation.harmonic_mean(result["base"]["final"],
                                                             result["novel"]["final"])
    for target in ("imagenet", "imagenetv2"):
        assert run(evaluation, *on_others(path, folder, target)) == 0
        result = evaluated(path, target)
        hold_by_hand(scored, result["base"], path, data.load_dataset(target, folder).test,
                     names[target], "ensemble")
        assert not result["comparable"] and any("base classes" in note for note in result["notes"])


@pytest.mark.parametrize("given", [
    {"baseline": "maple"}, {"baseline": "cocoop"}, {"baseline": "dept"}, {"baseline": "clip"},
    {"arrangement": "after-class"}, {"template": "atprompt"},
    {"draw": "once", "test_position": "sample"}])
def test_every_kind_of_run_goes_to_other_datasets(world, tmp_path, scored, given):
    folder, names = world
    path = save_prompt(tmp_path, names["imagenet"], **given)
    assert run(evaluation, *on_others(path, folder, "dtd", "imagenet_sketch")) == 0
    for target, rule in (("dtd", "ensemble"), ("imagenet_sketch", "normal")):
        learner, settings = learnt(names=names["imagenet"], **given)
        learner.set_classes(names[target])
        images = images_by_clip([item.source for item in data.load_dataset(target, folder).test])
        readings = READINGS if settings["template"] == "anchoropt" else ("normal", "final")
        assert tuple(evaluated(path, target)["base"]) == readings
        found = {reading: scored.pop(0)[0] for reading in readings}
        assert relative(found["normal"], learner(MODEL.encode_image(images), images)) < 1e-5
        assert torch.equal(found["final"], found[rule if len(readings) == 4 else "normal"])


def test_depts_base_class_head_answers_only_for_the_classes_it_learnt(world, tmp_path):
    folder, names = world
    path = save_prompt(tmp_path, names["imagenet"], baseline="dept", template="plain")
    saved = torch.load(path / "prompt.pt", weights_only=True)

    def final(target, bias):
        saved["state"] |= {"head.weight": torch.zeros(10, 64), "head.bias": bias}
        torch.save(saved, path / "prompt.pt")
        assert run(evaluation, *on_others(path, folder, target)) == 0
        return evaluated(path, target)["base"]["final"]
    always_class_3 = 1e6 * torch.eye(10)[3]
    assert names["imagenet_sketch"] == names["imagenet"]
    assert final("imagenet_sketch", always_class_3) == 10.0
    assert final("dtd", always_class_3) == final("dtd", torch.zeros(10))


def test_an_evaluation_is_skipped_until_prompt_or_data_change(world, tmp_path, capsys):
    folder, names = world
    shutil.copytree(folder / "dtd", tmp_path / "dtd")
    path = save_prompt(tmp_path / "run" / "seed1", names["imagenet"])
    command = on_others(tmp_path / "run", tmp_path, "dtd")              # a parent: all its runs
    assert run(evaluation, *command) == 0
    file = path / "eval-dtd.json"
    truth = json.loads(file.read_text())
    other = truth | {"base": dict.fromkeys(READINGS, 1.0), "notes": ["an old note"]}
    file.write_text(json.dumps(other))
    capsys.readouterr()
    assert run(evaluation, *command) == 0
    out = capsys.readouterr().out
    assert "finished already" in out and " 1.00 |" in out and "an old note" in out
    # A prompt that was learnt anew makes its old evaluations none.
    save_prompt(path, names["imagenet"], seed=2)
    assert run(evaluation, *command) == 0
    anew = json.loads(file.read_text())
    assert anew["seed"] == 2 and anew["notes"] == truth["notes"]
    assert "finished already" not in capsys.readouterr().out

    # Data that were unpacked by halves, and then wholly.
    split_file = tmp_path / "dtd" / "split_zhou_DescribableTextures.json"
    split = json.loads(split_file.read_text())
    split_file.write_text(json.dumps(split | {"test": split["test"][:-1]}))
    refused(capsys, command, file, "test images", "--overwrite")
    assert json.loads(file.read_text()) == anew
    for damage in ("{", "[]", json.dumps(anew | {"base": 1})):
        file.write_text(damage)
        refused(capsys, command, file, "--overwrite")
    assert run(evaluation, *command, "--overwrite") == 0
    assert json.loads(file.read_text())["facts"] != anew["facts"]


@pytest.mark.parametrize("of_run, of_target", [
    (["learnt on some classes"], []), ([], ["5 classes found"]), ([], [])])
def test_notes_of_a_run_and_of_the_target_travel_to_the_evaluation(
        world, tmp_path, capsys, monkeypatch, of_run, of_target):
    folder, names = world
    load = data.load_dataset
    monkeypatch.setattr(data, "load_dataset", lambda *given: load(*given)._replace(notes=of_target))
    path = made_up(tmp_path, "--classes all", "imagenet", notes=of_run)
    save_prompt(path, names["imagenet"])
    assert run(evaluation, *on_others(path, folder, "dtd")) == 0
    result, notes = evaluated(path, "dtd"), of_run + of_target
    assert result["notes"] == notes and result["comparable"] == (not notes)
    assert [note.rpartition(" (")[0] for note in notes_in(capsys.readouterr().out)] == notes


def test_the_file_that_is_named_is_the_one_that_is_evaluated(world, tmp_path, capsys):
    folder, names = world
    (tmp_path / "prompt.pt").write_bytes(b"another file")
    save_prompt(tmp_path, names["imagenet"], seed=7, file="my_coop.pt")
    assert run(evaluation, *on_others(tmp_path / "my_coop.pt", folder, "dtd")) == 0
    assert evaluated(tmp_path, "dtd")["seed"] == 7
    refused(capsys, on_others(tmp_path, folder, "dtd"), tmp_path / "prompt.pt")


def test_each_run_is_evaluated_with_its_own_clip_precision_and_seed(
        world, tmp_path, loads, scored):
    folder, names = world
    for seed, dtype in enumerate(("float32", "float32", "default")):
        save_prompt(tmp_path / f"seed{seed}", names["imagenet"], seed, dtype=dtype,
                    test_position="sample")
    loads.clear()
    command = [*on_others(tmp_path, folder, "dtd"), "--dtype", "bfloat16", "--test-batch", 5]
    assert run(evaluation, *command) == 0
    assert loads == [torch.float32, torch.bfloat16]             # "default" follows --dtype
    torch.manual_seed(99)                       # W is drawn from the run's seed, not from this
    assert run(evaluation, *command, "--overwrite") == 0
    assert len(scored) == 24
    assert all(torch.equal(scored[i][0], scored[i + 12][0]) for i in range(12))
    assert [evaluated(tmp_path / f"seed{seed}", "dtd")["seed"] for seed in range(3)] == [0, 1, 2]


def test_prompts_and_clips_that_do_not_fit_end_in_one_line(world, tmp_path, capsys):
    folder, names = world
    save_prompt(tmp_path, names["imagenet"])
    good = torch.load(tmp_path / "prompt.pt", weights_only=True)
    state, settings = good["state"], good["settings"]
    torch.save(tiny_clip(layers=1, width=128).state_dict(), folder / "wide.pt")
    wide = prompts.clip_identity(folder / "wide.pt")

    def check(*parts, clip=None, **changed):
        torch.save(good | changed, tmp_path / "prompt.pt")
        argv = on_others(tmp_path, folder, "dtd") + (["--clip", clip] if clip else [])
        refused(capsys, argv, tmp_path / "prompt.pt", *parts)

    def without(content, part):
        return {key: value for key, value in content.items() if part not in key}

    check("ViT-B/16", wide, clip=folder / "wide.pt")
    check(wide, "--clip", settings=settings | {"clip": wide})           # where may it lie?
    check("64", "128", clip=folder / "wide.pt", settings=settings | {"clip": wide})
    check("soft_tokens", state=without(state, "soft"))
    check("soft_tokens", state=state | {"template.soft_tokens": torch.zeros(2, 64)})
    check("anchor tokens", state=without(state, "anchor"))
    check("tau", settings=without(settings, "tau"))
    for foreign in ({"settings": "default"}, {"settings": settings | {"baseline": "tip"}},
                    {"class_names": []}, {"settings": settings | {"dtype": 3}}):
        check("prompt.pt of stage2.py", **foreign)
    torch.save([1, 2], tmp_path / "prompt.pt")
    refused(capsys, on_others(tmp_path, folder, "dtd"), tmp_path / "prompt.pt")
    assert not list(tmp_path.glob("eval-*"))


def test_logits_that_are_not_finite_end_in_one_line_and_no_figure(world, tmp_path, capsys):
    folder, names = world
    save_prompt(tmp_path, names["imagenet"])
    saved = torch.load(tmp_path / "prompt.pt", weights_only=True)
    saved["state"]["template.soft_tokens"][0] = torch.nan
    torch.save(saved, tmp_path / "prompt.pt")
    refused(capsys, on_others(tmp_path, folder, "dtd"), "not finite", "5 of 5 classes")
    picture = data.load_dataset("dtd", folder).test[0].source
    refused(capsys, [tmp_path, "--device", "cpu", "--images", picture, "--csv", tmp_path / "q.csv"],
            "not finite", "10 of 10 classes")
    assert [file.name for file in tmp_path.iterdir()] == ["prompt.pt"]


# ---------------------------------------------------------------------------- made-up results

BELOW_FINAL = {"anchor": 3, "normal": 2, "ensemble": 1, "final": 0}


def resolved(words):
    """The settings that stage2.py runs with, given these words of a command; and its `Run`."""
    args = stage2.parse(words)
    settings, changed = stage1.resolve(args, args.dataset, args.baseline, args.template)
    return settings, stage1.Run(settings, changed, args.seeds[0], args)


def made_up(output, words="", dataset="dtd", seed=1, base=80.0, novel=60.0, target=None, notes=(),
            facts="the same", prompt="digest", **changed):
    """A results.json as stage2.py writes it; or, with a target, an eval-*.json. Its folder.

    base, novel: of the final reading, see BELOW_FINAL. words: of stage2.py's command. changed: of
    its settings, where no option changes them without a file.
    """
    settings, run_ = resolved(["--dataset", dataset, *words.split(), "--output", str(output),
                               "--seeds", str(seed)])
    settings |= changed
    folder = run_._replace(changed=run_.changed | changed).folder
    readings, W = ("normal", "final"), None
    if settings["template"] == "anchoropt":
        readings = READINGS
        W = {"start": [[1, 0], [1, 0]], "end": [[0, 1], [seed, 0]], "epochs": []}
    sides = {side: {reading: value - BELOW_FINAL[reading] for reading in readings}
             for side, value in (("base", base), ("novel", novel))}
    if target or settings["classes"] == "all":
        sides["novel"] = None
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / (f"eval-{target}.json" if target else "results.json")
    file.write_text(json.dumps({
        "dataset": target or dataset, "seed": seed, "settings": settings, **sides, "hm": None,
        "position_matrix": W, "facts": {"class names": facts, "test images": facts},
        "notes": list(notes), "comparable": not notes, "prompt": prompt}))
    return folder


def printed_rows(text):
    """dict (block, method) -> cells of the Markdown tables in `text`."""
    rows, block = {}, None
    for line in text.splitlines():
        if line.startswith("### "):
            block = line[4:]
        if line.startswith("| ") and not line.startswith("| method"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            rows[block, cells[0]] = cells[1:]
    return rows


def notes_in(text):
    return [line[2:] for line in text.splitlines() if line.startswith("- ")]


def commands_in(text):
    """The commands for empty cells as lists of words; a loop's once for each turn."""
    for line in text.partition("```\n")[2].partition("```")[0].splitlines():
        loop = re.fullmatch(r"for d in (.*); do (.*); done", line)
        if loop:
            yield from (shlex.split(loop[2].replace("$d", dataset)) for dataset in loop[1].split())
        else:
            yield shlex.split(line)


def table(capsys, number, *argv):
    """What `eval.py --table` prints: its rows, and all its text."""
    capsys.readouterr()
    assert run(evaluation, *argv, "--table", number) == 0
    text = capsys.readouterr().out
    return printed_rows(text), text


# ---------------------------------------------------------------------------- the paper's figures

@pytest.fixture(scope="module")
def paper():
    """dict (table, dataset, method) -> row of assets/paper_tables.csv."""
    return {(row["table"], row["dataset"], row["method"]): row for number in evaluation.TABLES
            for row in evaluation.read_rows("paper_tables.csv", number)}


def test_every_printed_hm_follows_from_base_and_novel_but_for_those_with_a_note(paper):
    off = []
    for (number, dataset, method), row in paper.items():
        if row["hm"]:
            hm = f"{2 / (1 / float(row['base']) + 1 / float(row['novel'])):.2f}"
            if abs(float(hm) - float(row["hm"])) > 0.021:
                off.append((number, dataset, method))
                assert row["hm"] in row["note"] and hm in row["note"]
    assert off == [("1", "stanford_cars", "CoOp + AnchorOPT"),
                   ("S1", "average", "AnchorOPT-Anchor Prompts"),
                   ("S1", "caltech101", "AnchorOPT-Anchor Prompts"),
                   ("S1", "stanford_cars", "AnchorOPT-Final"),
                   ("S1", "oxford_flowers", "AnchorOPT-Ensemble")]


def test_every_printed_average_is_the_mean_but_for_those_with_a_note(paper):
    off = []
    for (number, dataset, method), row in paper.items():
        paper_table = evaluation.TABLES[number]
        for measure in ("base", "novel", "accuracy"):
            if dataset != "average" or len(paper_table.shown) == 1 or not row[measure]:
                continue
            values = [float(paper[number, name, method][measure]) for name in paper_table.datasets
                      if name != paper_table.source]
            if abs(statistics.fmean(values) - float(row[measure])) > 0.0101:
                off.append((number, method, measure))
                assert row[measure] in row["note"]
    assert off == [("1", "CoCoOp + AnchorOPT", "base"), ("S1", "AnchorOPT-Anchor Prompts", "base")]


def test_figures_that_the_paper_prints_twice_agree(paper):
    def figures(*key):
        return [paper[key][measure] for measure in ("base", "novel", "hm")]
    for dataset in ("average", *stage1.ELEVEN):
        for one, other in (("CoOp", "CoOp"), ("ATPrompt", "CoOp + ATPrompt"),
                           ("AnchorOPT-Final", "CoOp + AnchorOPT")):
            assert figures("S1", dataset, one) == figures("1", dataset, other)
    assert figures("3", "average", "One-stage") == figures("S1", "average", "AnchorOPT-One Stage")
    assert figures("5", "average", "AnchorOPT w/o Ensemble") == figures(
        "S1", "average", "AnchorOPT-Normal Prompts")
    for number, label in (("9", "with KD"), ("6", "of"), ("8", "Position Matrix"), ("S2", "of"),
                          ("S3", "tau = 1")):
        assert figures(number, "imagenet", label) == figures("1", "imagenet", "CoOp + AnchorOPT")


# What the rows are about: label -> (options of stage2.py, the prompt that is shown).
OURS = "--baseline coop --template anchoropt"
KINDS = {f"{name}{suffix}": (f"--baseline {name.lower()} --template {template}", "final")
         for name in ("CoOp", "CoCoOp", "MaPLe", "DePT")
         for suffix, template in (("", "plain"), (" + ATPrompt", "atprompt"),
                                  (" + AnchorOPT", "anchoropt"))}
ON_ALL = {label: (f"{options} --classes all", reading)
          for label, (options, reading) in KINDS.items() if not label.startswith("DePT")}
OF = {word: (f"{OURS} --preposition {word}", "final")
      for word in ("of", "with", "at", "sun", "sea")}
MEANT = {
    "1": KINDS, "2": ON_ALL, "4": ON_ALL,
    "3": {"One-stage": (f"{OURS} --one-stage", "final"), "Two-stage": (OURS, "final")},
    "5": {"ATPrompt": KINDS["CoOp + ATPrompt"], "AnchorOPT w/o Ensemble": (OURS, "normal")},
    "6": OF,
    "7": {f"{reading} prompt, N = {n}": (f"{OURS} --anchor-length {n}", reading)
          for reading in ("anchor", "normal") for n in (1, 2, 3, 4)},
    "8": {"Position Matrix": (OURS, "final"),
          "Before Soft Token": (f"{OURS} --arrangement before", "final"),
          "Middle": (f"{OURS} --arrangement middle", "final"),
          "After Class Token": (f"{OURS} --arrangement after-class", "final")},
    "9": {"without KD": (f"{OURS} --lambda-2 0", "final"), "with KD": (OURS, "final")},
    "S1": {"CoOp": KINDS["CoOp"], "ATPrompt": KINDS["CoOp + ATPrompt"],
           "AnchorOPT-One Stage": (f"{OURS} --one-stage", "final"),
           "AnchorOPT-Anchor Prompts": (OURS, "anchor"),
           "AnchorOPT-Normal Prompts": (OURS, "normal"),
           "AnchorOPT-Ensemble": (OURS, "ensemble"), "AnchorOPT-Final": (OURS, "final")},
    "S2": OF | {"none": (f"{OURS} --preposition none", "final")},
    "S3": {f"tau = {tau}": (f"{OURS} --tau {tau}", "final")
           for tau in ("0.1", "0.5", "1", "2", "4")}}


def test_every_row_is_one_that_the_paper_prints_in_all_blocks_of_its_table(paper):
    beyond = {"CoCoOp + ATPrompt", "MaPLe + ATPrompt", "CoCoOp + AnchorOPT", "MaPLe + AnchorOPT"}
    for number, paper_table in evaluation.TABLES.items():
        rows = evaluation.read_rows("table_rows.csv", number)
        assert sorted(row["label"] for row in rows) == sorted(MEANT[number])
        assert {key[1] for key in paper if key[0] == number} == set(paper_table.shown)
        for row, block in itertools.product(rows, paper_table.shown):
            printed = (number, block, row["label"]) in paper
            assert printed != (number in ("2", "4") and row["label"] in beyond)
            assert set(evaluation.settings_of(row, block)[1]) <= set(stage1.SETTINGS)


@pytest.mark.parametrize("number", MEANT)
def test_a_table_takes_the_runs_and_the_prompts_that_the_paper_means(
        tmp_path, capsys, paper, number):
    """Every run gets figures of its own: a row of another run, or another prompt, would show."""
    paper_table = evaluation.TABLES[number]
    targets = [name for name in paper_table.datasets if name != paper_table.source]
    datasets = paper_table.datasets if paper_table.source else [*targets, "toy"]
    runs = {}
    for dataset, (options, _) in itertools.product(datasets, MEANT[number].values()):
        if (dataset, options) not in runs:
            base = runs[dataset, options] = 20.0 + 0.25 * len(runs)
            target = dataset if paper_table.source and dataset in targets else None
            made_up(tmp_path, options, paper_table.source or dataset, 1, base, base / 2, target)
    rows, text = table(capsys, number, tmp_path)
    assert not list(commands_in(text)) and "with other settings" not in text
    assert (evaluation.TOY_WARNING in text) == (not paper_table.source)
    assert ("(CoCoOp + AnchorOPT; MaPLe + AnchorOPT)" in text) == bool(paper_table.source)
    for label, (options, reading) in MEANT[number].items():
        shown = list(paper_table.shown) if paper_table.source else [*paper_table.shown, "toy"]
        for block in shown:
            members = targets if block == "average" else [block]
            base = statistics.fmean(runs[name, options] for name in members)
            below = BELOW_FINAL[reading]
            values = [base - below]
            if not paper_table.source:
                values += [base / 2 - below]
                values += [2 * values[0] * values[1] / sum(values)]
            cells = rows.pop((block, label))
            printed = paper.get((number, block, label), {})
            measures = ["accuracy"] if paper_table.source else ["base", "novel", "hm"]
            for i, (value, measure) in enumerate(zip(values, measures)):
                ours, theirs, difference = cells[3 * i:3 * i + 3]
                assert float(ours) == pytest.approx(value, abs=0.00501)
                assert theirs == printed.get(measure, "-")
                if theirs == "-":
                    assert difference == "-"
                else:
                    assert float(difference) == pytest.approx(value - float(theirs), abs=0.00501)
            members = f"{len(targets)} of {len(targets)} datasets"
            assert cells[3 * len(values)] == (members if block == "average" else "seed 1")
    assert all(cells[-1] == "paper only" for cells in rows.values())


@pytest.mark.parametrize("number", MEANT)
def test_the_commands_for_empty_cells_make_the_runs_of_these_cells(tmp_path, capsys, number):
    paper_table, output = evaluation.TABLES[number], tmp_path / "my output"
    output.mkdir()
    _, text = table(capsys, number, output)
    made, tested = [], {}
    for _, script, *words in commands_in(text):
        if script == "eval.py":
            args = evaluation.parse(words)
            tested[args.paths[0]] = args.dataset
        else:
            args = stage2.parse(words)
            made.append(resolved(words))
            assert args.seeds == [1, 2, 3] and args.output == str(output)
        assert args.root == "$DATA"
    datasets = [paper_table.source] if paper_table.source else paper_table.datasets
    options = dict.fromkeys(options for options, _ in MEANT[number].values())
    wanted = [resolved(["--dataset", dataset, *each.split()])[0]
              for each in options for dataset in datasets]
    assert sorted(map(str, wanted)) == sorted(str(settings) for settings, _ in made)
    if paper_table.source:
        targets = list(paper_table.datasets[1:])
        assert tested == {str(run_.folder.parent): targets for _, run_ in made}


# ---------------------------------------------------------------------------- tables by hand

def differences(rows, block, label):
    return rows[block, label][2:-1:3]


def test_table_1_of_made_up_runs_is_a_hand_computation(tmp_path, capsys):
    for seed, base, novel in ((1, 76.0, 68.0), (2, 77.0, 70.0), (3, 78.0, 66.0)):
        made_up(tmp_path, "--template plain", "imagenet", seed, base, novel)
    made_up(tmp_path, "--template plain", "dtd", 1, 80.0, 40.0)
    made_up(tmp_path, "", "stanford_cars", 2, 76.73, 74.43)
    made_up(tmp_path, "--shots 2", "imagenet", 1, 99.0, 99.0)               # belongs in no cell
    made_up(tmp_path, "--classes all", "imagenet", 1, 98.0)
    rows, text = table(capsys, "1", tmp_path)
    # means 77 and 68, HM 2 * 77 * 68 / 145 = 72.2207; the paper has 76.47, 67.88, 71.92
    assert rows["imagenet", "CoOp"] == ["77.00", "76.47", "+0.53", "68.00", "67.88", "+0.12",
                                        "72.22", "71.92", "+0.30", "seeds 1, 2, 3"]
    assert rows["dtd", "CoOp"] == ["80.00", "79.44", "+0.56", "40.00", "41.18", "-1.18",
                                   "53.33", "54.24", "-0.91", "seed 1"]
    # (77 + 80) / 2 and (68 + 40) / 2: HM 2 * 78.5 * 54 / 132.5 = 63.9849; two are not the eleven
    assert rows["average", "CoOp"] == ["78.50", "82.69", "-", "54.00", "63.22", "-",
                                       "63.98", "71.66", "-", "2 of 11 datasets"]
    assert differences(rows, "stanford_cars", "CoOp + AnchorOPT") == ["+0.00", "+0.00", "-0.11"]
    assert rows["imagenet", "CoOp + AnchorOPT"] == ["-", "76.30", "-", "-", "71.56", "-",
                                                    "-", "73.85", "-", "none yet"]
    assert rows["imagenet", "PromptSRC"][-1] == "paper only"
    # Notes: the paper's own slip, and what has no cell. Commands: for the other datasets alone.
    notes = notes_in(text)
    assert any("75.67" in note and "75.56" in note and "stanford_cars" in note for note in notes)
    (left_out,) = [note for note in notes if "shots=2" in note]
    assert "coop-anchoropt,classes=all" in left_out
    plain = [words for words in commands_in(text) if "coop" in words and "plain" in words]
    assert {words[words.index("--dataset") + 1] for words in plain} \
        == set(stage1.ELEVEN) - {"imagenet", "dtd"}


def test_tables_2_and_4_read_what_runs_on_imagenet_left(tmp_path, capsys):
    label = "CoOp + AnchorOPT"
    for seed in (1, 2):
        ours = tmp_path, "--classes all", "imagenet", seed
        folder = made_up(*ours, 70.0 + seed)
        made_up(*ours, 90.0 + seed, target="caltech101")
        made_up(*ours, 50.0, target="imagenet_a")
        if seed == 1:
            made_up(*ours, 40.0, target="dtd")
            made_up(*ours, 1.0, target="birds")                         # a dataset of one's own
    made_up(tmp_path, "", "imagenet")                                   # base classes alone
    made_up(tmp_path, "", "imagenet", 1, 1.0, target="caltech101")
    rows, text = table(capsys, "2", tmp_path)
    assert rows["imagenet", label] == ["71.50", "71.33", "+0.17", "seeds 1, 2"]
    assert rows["caltech101", label] == ["91.50", "94.65", "-3.15", "seeds 1, 2"]
    assert rows["dtd", label] == ["40.00", "46.93", "-6.93", "seed 1"]
    # Without the source: (91.5 + 40) / 2.
    assert rows["average", label] == ["65.75", "66.93", "-", "2 of 10 datasets"]
    assert "birds" not in text
    (words,) = [words for words in commands_in(text) if words[2] == str(folder.parent)]
    assert evaluation.parse(words[2:]).dataset == [
        name for name in stage1.ELEVEN if name not in ("imagenet", "caltech101", "dtd")]
    (note,) = [note for note in notes_in(text) if "coop-anchoropt" in note]
    assert "classes=all" not in note                                    # these are in their cells
    rows, _ = table(capsys, "4", tmp_path)
    assert rows["imagenet_a", label] == ["50.00", "51.64", "-1.64", "seeds 1, 2"]
    assert rows["average", label] == ["50.00", "60.79", "-", "1 of 4 datasets"]


def test_an_evaluation_of_a_prompt_that_was_learnt_anew_is_in_no_table(tmp_path, capsys):
    ours = tmp_path, "--classes all", "imagenet"
    made_up(*ours, prompt="new")
    made_up(*ours, target="dtd", prompt="old")
    made_up(*ours, target="eurosat", prompt="new")
    rows, _ = table(capsys, "2", tmp_path)
    assert rows["eurosat", "CoOp + AnchorOPT"][-1] == "seed 1"
    assert rows["average", "CoOp + AnchorOPT"][-1] == "1 of 10 datasets"


def test_an_evaluation_on_the_runs_own_dataset_takes_no_cell_from_the_run(tmp_path, capsys):
    made_up(tmp_path, "", "dtd", base=70.0)
    made_up(tmp_path, "", "dtd", base=10.0, target="dtd", facts="all classes")
    rows, _ = table(capsys, "1", tmp_path)
    assert rows["dtd", "CoOp + AnchorOPT"][0] == "70.00"
    ours = tmp_path, "--classes all", "imagenet"
    made_up(*ours, base=71.0, prompt="new")
    made_up(*ours, base=11.0, target="imagenet", prompt="old")
    rows, _ = table(capsys, "2", tmp_path)
    assert rows["imagenet", "CoOp + AnchorOPT"] == ["71.00", "71.33", "-0.33", "seed 1"]


# ---------------------------------------------------------------------------- what may be compared

@pytest.mark.parametrize("changed, words, compares", [
    ({"descriptions": "mine-12345678"}, "", True), ({"anchor": "model-12345678"}, "", True),
    ({}, "--clip ViT-B/32", False), ({}, "--dtype bfloat16", True)])
def test_runs_of_another_clip_or_text_fill_their_cell_are_named_and_give_way_to_exact_ones(
        tmp_path, capsys, changed, words, compares):
    made_up(tmp_path, words, base=70.0, **changed)
    rows, text = table(capsys, "1", tmp_path)
    assert rows["dtd", "CoOp + AnchorOPT"][0] == "70.00"
    assert differences(rows, "dtd", "CoOp + AnchorOPT")[0] == ("-4.04" if compares else "-")
    ((key, value),) = changed.items() or [words[2:].split()]
    assert f"run with {key} {value} (CoOp + AnchorOPT, dtd)" in notes_in(text)
    made_up(tmp_path, base=71.0)
    rows, text = table(capsys, "1", tmp_path)
    assert rows["dtd", "CoOp + AnchorOPT"][0] == "71.00" and f"run with {key}" not in text


def test_two_runs_that_fit_a_cell_are_named_and_refused(tmp_path, capsys):
    folders = [made_up(tmp_path / tree).parent for tree in ("a", "b")]
    refused(capsys, [tmp_path, "--table", "1"], *folders, "CoOp + AnchorOPT", "dtd")
    rows, _ = table(capsys, "1", tmp_path / "a")
    assert rows["dtd", "CoOp + AnchorOPT"][-1] == "seed 1"


@pytest.mark.parametrize("facts", ["other classes", "other images"])
def test_seeds_of_other_classes_or_test_images_never_meet_in_a_mean(tmp_path, capsys, facts):
    made_up(tmp_path, seed=1, base=70.0)
    file = made_up(tmp_path, seed=2, base=51.0) / "results.json"
    result = json.loads(file.read_text())
    result["facts"]["class names" if facts == "other classes" else "test images"] = "others"
    file.write_text(json.dumps(result))
    assert run(evaluation, tmp_path) == 0
    out = capsys.readouterr().out
    assert "70.00" in out and "51.00" in out and "60.50" not in out and "±" not in out
    refused(capsys, [tmp_path, "--table", "1"], file.parent.parent, "dtd")


def test_what_does_not_compare_has_no_difference_and_its_note_is_in_every_listing(
        tmp_path, capsys):
    for dataset in stage1.ELEVEN:
        made_up(tmp_path, dataset=dataset, notes=["OWN SPLIT"] if dataset == "dtd" else [])
    rows, text = table(capsys, "1", tmp_path)
    assert rows["dtd", "CoOp + AnchorOPT"][:2] == ["80.00", "74.04"]
    for block, compares in (("dtd", False), ("average", False), ("eurosat", True)):
        assert (differences(rows, block, "CoOp + AnchorOPT") != ["-", "-", "-"]) == compares
    assert rows["average", "CoOp + AnchorOPT"][-1] == "11 of 11 datasets"
    assert "OWN SPLIT (CoOp + AnchorOPT, dtd)" in notes_in(text)
    assert run(evaluation, tmp_path) == 0
    assert notes_in(capsys.readouterr().out) == ["OWN SPLIT (dtd, coop-anchoropt)"]


@pytest.mark.parametrize("where, compare", [("source", [False, True]), ("target", [True, False])])
def test_tables_2_and_4_do_not_compare_what_was_learnt_or_tested_on_other_data(
        tmp_path, capsys, where, compare):
    ours = tmp_path, "--classes all", "imagenet"
    note = ["10 classes found"]
    made_up(*ours, notes=note if where == "source" else [])
    made_up(*ours, target="dtd", notes=note if where == "target" else [])
    rows, text = table(capsys, "2", tmp_path)
    label = "CoOp + AnchorOPT"
    assert [differences(rows, block, label) != ["-"] for block in ("imagenet", "dtd")] == compare
    assert any(found.startswith(note[0]) and label in found for found in notes_in(text))


def test_a_dataset_of_ones_own_is_listed_and_never_in_a_table_of_the_paper(tmp_path, capsys):
    made_up(tmp_path, dataset="birds", base=12.34, novel=23.45)
    assert run(evaluation, tmp_path) == 0
    out = capsys.readouterr().out
    assert "birds, coop-anchoropt, seed 1" in out and "12.34" in out and "23.45" in out
    for number in evaluation.TABLES:
        rows, text = table(capsys, number, tmp_path)
        assert not rows and "birds" not in text and "12.34" not in text


# ---------------------------------------------------------------------------- listings, figures

def test_a_listing_is_mean_and_deviation_over_seeds_and_hm_of_the_means(tmp_path, capsys):
    finals = {1: (60.0, 80.0), 2: (70.0, 82.0), 3: (65.0, 90.0)}
    for seed, (base, novel) in finals.items():
        made_up(tmp_path, dataset="toy", seed=seed, base=base, novel=novel)
    made_up(tmp_path, "--classes all", "imagenet", base=70.0)
    folder = made_up(tmp_path, "--template plain", "dtd")
    # Each once, in however many ways it is named.
    assert run(evaluation, tmp_path, folder, folder / "results.json") == 0
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in out.splitlines() if line.startswith("| final")]
    hms = [2 * base * novel / (base + novel) for base, novel in finals.values()]
    # sqrt((25 + 25) / 2) and sqrt((16 + 4 + 36) / 2); HM 2 * 65 * 84 / 149 = 73.2886
    assert ["final", "65.00 ± 5.00", "84.00 ± 5.29", f"73.29 ± {statistics.stdev(hms):.2f}"] in rows
    assert ["final", "70.00"] in rows and ["final", "80.00", "60.00", "68.57"] in rows
    assert len(rows) == 3
    assert "toy, coop-anchoropt, seeds 1, 2, 3" in out and "| accuracy |" in out
    assert evaluation.TOY_WARNING in out


def csv_rows(file):
    with open(file, newline="", encoding="utf-8") as text:
        return list(csv.DictReader(text))


def test_csv_holds_what_the_markdown_shows(tmp_path, capsys):
    made_up(tmp_path, "--tau 0.5", "imagenet", 1, 76.0, 71.0)
    assert run(evaluation, tmp_path, "--table", "s3", "--csv", tmp_path / "t.csv") == 0
    rows = {row["method"]: row for row in csv_rows(tmp_path / "t.csv")}
    assert list(rows) == list(MEANT["S3"])
    assert rows["tau = 0.5"] == {
        "table": "S3", "dataset": "imagenet", "method": "tau = 0.5",
        "base": "76.00", "base_paper": "76.10", "base_diff": "-0.10",
        "novel": "71.00", "novel_paper": "71.39", "novel_diff": "-0.39",
        "hm": "73.41", "hm_paper": "73.67", "hm_diff": "-0.26", "runs": "seed 1"}
    assert rows["tau = 4"]["hm"] == "" and rows["tau = 4"]["hm_paper"] == "73.70"
    shown = printed_rows(capsys.readouterr().out)
    assert shown["imagenet", "tau = 0.5"] == list(rows["tau = 0.5"].values())[3:]


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"base": 3}', {"base": {"final": None}},
                                    {"novel": {"final": float("nan")}}, {"base": {"final": 101}}])
def test_a_damaged_results_file_ends_in_one_line(tmp_path, capsys, damage):
    path = made_up(tmp_path) / "results.json"
    if isinstance(damage, dict):
        damage = json.dumps(json.loads(path.read_text()) | damage)
    path.write_text(damage)
    for options in ([], ["--table", "1"], ["--figure", "4"]):
        refused(capsys, [tmp_path, *options], path)


@pytest.mark.parametrize("options, parts", [
    ([], ["no results.json"]), (["--figure", "4"], ["no results.json"]),
    (["--dataset", "toy"], ["no prompt.pt"]), (["--images", "a.jpg"], ["no prompt.pt"]),
    (["--table", "S4"], ["--table", "S4"]), (["--table", "1", "--figure", "4"], ["not allowed"]),
    (["--csv", "x"], ["--csv", "--table", "--images"]),
    (["--output", "x", "--table", "1"], ["--output", "--figure"]),
    (["--figure", "4", "--top", "9"], ["--top", "--images"]),
    (["--classes-from", "x"], ["--classes-from", "--images"]),
    (["--root", "x"], ["--root", "--dataset"]), (["--overwrite"], ["--overwrite", "--dataset"]),
    (["--feature-cache", "x", "--images", "a.jpg"], ["--feature-cache", "--dataset"]),
    (["--test-batch", "9"], ["--test-batch", "--dataset", "--images"]),
    (["--images", "a.jpg", "--top", "0"], ["--top", "0"])])
def test_options_and_folders_without_sense_end_in_one_line(tmp_path, capsys, options, parts):
    refused(capsys, [tmp_path, *options], *parts)
    if parts[0].startswith("no "):
        refused(capsys, [tmp_path / "nowhere", *options], tmp_path / "nowhere", "does not exist")


def test_figure_4_draws_the_learnt_w_of_the_lowest_seed_of_every_run(
        tmp_path, capsys, monkeypatch):
    drawn = []

    def draw(panels, path, n_anchor):
        drawn.append((panels, n_anchor))
        pathlib.Path(path).write_text("picture")
    monkeypatch.setattr(evaluation, "plot_position_matrix", draw)
    for seed in (3, 2):
        made_up(tmp_path / "a", "--anchor-length 2", seed=seed)
    made_up(tmp_path / "a", dataset="eurosat")
    made_up(tmp_path / "b", dataset="eurosat")                          # the same run elsewhere
    plain = made_up(tmp_path / "a", "--template plain", "eurosat")      # has no W
    assert run(evaluation, tmp_path, "--figure", "4", "--output", tmp_path / "w") == 0
    assert (tmp_path / "w.png").read_text() == "picture"
    first, second, third = "dtd, coop-anchoropt, anchor_length=2", "eurosat, coop-anchoropt", None
    ((panels, n_anchor),) = drawn
    (third,) = set(panels) - {first, second}
    assert third.startswith(second)
    assert panels == {first: [[0, 1], [2, 0]], second: [[0, 1], [1, 0]], third: [[0, 1], [1, 0]]}
    assert n_anchor == {first: 2, second: 1, third: 1}
    refused(capsys, [plain, "--figure", "4"], "no run with")


def test_a_reader_who_has_seen_enough_is_left_quietly(tmp_path):
    made_up(tmp_path)
    command = [sys.executable, evaluation.__file__, str(tmp_path), "--table", "1"]
    done = subprocess.run(f"{shlex.join(command)} | head -1", shell=True, capture_output=True,
                          text=True)
    assert done.stdout == "## Table 1: base to novel classes\n"
    assert "pipe" not in done.stderr and "Traceback" not in done.stderr


# ---------------------------------------------------------------------------- pictures of one's own

LEARNT_ON = ["lemon", "teal ring", "3. gear"]
NEVER_SEEN = ["harbour crane", "a very small teapot", "Éclair (chocolate)", "7-up"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A run at the README's place, five pictures, and four of them in pictures/. The folder."""
    folder = tmp_path_factory.mktemp("own")
    save_prompt(folder / "output" / "toy" / "coop-anchoropt" / "seed1", LEARNT_ON)
    for label, name in enumerate(["a", "b", "pictures/c", "pictures/d", "pictures/deep/e"]):
        worlds.write_image(folder / f"{name}.jpg", label, label)
    return folder


def classify(folder, *options):
    """The command that classifies pictures by the run in `folder`."""
    return [folder / "output" / "toy" / "coop-anchoropt" / "seed1", "--device", "cpu", *options]


def loaded(folder):
    return evaluation.load_run(classify(folder)[0], device="cpu")


@pytest.mark.parametrize("names", [None, NEVER_SEEN, [*LEARNT_ON, "ant"], LEARNT_ON[:0:-1]])
def test_a_learnt_prompt_classifies_pictures_with_any_names(pictures, tmp_path, capsys, names):
    options = []
    if names:
        text = "\ufeff" + "\n".join(["", *names, names[0], "  "])             # as editors save it
        (tmp_path / "names.txt").write_text(text, encoding="utf-8")
        options = ["--classes-from", tmp_path / "names.txt"]
    names = names or LEARNT_ON
    paths = [str(pictures / name) for name in ("pictures/c.jpg", "pictures/d.jpg",
                                               "pictures/deep/e.jpg", "a.jpg")]
    argv = classify(pictures, *options, "--images", pictures / "pictures", pictures / "a.jpg")
    assert run(evaluation, *argv, "--top", 99, "--test-batch", 3, "--csv", tmp_path / "q.csv") == 0
    rows = csv_rows(tmp_path / "q.csv")
    saved = torch.load(argv[0] / "prompt.pt", weights_only=True)
    u = unit(EXACT.encode_image(images_by_clip(paths).double()))
    rule = "normal" if set(names) <= set(LEARNT_ON) else "ensemble"
    expected = logits_by_hand(saved, names, u)[rule].softmax(-1)                        # Eq. 1
    assert f"the {rule}" in capsys.readouterr().out
    assert [row["image"] for row in rows] == [path for path in paths for _ in names]
    for path, q in zip(paths, expected.tolist()):
        own = [row for row in rows if row["image"] == path]
        assert [row["rank"] for row in own] == [str(i + 1) for i in range(len(names))]
        found = {row["class"]: float(row["probability"]) for row in own}
        assert found == pytest.approx(dict(zip(names, q)), abs=5e-4)
        assert list(found.values()) == sorted(found.values(), reverse=True)
    assert run(evaluation, *argv, "--top", 2) == 0
    best = [row for row in rows if row["image"] == paths[-1]][:2]
    assert capsys.readouterr().out.splitlines()[-1] == f"{paths[-1]}: " + ", ".join(
        f"{row['class']} {100 * float(row['probability']):.1f} %" for row in best)


def test_a_broken_picture_is_named_and_the_others_are_answered(pictures, tmp_path, capsys):
    (tmp_path / "broken.jpg").write_bytes((pictures / "a.jpg").read_bytes()[:200])
    images = [pictures / "a.jpg", tmp_path / "broken.jpg", pictures / "b.jpg"]
    argv = classify(pictures, "--csv", tmp_path / "q.csv", "--images")
    assert run(evaluation, *argv, *images) == 1
    found = capsys.readouterr()
    worlds.one_line(found.err, tmp_path / "broken.jpg")
    assert [line.split(":")[0] for line in found.out.splitlines()[-2:]] == [
        str(images[0]), str(images[2])]
    answered = {row["image"] for row in csv_rows(tmp_path / "q.csv")}
    assert answered == {str(images[0]), str(images[2])}
    (tmp_path / "q.csv").unlink()
    assert run(evaluation, *argv, tmp_path / "missing.jpg") == 1
    worlds.one_line(capsys.readouterr().err, tmp_path / "missing.jpg")
    assert not (tmp_path / "q.csv").exists()


def test_a_picture_that_is_named_twice_is_no_broken_one(pictures, capsys):
    assert run(evaluation, *classify(pictures, "--images", pictures / "a.jpg",
                                     pictures / "a.jpg")) == 0


def test_the_readmes_snippet_gives_the_command_lines_numbers(
        pictures, tmp_path, capsys, monkeypatch):
    readme = pathlib.Path(evaluation.__file__).with_name("README.md").read_text(encoding="utf-8")
    (snippet,) = [block.split("```")[0] for block in readme.split("import eval as evaluation")[1:]
                  if "load_run(" in block]
    monkeypatch.chdir(pictures)
    found = {}
    exec(f"import eval as evaluation {snippet}", found)
    q, names = found["q"], found["run"].class_names
    assert q.shape == (2, len(names)) and torch.allclose(q.sum(1).cpu(), torch.ones(2))
    (tmp_path / "names.txt").write_text("\n".join(names))
    assert run(evaluation, "output/toy/coop-anchoropt/seed1", "--classes-from",
               tmp_path / "names.txt", "--csv", tmp_path / "q.csv", "--images", "a.jpg",
               "b.jpg") == 0
    rows = {(row["image"], row["class"]): float(row["probability"])
            for row in csv_rows(tmp_path / "q.csv")}
    for i, picture in enumerate(("a.jpg", "b.jpg")):
        for c, name in enumerate(names):
            assert rows[picture, name] == pytest.approx(q[i, c].item(), abs=2e-6)


def test_a_loaded_run_is_ready_for_use_and_turns_pictures_upright(pictures, tmp_path):
    run_ = loaded(pictures)
    paths = [str(pictures / f"{name}.jpg") for name in ("a", "b", "pictures/c")]
    first = run_.probabilities(paths)
    assert torch.equal(first, run_.probabilities(paths)) and not first.requires_grad
    assert torch.allclose(first, run_.probabilities(paths, batch_size=2), atol=1e-4)
    assert run_.probabilities([]).shape == (0, len(LEARNT_ON))
    upright = data.load_image(paths[0])
    exif = upright.getexif()
    exif[274] = 6                                       # turn it by 90 degrees, says the camera
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    turned = run_.probabilities([tmp_path / "turned.png"])
    assert torch.allclose(turned, first[:1], atol=1e-4)


def test_names_are_read_as_folders_are_and_the_normal_prompt_answers_for_known_ones(pictures):
    run_ = loaded(pictures)
    assert run_.class_names == LEARNT_ON and run_.known
    assert run_.set_classes(["3. gear", "lemon"]).known             # known as they are
    run_.set_classes(["001.Black_footed_Albatross", "n02110958 pug", "2012 Acura RL", "lemon",
                      "lemon"])
    assert run_.class_names == ["Black footed Albatross", "pug", "2012 Acura RL", "lemon"]
    assert not run_.known
    for wrong, said in (([], "no class names"), (["word " * 80], "word")):
        with pytest.raises(ValueError, match=said):
            run_.set_classes(wrong)
    assert run_.class_names[-1] == "lemon"                          # still bound to the last good


@pytest.mark.parametrize("given", [{}, {"baseline": "maple"}, {"arrangement": "after-class"},
                                   {"baseline": "dept", "template": "plain"}])
def test_text_features_are_what_the_learner_computes(tmp_path, given):
    save_prompt(tmp_path, LEARNT_ON, **given)
    normal, anchor = evaluation.load_run(tmp_path, device="cpu").set_classes(NEVER_SEEN) \
        .text_features()
    learner, settings = learnt(names=LEARNT_ON, **given)
    learner.set_classes(NEVER_SEEN)
    assert relative(normal, unit(learner.text_features())) < 1e-5 and not normal.requires_grad
    if settings["template"] == "plain":
        assert anchor is None
    else:
        tokens = learner.template.anchor_tokens
        assert relative(anchor, anchor_features(MODEL, NEVER_SEEN, tokens, "of")) < 1e-5


def test_pictures_classes_and_runs_that_cannot_be_read_end_in_one_line(pictures, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "latin1.txt").write_bytes("Éclair\n".encode("latin1"))
    (tmp_path / "nothing").mkdir()
    picture = pictures / "a.jpg"
    for file in ("empty.txt", "latin1.txt", "gone.txt"):
        refused(capsys, classify(pictures, "--images", picture, "--classes-from", tmp_path / file),
                tmp_path / file)
    for options, part in ((["--images", tmp_path / "nothing"], tmp_path / "nothing"),
                          (["--images", picture, "--csv", picture / "x.csv"], picture / "x.csv"),
                          (["--images", picture, "--clip", "ViT-B/32"], "ViT-B/16")):
        refused(capsys, classify(pictures, *options), part)
    for seed in (1, 2):
        save_prompt(tmp_path / "runs" / f"seed{seed}", LEARNT_ON, seed)
    refused(capsys, [tmp_path / "runs", "--images", picture], "2 runs", tmp_path / "runs" / "seed1")
    save_prompt(tmp_path / "cocoop", LEARNT_ON, baseline="cocoop")
    with pytest.raises(ValueError, match="cocoop"):
        evaluation.load_run(tmp_path / "cocoop", device="cpu").text_features()


def test_options_of_the_machine_reach_pictures_too(pictures, monkeypatch, loads):
    found, probabilities = {}, evaluation.Classifier.probabilities

    def note(self, crops, batch_size):
        found.update(batch_size=batch_size, chunks=(self.class_chunk, self.learner.class_chunk))
        return probabilities(self, crops, batch_size)
    monkeypatch.setattr(evaluation.Classifier, "probabilities", note)
    loads.clear()
    assert run(evaluation, *classify(pictures, "--images", pictures / "a.jpg", "--dtype",
                                     "bfloat16", "--class-chunk", 5, "--test-batch", 3)) == 0
    assert found == {"batch_size": 3, "chunks": (5, 5)} and loads == [torch.bfloat16]
