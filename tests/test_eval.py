"""eval.py: the inference rule, learnt prompts on other datasets and pictures, tables."""

import csv
import glob
import io
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import data
import eval as evaluation
import prompts
import stage1
import stage2
import worlds
from anchor import anchor_features
from reference import NAMES, TOKENIZER, encode_77, relative, tiny_clip, unit

MODEL = tiny_clip()
LOAD_DATASET = data.load_dataset


def run(script, *argv):
    return script.main([str(word) for word in argv])


def refused(capsys, script, argv, *parts):
    """The script ends with exit code 2 and one clear line that holds these parts."""
    capsys.readouterr()
    assert run(script, *argv) == 2
    return worlds.one_line(capsys.readouterr().err, *parts)


def parser_refuses(capsys, argv, *parts):
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_code:
        run(evaluation, *argv)
    assert exit_code.value.code == 2
    return worlds.one_line(capsys.readouterr().err, *parts)


# ---------------------------------------------------------------------------- accuracy and readings

def test_accuracy_and_harmonic_mean_by_hand():
    logits = torch.tensor([[2.0, 1, 0], [0, 3, 1], [5, 4, 6], [1, 0, 0]])
    assert evaluation.accuracy(logits, torch.tensor([0, 1, 0, 0])) == 75.0
    with pytest.raises(ValueError, match="no images"):
        evaluation.accuracy(torch.zeros(0, 3), torch.zeros(0))
    assert evaluation.harmonic_mean(60, 40) == 48.0
    assert evaluation.harmonic_mean(0, 0) == 0.0 and evaluation.harmonic_mean(50, 0) == 0.0


def tiny_learner(baseline="coop", **changed):
    torch.manual_seed(1)
    settings = {"baseline": baseline, "template": "anchoropt", "soft_tokens": 3,
                "arrangement": "adaptive", "tau": 1.0, "test_position": "argmax",
                "feature_at": "eot",
                "preposition": "of", "depth": 2, "w_cat": 0.7} | changed
    settings |= dict.fromkeys(stage1.CLIP_SETTINGS, "default")
    anchor_tokens = 0.5 * torch.randn(2, 128)
    learner = prompts.build_learner(settings, MODEL, NAMES, anchor_tokens)
    learner.template.soft_tokens.data.mul_(50)      # so that no two readings agree by accident
    return learner, settings, anchor_tokens


def tiny_features(n=400):
    torch.manual_seed(2)
    return torch.randn(n, 64), torch.randint(0, len(NAMES), (n,))


def batches(f, y, size):
    return [(f_part, None, y_part) for f_part, y_part in zip(f.split(size), y.split(size))]


@pytest.mark.parametrize("known", [True, False])
def test_the_four_readings_are_those_of_a_plain_loop(known):
    learner, settings, tokens = tiny_learner()
    features, labels = tiny_features()
    f_anc = evaluation.anchor_prompts(learner, settings)
    found = evaluation.evaluate(learner, batches(features, labels, 400), f_anc, known)

    W = torch.eye(5)[learner.template.position_matrix.logits.argmax(-1)]
    normal_context = W @ torch.cat([learner.template.soft_tokens.detach(), tokens])
    of = MODEL.token_embedding.weight[TOKENIZER.encode("of")]
    normal = unit(encode_77(MODEL, normal_context, NAMES))
    anchor = unit(encode_77(MODEL, torch.cat([tokens, of]), NAMES))
    right = dict.fromkeys(("anchor", "normal", "ensemble"), 0)
    for x, y in zip(features, labels):
        l_norm, l_anc = (MODEL.logit_scale.exp() * v @ (x / x.norm()) for v in (normal, anchor))
        logits = {"normal": l_norm, "anchor": l_anc, "ensemble": (l_norm + l_anc) / 2}
        for reading in right:
            right[reading] += int(logits[reading].argmax() == y)
    assert len(set(right.values())) == 3
    expected = {reading: 100 * count / len(labels) for reading, count in right.items()}
    expected["final"] = expected["normal" if known else "ensemble"]
    assert found == pytest.approx(expected)


def test_without_an_anchor_final_is_the_normal_prompt_and_no_images_are_an_error():
    learner, _, _ = tiny_learner()
    features, labels = tiny_features()
    found = evaluation.evaluate(learner, batches(features, labels, 100), known=False)
    assert set(found) == {"normal", "final"} and found["final"] == found["normal"]
    for nothing in ([], batches(features[:0], labels[:0], 1)):
        with pytest.raises(ValueError, match="no images"):
            evaluation.evaluate(learner, nothing)


def test_an_evaluation_in_batches_equals_one_batch_and_training_mode_comes_back():
    learner, settings, _ = tiny_learner("cocoop")
    features, labels = tiny_features(23)
    f_anc = evaluation.anchor_prompts(learner, settings)
    learner.train()
    found = [evaluation.evaluate(learner, batches(features, labels, size), f_anc, False)
             for size in (23, 7, 1)]
    assert found[0] == found[1] == found[2] and learner.training


def args_of(*options):
    return evaluation.parse(["RUN", "--dataset", "dtd", "--device", "cpu", *map(str, options)])


@pytest.fixture(scope="module")
def few_images(tmp_path_factory):
    """Ten classes' 20 test images."""
    root = tmp_path_factory.mktemp("few")
    worlds.eurosat_tree(root, per_class=5)
    return data.load_dataset("eurosat", root).test


def crops_of(items, resolution=32):
    """Test crops (n, 3, R, R), not yet normalised."""
    transform = data.test_transform(resolution)
    return torch.stack([transform(data.load_image(item.source)) for item in items])


@pytest.mark.parametrize("baseline, test_position, sizes", [
    ("coop", "argmax", [20]), ("coop", "sample", [7, 7, 6]), ("cocoop", "argmax", [7, 7, 6]),
    ("maple", "argmax", [7, 7, 6]), ("dept", "argmax", [20])])
def test_batches_of_test_images_are_cut_only_where_something_depends_on_them(
        few_images, baseline, test_position, sizes):
    learner, settings, _ = tiny_learner(baseline, test_position=test_position)
    f_anc = evaluation.anchor_prompts(learner, settings)
    found = list(evaluation.test_batches(learner, settings, few_images, f_anc,
                                         args_of("--test-batch", 7)))
    assert [len(y) for _, _, y in found] == sizes
    images = crops_of(few_images)
    expected = MODEL.encode_image(data.normalize(images))
    assert relative(torch.cat([f for f, _, _ in found]), expected) < 1e-5
    assert torch.cat([y for _, _, y in found]).tolist() == [item.label for item in few_images]
    if baseline == "maple":
        assert torch.equal(torch.cat([x for _, x, _ in found]), data.normalize(images))
    else:
        assert all(x is None for _, x, _ in found)


@pytest.mark.parametrize("baseline, size", [("cocoop", 100), ("maple", 200)])
def test_a_test_batch_is_100_images_and_maples_200(baseline, size):
    learner, _, _ = tiny_learner(baseline)
    assert evaluation.test_batch_size(learner, 1000, None) == size


def test_a_sampled_position_matrix_is_drawn_anew_for_each_batch():
    for test_position, samples in (("argmax", 1), ("sample", 4)):
        learner, _, _ = tiny_learner(test_position=test_position)
        features, labels = tiny_features(23)
        drawn = []
        W = learner.template.position_matrix
        W.register_forward_hook(lambda module, inputs, output: drawn.append(output))    # noqa: B023
        evaluation.evaluate(learner, batches(features, labels, 7))
        assert len(drawn) == 4
        assert len({str(W.tolist()) for W in drawn}) == samples


def test_maple_without_an_anchor_encodes_no_image_twice(few_images, monkeypatch):
    learner, settings, _ = tiny_learner("maple", template="plain")
    frozen = []
    monkeypatch.setattr(evaluation, "frozen_features", lambda *given: frozen.append(given))
    found = evaluation.evaluate_items(learner, settings, few_images, True, args_of())
    images = crops_of(few_images)
    labels = torch.tensor([item.label for item in few_images])
    expected = evaluation.evaluate(learner, [(None, data.normalize(images), labels)])
    assert found == expected and not frozen


def test_features_are_kept_between_runs_and_never_stale(tmp_path, monkeypatch):
    worlds.dtd_tree(tmp_path / "data", per_class=4)
    items = tuple(data.load_dataset("dtd", tmp_path / "data").test)
    encoded, encode = [], evaluation.encode_image
    monkeypatch.setattr(evaluation, "encode_image",
                        lambda *given: encoded.append(1) or encode(*given))

    def features(model=MODEL, cache=tmp_path / "cache", name="a"):
        evaluation.frozen_features.cache_clear()
        encoded.clear()
        own = dict.fromkeys(stage1.CLIP_SETTINGS, "default") | {"clip": name}
        return evaluation.frozen_features(model, tuple(own.items()), items, cache, 0), len(encoded)

    plain, times = features(cache=None)
    assert times == 1
    first, times = features()
    assert times == 1 and torch.equal(plain, first)
    again, times = features()
    assert times == 0 and torch.equal(plain, again)
    (file,) = (tmp_path / "cache").iterdir()
    other, times = features(tiny_clip(seed=1), name="b")                    # another CLIP
    assert times == 1 and not torch.equal(plain, other)
    file.write_bytes(file.read_bytes()[:100])                               # damaged
    again, times = features()
    assert times == 1 and torch.equal(plain, again)
    os.utime(items[0].source, (1, 1))                                       # a changed image
    assert features()[1] == 1


# ---------------------------------------------------------------------------- the paper's figures

def paper():
    with open(evaluation.PAPER_FILE, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def hm_that_do_not_follow(table):
    """(dataset, method, printed HM, computed HM) where the printed HM is more than 0.02 off."""
    found = []
    for row in paper():
        if row["table"] == table:
            computed = evaluation.harmonic_mean(float(row["base"]), float(row["novel"]))
            if abs(computed - float(row["hm"])) > 0.02 + 1e-9:
                found.append((row["dataset"], row["method"], row["hm"], f"{computed:.2f}"))
                assert row["hm"] in row["note"] and f"{computed:.2f}" in row["note"]
    return found


def test_every_hm_of_table_1_follows_from_base_and_novel_but_one():
    assert sum(row["table"] == "1" for row in paper()) == 17 * 12
    assert hm_that_do_not_follow("1") == [("stanford_cars", "CoOp + AnchorOPT", "75.67", "75.56")]


def test_the_hm_of_the_other_tables_follow_but_four():
    assert hm_that_do_not_follow("S1") == [
        ("average", "AnchorOPT-Anchor Prompts", "73.91", "74.22"),
        ("caltech101", "AnchorOPT-Anchor Prompts", "96.53", "96.66"),
        ("stanford_cars", "AnchorOPT-Final", "75.67", "75.56"),
        ("oxford_flowers", "AnchorOPT-Ensemble", "84.94", "83.20")]
    for table in ("3", "5", "6", "7", "8", "9", "S2", "S3"):
        assert hm_that_do_not_follow(table) == []


def test_averages_of_the_paper_are_means_over_its_datasets_but_two():
    off = []
    for table in ("1", "2", "4", "S1"):
        rows = [row for row in paper() if row["table"] == table]
        for average in [row for row in rows if row["dataset"] == "average"]:
            for measure in ("base", "novel", "accuracy"):
                left_out = ["average"]
                if measure == "accuracy":                   # Tables 2 and 4: over the targets
                    left_out.append("imagenet")
                values = [float(row[measure]) for row in rows
                          if row["method"] == average["method"] and row[measure]
                          and row["dataset"] not in left_out]
                if values and abs(sum(values) / len(values) - float(average[measure])) > 0.0101:
                    off.append((table, average["method"], measure, average[measure]))
                    assert average[measure] in average["note"]
    assert off == [("1", "CoCoOp + AnchorOPT", "base", "81.87"),
                   ("S1", "AnchorOPT-Anchor Prompts", "base", "71.69")]


def test_figures_that_the_paper_prints_twice_agree():
    rows = {(row["table"], row["dataset"], row["method"]): (row["base"], row["novel"], row["hm"])
            for row in paper()}
    for dataset in ("average", *stage1.ELEVEN):
        assert rows["S1", dataset, "AnchorOPT-Final"] == rows["1", dataset, "CoOp + AnchorOPT"]
        assert rows["S1", dataset, "CoOp"] == rows["1", dataset, "CoOp"]
        assert rows["S1", dataset, "ATPrompt"] == rows["1", dataset, "CoOp + ATPrompt"]
    assert rows["3", "average", "One-stage"] == rows["S1", "average", "AnchorOPT-One Stage"]
    assert (rows["5", "average", "AnchorOPT w/o Ensemble"]
            == rows["S1", "average", "AnchorOPT-Normal Prompts"])
    ours = rows["1", "imagenet", "CoOp + AnchorOPT"]
    assert ours == ("76.30", "71.56", "73.85")
    for table, label in (("9", "with KD"), ("6", "of"), ("8", "Position Matrix"), ("S3", "tau = 1"),
                         ("S2", "of")):
        assert rows[table, "imagenet", label] == ours


def test_every_label_of_a_table_is_one_of_the_paper_for_every_dataset_of_it():
    beyond = {"CoCoOp + ATPrompt", "CoCoOp + AnchorOPT", "MaPLe + ATPrompt", "MaPLe + AnchorOPT"}
    for number, paper_table in evaluation.TABLES.items():
        printed = evaluation.load_paper(number)
        labels = {row.label for row in paper_table.rows} - {label for _, label in printed}
        assert labels == (beyond if number in ("2", "4") else set())
        assert {dataset for dataset, _ in printed} == set(paper_table.blocks)


# ---------------------------------------------------------------------------- made-up runs

def made_up(output, dataset, row=evaluation.METHODS[2], seed=1, base=80.0, novel=60.0, notes=(),
            **changed):
    """A results.json as stage2.py writes it.

    base, novel: of the final reading; ensemble, normal, anchor are 1, 2, 3 below. notes: why the
    run does not compare.
    """
    return write_result(output, row.settings(dataset) | changed, seed, base, novel, notes)


def write_result(output, settings, seed, base, novel, notes=()):
    folder = stage1.run_folder(output, settings, seed)
    readings, W = ("normal", "final"), None
    if settings["template"] == "anchoropt":
        readings, W = evaluation.READINGS, {"start": [[1, 0], [1, 0]], "end": [[1, 0], [0, 1]]}
    sides = {}
    for side, value in (("base", base), ("novel", novel)):
        sides[side] = {reading: value - BELOW_FINAL[reading] for reading in readings}
    if settings["classes"] == "all":
        sides["novel"] = None
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({
        **{key: settings[key] for key in ("dataset", "baseline", "template", "clip")},
        "seed": seed, "settings": settings, **sides, "position_matrix": W, "facts": {},
        "notes": list(notes), "comparable": not notes}))
    return folder


BELOW_FINAL = {"final": 0, "ensemble": 1, "normal": 2, "anchor": 3}


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


def commands_in(text):
    return [line for line in text.splitlines() if line.startswith("python ")]


def notes_in(text):
    return [line[2:] for line in text.splitlines() if line.startswith("- ")]


def table(capsys, number, *argv):
    """What `eval.py --table` prints: its rows, and all its text."""
    capsys.readouterr()
    assert run(evaluation, *argv, "--table", number) == 0
    text = capsys.readouterr().out
    return printed_rows(text), text


def test_table_1_of_made_up_runs_is_a_hand_computation(tmp_path, capsys):
    output = tmp_path / "output"
    coop, ours = evaluation.METHODS[0], evaluation.METHODS[2]
    for seed, base, novel in ((1, 76.0, 68.0), (2, 77.0, 70.0), (3, 78.0, 66.0)):
        made_up(output, "imagenet", coop, seed, base, novel)
    made_up(output, "dtd", coop, 1, 80.0, 40.0)
    made_up(output, "stanford_cars", ours, 2, 76.73, 74.43)
    made_up(output, "imagenet", ours, 1, 99.0, 99.0, epochs=1)              # belongs in no cell
    made_up(output, "imagenet", evaluation.Row("", changed={"classes": "all"}), 1, 98.0)
    rows, text = table(capsys, "1", output)
    # means 77 and 68, HM 2 * 77 * 68 / 145 = 72.2207; the paper has 76.47, 67.88, 71.92
    assert rows["imagenet", "CoOp"] == ["77.00", "76.47", "+0.53", "68.00", "67.88", "+0.12",
                                        "72.22", "71.92", "+0.30", "seeds 1, 2, 3"]
    assert rows["dtd", "CoOp"] == ["80.00", "79.44", "+0.56", "40.00", "41.18", "-1.18",
                                   "53.33", "54.24", "-0.91", "seed 1"]
    # (77 + 80) / 2 and (68 + 40) / 2: HM 2 * 78.5 * 54 / 132.5 = 63.9849; two are not the eleven
    assert rows["average", "CoOp"] == ["78.50", "82.69", "-", "54.00", "63.22", "-",
                                       "63.98", "71.66", "-", "2 of 11 datasets"]
    assert rows["stanford_cars", "CoOp + AnchorOPT"][6:9] == ["75.56", "75.67", "-0.11"]
    assert rows["imagenet", "CoOp + AnchorOPT"] == ["-", "76.30", "-", "-", "71.56", "-",
                                                    "-", "73.85", "-", "none yet"]
    assert rows["imagenet", "PromptSRC"] == ["-", "77.60", "-", "-", "70.73", "-",
                                             "-", "74.01", "-", "paper only"]
    assert len(rows) == 17 * 12 and "toy" not in text
    assert ("printed HM 75.67; its base and novel give 75.56 (the paper's CoOp + AnchorOPT, "
            "stanford_cars)") in notes_in(text)
    assert len(commands_in(text)) == 12 * 11 - 3
    assert ("python stage2.py --dataset dtd --baseline cocoop --template atprompt --seeds 1 2 3 "
            f"--root $DATA --output {os.path.relpath(output)}") in commands_in(text)


def test_an_average_over_all_datasets_compares_with_the_papers(tmp_path, capsys):
    for i, dataset in enumerate(stage1.ELEVEN):
        made_up(tmp_path, dataset, evaluation.METHODS[0], 1, 70.0 + i, 60.0 + i)
    rows, _ = table(capsys, "1", tmp_path)
    assert rows["average", "CoOp"] == ["75.00", "82.69", "-7.69", "65.00", "63.22", "+1.78",
                                       # HM: 2 * 75 * 65 / 140
                                       "69.64", "71.66", "-2.02", "11 of 11 datasets"]


def test_table_1_has_a_toy_block_where_toy_runs_are_and_the_warning(tmp_path, capsys):
    made_up(tmp_path, "toy", evaluation.METHODS[5], 1, 60.0, 40.0)
    rows, text = table(capsys, "1", tmp_path)
    assert rows["toy", "CoCoOp + AnchorOPT"] == ["60.00", "-", "-", "40.00", "-", "-",
                                                 "48.00", "-", "-", "seed 1"]
    assert evaluation.TOY_WARNING in text
    assert rows["average", "CoCoOp + AnchorOPT"][-1] == "none yet"
    rows, text = table(capsys, "1", tmp_path, "--on", "toy")
    assert len(rows) == 12 and len(commands_in(text)) == 11 and evaluation.TOY_WARNING in text
    assert evaluation.TOY_WARNING not in table(capsys, "9", tmp_path, "--on", "toy")[1]


# What the paper's tables are about: label -> (options of stage2.py, the prompt that is shown).
COOP = "--baseline coop --template plain"
ATPROMPT = "--baseline coop --template atprompt"
OURS = "--baseline coop --template anchoropt"
SUFFIXES = {"": "plain", " + ATPrompt": "atprompt", " + AnchorOPT": "anchoropt"}
OF = {"of": (OURS, "final")}
OF |= {word: (f"{OURS} --preposition {word}", "final") for word in ("with", "at", "sun", "sea")}
LENGTHS = {1: OURS} | {n: f"{OURS} --anchor-length {n}" for n in (2, 3, 4)}
MEANT = {
    "1": {f"{name}{suffix}": (f"--baseline {name.lower()} --template {template}", "final")
          for name in ("CoOp", "CoCoOp", "MaPLe", "DePT") for suffix, template in SUFFIXES.items()},
    "3": {"One-stage": (OURS + " --one-stage", "final"), "Two-stage": (OURS, "final")},
    "5": {"ATPrompt": (ATPROMPT, "final"), "AnchorOPT w/o Ensemble": (OURS, "normal")},
    "6": OF,
    "7": {f"{reading} prompt, N = {n}": (options, reading)
          for reading in ("anchor", "normal") for n, options in LENGTHS.items()},
    "8": {"Position Matrix": (OURS, "final"),
          "Before Soft Token": (OURS + " --arrangement before", "final"),
          "Middle": (OURS + " --arrangement middle", "final"),
          "After Class Token": (OURS + " --arrangement after-class", "final")},
    "9": {"without KD": (OURS + " --lambda-2 0", "final"), "with KD": (OURS, "final")},
    "S1": {"CoOp": (COOP, "final"), "ATPrompt": (ATPROMPT, "final"),
           "AnchorOPT-One Stage": (OURS + " --one-stage", "final"),
           "AnchorOPT-Anchor Prompts": (OURS, "anchor"),
           "AnchorOPT-Normal Prompts": (OURS, "normal"),
           "AnchorOPT-Ensemble": (OURS, "ensemble"), "AnchorOPT-Final": (OURS, "final")},
    "S2": OF | {"none": (OURS + " --preposition none", "final")},
    "S3": {"tau = 1": (OURS, "final")}
          | {f"tau = {tau}": (f"{OURS} --tau {tau}", "final") for tau in ("0.1", "0.5", "2", "4")}}


def settings_of(words):
    """The settings that stage2.py runs with, given these words of a command."""
    args = stage2.parse(words)
    return stage1.resolve(args, stage1.default_settings(args.dataset, args.baseline, args.template,
                                                        args.classes, args.one_stage))


@pytest.mark.parametrize("number", MEANT)
@pytest.mark.parametrize("on", ["paper", "toy"])
def test_each_table_takes_the_runs_and_the_prompt_that_the_paper_means(
        tmp_path, capsys, number, on):
    """Every run gets accuracies of its own: a row of another run, or another prompt, would show."""
    paper_table, values, runs = evaluation.TABLES[number], {}, {}
    datasets, blocks, options_on = paper_table.datasets, paper_table.blocks, []
    if on == "toy":
        datasets, blocks, options_on = ("toy",), ("toy",), ["--on", "toy"]
    for dataset in datasets:
        for label, (options, reading) in MEANT[number].items():
            if (dataset, options) not in runs:
                base = runs[dataset, options] = 20.0 + 0.25 * len(runs)
                words = f"--dataset {dataset} {options}".split()
                write_result(tmp_path, settings_of(words), 1, base, base / 2)
            base = runs[dataset, options]
            values[dataset, label] = (base - BELOW_FINAL[reading], base / 2 - BELOW_FINAL[reading])
    rows, text = table(capsys, number, tmp_path, *options_on)
    assert commands_in(text) == [] and "left out" not in text
    for label in MEANT[number]:
        for block in blocks:
            members = datasets if block == "average" else (block,)
            base, novel = np.mean([values[dataset, label] for dataset in members], axis=0)
            cells = rows.pop((block, label))
            shown = [float(cell) for cell in cells[0:9:3]]
            hm = 2 * base * novel / (base + novel)
            assert shown == pytest.approx([base, novel, hm], abs=0.00501)
            theirs = evaluation.load_paper(number).get((block, label), {})
            assert cells[1:9:3] == [theirs.get(measure, "-") for measure in ("base", "novel", "hm")]
    assert all(cells[-1] == "paper only" for cells in rows.values())


@pytest.mark.parametrize("number", MEANT)
def test_the_commands_for_empty_cells_are_short_and_those_that_the_paper_means(
        tmp_path, capsys, number):
    _, text = table(capsys, number, tmp_path, "--on", "toy")
    wanted = {f"python stage2.py --dataset toy {options} --seeds 1 2 3 --output {tmp_path}"
              for options, _ in MEANT[number].values()}
    commands = commands_in(text)
    assert len(commands) == len(wanted) and set(commands) == wanted


@pytest.mark.parametrize("number", list(evaluation.TABLES))
@pytest.mark.parametrize("on", ["paper", "dtd", "toy"])
def test_every_command_for_an_empty_cell_parses_and_makes_the_run_of_that_cell(
        tmp_path, capsys, number, on):
    paper_table = evaluation.TABLES[number]
    if on != "paper" and paper_table.source:
        refused(capsys, evaluation, [tmp_path, "--table", number, "--on", on], "runs on imagenet")
        return
    options_on = [] if on == "paper" else ["--on", on]
    _, text = table(capsys, number, tmp_path, *options_on)
    made, targets = [], {}
    for command in commands_in(text):
        words = shlex.split(command)
        if words[1] == "eval.py":
            args = evaluation.parse(words[2:])
            targets[args.paths[0]] = args.dataset
            continue
        args = stage2.parse(words[2:])
        assert args.seeds == [1, 2, 3] and args.output == str(tmp_path)
        assert args.root == (None if on == "toy" else "$DATA")
        assert os.path.isfile(data.default_descriptions(args.dataset))      # so none need be given
        made.append(settings_of(words[2:]))
    datasets = paper_table.datasets if on == "paper" else (on,)
    if paper_table.source:
        datasets = ("imagenet",)
    wanted = []
    for row in paper_table.rows:
        for dataset in datasets:
            if row.settings(dataset) not in wanted:
                wanted.append(row.settings(dataset))
    assert len(made) == len(wanted) and all(settings in made for settings in wanted)
    if paper_table.source:
        assert list(targets.values()) == [list(paper_table.datasets[1:])] * len(paper_table.rows)
        folders = [stage1.run_folder(tmp_path, settings, 1).parent for settings in wanted]
        assert list(targets) == [f"{folder}*" for folder in folders]


def transfer(folder, target, final, notes=()):
    """An eval-*.json as `evaluate_run` writes it."""
    settings = json.loads((folder / "results.json").read_text())["settings"]
    accuracy = {reading: final - BELOW_FINAL[reading] for reading in evaluation.READINGS}
    (folder / f"eval-{target}.json").write_text(json.dumps(
        {"dataset": "imagenet", "target": target, "seed": int(folder.name[4:]),
         "settings": settings,
         "run": folder.parent.name, "classes": 10, "images": 20, "facts": {}, "accuracy": accuracy,
         "prompt": "0" * 8, "notes": list(notes), "comparable": not notes}))


def test_tables_2_and_4_read_what_runs_on_imagenet_left(tmp_path, capsys):
    row = evaluation.TRANSFER[2]
    assert row.label == "CoOp + AnchorOPT"
    for seed in (1, 2):
        folder = made_up(tmp_path, "imagenet", row, seed, 70.0 + seed)
        transfer(folder, "caltech101", 90.0 + seed)
        transfer(folder, "imagenet_a", 50.0)
        if seed == 1:
            transfer(folder, "dtd", 40.0)
            transfer(folder, "birds", 1.0)                          # a dataset of one's own
    base_run = made_up(tmp_path, "imagenet")                # base classes: not of these tables
    transfer(base_run, "caltech101", 1.0)
    rows, text = table(capsys, "2", tmp_path)
    assert rows["imagenet", row.label] == ["71.50", "71.33", "+0.17", "seeds 1, 2"]
    assert rows["caltech101", row.label] == ["91.50", "94.65", "-3.15", "seeds 1, 2"]
    assert rows["dtd", row.label] == ["40.00", "46.93", "-6.93", "seed 1"]
    assert rows["average", row.label] == ["65.75", "66.93", "-", "2 of 10 datasets"]
    assert rows["average", "TCP"] == ["-", "66.29", "-", "paper only"]
    assert "birds" not in text
    (command,) = [line for line in commands_in(text)
                  if "eval.py" in line and str(folder.parent) + " " in line]
    assert command == (f"python eval.py {folder.parent} --dataset oxford_pets stanford_cars "
                       "oxford_flowers food101 fgvc_aircraft sun397 eurosat ucf101 --root $DATA")
    rows, _ = table(capsys, "4", tmp_path)
    assert rows["imagenet_a", row.label] == ["50.00", "51.64", "-1.64", "seeds 1, 2"]
    assert rows["average", row.label] == ["50.00", "60.79", "-", "1 of 4 datasets"]


@pytest.mark.parametrize("number", ["2", "4"])
def test_rows_of_tables_2_and_4_without_a_source_say_so(tmp_path, capsys, number):
    _, text = table(capsys, number, tmp_path)
    (note,) = [note for note in notes_in(text) if "no source" in note]
    assert note.endswith("(CoCoOp + AnchorOPT; MaPLe + AnchorOPT)")


def test_runs_with_another_clip_or_descriptions_count_and_are_named_never_mixed(tmp_path, capsys):
    mine, other = {"descriptions": "mine-12345678"}, {"clip": "other-87654321"}
    made_up(tmp_path, "dtd", base=70.0, novel=50.0, **mine)
    made_up(tmp_path, "dtd", seed=1, **mine, **other)
    made_up(tmp_path, "dtd", seed=2, **mine, **other)
    rows, text = table(capsys, "1", tmp_path)
    assert rows["dtd", "CoOp + AnchorOPT"][0] == "70.00"
    assert rows["dtd", "CoOp + AnchorOPT"][-1] == "seed 1"
    assert "run with descriptions mine-12345678 (CoOp + AnchorOPT, dtd)" in notes_in(text)
    (left_out,) = [note for note in notes_in(text) if "left out" in note]
    assert "clip other-87654321" in left_out and "is shown" in left_out


def test_of_two_copies_of_a_run_the_table_takes_the_one_that_compares(tmp_path, capsys):
    for seed in (1, 2):
        made_up(tmp_path / "own", "dtd", seed=seed, base=10.0, notes=["dtd: OWN SPLIT"])
    made_up(tmp_path / "proper", "dtd", base=70.0)
    rows, text = table(capsys, "1", tmp_path)
    assert rows["dtd", "CoOp + AnchorOPT"][:3] == ["70.00", "74.04", "-4.04"]
    assert "OWN SPLIT" not in text


def test_runs_with_an_anchor_from_a_file_fill_their_cell_and_say_so(tmp_path, capsys):
    made_up(tmp_path, "dtd", base=70.0, anchor="model-12345678")
    rows, text = table(capsys, "1", tmp_path)
    assert rows["dtd", "CoOp + AnchorOPT"][0] == "70.00"
    assert "run with anchor model-12345678 (CoOp + AnchorOPT, dtd)" in notes_in(text)


def test_a_copy_of_a_seed_beside_it_counts_for_nobody(tmp_path, capsys):
    folder = made_up(tmp_path, "dtd")
    shutil.copytree(folder, folder.with_name("seed1.bak"))
    refused(capsys, evaluation, [tmp_path], "are both seed 1 of one run: move one")


def test_one_run_named_in_two_ways_stays_one(tmp_path, capsys, monkeypatch):
    made_up(tmp_path / "output", "dtd")
    folder = made_up(tmp_path / "output", "dtd", seed=2)
    monkeypatch.chdir(tmp_path)
    assert run(evaluation, "output", folder) == 0
    assert "seeds 1, 2" in capsys.readouterr().out
    rows, text = table(capsys, "1", "output", folder)
    assert rows["dtd", "CoOp + AnchorOPT"][-1] == "seeds 1, 2" and "left out" not in text


def test_the_same_run_in_two_trees_is_left_out_without_empty_brackets(tmp_path, capsys):
    for tree in ("a", "b"):
        made_up(tmp_path / tree, "dtd")
    _, text = table(capsys, "1", tmp_path / "a", tmp_path / "b")
    (note,) = [note for note in notes_in(text) if "left out" in note]
    assert "()" not in note


def test_a_result_whose_novel_side_has_gone_is_named(tmp_path, capsys):
    path = made_up(tmp_path, "dtd") / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"novel": None}))
    refused(capsys, evaluation, [tmp_path, "--table", "1"], "is not a results.json of stage2.py")


# ---------------------------------------------------------------------------- notes travel

def differences(rows, block, label):
    return rows[block, label][2:-1:3]


def test_what_does_not_compare_has_no_difference_and_its_note_is_in_every_listing(tmp_path, capsys):
    """Issue 10, section 3: an own split never stands beside the paper's figure, unsaid."""
    made_up(tmp_path, "eurosat", notes=["eurosat: OWN SPLIT"])
    made_up(tmp_path, "dtd")
    rows, text = table(capsys, "1", tmp_path)
    assert differences(rows, "eurosat", "CoOp + AnchorOPT") == ["-", "-", "-"]
    assert rows["eurosat", "CoOp + AnchorOPT"][:2] == ["80.00", "83.75"]
    assert all(cell[0] in "+-" and len(cell) > 1
               for cell in differences(rows, "dtd", "CoOp + AnchorOPT"))
    assert "eurosat: OWN SPLIT (CoOp + AnchorOPT, eurosat)" in notes_in(text)
    for options in ([], ["--summary", "final"]):
        assert run(evaluation, tmp_path, *options) == 0
        assert notes_in(capsys.readouterr().out) == ["eurosat: OWN SPLIT (eurosat, coop-anchoropt)"]


def test_one_run_that_does_not_compare_takes_the_difference_from_the_average(tmp_path, capsys):
    for dataset in stage1.ELEVEN:
        notes = ["OWN SPLIT"] if dataset == "dtd" else []
        made_up(tmp_path, dataset, evaluation.METHODS[0], notes=notes)
    rows, _ = table(capsys, "1", tmp_path)
    assert rows["average", "CoOp"][-1] == "11 of 11 datasets"
    assert differences(rows, "average", "CoOp") == ["-", "-", "-"]


def test_a_run_with_another_clip_than_the_papers_has_no_difference(tmp_path, capsys):
    made_up(tmp_path, "dtd", clip="ViT-B/32")
    rows, text = table(capsys, "1", tmp_path)
    assert rows["dtd", "CoOp + AnchorOPT"][0] == "80.00"
    assert differences(rows, "dtd", "CoOp + AnchorOPT") == ["-", "-", "-"]
    assert "run with clip ViT-B/32 (CoOp + AnchorOPT, dtd)" in notes_in(text)


@pytest.mark.parametrize("where", ["source", "target"])
def test_tables_2_and_4_do_not_compare_what_was_learnt_or_tested_on_other_data(
        tmp_path, capsys, where):
    row, note = evaluation.TRANSFER[2], ["10 classes found, the full dataset has 1000"]
    folder = made_up(tmp_path, "imagenet", row, notes=note if where == "source" else ())
    transfer(folder, "dtd", 40.0, note if where == "target" else ())
    transfer(folder, "ucf101", 70.0)
    rows, text = table(capsys, "2", tmp_path)
    assert differences(rows, "dtd", row.label) == ["-"]
    expected = {"source": (["-"], ["-"]), "target": (["+8.67"], ["+0.40"])}[where]
    assert (differences(rows, "imagenet", row.label),
            differences(rows, "ucf101", row.label)) == expected
    assert any(found.startswith(note[0]) and row.label in found for found in notes_in(text))


def test_a_note_of_many_runs_is_printed_once(tmp_path, capsys):
    for dataset in ("dtd", "eurosat", "food101", "sun397", "ucf101"):
        for seed in (1, 2):
            made_up(tmp_path, dataset, seed=seed, notes=["a CLIP of your own"])
    assert run(evaluation, tmp_path) == 0
    (note,) = notes_in(capsys.readouterr().out)
    assert note == ("a CLIP of your own (dtd, coop-anchoropt; eurosat, coop-anchoropt; "
                    "food101, coop-anchoropt; and 2 more)")


@pytest.mark.parametrize("notes", [[], ["an OWN SPLIT"]])
def test_results_from_before_notes_and_facts_were_kept_still_list(tmp_path, capsys, notes):
    path = made_up(tmp_path, "dtd") / "results.json"
    result = json.loads(path.read_text())
    for key in ("comparable", "facts", "notes"):
        del result[key]
    if notes:                                               # older ones have notes, yet no verdict
        result["notes"] = notes
    path.write_text(json.dumps(result))
    for options in ([], ["--summary", "final"]):
        assert run(evaluation, tmp_path, *options) == 0
        out = capsys.readouterr().out
        assert "80.00" in out and ("OWN SPLIT" in out) == bool(notes)
    rows, _ = table(capsys, "1", tmp_path)
    assert rows["dtd", "CoOp + AnchorOPT"][0] == "80.00"
    assert (differences(rows, "dtd", "CoOp + AnchorOPT") == ["-", "-", "-"]) == bool(notes)


def test_a_dataset_of_ones_own_is_listed_and_never_in_a_table_of_the_paper(tmp_path, capsys):
    made_up(tmp_path, "birds", base=12.34, novel=23.45)
    for options in ([], ["--summary", "final"]):
        assert run(evaluation, tmp_path, *options) == 0
        out = capsys.readouterr().out
        assert "birds, coop-anchoropt" in out and "12.34" in out and "23.45" in out
    for number in evaluation.TABLES:
        rows, text = table(capsys, number, tmp_path)
        assert "birds" not in text and "12.34" not in text
        assert {cells[-1] for cells in rows.values()} <= {"none yet", "paper only"}
    refused(capsys, evaluation, [tmp_path, "--table", "1", "--on", "birds"], "--on birds")


def test_finished_already_prints_the_runs_notes_again(tmp_path, capsys):
    worlds.eurosat_tree(tmp_path / "data", per_class=8)
    for split in (tmp_path / "data").rglob("split_*.json"):
        split.unlink()
    torch.save(tiny_clip(layers=1, width=64).state_dict(), tmp_path / "tiny.pt")
    command = ["--dataset", "eurosat", "--root", tmp_path / "data", "--clip", tmp_path / "tiny.pt",
               "--baseline", "cocoop", "--template", "plain", "--device", "cpu",
               "--output", tmp_path / "o"]
    found = []
    for _ in range(2):
        assert run(stage2, *command) == 0
        found.append(capsys.readouterr().out)
    assert "finished already" in found[1] and "finished already" not in found[0]
    for out in found:
        assert any("OWN SPLIT" in note for note in notes_in(out))
        assert any("tiny-" in note and "do not compare" in note for note in notes_in(out))
    rows, _ = table(capsys, "1", tmp_path / "o")
    assert rows["eurosat", "CoCoOp"][0] != "-"
    assert differences(rows, "eurosat", "CoCoOp") == ["-", "-", "-"]


# ---------------------------------------------------------------------------- listings, figures

def test_summary_is_mean_and_standard_deviation_over_seeds(tmp_path, capsys):
    finals = {1: (60.0, 80.0), 2: (70.0, 82.0), 3: (65.0, 90.0)}
    for seed, (base, novel) in finals.items():
        made_up(tmp_path, "toy", evaluation.METHODS[0], seed, base, novel)
    assert run(evaluation, tmp_path, "--summary", "final") == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "coop-plain" in line]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == "65.00 ± 5.00" and cells[4] == "3"
    assert cells[2] == "84.00 ± 5.29"                               # sqrt((16 + 4 + 36) / 2)
    hm, spread = cells[3].split(" ± ")
    assert hm == f"{2 * 65 * 84 / 149:.2f}"
    assert float(spread) == pytest.approx(np.std([2 * b * n / (b + n) for b, n in finals.values()],
                                                 ddof=1), abs=0.006)


def test_summary_shows_runs_on_all_classes_without_a_novel_side(tmp_path, capsys):
    made_up(tmp_path, "imagenet", evaluation.TRANSFER[2], base=70.0)
    assert run(evaluation, tmp_path, "--summary", "anchor") == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "classes=all" in line]
    assert [cell.strip() for cell in row.strip("|").split("|")][1:] == ["67.00", "-", "-", "1"]


def test_csv_holds_what_the_markdown_shows(tmp_path, capsys):
    made_up(tmp_path, "imagenet", evaluation.Row("", changed={"tau": 0.5}), 1, 76.0, 71.0)
    assert run(evaluation, tmp_path, "--table", "s3", "--csv") == 0
    rows = {row["method"]: row for row in csv.DictReader(io.StringIO(capsys.readouterr().out))}
    assert list(rows) == ["tau = 0.1", "tau = 0.5", "tau = 1", "tau = 2", "tau = 4"]
    assert rows["tau = 0.5"] == {
        "table": "S3", "dataset": "imagenet", "method": "tau = 0.5",
        "base": "76.00", "base_paper": "76.10", "base_difference": "-0.10",
        "novel": "71.00", "novel_paper": "71.39", "novel_difference": "-0.39",
        "hm": "73.41", "hm_paper": "73.67", "hm_difference": "-0.26", "runs": "seed 1"}
    assert rows["tau = 4"]["hm"] == "" and rows["tau = 4"]["hm_paper"] == "73.70"
    assert run(evaluation, tmp_path, "--table", "S3", "--csv", tmp_path / "t.csv") == 0
    with open(tmp_path / "t.csv", newline="") as file:
        assert {row["method"]: row for row in csv.DictReader(file)} == rows
    assert "## Table S3" in capsys.readouterr().out


def test_the_same_run_named_twice_counts_once(tmp_path):
    folder = made_up(tmp_path, "dtd")
    assert len(evaluation.load_results([tmp_path, folder, folder / "results.json"])) == 1


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"base": 3}', "null", "NaN accuracy",
                                    "unlike readings", "no settings", "notes of numbers",
                                    "no facts"])
def test_a_damaged_results_file_ends_in_one_line(tmp_path, capsys, damage):
    path = made_up(tmp_path, "dtd") / "results.json"
    result = json.loads(path.read_text())
    if damage == "NaN accuracy":
        result["base"]["final"] = float("nan")
    elif damage == "unlike readings":
        del result["novel"]["normal"]
    elif damage == "no settings":
        result["settings"] = "default"
    elif damage == "notes of numbers":
        result["notes"] = [1]
    elif damage == "no facts":
        result["facts"] = None
    changed = result != json.loads(path.read_text())
    path.write_text(json.dumps(result) if changed else damage)
    for options in ([], ["--table", "1"], ["--figure", "4"], ["--summary", "final"]):
        refused(capsys, evaluation, [tmp_path, *options], path)


def test_bad_options_end_in_one_line(tmp_path, capsys):
    made_up(tmp_path, "dtd")
    for argv, words in (([tmp_path / "nowhere", "--table", "1"], "does not exist"),
                        ([tmp_path, "--table", "6", "--on", "imagenetv2"], "training images"),
                        ([tmp_path, "--table", "6", "--on", "nothing"], "training images"),
                        ([tmp_path, "--dataset", "toy"], "holds no prompt.pt"),
                        ([tmp_path / "nowhere", "--dataset", "toy"], "does not exist")):
        refused(capsys, evaluation, argv, words)
    for argv, words in (([tmp_path, "--table", "S4"], "--table"),
                        ([tmp_path, "--table", "1", "--figure", "4"], "do not go together"),
                        ([tmp_path, "--csv", "x"], "--csv goes with --table or --images"),
                        ([tmp_path, "--on", "toy"], "--on goes with --table"),
                        ([tmp_path, "--figure", "4", "--top", "9"], "--top goes with --images"),
                        ([tmp_path, "--root", "x"], "--root goes with --dataset"),
                        ([tmp_path, "--overwrite"], "--overwrite goes with --dataset"),
                        ([tmp_path, "--classes-from", "x"], "--classes-from goes with --images"),
                        ([tmp_path, "--images", "a.jpg", "--csv"], "--csv needs a FILE"),
                        ([tmp_path, "--images", "a.jpg", "--top", "0"], "--top"),
                        ([tmp_path, "--dataset", "dtd", "--test-batch", "-1"], "--test-batch")):
        parser_refuses(capsys, argv, words)


def test_a_table_says_which_runs_it_leaves_out_of_an_empty_cell(tmp_path, capsys):
    made_up(tmp_path, "dtd", shots=2)
    assert run(evaluation, tmp_path, "--table", "1") == 0
    out = capsys.readouterr().out
    assert ("no run with the table's settings; left out: coop-anchoropt,shots=2 "
            "(CoOp + AnchorOPT, dtd)") in out and out.count("left out") == 1
    made_up(tmp_path, "dtd")
    assert run(evaluation, tmp_path, "--table", "1") == 0
    assert "left out" not in capsys.readouterr().out
    made_up(tmp_path, "imagenet", evaluation.TRANSFER[0], shots=2)
    assert run(evaluation, tmp_path, "--table", "4") == 0
    assert "left out: coop-plain,classes=all,shots=2 (CoOp, imagenet)" in capsys.readouterr().out


@pytest.fixture
def drawn(monkeypatch):
    """The panels of each picture, instead of pictures."""
    found = []

    def draw(panels, path, n_anchor):
        found.append((panels, n_anchor))
        pathlib.Path(path).write_text("picture")
    monkeypatch.setattr(evaluation, "plot_position_matrix", draw)
    return found


def test_copies_of_a_run_in_two_trees_are_two_runs(tmp_path, capsys, drawn):
    for tree in ("a", "b"):
        made_up(tmp_path / tree, "dtd")
    assert run(evaluation, tmp_path / "a", tmp_path / "b") == 0
    out = capsys.readouterr().out
    assert out.count("dtd, coop-anchoropt, seed 1") == 2 and "seeds" not in out
    assert run(evaluation, tmp_path, "--summary", "final") == 0
    assert "±" not in capsys.readouterr().out
    assert run(evaluation, tmp_path, "--figure", "4", "--output", tmp_path / "a.png") == 0
    ((panels, _),) = drawn
    runs = [tmp_path / tree / "dtd" / "coop-anchoropt" for tree in ("a", "b")]
    titles = [title.split("\n", 1) for title in panels]
    assert [(first, rest.replace("\n", "")) for first, rest in titles] \
        == [("dtd", str(folder)) for folder in runs]


def test_figure_4_draws_the_lowest_seed_of_every_run(tmp_path, capsys, drawn):
    for seed in (3, 2):
        made_up(tmp_path, "dtd", seed=seed)
    made_up(tmp_path, "eurosat")
    made_up(tmp_path, "eurosat", evaluation.METHODS[0])             # plain: has no matrix
    assert run(evaluation, tmp_path, "--figure", "4", "--output", tmp_path / "a.png") == 0
    out = capsys.readouterr().out
    assert "seed2" in out and "seed3" not in out
    assert (tmp_path / "a.png").read_text() == "picture"
    made_up(tmp_path, "eurosat", tau=0.5)
    assert run(evaluation, tmp_path, "--figure", "4", "--output", tmp_path / "b.png") == 0
    assert drawn[0] == ({"dtd": [[1, 0], [0, 1]], "eurosat": [[1, 0], [0, 1]]},
                        {"dtd": 1, "eurosat": 1})
    assert list(drawn[1][0]) == ["dtd\ncoop-anchoropt", "eurosat\ncoop-anchoropt",
                                 "eurosat\ncoop-anchoropt,tau=0.5"]
    made_up(tmp_path, "dtd", anchor_length=2)
    assert run(evaluation, tmp_path, "--figure", "4", "--output", tmp_path / "c.png") == 0
    assert drawn[2][1]["dtd\ncoop-anchoropt,anchor_length=2"] == 2
    plain = tmp_path / "eurosat" / "coop-plain"
    refused(capsys, evaluation, [plain, "--figure", "4"], "no run with")


def test_the_other_file_of_a_run_stands_for_it_and_no_advice_would_lose_one(tmp_path, capsys):
    folder = made_up(tmp_path, "dtd")
    (folder / "prompt.pt").write_text("a good one")
    assert run(evaluation, folder / "prompt.pt") == 0
    assert "dtd, coop-anchoropt, seed 1" in capsys.readouterr().out
    (folder / "copy.json").write_text("no results")
    line = refused(capsys, evaluation, [folder / "copy.json"], "copy.json is not a results.json")
    assert "--overwrite" not in line
    line = refused(capsys, evaluation, [folder / "results.json", "--images", __file__],
                   "give a run's folder or its prompt.pt")
    assert "--overwrite" not in line


def test_a_reader_who_has_seen_enough_is_left_quietly(tmp_path):
    made_up(tmp_path, "dtd")
    command = f"{shlex.quote(sys.executable)} {evaluation.__file__} {tmp_path} --table 1 | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert done.stdout == "## Table 1: base to novel classes\n"
    assert "pipe" not in done.stderr and "Traceback" not in done.stderr


def test_figure_4_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    made_up(tmp_path, "dtd")
    assert run(evaluation, tmp_path, "--figure", "4", "--output", tmp_path / "a.png") == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------------------- other datasets

VARIANTS = stage1.VARIANTS
TARGETS = [name for name in worlds.TREES if name != "imagenet"]             # the fourteen others


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Small trees, a CLIP of random weights, a run of one epoch on all of imagenet's classes."""
    folder = tmp_path_factory.mktemp("world")
    names = {"imagenet": worlds.imagenet_tree(folder / "data", per_class=4, classes=10)}
    for target in TARGETS:
        size = (4,) if target in VARIANTS else (8, 5)
        names[target] = worlds.TREES[target](folder / "data", *size)
    torch.save(tiny_clip(seed=3).state_dict(), folder / "tiny.pt")
    torch.save(tiny_clip(seed=3, width=64).state_dict(), folder / "smaller.pt")
    (folder / "said").mkdir()
    worlds.write_descriptions(folder / "said" / "imagenet.json", names["imagenet"])
    assert train(folder) == 0
    return folder, names


def train(folder, *options, output=None):
    given = ["--dataset", "imagenet", "--classes", "all", "--root", folder / "data",
             "--clip", folder / "tiny.pt", "--device", "cpu", "--no-plot",
             "--output", output or folder / "output", *options]
    if "clip" not in options:
        given += ["--epochs", 1]
        if "plain" not in options and "atprompt" not in options:
            given += ["--anchor-epochs", 1, "--descriptions", folder / "said" / "imagenet.json"]
    return run(stage2, *given)


def run_in(folder, pattern="coop-anchoropt,*classes=all*"):
    (found,) = (folder / "output" / "imagenet").glob(pattern + "/seed1")
    return found


def elsewhere(folder, path, *targets):
    """The arguments of eval.py that evaluate a prompt on these datasets of the world."""
    return [path, "--root", folder / "data", "--clip", folder / "tiny.pt", "--device", "cpu",
            "--dataset", *targets]


def by_hand(folder, path, target, names):
    """The three readings of a prompt.pt by CLIP's own 77-position encoder.

    Returns dict reading -> (lowest, highest) accuracy, and the number of images. Two classes
    of one name have one text feature: rounding picks between them, so a tie may go either way.
    """
    saved = torch.load(path / "prompt.pt", weights_only=True)
    model = prompts.load_clip(str(folder / "tiny.pt"))
    anchors = saved["state"]["template.anchor_tokens"]
    logits = saved["state"]["template.position_matrix.logits"]
    W = torch.eye(len(logits))[logits.argmax(-1)]
    normal = W @ torch.cat([saved["state"]["template.soft_tokens"], anchors])
    anchor = torch.cat([anchors, model.token_embedding.weight[TOKENIZER.encode("of")]])
    items = data.load_dataset(target, folder / "data").test
    crops = torch.stack([data.test_transform(32)(data.load_image(item.source)) for item in items])
    u = unit(model.encode_image(data.normalize(crops)))
    labels = torch.tensor([item.label for item in items])
    scores = {"normal": u @ unit(encode_77(model, normal, names)).T,
              "anchor": u @ unit(encode_77(model, anchor, names)).T}
    scores["ensemble"] = (scores["normal"] + scores["anchor"]) / 2
    found = {}
    for reading, score in scores.items():
        own = score[range(len(labels)), labels]
        others = score.scatter(1, labels[:, None], -9).amax(-1)
        found[reading] = [100 * (own > others + slack).double().mean().item()
                          for slack in (1e-5, -1e-5)]
    return found, len(labels)


def test_a_run_on_imagenet_carries_its_prompt_and_anchor_to_other_datasets(world, capsys):
    folder, names = world
    path = run_in(folder)
    capsys.readouterr()
    assert run(evaluation, *elsewhere(folder, path, *TARGETS)) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| coop")]
    differ = 0
    assert len(lines) == 14
    for target, line in zip(TARGETS, lines):
        expected, n = by_hand(folder, path, target, names[target])
        rule = "normal" if target in VARIANTS else "ensemble"
        result = json.loads((path / f"eval-{target}.json").read_text())
        for reading, (lowest, highest) in expected.items():
            assert lowest - 1e-6 <= result["accuracy"][reading] <= highest + 1e-6
            assert lowest == highest or len(set(names[target])) < len(names[target])
        assert result["accuracy"]["final"] == result["accuracy"][rule]
        assert (result["images"], result["classes"]) == (n, len(names[target]))
        assert (result["dataset"], result["target"], result["seed"]) == ("imagenet", target, 1)
        assert result["settings"]["classes"] == "all"
        shown = [cell.strip() for cell in line.strip("|").split("|")]
        assert shown[1:5] == ["1", target, str(len(names[target])), str(n)]
        assert shown[5:] == [f"{result['accuracy'][reading]:.2f}"
                             for reading in evaluation.READINGS]
        differ += result["accuracy"]["normal"] != result["accuracy"]["ensemble"]
    assert differ >= 2 and len(names["imagenet_a"]) == 5
    assert not list(path.glob("*.part*")) and len(list(path.glob("eval-*.json"))) == len(TARGETS)


def copy_of_the_run(folder, tmp_path):
    """A copy of the world's run, to do with what one likes."""
    copy = tmp_path / "coop-anchoropt" / "seed1"
    shutil.copytree(run_in(folder), copy, ignore=shutil.ignore_patterns("eval-*"))
    return copy


def test_finished_evaluations_skip_until_the_prompt_changes(world, tmp_path, capsys):
    folder, _ = world
    path = copy_of_the_run(folder, tmp_path)
    command = elsewhere(folder, tmp_path, "caltech101")             # a parent: all its runs
    assert run(evaluation, *command) == 0
    file = path / "eval-caltech101.json"
    truth = json.loads(file.read_text())
    other = truth | {"accuracy": dict.fromkeys(evaluation.READINGS, 1.0), "notes": ["an old note"]}
    file.write_text(json.dumps(other))
    capsys.readouterr()
    assert run(evaluation, *command) == 0
    out = capsys.readouterr().out
    assert "finished already" in out and " 1.00 |" in out
    assert notes_in(out) == ["an old note (coop-anchoropt on caltech101)"]
    file.write_text(json.dumps(other | {"prompt": "another!"}))
    assert evaluation.load_transfer(path / "prompt.pt", "caltech101") is None
    assert run(evaluation, *elsewhere(folder, path / "prompt.pt", "caltech101")) == 0
    assert "finished already" not in capsys.readouterr().out
    assert json.loads(file.read_text()) == truth
    for damage in ("{}", "[]", "{", json.dumps(truth | {"notes": [1]}),
                   json.dumps(truth | {"seed": "x"}),
                   json.dumps({key: truth[key] for key in truth if key != "images"})):
        file.write_text(damage)
        refused(capsys, evaluation, command, file, "damaged", "--overwrite")
    assert run(evaluation, *command, "--overwrite") == 0 and json.loads(file.read_text()) == truth


def test_evaluations_refuse_a_target_whose_images_or_classes_have_changed(world, tmp_path, capsys):
    """Issue 10, section 2: half-unpacked data, then the same command."""
    folder, _ = world
    path = copy_of_the_run(folder, tmp_path)
    worlds.dtd_tree(tmp_path / "data", per_class=4, classes=3)
    command = elsewhere(folder, path, "dtd")
    command[command.index("--root") + 1] = tmp_path / "data"
    assert run(evaluation, *command) == 0
    file = path / "eval-dtd.json"
    before = file.read_bytes()
    shutil.rmtree(tmp_path / "data")
    worlds.dtd_tree(tmp_path / "data", per_class=8, classes=3)              # more images
    refused(capsys, evaluation, command, file, "test images", "--overwrite")
    shutil.rmtree(tmp_path / "data")
    worlds.dtd_tree(tmp_path / "data", per_class=8, classes=4)              # and more classes
    refused(capsys, evaluation, command, file, "class names and test images", "--overwrite")
    assert file.read_bytes() == before
    assert run(evaluation, *command, "--overwrite") == 0 and file.read_bytes() != before


def test_an_evaluation_from_before_facts_were_kept_is_made_again(world, tmp_path, capsys):
    folder, _ = world
    path = copy_of_the_run(folder, tmp_path)
    command = elsewhere(folder, path, "dtd")
    assert run(evaluation, *command) == 0
    file = path / "eval-dtd.json"
    truth = json.loads(file.read_text())
    file.write_text(json.dumps({key: truth[key] for key in truth if key != "facts"}))
    assert run(evaluation, *command) == 0 and json.loads(file.read_text()) == truth
    assert "finished already" not in capsys.readouterr().out


def test_only_who_has_an_ensemble_is_noted_to_answer_with_it(world, tmp_path, capsys):
    folder, _ = world
    common = ["--dataset", "caltech101", "--root", folder / "data", "--clip", folder / "tiny.pt",
              "--device", "cpu", "--no-plot", "--output", tmp_path / "o"]
    said = {}
    for cell in (["--baseline", "clip"], ["--template", "plain", "--epochs", 1]):
        assert run(stage2, *common, *cell) == 0
    for file in sorted((tmp_path / "o").rglob("prompt.pt")):
        assert run(evaluation, *elsewhere(folder, file.parent, "dtd")) == 0
        notes = json.loads((file.parent / "eval-dtd.json").read_text())["notes"]
        said[file.parent.parent.name.split(",")[0]] = " ".join(notes)
    assert "learnt on base classes alone" in said["coop-plain"]
    assert "base classes" not in said["clip"] and "ensemble" not in "".join(said.values())


def test_what_is_noted_about_a_run_travels_to_its_evaluations(world, tmp_path, capsys):
    folder, _ = world
    path = copy_of_the_run(folder, tmp_path)
    noted = json.loads((path / "results.json").read_text())
    assert any("10 classes found" in note for note in noted["notes"]) and not noted["comparable"]
    capsys.readouterr()
    assert run(evaluation, *elsewhere(folder, path, "dtd")) == 0
    result = json.loads((path / "eval-dtd.json").read_text())
    assert set(noted["notes"]) < set(result["notes"]) and not result["comparable"]
    assert any("5 classes found" in note for note in result["notes"])       # of the target itself
    printed = notes_in(capsys.readouterr().out)
    assert len(printed) == len(set(result["notes"]))
    assert all(note.endswith(" (coop-anchoropt on dtd)") for note in printed)


def test_the_file_that_is_named_is_the_one_that_is_evaluated(world, tmp_path, capsys):
    """Issue 10, section 4: `eval.py zoo/my_coop.pt` opened zoo/prompt.pt."""
    folder, _ = world
    good = torch.load(run_in(folder) / "prompt.pt", weights_only=True)
    (tmp_path / "prompt.pt").write_bytes(b"another file")
    torch.save(good | {"seed": 7}, tmp_path / "my_coop.pt")
    capsys.readouterr()
    assert run(evaluation, *elsewhere(folder, tmp_path / "my_coop.pt", "dtd")) == 0
    assert "| my_coop |" in capsys.readouterr().out
    assert [file.name for file in tmp_path.glob("*.json")] == ["my_coop-eval-dtd.json"]
    result = json.loads((tmp_path / "my_coop-eval-dtd.json").read_text())
    assert result["seed"] == 7 and result["run"] == "my_coop"
    named = evaluation.load_transfer(tmp_path / "my_coop.pt", "dtd")
    assert named == result and evaluation.load_transfer(tmp_path / "prompt.pt", "dtd") is None
    other = elsewhere(folder, tmp_path / "prompt.pt", "dtd")
    refused(capsys, evaluation, other, "could not be read")


def test_a_run_on_base_classes_is_evaluated_with_the_ensemble_and_says_so(world, tmp_path, capsys):
    folder, _ = world
    assert train(folder, "--classes", "base", output=tmp_path) == 0
    for target in ("imagenetv2", "imagenet"):
        capsys.readouterr()
        assert run(evaluation, *elsewhere(folder, tmp_path, target)) == 0
        assert "base classes alone" in capsys.readouterr().out
        (file,) = tmp_path.rglob(f"eval-{target}.json")
        result = json.loads(file.read_text())
        assert result["accuracy"]["final"] == result["accuracy"]["ensemble"]
        assert result["known"] is False


def test_a_run_on_a_split_of_its_own_is_tested_on_its_own_seeds_test_images(
        world, tmp_path, monkeypatch):
    folder, _ = world
    worlds.eurosat_tree(tmp_path / "data", per_class=10)
    for split in (tmp_path / "data").rglob("split_*.json"):
        split.unlink()
    common = ["--root", tmp_path / "data", "--clip", folder / "tiny.pt", "--device", "cpu"]
    assert run(stage2, "--dataset", "eurosat", "--template", "plain", "--seeds", 2, "--epochs", 1,
               "--output", tmp_path / "output", *common) == 0
    tested, evaluate_items = [], evaluation.evaluate_items

    def note_items(learner, settings, items, *rest):
        tested.append(items)
        return evaluate_items(learner, settings, items, *rest)
    monkeypatch.setattr(evaluation, "evaluate_items", note_items)
    assert run(evaluation, tmp_path / "output", "--dataset", "eurosat", *common) == 0
    first, second = (data.load_dataset("eurosat", tmp_path / "data", seed).test for seed in (1, 2))
    assert tested == [second] and first != second


@pytest.mark.parametrize("options", [
    ["--baseline", "maple", "--depth", 2], ["--baseline", "cocoop"], ["--baseline", "dept"],
    ["--arrangement", "after-class"], ["--template", "atprompt"], ["--baseline", "clip"]])
def test_every_kind_of_run_goes_to_other_datasets(world, tmp_path, options):
    folder, _ = world
    assert train(folder, *options, output=tmp_path) == 0
    assert run(evaluation, *elsewhere(folder, tmp_path, "caltech101", "imagenet_sketch")) == 0
    no_anchor = "atprompt" in options or "clip" in options
    for target, rule in (("caltech101", "ensemble"), ("imagenet_sketch", "normal")):
        (file,) = tmp_path.rglob(f"eval-{target}.json")
        accuracy = json.loads(file.read_text())["accuracy"]
        if no_anchor:
            assert set(accuracy) == {"normal", "final"} and accuracy["final"] == accuracy["normal"]
        else:
            assert set(accuracy) == set(evaluation.READINGS) and accuracy["final"] == accuracy[rule]


def test_the_base_class_head_of_dept_answers_only_for_the_classes_it_learnt(world, tmp_path):
    folder, names = world
    assert train(folder, "--baseline", "dept", "--template", "plain", output=tmp_path) == 0
    (file,) = tmp_path.rglob("prompt.pt")
    saved = torch.load(file, weights_only=True)

    def final(target, bias):
        saved["state"] |= {"head.weight": torch.zeros(10, 64), "head.bias": bias}
        torch.save(saved, file)
        assert run(evaluation, *elsewhere(folder, tmp_path, target)) == 0
        return json.loads((file.parent / f"eval-{target}.json").read_text())["accuracy"]["final"]
    assert names["imagenet_sketch"] == names["imagenet"]
    always_class_3 = 1e6 * torch.eye(10)[3]
    assert final("imagenet_sketch", always_class_3) == 10.0
    assert final("caltech101", always_class_3) == final("caltech101", torch.zeros(10))


def test_the_runs_own_settings_win_over_switches(world, tmp_path, capsys):
    folder, _ = world
    saved = torch.load(run_in(folder) / "prompt.pt", weights_only=True)
    saved["settings"]["dtype"] = "float32"
    torch.save(saved, tmp_path / "prompt.pt")
    loaded = []
    with pytest.MonkeyPatch.context() as patch:
        load_clip = stage1.load_clip
        patch.setattr(stage1, "load_clip",
                      lambda *given: loaded.append(given[2]) or load_clip(*given))
        command = elsewhere(folder, tmp_path, "caltech101")
        assert run(evaluation, *command, "--dtype", "bfloat16") == 0
    assert "trained in float32" in capsys.readouterr().out and loaded == [torch.float32]


def test_each_run_is_evaluated_with_its_own_clip(world, tmp_path, monkeypatch):
    folder, _ = world
    saved = torch.load(run_in(folder) / "prompt.pt", weights_only=True)
    loaded, load_clip = [], stage1.load_clip
    monkeypatch.setattr(stage1, "load_clip",
                        lambda *given: loaded.append(given[2]) or load_clip(*given))
    for seed, dtype in enumerate(("float32", "float32", "bfloat16")):
        (tmp_path / f"seed{seed}").mkdir()
        file = tmp_path / f"seed{seed}" / "prompt.pt"
        settings = saved["settings"] | {"dtype": dtype}
        torch.save(saved | {"settings": settings, "seed": seed}, file)
    assert run(evaluation, *elsewhere(folder, tmp_path, "caltech101")) == 0
    assert loaded == [torch.float32, torch.bfloat16]
    assert len(list(tmp_path.rglob("eval-caltech101.json"))) == 3


def test_bad_prompts_and_clips_end_in_one_line(world, tmp_path, capsys):
    folder, _ = world
    good = torch.load(run_in(folder) / "prompt.pt", weights_only=True)
    state, settings = good["state"], good["settings"]
    torch.save(tiny_clip(seed=4, width=64, d=32).state_dict(), folder / "narrow.pt")
    narrow = prompts.clip_identity(str(folder / "narrow.pt"))

    def check(*words, clip=folder / "tiny.pt", dataset="caltech101", **changed):
        torch.save(good | changed, tmp_path / "prompt.pt")
        argv = [tmp_path, "--dataset", dataset, "--root", folder / "data", "--device", "cpu"]
        refused(capsys, evaluation, argv + (["--clip", clip] if clip else []), *words)

    def without(content, part):
        return {key: value for key, value in content.items() if part not in key}

    check(settings["clip"], "narrow-", clip=folder / "narrow.pt")           # says both
    check(settings["clip"], "--clip", clip=None)
    check("does not fit", clip=folder / "narrow.pt", settings=settings | {"clip": narrow})
    check("does not fit", "soft_tokens", state=without(state, "soft"))
    two = state | {"template.soft_tokens": torch.zeros(2, 128)}
    check("does not fit", "soft_tokens", state=two)
    check("does not fit", "anchor", state=without(state, "anchor"))
    check("does not fit", "tau", settings=without(settings, "tau"))
    for wrong in ({"settings": "default"}, {"settings": without(settings, "preposition")},
                  {"settings": settings | {"clip": 3}}, {"class_names": [1, 2]}, {"seed": None}):
        check("not a prompt.pt", **wrong)
    check("did you mean", dataset="caltech")
    torch.save([1, 2], tmp_path / "prompt.pt")
    refused(capsys, evaluation, elsewhere(folder, tmp_path, "dtd"), "not a prompt.pt")
    (tmp_path / "prompt.pt").write_bytes(b"PK not quite")
    refused(capsys, evaluation, elsewhere(folder, tmp_path, "dtd"), "could not be read")
    assert not list(tmp_path.glob("eval-*"))


# ---------------------------------------------------------------------------- Tables 2 and 4

# The settings of runs on all of ImageNet's classes, as their sources have them.
SOURCES = {
    "CoOp + AnchorOPT": {"soft_tokens": 4, "epochs": 20, "batch_size": 32, "lr": 0.002,
                         "lambda_1": 1,
                         "lambda_2": 1, "temperature": 1, "max_descriptions": 5},
    "MaPLe": {"soft_tokens": 2, "epochs": 2, "batch_size": 4, "lr": 0.0026, "depth": 3,
              "start_words": "a photo of a"}}


@pytest.mark.parametrize("number, label", [("2", "CoOp + AnchorOPT"), ("4", "MaPLe")])
def test_runs_made_with_the_printed_commands_land_in_their_cells(
        world, tmp_path, capsys, monkeypatch, number, label):
    """Issue 11, section 3: from the empty table's commands to its figures."""
    folder, _ = world
    (row,) = [row for row in evaluation.TRANSFER if row.label == label]
    kind = f"--baseline {row.baseline} --template {row.template} "
    name = f"/{row.baseline}-{row.template},"
    _, text = table(capsys, number, tmp_path)
    commands = [command for command in commands_in(text) if kind in command or name in command]
    assert len(commands) == 2
    monkeypatch.setenv("DATA", str(folder / "data"))
    for command in commands:
        words = []
        for word in shlex.split(os.path.expandvars(command)):       # as a shell reads it
            words += sorted(glob.glob(word)) if "*" in word else [word]
        script = {"stage2.py": stage2, "eval.py": evaluation}[words[1]]
        more = ["--no-plot"] if script is stage2 else []
        if script is stage2 and row.template == "anchoropt":    # shipped: no made-up class
            more += ["--descriptions", folder / "said" / "imagenet.json"]
        assert run(script, *words[2:], *more, "--clip", folder / "smaller.pt",
                   "--device", "cpu") == 0

    results = evaluation.load_results([tmp_path])
    assert sorted(result["seed"] for result in results) == [1, 2, 3]
    for result in results:
        assert SOURCES[label].items() <= result["settings"].items()
    rows, text = table(capsys, number, tmp_path)
    paper_table = evaluation.TABLES[number]
    for dataset in paper_table.datasets:
        cells = rows[dataset, label]
        assert 0 <= float(cells[0]) <= 100 and cells[1] != "-"
        assert cells[2:] == ["-", "seeds 1, 2, 3"]                  # another CLIP than the paper's
        if dataset != "imagenet":
            finals = [json.loads((result["folder"] / f"eval-{dataset}.json").read_text())
                      ["accuracy"]["final"] for result in results]
            assert cells[0] == f"{np.mean(finals):.2f}"
    n = len(paper_table.datasets) - 1
    assert rows["average", label][-1] == f"{n} of {n} datasets"
    assert not any(kind in command or name in command for command in commands_in(text))


# ---------------------------------------------------------------------------- pictures of one's own

README = pathlib.Path(evaluation.__file__).parent / "README.md"


def snippet():
    """The README's lines of Python that classify pictures."""
    blocks = README.read_text(encoding="utf-8").split("```python\n")[1:]
    (found,) = [block.split("```")[0] for block in blocks if "load_run(" in block]
    return found


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """A folder with a short toy run at the README's place, and five pictures; the dataset."""
    folder = tmp_path_factory.mktemp("toy")
    dataset = LOAD_DATASET("toy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load_dataset",
                      lambda *given: dataset._replace(test=dataset.test[::12]))
        assert run(stage2, "--epochs", 1, "--anchor-epochs", 1, "--shots", 1, "--no-plot",
                   "--device", "cpu", "--output", folder / "made") == 0
    (made,) = (folder / "made" / "toy").glob("coop-anchoropt*")
    (folder / "output" / "toy").mkdir(parents=True)
    shutil.copytree(made, folder / "output" / "toy" / "coop-anchoropt")
    (folder / "pictures").mkdir()
    for name, item in zip("abcde", dataset.test[::len(dataset.test) // 5]):
        data.load_image(item.source).save(folder / f"{name}.jpg")
        shutil.copy(folder / f"{name}.jpg", folder / "pictures")
    return folder, dataset


def seed1(folder):
    return folder / "output" / "toy" / "coop-anchoropt" / "seed1"


def pictures_of(folder):
    return [str(folder / "pictures" / f"{name}.jpg") for name in "abcde"]


def probabilities_by_hand(path, names, pictures, known):
    """Eq. 1 and the inference rule with CLIP's own encoders, from prompt.pt."""
    saved = torch.load(path / "prompt.pt", weights_only=True)
    model = prompts.load_clip("toy")
    anchors = saved["state"]["template.anchor_tokens"]
    logits = saved["state"]["template.position_matrix.logits"]
    W = torch.eye(len(logits))[logits.argmax(-1)]
    normal = W @ torch.cat([saved["state"]["template.soft_tokens"], anchors])
    anchor = torch.cat([anchors, model.token_embedding.weight[TOKENIZER.encode("of")]])
    transform = data.test_transform(model.visual.input_resolution)
    crops = torch.stack([transform(data.load_image(picture)) for picture in pictures])
    u = unit(model.encode_image(data.normalize(crops)))
    q_norm = model.logit_scale.exp() * u @ unit(encode_77(model, normal, names)).T
    q_anc = model.logit_scale.exp() * u @ unit(encode_77(model, anchor, names)).T
    return (q_norm if known else (q_norm + q_anc) / 2).softmax(-1)


NEVER_SEEN = ["harbour crane", "a very small teapot", "Éclair (chocolate)", "7-up"]


@pytest.mark.parametrize("kind", ["base", "novel", "never seen"])
def test_a_learnt_prompt_classifies_pictures_with_any_names(toy_run, tmp_path, capsys, kind):
    """Issue 13, section 2: five pictures, with --classes-from but for the classes learnt on."""
    folder, dataset = toy_run
    half = len(dataset.class_names) // 2
    names = {"base": dataset.class_names[:half], "novel": dataset.class_names[half:],
             "never seen": NEVER_SEEN}[kind]
    options = []
    if kind != "base":
        text = "\ufeff" + "\n".join([*names, "", names[0], "  "]) + "\n"        # as editors save it
        (tmp_path / "names.txt").write_text(text, encoding="utf-8")
        options = ["--classes-from", tmp_path / "names.txt"]
    argv = [seed1(folder), "--device", "cpu", *options, "--images", folder / "pictures"]
    assert run(evaluation, *argv, "--top", 1000, "--csv", tmp_path / "all.csv") == 0
    out = capsys.readouterr().out
    rule = "ensemble of normal and anchor prompt answers"
    if kind == "base":
        rule = "normal prompt answers"
    assert f"{len(names)} classes; the {rule}" in out
    with open(tmp_path / "all.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(dict.fromkeys(row["image"] for row in rows)) == pictures_of(folder)
    expected = probabilities_by_hand(seed1(folder), names, pictures_of(folder), kind == "base")
    for picture, of_picture in zip(pictures_of(folder), expected):
        own = [row for row in rows if row["image"] == picture]
        assert [int(row["rank"]) for row in own] == list(range(1, len(names) + 1))
        found = {row["class"]: float(row["probability"]) for row in own}
        assert sum(found.values()) == pytest.approx(1, abs=1e-4)
        assert found == pytest.approx(dict(zip(names, of_picture.tolist())), abs=1e-4)
        assert list(found.values()) == sorted(found.values(), reverse=True)

    assert run(evaluation, *argv[:-1], *pictures_of(folder)[:2], "--top", 2) == 0
    lines = capsys.readouterr().out.splitlines()[-2:]
    for picture, line in zip(pictures_of(folder), lines):
        best = [row for row in rows if row["image"] == picture][:2]
        assert line == f"{picture}: " + ", ".join(
            f"{row['class']} {100 * float(row['probability']):.1f} %" for row in best)


def test_the_readmes_snippet_gives_the_command_lines_numbers(
        toy_run, tmp_path, capsys, monkeypatch):
    folder, _ = toy_run
    monkeypatch.chdir(folder)
    found = {}
    assert len(snippet().splitlines()) <= 8
    exec(snippet(), found)
    q = found["q"]
    assert q.shape == (2, 2) and q.dtype == torch.float32
    assert torch.allclose(q.sum(1), torch.ones(2))
    names = found["run"].class_names                        # those that the README binds
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n")
    assert run(evaluation, "output/toy/coop-anchoropt/seed1", "--images", "a.jpg", "b.jpg",
               "--classes-from", tmp_path / "names.txt", "--csv", tmp_path / "q.csv") == 0
    with open(tmp_path / "q.csv", newline="") as file:
        rows = {(row["image"], row["class"]): float(row["probability"])
                for row in csv.DictReader(file)}
    for i, picture in enumerate(("a.jpg", "b.jpg")):
        for c, name in enumerate(names):
            assert rows[picture, name] == pytest.approx(q[i, c].item(), abs=2e-6)


def test_a_loaded_run_is_ready_for_use(toy_run):
    """Nobody has to say .eval(): in training mode W would be drawn anew at every call."""
    folder, _ = toy_run
    run_ = evaluation.load_run(seed1(folder), device="cpu")
    assert not run_.learner.training and not run_.learner.template.position_matrix.training
    first = run_.probabilities(pictures_of(folder))
    assert torch.equal(first, run_.probabilities(pictures_of(folder))) and not first.requires_grad
    run_.learner.train()
    others = [run_.probabilities(pictures_of(folder)) for _ in range(5)]
    assert any(not torch.equal(first, other) for other in others)           # what would happen
    run_.learner.eval()
    in_batches = run_.probabilities(pictures_of(folder), batch_size=2)
    assert torch.allclose(first, in_batches, atol=1e-6)
    assert run_.probabilities([]).shape == (0, len(run_.class_names))


def test_the_classes_learnt_on_are_known_and_any_others_are_not(toy_run):
    folder, dataset = toy_run
    run_ = evaluation.load_run(seed1(folder), device="cpu")
    half = len(dataset.class_names) // 2
    assert run_.class_names == dataset.class_names[:half] and run_.known
    assert run_.set_classes(run_.class_names[3:0:-1]).known
    assert not run_.set_classes([*run_.class_names, "harbour crane"]).known
    with pytest.raises(ValueError, match="no class names"):
        run_.set_classes([])
    with pytest.raises(ValueError, match="too long"):
        run_.set_classes(["word " * 80])
    assert run_.class_names[-1] == "harbour crane"                  # still bound to the last good


@pytest.mark.parametrize("options", [
    [], ["--template", "plain"], ["--baseline", "maple"], ["--baseline", "dept"],
    ["--arrangement", "after-class"], ["--baseline", "clip"]])
def test_text_features_are_what_the_learner_computes(world, tmp_path, capsys, options):
    folder, _ = world
    if "maple" in options:
        options = [*options, "--depth", 2]
    assert train(folder, *options, output=tmp_path / "o") == 0
    (path,) = (tmp_path / "o").rglob("prompt.pt")
    (tmp_path / "names.txt").write_text("\n".join(NEVER_SEEN), encoding="utf-8")
    capsys.readouterr()
    assert run(evaluation, path, "--clip", folder / "tiny.pt", "--device", "cpu",
               "--classes-from", tmp_path / "names.txt",
               "--save-text-features", tmp_path / "f.npz") == 0
    out = capsys.readouterr().out.splitlines()[-1]
    with np.load(tmp_path / "f.npz", allow_pickle=False) as file:
        arrays = dict(file)
    saved = evaluation.load_prompt(path)
    clip_model = prompts.load_clip(str(folder / "tiny.pt"))
    learner = evaluation.load_learner(path, saved, clip_model)
    learner.set_classes(NEVER_SEEN)
    with torch.no_grad():
        expected = {"normal": unit(learner.text_features().float())}
    if saved["settings"]["template"] == "anchoropt":
        expected["anchor"] = anchor_features(clip_model, NEVER_SEEN, learner.template.anchor_tokens)
    assert list(arrays) == ["class_names", *expected]
    assert out == f"{tmp_path / 'f.npz'}: {', '.join(arrays)} of 4 classes"
    assert arrays.pop("class_names").tolist() == NEVER_SEEN
    for name, found in arrays.items():
        assert found.dtype == np.float32 and found.shape == (4, 64)
        assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
        assert relative(torch.from_numpy(found), expected[name]) < 1e-6


def test_wrong_pictures_classes_and_runs_end_in_one_line(toy_run, world, tmp_path, capsys):
    folder, _ = toy_run
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "latin1.txt").write_bytes("Éclair\n".encode("latin1"))
    (tmp_path / "names.json").write_text('{"ant": ["It is small."]}')
    (tmp_path / "broken.jpg").write_bytes(b"not a picture")
    (tmp_path / "nothing").mkdir()
    picture = folder / "a.jpg"
    classes_from = ["--images", picture, "--classes-from"]
    for argv, words in ((["--images", tmp_path / "missing.jpg"], "missing.jpg does not exist"),
                        (["--images", tmp_path / "broken.jpg"], "broken.jpg"),
                        (["--images", tmp_path / "nothing"], "nothing"),
                        ([*classes_from, tmp_path / "empty.txt"], "empty.txt is"),
                        ([*classes_from, tmp_path / "latin1.txt"], "latin1.txt is"),
                        ([*classes_from, tmp_path / "gone.txt"], "gone.txt: No such file"),
                        ([*classes_from, tmp_path / "names.json"], "names.json looks like JSON"),
                        (["--images", picture, "--csv", picture / "x.csv"], "could not write"),
                        (["--images", picture, "--clip", "ViT-B/16"], "trained with CLIP toy")):
        refused(capsys, evaluation, [seed1(folder), "--device", "cpu", *argv], words)
    for seed in ("seed1", "seed2"):
        shutil.copytree(seed1(folder), tmp_path / "runs" / seed)
    for what in (["--images", picture], ["--save-text-features", tmp_path / "f.npz"]):
        argv = [tmp_path / "runs", *what]
        refused(capsys, evaluation, argv, "2 runs", tmp_path / "runs" / "seed1")
        refused(capsys, evaluation, [seed1(folder), tmp_path / "runs" / "seed2", *what], "one run")
        refused(capsys, evaluation, [tmp_path / "nowhere", *what], "nowhere does not exist")
    argv = [seed1(folder), "--save-text-features", tmp_path / "\0.npz"]
    refused(capsys, evaluation, argv, "null")
    trees, _ = world
    assert train(trees, "--baseline", "cocoop", "--template", "plain", output=tmp_path / "o") == 0
    refused(capsys, evaluation, [tmp_path / "o", "--clip", trees / "tiny.pt", "--device", "cpu",
                                 "--save-text-features", tmp_path / "f.npz"], "cocoop", "image")
    assert not list(tmp_path.glob("*.npz"))


def test_switches_of_the_machine_reach_pictures_too(toy_run, monkeypatch, capsys):
    folder, _ = toy_run
    found, classifier = {}, evaluation.Classifier.probabilities

    def note(self, pictures, batch_size, workers):
        found.update(batch_size=batch_size, workers=workers, dtype=self.learner.clip_model.dtype,
                     class_chunk=self.learner.class_chunk)
        return classifier(self, pictures, batch_size, workers)
    monkeypatch.setattr(evaluation.Classifier, "probabilities", note)
    assert run(evaluation, seed1(folder), "--images", folder / "a.jpg", "--device", "cpu",
               "--dtype", "bfloat16", "--class-chunk", 5, "--test-batch", 3, "--workers", 0) == 0
    assert found == {"batch_size": 3, "workers": 0, "dtype": torch.bfloat16, "class_chunk": 5}


def test_help_says_what_each_option_does(capsys):
    with pytest.raises(SystemExit) as exit_code:
        run(evaluation, "--help")
    assert exit_code.value.code == 0
    text = capsys.readouterr().out
    for option in ("--dataset", "--images", "--save-text-features", "--table", "--summary",
                   "--figure",
                   "--on", "--csv", "--output", "--classes-from", "--top", "--root", "--overwrite"):
        line = [line for line in text.splitlines() if line.startswith(f"  {option}")]
        assert len(line) == 1, option
