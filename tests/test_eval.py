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

import clip
import pytest
import torch

import data
import eval as evaluation
import prompts
import stage1
import stage2
import worlds
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
        if dtype == torch.float16:
            clip.model.convert_weights(model)
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
    given = {"classes": "all"} | ({"depth": 2} if baseline == "maple" else {}) | changed
    settings = stage1.default_settings("imagenet", baseline, template, given) | given
    torch.manual_seed(seed)
    anchor_tokens = 0.5 * torch.randn(settings.get("anchor_length", 1), 64)
    learner = prompts.build_learner(settings, MODEL, names, anchor_tokens)
    for parameter in learner.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    return learner.eval(), settings


def save_prompt(folder, names, seed=1, **given):
    """What stage2.py leaves of a run on all of ImageNet's classes, without its results.json."""
    learner, settings = learnt(names=names, seed=seed, **given)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"state": learner.state_dict(), "settings": settings, "class_names": names,
                "seed": seed}, folder / "prompt.pt")
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
        assert torch.equal(labels, torch.tensor([item.label for item in items]))
        right = sum(row.index(max(row)) == label for row, label in zip(logits.tolist(), labels))
        assert scores[reading] == 100 * right / len(items)
    assert relative(expected["normal"], expected["ensemble"]) > 1e-3


def test_accuracy_and_harmonic_mean_by_hand():
    logits = torch.tensor([[2.0, 1, 0], [0, 3, 1], [5, 4, 6], [1, 0, 0]])
    assert evaluation.accuracy(logits, torch.tensor([0, 1, 0, 0])) == 75.0
    assert evaluation.harmonic_mean(60, 40) == 48.0
    assert evaluation.harmonic_mean(0, 0) == 0.0 and evaluation.harmonic_mean(50, 0) == 0.0


def some_features(n):
    torch.manual_seed(2)
    return torch.randn(n, 64), torch.randint(0, len(NAMES), (n,))


def batches(f, y, size):
    return [(f_part, None, y_part) for f_part, y_part in zip(f.split(size), y.split(size))]


@pytest.mark.parametrize("ensemble", ["logits", "probabilities"])
@pytest.mark.parametrize("known, rule", [(True, "normal"), (False, "ensemble")])
def test_the_readings_are_those_of_a_plain_loop_and_final_follows_the_rule(known, rule, ensemble):
    learner, settings = learnt(ensemble=ensemble, anchor_length=2, preposition="with")
    f, _ = some_features(200)
    f_anc = evaluation.anchor_prompts(learner, settings)
    found = evaluation.infer(learner, f, None, f_anc, known)
    saved = {"state": learner.state_dict(), "settings": settings}
    expected = logits_by_hand(saved, NAMES, unit(f.double()))
    for reading, logits in expected.items():
        assert relative(found[reading].double(), logits) < 1e-5
    assert found["final"] is found[rule] and set(found) == set(READINGS)


def test_logits_that_are_not_finite_are_no_answers():
    learner, settings = learnt()
    f_anc = evaluation.anchor_prompts(learner, settings)
    f_anc[1] = torch.nan                                                # of one class
    with pytest.raises(ValueError, match=f"20 of 20 images.*{NAMES[1]}"):
        evaluation.evaluate(learner, batches(*some_features(20), 7), f_anc)


def test_an_evaluation_in_batches_equals_one_batch_and_the_learners_mode_comes_back():
    learner, settings = learnt("cocoop")
    f_anc, found = evaluation.anchor_prompts(learner, settings), []
    for size, training in ((23, True), (7, False), (1, True)):
        learner.train(training)
        found.append(evaluation.evaluate(learner, batches(*some_features(23), size), f_anc, False))
        assert learner.training == training
    assert found[0] == found[1] == found[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Small trees: ImageNet, its variants, and DTD. Their folder, and the class names of each."""
    folder = tmp_path_factory.mktemp("world")
    names = {"imagenet": worlds.imagenet_tree(folder, per_class=4, classes=10),
             "dtd": worlds.dtd_tree(folder, per_class=8, classes=5)}
    for variant in stage1.VARIANTS:
        names[variant] = worlds.TREES[variant](folder)
    return folder, names


def a_run(settings):
    argv = ["RUN", "--dataset", "dtd", "--device", "cpu"]
    return stage1.Run(settings, {}, 1, evaluation.parse(argv))


@pytest.mark.parametrize("baseline, test_position, sizes", [
    ("coop", "argmax", [220]),
    ("coop", "sample", [100, 100, 20]),
    ("cocoop", "argmax", [100, 100, 20]),
    ("maple", "argmax", [200, 20])])
def test_batches_of_test_images_are_cut_only_where_something_depends_on_them(
        world, baseline, test_position, sizes):
    items = data.load_dataset("imagenet", world[0]).test * 11
    learner, settings = learnt(baseline, test_position=test_position)
    f_anc = evaluation.anchor_prompts(learner, settings)
    found = list(evaluation.test_batches(a_run(settings), learner, items, f_anc))
    assert [len(y) for _, _, y in found] == sizes
    images = images_by_clip([item.source for item in items])
    f = torch.cat([f for f, _, _ in found])
    assert relative(f.double(), EXACT.encode_image(images.double())) < 1e-5
    assert torch.cat([y for _, _, y in found]).tolist() == [item.label for item in items]
    if baseline == "maple":
        assert relative(torch.cat([x for _, x, _ in found]), images) < 1e-5
    else:
        assert all(x is None for _, x, _ in found)


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
    for target in ("imagenet", "imagenetv2"):
        assert run(evaluation, *on_others(path, folder, target)) == 0
        result = evaluated(path, target)
        hold_by_hand(scored, result["base"], path, data.load_dataset(target, folder).test,
                     names[target], "ensemble")
        assert any("--classes all" in note for note in result["notes"])


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
    assert "finished already" in out and " 1.00 " in out and "an old note" in out

    # A prompt that was learnt anew, data that were unpacked by halves.
    save_prompt(path, names["imagenet"], seed=2)
    refused(capsys, command, file, "prompt", "--overwrite")
    save_prompt(path, names["imagenet"])
    split_file = tmp_path / "dtd" / "split_zhou_DescribableTextures.json"
    split = json.loads(split_file.read_text())
    split_file.write_text(json.dumps(split | {"test": split["test"][:-1]}))
    refused(capsys, command, file, "test images", "--overwrite")
    assert run(evaluation, *command, "--overwrite") == 0
    assert json.loads(file.read_text())["facts"] != truth["facts"]


def test_notes_of_a_run_and_of_the_target_travel_to_the_evaluation(
        world, tmp_path, capsys, monkeypatch):
    folder, names = world
    load, notes = data.load_dataset, ["learnt on some classes", "5 classes found"]
    monkeypatch.setattr(data, "load_dataset",
                        lambda *given: load(*given)._replace(notes=notes[1:]))
    path = made_up(tmp_path, "--classes all", "imagenet", notes=notes[:1])
    save_prompt(path, names["imagenet"])
    assert run(evaluation, *on_others(path, folder, "dtd")) == 0
    assert evaluated(path, "dtd")["notes"] == notes_in(capsys.readouterr().out) == notes


def test_each_run_is_evaluated_with_its_own_clip_precision_and_seed(
        world, tmp_path, loads, scored):
    folder, names = world
    for seed, dtype in enumerate(("float32", "float32", "default")):
        save_prompt(tmp_path / f"seed{seed}", names["imagenet"], seed, dtype=dtype,
                    test_position="sample")
    loads.clear()
    command = on_others(tmp_path, folder, "dtd")
    assert run(evaluation, *command) == 0
    assert loads == [torch.float32, None]
    torch.manual_seed(99)                       # W is drawn from the run's seed, not from this
    assert run(evaluation, *command, "--overwrite", "--dtype", "float32") == 0
    assert loads[2:] == [torch.float32] * 2                     # --dtype goes for all
    assert len(scored) == 24
    assert all(torch.equal(scored[i][0], scored[i + 12][0]) for i in range(12))
    assert [evaluated(tmp_path / f"seed{seed}", "dtd")["seed"] for seed in range(3)] == [0, 1, 2]


def test_prompts_and_clips_that_do_not_fit_end_in_one_line(world, tmp_path, capsys):
    folder, names = world
    save_prompt(tmp_path, names["imagenet"])
    torch.save(tiny_clip(layers=1, width=128).state_dict(), tmp_path / "wide.pt")
    refused(capsys, [*on_others(tmp_path, folder, "dtd"), "--clip", tmp_path / "wide.pt"],
            tmp_path / "prompt.pt", "ViT-B/16", "--clip")
    for foreign in ([1, 2], {"anchor_tokens": torch.zeros(1, 64)}):
        torch.save(foreign, tmp_path / "prompt.pt")
        refused(capsys, on_others(tmp_path, folder, "dtd"), tmp_path / "prompt.pt", "--overwrite")
    assert not list(tmp_path.glob("eval-*"))


# ---------------------------------------------------------------------------- made-up results

BELOW_FINAL = {"anchor": 3, "normal": 2, "ensemble": 1, "final": 0}


def resolved(words):
    """The settings that stage2.py runs with, given these words of a command; and its `Run`."""
    args = stage2.parse(words)
    settings, changed = stage1.resolve(args, args.dataset, args.baseline, args.template)
    return settings, stage1.Run(settings, changed, args.seeds[0], args)


def made_up(output, words="", dataset="dtd", seed=1, base=80.0, novel=60.0, target=None, notes=(),
            prompt="digest", **changed):
    """A results.json as stage2.py writes it; or, with a target, an eval-*.json. Its folder.

    base, novel: of the final reading, see BELOW_FINAL. words: of stage2.py's command. changed: of
    its settings, where no option changes them without a file.
    """
    settings, run_ = resolved(["--dataset", dataset, *words.split(), "--output", str(output),
                               "--seeds", str(seed)])
    settings |= changed
    if "anchor" in changed:                             # given: Stage I has not learnt it
        settings = {key: settings[key] for key in settings if key not in stage1.SETTINGS
                    or stage1.SETTINGS[key].group not in ("anchor's learning", "stage I")}
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
        "dataset": target or dataset, "seed": seed, "settings": settings, **sides,
        "position_matrix": W, "facts": {"class names": "", "test images": ""},
        "notes": list(notes), "prompt": prompt}))
    return folder


def printed_rows(text):
    """dict (dataset, method) -> the other cells of the Markdown tables in `text`."""
    rows = {}
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith(("| dataset", "| ---")):
            dataset, method, *cells = [cell.strip() for cell in line.strip("|").split("|")]
            rows[dataset, method] = cells
    return rows


def notes_in(text):
    return [line[2:] for line in text.splitlines() if line.startswith("- ")]


def commands_in(text):
    """The commands for empty cells as lists of words; a loop's once for each turn."""
    for line in re.findall(r"^    (.*)$", text, re.MULTILINE):
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


def csv_rows(file):
    with open(file, newline="", encoding="utf-8") as text:
        return list(csv.DictReader(text))


@pytest.fixture(scope="module")
def paper():
    """dict (table, dataset, method) -> row of assets/paper_tables.csv."""
    return {(row["table"], row["dataset"], row["method"]): row for number in evaluation.TABLES
            for row in evaluation.read_rows("paper_tables.csv", number)}


def targets_of(number):
    """The datasets that a table averages over."""
    return [name for name in evaluation.TABLES[number] if name != evaluation.SOURCE.get(number)]


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


@pytest.mark.parametrize("number", MEANT)
def test_a_table_takes_the_runs_and_the_prompts_that_the_paper_means(
        tmp_path, capsys, paper, number):
    """Every run gets figures of its own: a row of another run, or another prompt, would show."""
    source, targets, runs = evaluation.SOURCE.get(number), targets_of(number), {}
    datasets = evaluation.TABLES[number] if source else [*targets, "toy"]
    for dataset, (options, _) in itertools.product(datasets, MEANT[number].values()):
        if (dataset, options) not in runs:
            base = runs[dataset, options] = 20.0 + 0.25 * len(runs)
            made_up(tmp_path, options, source or dataset, 1, base, base / 2,
                    dataset if source and dataset in targets else None)
    rows, text = table(capsys, number, tmp_path)
    assert not list(commands_in(text)) and (evaluation.TOY_WARNING in text) == (not source)
    blocks = [*datasets, "average"] if len(targets) > 1 else datasets
    for (label, (options, reading)), block in itertools.product(MEANT[number].items(), blocks):
        members = targets if block == "average" else [block]
        base = statistics.fmean(runs[name, options] for name in members)
        values = [base - BELOW_FINAL[reading]]
        if not source:
            values += [base / 2 - BELOW_FINAL[reading]]
            values += [2 * values[0] * values[1] / sum(values)]
        cells, printed = rows.pop((block, label)), paper.get((number, block, label), {})
        measures = ["accuracy"] if source else ["base", "novel", "hm"]
        for i, (value, measure) in enumerate(zip(values, measures)):
            assert float(cells[2 * i]) == pytest.approx(value, abs=0.00501)
            assert cells[2 * i + 1] == printed.get(measure, "-")
        of = f"{len(targets)} of {len(targets)} datasets" if block == "average" else "seed 1"
        assert cells[2 * len(values)] == of
    assert all(cells[-2] == "no run" for cells in rows.values())        # of other methods


@pytest.mark.parametrize("number", MEANT)
def test_the_commands_for_empty_cells_make_the_runs_of_these_cells(tmp_path, capsys, number):
    source, output = evaluation.SOURCE.get(number), tmp_path / "my output"
    made_up(output, dataset="birds")
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
    datasets = [source] if source else evaluation.TABLES[number]
    options = dict.fromkeys(options for options, _ in MEANT[number].values())
    wanted = [resolved(["--dataset", dataset, *each.split()])[0]
              for each in options for dataset in datasets]
    assert sorted(map(str, wanted)) == sorted(str(settings) for settings, _ in made)
    if source:
        assert tested == {str(run_.folder.parent): targets_of(number) for _, run_ in made}


def test_table_1_of_made_up_runs_is_a_hand_computation(tmp_path, capsys):
    for seed, base, novel in ((1, 76.0, 68.0), (2, 77.0, 70.0), (3, 78.0, 66.0)):
        made_up(tmp_path, "--template plain", "imagenet", seed, base, novel, notes=["OWN SPLIT"])
    made_up(tmp_path, "--template plain", "dtd", 1, 80.0, 40.0)
    made_up(tmp_path, "--shots 2", "imagenet", 1, 99.0, 99.0)               # belongs in no cell
    made_up(tmp_path, "--classes all", "imagenet", 1, 98.0)
    made_up(tmp_path, dataset="birds", base=12.34, novel=23.45)             # nor one's own dataset
    rows, text = table(capsys, "1", tmp_path, "--csv", tmp_path / "t.csv")
    # means 77 and 68, HM 2 * 77 * 68 / 145 = 72.2207
    assert rows["imagenet", "CoOp"] == ["77.00", "76.47", "68.00", "67.88", "72.22", "71.92",
                                        "seed 1, 2, 3", "-"]
    assert rows["dtd", "CoOp"] == ["80.00", "79.44", "40.00", "41.18", "53.33", "54.24", "seed 1",
                                   "-"]
    # (77 + 80) / 2 and (68 + 40) / 2: HM 2 * 78.5 * 54 / 132.5 = 63.9849
    assert rows["average", "CoOp"] == ["78.50", "82.69", "54.00", "63.22", "63.98", "71.66",
                                       "2 of 11 datasets", "-"]
    assert rows["imagenet", "CoOp + AnchorOPT"] == ["-", "76.30", "-", "71.56", "-", "73.85",
                                                    "no run", "-"]
    assert "81.87" in rows["average", "CoCoOp + AnchorOPT"][-1]             # the paper's own slip
    (line,) = [line for line in csv_rows(tmp_path / "t.csv") if line["method"] == "CoOp"
               and line["dataset"] == "dtd"]
    assert [value or "-" for value in line.values()] == ["dtd", "CoOp", *rows["dtd", "CoOp"]]
    assert ("caltech101", "CoOp") not in rows and "OWN SPLIT" in notes_in(text)
    assert "fits no cell: coop-anchoropt,shots=2" in text
    assert "99.00" not in text and "98.00" not in text and "birds" not in rows
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
        made_up(*ours, 11.0, target="imagenet")                         # is no run's own figure
        if seed == 1:
            made_up(*ours, 40.0, target="dtd")
            made_up(*ours, 1.0, target="eurosat", prompt="old")         # was learnt anew since
    made_up(tmp_path, "", "imagenet")                                   # base classes alone
    made_up(tmp_path, "", "imagenet", 1, 1.0, target="caltech101")
    rows, text = table(capsys, "2", tmp_path)
    assert rows["imagenet", label] == ["71.50", "71.33", "seed 1, 2", "-"]
    assert rows["caltech101", label] == ["91.50", "94.65", "seed 1, 2", "-"]
    assert rows["dtd", label] == ["40.00", "46.93", "seed 1", "-"]
    # Without the source: (91.5 + 40) / 2.
    assert rows["average", label] == ["65.75", "66.93", "2 of 10 datasets", "-"]
    (words,) = [words for words in commands_in(text) if words[2] == str(folder.parent)]
    assert evaluation.parse(words[2:]).dataset == [
        name for name in stage1.ELEVEN if name not in ("imagenet", "caltech101", "dtd")]
    rows, _ = table(capsys, "4", tmp_path)
    assert rows["imagenet_a", label] == ["50.00", "51.64", "seed 1, 2", "-"]
    assert rows["average", label] == ["50.00", "60.79", "1 of 4 datasets", "-"]


@pytest.mark.parametrize("changed, words", [
    ({"descriptions": "mine-12345678"}, ""), ({"anchor": "model-12345678"}, ""),
    ({}, "--dtype float16")])
def test_runs_of_another_clip_or_text_fill_their_cell_and_it_says_so(
        tmp_path, capsys, changed, words):
    made_up(tmp_path, words, base=70.0, **changed)
    rows, text = table(capsys, "1", tmp_path)
    ((key, value),) = changed.items() or [words[2:].split()]
    assert rows["dtd", "CoOp + AnchorOPT"][-2] == f"seed 1, {key} {value}"


def test_two_runs_that_fit_a_cell_and_damaged_files_are_named_and_refused(tmp_path, capsys):
    folders = [made_up(tmp_path / tree).parent for tree in ("a", "b")]
    refused(capsys, [tmp_path, "--table", "1"], *folders, "CoOp + AnchorOPT", "dtd")
    damaged = folders[0] / "seed1" / "results.json"
    damaged.write_text('{"base": 3}')
    refused(capsys, [tmp_path], damaged)


def test_seeds_of_other_classes_or_test_images_never_meet_in_a_mean(tmp_path, capsys):
    made_up(tmp_path, seed=1, base=70.0)
    file = made_up(tmp_path, seed=2, base=51.0) / "results.json"
    result = json.loads(file.read_text())
    result["facts"]["test images"] = "others"
    file.write_text(json.dumps(result))
    assert run(evaluation, tmp_path) == 0
    out = capsys.readouterr().out
    assert "70.00" in out and "51.00" in out and "60.50" not in out and "±" not in out
    refused(capsys, [tmp_path, "--table", "1"], file.parent.parent, "dtd")


def test_a_listing_is_mean_and_deviation_over_seeds_and_hm_of_the_means(tmp_path, capsys):
    finals = {1: (60.0, 80.0), 2: (70.0, 82.0), 3: (65.0, 90.0)}
    for seed, (base, novel) in finals.items():
        made_up(tmp_path, dataset="toy", seed=seed, base=base, novel=novel, notes=["A NOTE"])
    made_up(tmp_path, "--classes all", "imagenet", base=70.0)
    made_up(tmp_path, "--template plain", "dtd")
    assert run(evaluation, tmp_path) == 0
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in out.splitlines() if line.startswith("| final")]
    hms = [2 * base * novel / (base + novel) for base, novel in finals.values()]
    # sqrt((25 + 25) / 2) and sqrt((16 + 4 + 36) / 2); HM 2 * 65 * 84 / 149 = 73.2886
    assert ["final", "65.00 ± 5.00", "84.00 ± 5.29", f"73.29 ± {statistics.stdev(hms):.2f}"] in rows
    assert ["final", "70.00"] in rows and ["final", "80.00", "60.00", "68.57"] in rows
    assert len(rows) == 3
    assert "toy, coop-anchoropt, seed 1, 2, 3" in out and "| accuracy |" in out
    assert notes_in(out) == ["A NOTE", evaluation.TOY_WARNING]


@pytest.mark.parametrize("options, parts", [
    ([], ["no results.json"]), (["--dataset", "toy"], ["no prompt.pt"]),
    (["--images", "a.jpg"], ["no prompt.pt"])])
def test_folders_without_a_run_end_in_one_line(tmp_path, capsys, options, parts):
    refused(capsys, [tmp_path / "nowhere", *options], *parts)


def test_figure_4_draws_the_learnt_w_of_the_first_seed_of_every_run(tmp_path, capsys, monkeypatch):
    drawn = []

    def draw(panels, path, n_anchor):
        drawn.append((panels, n_anchor))
        pathlib.Path(path).write_text("picture")
    monkeypatch.setattr(evaluation, "plot_position_matrix", draw)
    for seed in (3, 2):
        made_up(tmp_path, "--anchor-length 2", seed=seed)
    made_up(tmp_path, dataset="eurosat")
    plain = made_up(tmp_path, "--template plain", "eurosat")            # has no W
    assert run(evaluation, tmp_path, "--figure", "4", "--output", tmp_path / "w.png") == 0
    assert (tmp_path / "w.png").read_text() == "picture"
    first, second = "dtd, coop-anchoropt, anchor_length=2", "eurosat, coop-anchoropt"
    assert drawn == [({first: [[0, 1], [2, 0]], second: [[0, 1], [1, 0]]}, {first: 2, second: 1})]
    refused(capsys, [plain, "--figure", "4"], "no run with")


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


@pytest.mark.parametrize("names", [None, NEVER_SEEN, [*LEARNT_ON, "ant"], LEARNT_ON[:0:-1]])
def test_a_learnt_prompt_classifies_pictures_with_any_names(pictures, tmp_path, capsys, names):
    options = []
    if names:
        text = "\ufeff" + "\n".join(["", *names, "  "])             # as editors save it
        (tmp_path / "names.txt").write_text(text, encoding="utf-8")
        options = ["--classes-from", tmp_path / "names.txt"]
    names = names or LEARNT_ON
    paths = [str(pictures / name) for name in ("pictures/c.jpg", "pictures/d.jpg",
                                               "pictures/deep/e.jpg", "a.jpg")]
    argv = classify(pictures, *options, "--images", pictures / "pictures", pictures / "a.jpg")
    assert run(evaluation, *argv, "--top", 99, "--csv", tmp_path / "q.csv") == 0
    rows = csv_rows(tmp_path / "q.csv")
    saved = torch.load(argv[0] / "prompt.pt", weights_only=True)
    u = unit(EXACT.encode_image(images_by_clip(paths).double()))
    rule = "normal" if set(names) <= set(LEARNT_ON) else "ensemble"
    expected = logits_by_hand(saved, names, u)[rule].softmax(-1)                        # Eq. 1
    assert f"learnt on all of them: {rule == 'normal'}" in capsys.readouterr().out
    assert [row["image"] for row in rows] == [path for path in paths for _ in names]
    for path, q in zip(paths, expected.tolist()):
        own = [row for row in rows if row["image"] == path]
        assert [row["rank"] for row in own] == [str(i + 1) for i in range(len(names))]
        found = {row["class"]: float(row["probability"]) for row in own}
        assert found == pytest.approx(dict(zip(names, q)), abs=5e-4)
        assert list(found.values()) == sorted(found.values(), reverse=True)


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


def test_the_readmes_snippet_works(pictures, monkeypatch):
    readme = pathlib.Path(evaluation.__file__).with_name("README.md").read_text(encoding="utf-8")
    (snippet,) = [block.split("```")[0] for block in readme.split("import eval as evaluation")[1:]
                  if "load_run(" in block]
    monkeypatch.chdir(pictures)
    found = {}
    exec(f"import eval as evaluation {snippet}", found)
    assert found["q"].shape == (2, len(found["run"].class_names))
    assert torch.allclose(found["q"].sum(1), torch.ones(2))


def test_a_loaded_run_is_ready_for_use_and_turns_pictures_upright(pictures, tmp_path):
    run_ = evaluation.load_run(classify(pictures)[0], device="cpu")
    paths = [str(pictures / f"{name}.jpg") for name in ("a", "b", "pictures/c")]
    first = run_.probabilities(paths)
    assert torch.equal(first, run_.probabilities(paths)) and not first.requires_grad
    assert torch.allclose(first, run_.probabilities(paths, batch_size=2), atol=1e-4)
    upright = data.load_image(paths[0])
    exif = upright.getexif()
    exif[274] = 6                                       # turn it by 90 degrees, says the camera
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    turned = run_.probabilities([tmp_path / "turned.png"])
    assert torch.allclose(turned, first[:1], atol=1e-4)
    # The unit features of normal and anchor prompts: Eq. 1's logits by hand.
    saved = torch.load(classify(pictures)[0] / "prompt.pt", weights_only=True)
    u = unit(some_features(9)[0].double())
    for f, logits in zip(run_.text_features(), logits_by_hand(saved, LEARNT_ON, u).values()):
        assert relative(100 * u @ f.double().T, logits) < 1e-3 and not f.requires_grad
    # Names are read as folders' are; those that were learnt on are known as they are.
    assert run_.set_classes(["3. gear", "lemon"]).known
    assert not run_.set_classes(["001.Black_footed_Albatross", "lemon"]).known
    assert run_.class_names == ["Black footed Albatross", "lemon"]


def test_pictures_classes_and_runs_that_cannot_be_read_end_in_one_line(pictures, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "nothing").mkdir()
    picture = pictures / "a.jpg"
    for options, part in (
            (["--images", picture, "--classes-from", tmp_path / "empty.txt"], "empty.txt"),
            (["--images", tmp_path / "nothing"], tmp_path / "nothing"),
            (["--images", picture, "--csv", picture / "x.csv"], picture),
            (["--images", picture, "--clip", "ViT-B/32"], "ViT-B/16")):
        refused(capsys, classify(pictures, *options), part)
    for seed in (1, 2):
        save_prompt(tmp_path / "runs" / f"seed{seed}", LEARNT_ON, seed)
    refused(capsys, [tmp_path / "runs", "--images", picture], "2 runs", tmp_path / "runs" / "seed1")
