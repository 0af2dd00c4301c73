"""eval.py: the inference rule, prompts carried to other datasets, and the paper's tables filled with runs."""

import csv
import io
import json
import os
import pathlib
import shlex

import pytest
import torch

import data
import eval as evaluation
import prompts
import stage2
import worlds
from reference import NAMES, TOKENIZER, encode_77, tiny_clip, unit

MODEL = tiny_clip()


def run(script, *argv):
    return script.main([str(word) for word in argv])


def one_line(capsys):
    """stderr of a command that failed: exactly one line."""
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error
    return error


# ------------------------------------------------------------------------------------- accuracy and readings

def test_accuracy_and_harmonic_mean_by_hand():
    logits = torch.tensor([[2.0, 1, 0], [0, 3, 1], [5, 4, 6], [1, 0, 0]])
    assert evaluation.accuracy(logits, torch.tensor([0, 1, 0, 0])) == 75.0
    assert evaluation.harmonic_mean(60, 40) == 48.0
    assert evaluation.harmonic_mean(0, 0) == 0.0 and evaluation.harmonic_mean(50, 0) == 0.0
    with pytest.raises(ValueError, match="no images"):
        evaluation.accuracy(torch.zeros(0, 3), torch.zeros(0))


def tiny_learner(baseline="coop", **changed):
    torch.manual_seed(1)
    settings = {"baseline": baseline, "template": "anchoropt", "soft_tokens": 3, "arrangement": "adaptive", "tau": 1.0,
                "test_position": "argmax", "feature_at": "eot", "preposition": "of", "depth": 2, "w_cat": 0.7} | changed
    anchor_tokens = 0.5 * torch.randn(2, 128)
    learner = prompts.build_learner(settings, MODEL, NAMES, anchor_tokens)
    learner.template.soft_tokens.data.mul_(50)                   # so that the four readings do not agree by accident
    return learner, settings, anchor_tokens


def tiny_images(n=400):
    torch.manual_seed(2)
    return torch.randn(n, 64), torch.randint(0, len(NAMES), (n,))


@pytest.mark.parametrize("known", [True, False])
def test_the_four_readings_are_those_of_a_plain_loop(known):
    learner, settings, tokens = tiny_learner()
    features, labels = tiny_images()
    anchors = evaluation.anchor_features(MODEL, NAMES, tokens, settings)
    found = evaluation.evaluate(learner, features, labels, anchors, known)

    W = torch.eye(5)[learner.template.position_matrix.logits.argmax(-1)]
    normal_context = W @ torch.cat([learner.template.soft_tokens.detach(), tokens])
    anchor_context = torch.cat([tokens, MODEL.token_embedding.weight[TOKENIZER.encode("of")]])
    normal, anchor = (unit(encode_77(MODEL, context, NAMES)) for context in (normal_context, anchor_context))
    right = dict.fromkeys(("anchor", "normal", "ensemble"), 0)
    for x, y in zip(features, labels):
        l_norm, l_anc = (MODEL.logit_scale.exp() * v @ (x / x.norm()) for v in (normal, anchor))
        for reading, logits in (("normal", l_norm), ("anchor", l_anc), ("ensemble", (l_norm + l_anc) / 2)):
            right[reading] += int(logits.argmax() == y)
    expected = {reading: pytest.approx(100 * count / len(labels)) for reading, count in right.items()}
    assert len(set(right.values())) == 3
    assert found == expected | {"final": expected["normal" if known else "ensemble"]}


def test_without_an_anchor_final_is_the_normal_prompt_and_no_images_are_an_error():
    learner, _, _ = tiny_learner()
    features, labels = tiny_images()
    found = evaluation.evaluate(learner, features, labels, known=False)
    assert set(found) == {"normal", "final"} and found["final"] == found["normal"]
    with pytest.raises(ValueError, match="no images"):
        evaluation.evaluate(learner, features[:0], labels[:0])


def test_cocoop_in_batches_equals_one_batch_and_training_mode_comes_back():
    learner, settings, tokens = tiny_learner("cocoop")
    features, labels = tiny_images(23)
    anchors = evaluation.anchor_features(MODEL, NAMES, tokens, settings)
    learner.train()
    batches = []
    learner.register_forward_hook(lambda module, inputs, output: batches.append(len(inputs[0])))
    found = [evaluation.evaluate(learner, features, labels, anchors, False, test_batch=size) for size in (23, 7, 1)]
    assert found[0] == found[1] == found[2] and learner.training
    assert batches == [23] + [7, 7, 7, 2] + [1] * 23


@pytest.mark.parametrize("test_position, samples", [("argmax", 1), ("sample", 4)])
def test_a_sampled_position_matrix_is_drawn_anew_for_each_batch(test_position, samples):
    learner, _, _ = tiny_learner(test_position=test_position)
    features, labels = tiny_images(23)
    drawn = []
    learner.template.position_matrix.register_forward_hook(lambda *call: drawn.append(call[-1]))
    evaluation.evaluate(learner, features, labels, test_batch=7)
    assert len(drawn) == samples and (samples == 1 or any(not torch.equal(W, drawn[0]) for W in drawn))


# --------------------------------------------------------------------------------------- the paper's figures

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
        ("average", "AnchorOPT-Anchor Prompts", "73.91", "74.22"), ("caltech101", "AnchorOPT-Anchor Prompts", "96.53", "96.66"),
        ("stanford_cars", "AnchorOPT-Final", "75.67", "75.56"), ("oxford_flowers", "AnchorOPT-Ensemble", "84.94", "83.20")]
    for table in ("3", "5", "6", "7", "8", "9", "S2", "S3"):
        assert hm_that_do_not_follow(table) == []


def test_averages_of_the_paper_are_means_over_its_datasets_but_two():
    off = []
    for table in ("1", "2", "4", "S1"):
        rows = [row for row in paper() if row["table"] == table]
        for average in [row for row in rows if row["dataset"] == "average"]:
            for measure in ("base", "novel", "accuracy"):
                values = [float(row[measure]) for row in rows if row["method"] == average["method"] and row[measure]
                          and row["dataset"] not in ("average", *(["imagenet"] if measure == "accuracy" else []))]
                if values and abs(sum(values) / len(values) - float(average[measure])) > 0.0101:
                    off.append((table, average["method"], measure, average[measure]))
                    assert average[measure] in average["note"]
    assert off == [("1", "CoCoOp + AnchorOPT", "base", "81.87"), ("S1", "AnchorOPT-Anchor Prompts", "base", "71.69")]


def test_figures_that_the_paper_prints_twice_agree():
    rows = {(row["table"], row["dataset"], row["method"]): (row["base"], row["novel"], row["hm"]) for row in paper()}
    for dataset in ("average", *evaluation.ELEVEN):
        assert rows["S1", dataset, "AnchorOPT-Final"] == rows["1", dataset, "CoOp + AnchorOPT"]
        assert rows["S1", dataset, "CoOp"] == rows["1", dataset, "CoOp"]
        assert rows["S1", dataset, "ATPrompt"] == rows["1", dataset, "CoOp + ATPrompt"]
    assert rows["3", "average", "One-stage"] == rows["S1", "average", "AnchorOPT-One Stage"]
    assert rows["5", "average", "AnchorOPT w/o Ensemble"] == rows["S1", "average", "AnchorOPT-Normal Prompts"]
    ours = rows["1", "imagenet", "CoOp + AnchorOPT"]
    assert ours == ("76.30", "71.56", "73.85") == rows["9", "imagenet", "with KD"] == rows["6", "imagenet", "of"]
    assert ours == rows["8", "imagenet", "Position Matrix"] == rows["S3", "imagenet", "tau = 1"] == rows["S2", "imagenet", "of"]


def test_every_label_of_a_table_is_one_of_the_paper_for_every_dataset_of_it():
    for number, table in evaluation.TABLES.items():
        printed = evaluation.load_paper(number)
        assert {row.label for row in table.rows} <= {label for _, label in printed}
        assert {dataset for dataset, _ in printed} == set(table.blocks)


# ---------------------------------------------------------------------------------------------- made-up runs

def made_up(output, dataset, row=evaluation.Row(""), seed=1, base=80.0, novel=60.0, **changed):
    """A results.json as stage2.py writes it. base, novel: of the final reading; the others are 1, 2, 3 off."""
    return write_result(output, evaluation.default_settings(dataset, row.baseline, row.template) | row.changed | changed,
                        seed, base, novel)


def write_result(output, settings, seed, base, novel):
    folder, anchoropt = evaluation.run_folder(output, settings, seed), settings["template"] == "anchoropt"
    readings = evaluation.READINGS if anchoropt else ("normal", "final")
    sides = {side: {reading: value - evaluation.READINGS[::-1].index(reading) for reading in readings}
             for side, value in (("base", base), ("novel", novel))}
    if settings["classes"] == "all":
        sides["novel"] = None
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({
        **{key: settings[key] for key in ("dataset", "baseline", "template", "clip")},
        "seed": seed, "settings": settings, **sides,
        "position_matrix": {"start": [[1, 0], [1, 0]], "end": [[1, 0], [0, 1]]} if anchoropt else None}))
    return folder


def printed_rows(text):
    """dict (block, method) -> cells of the Markdown tables in `text`."""
    rows, block = {}, None
    for line in text.splitlines():
        block = line[4:] if line.startswith("### ") else block
        if line.startswith("| ") and not line.startswith("| method"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            rows[block, cells[0]] = cells[1:]
    return rows


def commands_in(text):
    return [line for line in text.splitlines() if line.startswith("python ")]


def test_table_1_of_made_up_runs_is_a_hand_computation(tmp_path, capsys):
    output = tmp_path / "output"
    coop, ours = evaluation.METHODS[0], evaluation.METHODS[2]
    for seed, base, novel in ((1, 76.0, 68.0), (2, 77.0, 70.0), (3, 78.0, 66.0)):
        made_up(output, "imagenet", coop, seed, base, novel)
    made_up(output, "dtd", coop, 1, 80.0, 40.0)
    made_up(output, "stanford_cars", ours, 2, 76.73, 74.43)
    made_up(output, "imagenet", ours, 1, 99.0, 99.0, epochs=1)                        # belongs in no cell
    made_up(output, "imagenet", evaluation.Row("", changed={"classes": "all"}), 1, 98.0)
    assert run(evaluation, "--table", 1, output) == 0
    text = capsys.readouterr().out
    rows = printed_rows(text)
    # means 77 and 68, HM 2 * 77 * 68 / 145 = 72.2207; the paper has 76.47, 67.88, 71.92
    assert rows["imagenet", "CoOp"] == ["77.00", "76.47", "+0.53", "68.00", "67.88", "+0.12", "72.22", "71.92", "+0.30",
                                        "seeds 1, 2, 3"]
    assert rows["dtd", "CoOp"] == ["80.00", "79.44", "+0.56", "40.00", "41.18", "-1.18", "53.33", "54.24", "-0.91", "seed 1"]
    # (77 + 80) / 2 and (68 + 40) / 2: HM 2 * 78.5 * 54 / 132.5 = 63.9849; two datasets do not compare with eleven
    assert rows["average", "CoOp"] == ["78.50", "82.69", "-", "54.00", "63.22", "-", "63.98", "71.66", "-", "2 of 11 datasets"]
    assert rows["stanford_cars", "CoOp + AnchorOPT"][6:9] == ["75.56", "75.67", "-0.11"]
    assert rows["imagenet", "CoOp + AnchorOPT"] == ["-", "76.30", "-", "-", "71.56", "-", "-", "73.85", "-", "none yet"]
    assert rows["imagenet", "PromptSRC"] == ["-", "77.60", "-", "-", "70.73", "-", "-", "74.01", "-", "paper only"]
    assert len(rows) == 17 * 12 and "printed HM 75.67; its base and novel give 75.56" in text
    assert len(commands_in(text)) == 12 * 11 - 3 and "toy" not in text
    assert (f"python stage2.py --dataset dtd --baseline cocoop --template atprompt --seeds 1 2 3 --root $DATA "
            f"--output {os.path.relpath(output)}") in commands_in(text)


def test_an_average_over_all_datasets_compares_with_the_papers(tmp_path, capsys):
    for i, dataset in enumerate(evaluation.ELEVEN):
        made_up(tmp_path, dataset, evaluation.METHODS[0], 1, 70.0 + i, 60.0 + i)
    assert run(evaluation, "--table", "1", tmp_path) == 0
    cells = printed_rows(capsys.readouterr().out)["average", "CoOp"]                   # 75, 65, HM 9750 / 140
    assert cells == ["75.00", "82.69", "-7.69", "65.00", "63.22", "+1.78", "69.64", "71.66", "-2.02", "11 of 11 datasets"]


def test_table_1_has_a_toy_block_where_toy_runs_are_and_the_warning(tmp_path, capsys):
    made_up(tmp_path, "toy", evaluation.METHODS[5], 1, 60.0, 40.0)
    assert run(evaluation, "--table", "1", tmp_path) == 0
    text = capsys.readouterr().out
    assert printed_rows(text)["toy", "CoCoOp + AnchorOPT"] == ["60.00", "-", "-", "40.00", "-", "-", "48.00", "-", "-", "seed 1"]
    assert evaluation.TOY_WARNING in text and printed_rows(text)["average", "CoCoOp + AnchorOPT"][-1] == "none yet"
    assert run(evaluation, "--table", "1", tmp_path, "--on", "toy") == 0
    text = capsys.readouterr().out
    assert len(printed_rows(text)) == 12 and len(commands_in(text)) == 11 and evaluation.TOY_WARNING in text


# What the paper's tables are about, as options of stage2.py: label -> (options, the prompt whose accuracy it is).
COOP, ATPROMPT, OURS = ("--baseline coop --template " + template for template in ("plain", "atprompt", "anchoropt"))
NAMED = {"CoOp": "coop", "CoCoOp": "cocoop", "MaPLe": "maple", "DePT": "dept"}
OF = {"of": (OURS, "final")} | {word: (f"{OURS} --preposition {word}", "final") for word in ("with", "at", "sun", "sea")}
MEANT = {
    "1": {f"{name}{suffix}": (f"--baseline {baseline} --template {template}", "final") for name, baseline in NAMED.items()
          for suffix, template in (("", "plain"), (" + ATPrompt", "atprompt"), (" + AnchorOPT", "anchoropt"))},
    "3": {"One-stage": (OURS + " --one-stage", "final"), "Two-stage": (OURS, "final")},
    "5": {"ATPrompt": (ATPROMPT, "final"), "AnchorOPT w/o Ensemble": (OURS, "normal")},
    "6": OF,
    "7": {f"{reading} prompt, N = {n}": (OURS + (n > 1) * f" --anchor-length {n}", reading)
          for reading in ("anchor", "normal") for n in range(1, 5)},
    "8": {"Position Matrix": (OURS, "final"), "Before Soft Token": (OURS + " --arrangement before", "final"),
          "Middle": (OURS + " --arrangement middle", "final"),
          "After Class Token": (OURS + " --arrangement after-class", "final")},
    "9": {"without KD": (OURS + " --lambda-2 0", "final"), "with KD": (OURS, "final")},
    "S1": {"CoOp": (COOP, "final"), "ATPrompt": (ATPROMPT, "final"), "AnchorOPT-One Stage": (OURS + " --one-stage", "final"),
           "AnchorOPT-Anchor Prompts": (OURS, "anchor"), "AnchorOPT-Normal Prompts": (OURS, "normal"),
           "AnchorOPT-Ensemble": (OURS, "ensemble"), "AnchorOPT-Final": (OURS, "final")},
    "S2": OF | {"none": (OURS + " --preposition none", "final")},
    "S3": {"tau = 1": (OURS, "final")} | {f"tau = {tau}": (f"{OURS} --tau {tau}", "final") for tau in ("0.1", "0.5", "2", "4")}}


def settings_of(words):
    """The settings that stage2.py runs with, given these words of a command."""
    args = stage2.parse(words)
    return evaluation.resolve(args, evaluation.default_settings(args.dataset, args.baseline, args.template, args.one_stage))


@pytest.mark.parametrize("number", MEANT)
@pytest.mark.parametrize("on", ["paper", "toy"])
def test_each_table_takes_the_runs_and_the_prompt_that_the_paper_means(tmp_path, capsys, number, on):
    """Every run gets accuracies of its own, so a row that took another run, or another prompt's accuracy, would show."""
    table, values, runs = evaluation.TABLES[number], {}, {}
    for dataset in table.datasets if on == "paper" else ("toy",):
        for label, (options, reading) in MEANT[number].items():
            if (dataset, options) not in runs:
                base = runs[dataset, options] = 20.0 + 0.25 * len(runs)
                write_result(tmp_path, settings_of(f"--dataset {dataset} {options}".split()), 1, base, base / 2)
            base, off = runs[dataset, options], evaluation.READINGS[::-1].index(reading)
            values[dataset, label], values[dataset, label, "novel"] = base - off, base / 2 - off
    assert run(evaluation, "--table", number, tmp_path, *(["--on", "toy"] if on == "toy" else [])) == 0
    text = capsys.readouterr().out
    rows = printed_rows(text)
    assert commands_in(text) == [] and "left out" not in text
    for label in MEANT[number]:
        for block in table.blocks if on == "paper" else ("toy",):
            members = table.datasets if block == "average" else (block,)
            base = sum(values[dataset, label] for dataset in members) / len(members)
            novel = sum(values[dataset, label, "novel"] for dataset in members) / len(members)
            cells = rows.pop((block, label))
            shown = [float(cell) for cell in cells[0:9:3]]
            assert shown == pytest.approx([base, novel, 2 * base * novel / (base + novel)], abs=0.00501)
            theirs = evaluation.load_paper(number).get((block, label), {})
            assert cells[1:9:3] == [theirs.get(measure, "-") for measure in ("base", "novel", "hm")]
    assert all(cells[-1] == "paper only" for cells in rows.values())


@pytest.mark.parametrize("number", MEANT)
def test_the_commands_for_empty_cells_are_short_and_those_that_the_paper_means(tmp_path, capsys, number):
    assert run(evaluation, "--table", number, tmp_path, "--on", "toy") == 0
    wanted = {f"python stage2.py --dataset toy {options} --seeds 1 2 3 --output {tmp_path}"
              for options, _ in MEANT[number].values()}
    commands = commands_in(capsys.readouterr().out)
    assert len(commands) == len(wanted) and set(commands) == wanted


@pytest.mark.parametrize("number", list(evaluation.TABLES))
@pytest.mark.parametrize("on", ["paper", "dtd", "toy"])
def test_every_command_for_an_empty_cell_parses_and_makes_the_run_of_that_cell(tmp_path, capsys, monkeypatch, number, on):
    table = evaluation.TABLES[number]
    if on != "paper" and table.source:
        assert run(evaluation, "--table", number, tmp_path, "--on", on) == 2 and "runs on imagenet" in one_line(capsys)
        return
    assert run(evaluation, "--table", number, tmp_path, *(["--on", on] if on != "paper" else [])) == 0
    commands = commands_in(capsys.readouterr().out)
    made, targets = [], {}
    for command in commands:
        words = shlex.split(command)
        if words[1] == "eval.py":
            args = evaluation.parse(words[2:])
            targets[args.paths[0]] = args.dataset
            continue
        args = stage2.parse(words[2:])
        assert args.seeds == [1, 2, 3] and args.output == str(tmp_path) and args.root == (None if on == "toy" else "$DATA")
        ships = (evaluation.SETTINGS_FILE.parent / "descriptions" / f"{args.dataset}.json").exists()
        assert args.descriptions == (None if ships or args.template != "anchoropt" else f"$DESCRIPTIONS/{args.dataset}.json")
        args.descriptions = None
        defaults = evaluation.default_settings(args.dataset, args.baseline, args.template, args.one_stage)
        made.append(evaluation.resolve(args, defaults))
    datasets = ("imagenet",) if table.source else table.datasets if on == "paper" else (on,)
    wanted = []
    for row in table.rows:
        for dataset in datasets:
            one_stage = row.changed.get("one_stage", False)
            settings = evaluation.default_settings(dataset, row.baseline, row.template, one_stage) | row.changed
            wanted += [settings] if settings not in wanted else []
    assert len(made) == len(wanted) and all(settings in made for settings in wanted)
    if table.source:
        assert list(targets.values()) == [list(table.datasets[1:])] * len(table.rows)
        assert list(targets) == [f"{evaluation.run_folder(tmp_path, settings, 1).parent}*" for settings in wanted]


def transfer(folder, target, final, **changed):
    settings = json.loads((folder / "results.json").read_text())["settings"]
    (folder / f"eval-{target}.json").write_text(json.dumps(
        {"dataset": "imagenet", "target": target, "seed": int(folder.name[4:]), "settings": settings,
         "accuracy": {"normal": final - 1, "final": final}, "prompt": "0" * 8} | changed))


def test_tables_2_and_4_read_what_runs_on_imagenet_left(tmp_path, capsys):
    row = evaluation.TRANSFER[2]
    assert row.label == "CoOp + AnchorOPT"
    for seed in (1, 2):
        folder = made_up(tmp_path, "imagenet", row, seed, 70.0 + seed)
        transfer(folder, "caltech101", 90.0 + seed)
        transfer(folder, "imagenet_a", 50.0)
        if seed == 1:
            transfer(folder, "dtd", 40.0)
    folder = made_up(tmp_path, "imagenet", evaluation.METHODS[2], 1)                    # base classes: not of these tables
    transfer(folder, "caltech101", 1.0)
    assert run(evaluation, "--table", "2", tmp_path) == 0
    text = capsys.readouterr().out
    rows = printed_rows(text)
    assert rows["imagenet", row.label] == ["71.50", "71.33", "+0.17", "seeds 1, 2"]
    assert rows["caltech101", row.label] == ["91.50", "94.65", "-3.15", "seeds 1, 2"]
    assert rows["dtd", row.label] == ["40.00", "46.93", "-6.93", "seed 1"]
    assert rows["average", row.label] == ["65.75", "66.93", "-", "2 of 10 datasets"]
    assert rows["average", "TCP"] == ["-", "66.29", "-", "paper only"]
    (command,) = [line for line in commands_in(text) if "eval.py" in line and "coop-anchoropt" in line and "/coop" in line]
    assert command == (f"python eval.py {folder.parent.parent / 'coop-anchoropt,classes=all'} --dataset oxford_pets "
                       "stanford_cars oxford_flowers food101 fgvc_aircraft sun397 eurosat ucf101 --root $DATA")
    assert run(evaluation, "--table", "4", tmp_path) == 0
    rows = printed_rows(capsys.readouterr().out)
    assert rows["imagenet_a", row.label] == ["50.00", "51.64", "-1.64", "seeds 1, 2"]
    assert rows["average", row.label] == ["50.00", "60.79", "-", "1 of 4 datasets"]


def test_runs_with_another_clip_or_descriptions_count_and_are_named_never_mixed(tmp_path, capsys):
    row = evaluation.METHODS[2]
    made_up(tmp_path, "dtd", row, 1, 70.0, 50.0, descriptions="mine-12345678")
    made_up(tmp_path, "dtd", row, 1, 60.0, 40.0, descriptions="mine-12345678", clip="other-87654321")
    made_up(tmp_path, "dtd", row, 2, 60.0, 40.0, descriptions="mine-12345678", clip="other-87654321")
    assert run(evaluation, "--table", "1", tmp_path) == 0
    text = capsys.readouterr().out
    assert printed_rows(text)["dtd", row.label][0] == "70.00" and printed_rows(text)["dtd", row.label][-1] == "seed 1"
    notes = [line for line in text.splitlines() if line.startswith("- ")]
    assert any("with descriptions mine-12345678" in note for note in notes)
    assert any("clip=other-87654321" in note and "left out" in note for note in notes)


def test_csv_holds_what_the_markdown_shows(tmp_path, capsys):
    made_up(tmp_path, "imagenet", evaluation.Row("", changed={"tau": 0.5}), 1, 76.0, 71.0)
    assert run(evaluation, "--table", "s3", tmp_path, "--csv") == 0
    rows = {row["method"]: row for row in csv.DictReader(io.StringIO(capsys.readouterr().out))}
    assert list(rows) == ["tau = 0.1", "tau = 0.5", "tau = 1", "tau = 2", "tau = 4"]
    assert rows["tau = 0.5"] == {"table": "S3", "dataset": "imagenet", "method": "tau = 0.5",
                                 "base": "76.00", "base_paper": "76.10", "base_difference": "-0.10",
                                 "novel": "71.00", "novel_paper": "71.39", "novel_difference": "-0.39",
                                 "hm": "73.41", "hm_paper": "73.67", "hm_difference": "-0.26", "runs": "seed 1"}
    assert rows["tau = 4"]["hm"] == "" and rows["tau = 4"]["hm_paper"] == "73.70"
    assert run(evaluation, "--table", "S3", tmp_path, "--csv", tmp_path / "t.csv") == 0
    assert {row["method"]: row for row in csv.DictReader(open(tmp_path / "t.csv"))} == rows
    assert "## Table S3" in capsys.readouterr().out


def test_the_same_run_named_twice_counts_once(tmp_path, capsys):
    folder = made_up(tmp_path, "dtd")
    assert len(evaluation.load_results([tmp_path, folder, folder / "results.json"])) == 1


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"base": 3}', "null", "NaN accuracy", "unlike readings", "no settings"])
def test_a_damaged_results_file_ends_in_one_line(tmp_path, capsys, damage):
    path = made_up(tmp_path, "dtd") / "results.json"
    result = json.loads(path.read_text())
    if damage == "NaN accuracy":
        result["base"]["final"] = float("nan")
    elif damage == "unlike readings":
        del result["novel"]["normal"]
    elif damage == "no settings":
        result["settings"] = "default"
    path.write_text(json.dumps(result) if " " in damage and damage[0] != "{" else damage)
    for options in ([], ["--table", "1"], ["--figure", "4"]):
        assert run(evaluation, tmp_path, *options) == 2
        assert str(path) in one_line(capsys)


def test_bad_options_end_in_one_line(tmp_path, capsys):
    made_up(tmp_path, "dtd")
    for argv, words in ((["--table", "1", tmp_path / "nowhere"], "does not exist"),
                        (["--table", "6", tmp_path, "--on", "imagenetv2"], "training images"),
                        (["--table", "6", tmp_path, "--on", "nothing"], "training images"),
                        ([tmp_path, "--dataset", "dtd"], "holds no prompt.pt")):
        assert run(evaluation, *argv) == 2 and words in one_line(capsys)
    for argv in (["--table", "S4", tmp_path], ["--table", "1", "--figure", "4", tmp_path], ["--csv", "x", tmp_path],
                 ["--on", "toy", tmp_path], ["--dataset", "dtd", "--test-batch", "-1", "--", tmp_path]):
        with pytest.raises(SystemExit, match="2"):
            run(evaluation, *argv)
    capsys.readouterr()


def test_copies_of_a_run_in_two_trees_are_two_runs(tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(evaluation, "plot_position_matrix",
                        lambda W, path, n_anchor: (drawn.append(list(W)), pathlib.Path(path).write_text("picture")))
    for tree in ("a", "b"):
        made_up(tmp_path / tree, "dtd")
    assert run(evaluation, tmp_path / "a", tmp_path / "b") == 0
    out = capsys.readouterr().out
    assert out.count("dtd, coop-anchoropt, seed 1") == 2 and "seeds" not in out
    assert run(evaluation, "--summary", "final", tmp_path) == 0 and "±" not in capsys.readouterr().out
    assert run(evaluation, "--figure", "4", tmp_path, "--output", tmp_path / "a.png") == 0
    assert drawn == [[f"dtd\n{tmp_path / tree / 'dtd' / 'coop-anchoropt'}" for tree in ("a", "b")]]


def test_figure_4_draws_the_lowest_seed_of_every_run(tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(evaluation, "plot_position_matrix",
                        lambda W, path, n_anchor: (drawn.append((W, n_anchor)), pathlib.Path(path).write_text("picture")))
    for seed in (3, 2):
        made_up(tmp_path, "dtd", seed=seed)
    made_up(tmp_path, "eurosat")
    made_up(tmp_path, "eurosat", evaluation.METHODS[0])                                # plain: has no matrix
    assert run(evaluation, "--figure", "4", tmp_path, "--output", tmp_path / "a.png") == 0
    assert "seed2" in (out := capsys.readouterr().out) and "seed3" not in out and (tmp_path / "a.png").read_text() == "picture"
    made_up(tmp_path, "eurosat", tau=0.5)
    assert run(evaluation, "--figure", "4", tmp_path, "--output", tmp_path / "b.png") == 0
    assert drawn[0] == ({"dtd": [[1, 0], [0, 1]], "eurosat": [[1, 0], [0, 1]]}, 1)
    assert list(drawn[1][0]) == ["dtd\ncoop-anchoropt", "eurosat\ncoop-anchoropt", "eurosat\ncoop-anchoropt,tau=0.5"]
    made_up(tmp_path, "dtd", anchor_length=2)
    capsys.readouterr()
    assert run(evaluation, "--figure", "4", tmp_path) == 2 and "1 and 2 anchor tokens" in one_line(capsys)
    assert run(evaluation, "--figure", "4", tmp_path / "eurosat" / "coop-plain") == 2 and "no run with" in one_line(capsys)


def test_figure_4_is_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    made_up(tmp_path, "dtd")
    assert run(evaluation, "--figure", "4", tmp_path, "--output", tmp_path / "a.png") == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


# ----------------------------------------------------------------------------------- prompts on other datasets

VARIANTS = evaluation.VARIANTS
TARGETS = [name for name in worlds.TREES if name != "imagenet"]                  # the fourteen others


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Small trees, a CLIP of random weights, and a run of one epoch on all of imagenet's classes."""
    folder = tmp_path_factory.mktemp("world")
    names = {"imagenet": worlds.imagenet_tree(folder / "data", per_class=4, classes=10)}
    for target in TARGETS:
        names[target] = worlds.TREES[target](folder / "data", *((4,) if target in VARIANTS else (8, 5)))
    torch.save(tiny_clip(seed=3).state_dict(), folder / "tiny.pt")
    worlds.write_descriptions(folder / "said.json", names["imagenet"])
    assert train(folder) == 0
    return folder, names


def train(folder, *options):
    return run(stage2, "--dataset", "imagenet", "--classes", "all", "--root", folder / "data", "--clip", folder / "tiny.pt",
               "--descriptions", folder / "said.json", "--epochs", 1, "--anchor-epochs", 1, "--device", "cpu", "--no-plot",
               "--output", folder / "output", *options)


def run_in(folder, pattern="coop-anchoropt,*classes=all*"):
    (found,) = (folder / "output" / "imagenet").glob(pattern + "/seed1")
    return found


def evaluate_on(folder, path, *options):
    return run(evaluation, path, "--root", folder / "data", "--clip", folder / "tiny.pt", "--device", "cpu", *options)


def by_hand(folder, path, target, names):
    """The three readings from prompt.pt with CLIP's own 77-position encoder: dict reading -> (lowest, highest) accuracy.

    Two ImageNet classes of one name have one text feature: rounding picks between them, so a tie may go either way.
    """
    saved, model = torch.load(path / "prompt.pt", weights_only=True), prompts.load_clip(str(folder / "tiny.pt"))
    anchors, logits = saved["state"]["template.anchor_tokens"], saved["state"]["template.position_matrix.logits"]
    W = torch.eye(len(logits))[logits.argmax(-1)]
    normal = W @ torch.cat([saved["state"]["template.soft_tokens"], anchors])
    anchor = torch.cat([anchors, model.token_embedding.weight[TOKENIZER.encode("of")]])
    v = {"normal": unit(encode_77(model, normal, names)), "anchor": unit(encode_77(model, anchor, names))}
    items = data.load_dataset(target, folder / "data").test
    images = torch.stack([data.test_transform(32)(data.load_image(item.source)) for item in items])
    u, labels = unit(model.encode_image(images)), torch.tensor([item.label for item in items])
    scores = {reading: u @ features.T for reading, features in v.items()}
    scores["ensemble"] = (scores["normal"] + scores["anchor"]) / 2
    found = {}
    for reading, score in scores.items():
        own = score[range(len(labels)), labels]
        others = score.scatter(1, labels[:, None], -9).amax(-1)
        found[reading] = [100 * (own > others + slack).double().mean().item() for slack in (1e-5, -1e-5)]
    return found, len(labels)


def test_a_run_on_a_split_of_its_own_is_tested_on_its_own_seeds_test_images(world, tmp_path, monkeypatch):
    folder, _ = world
    names = worlds.eurosat_tree(tmp_path / "data", per_class=10)
    [path.unlink() for path in (tmp_path / "data").rglob("split_*.json")]
    worlds.write_descriptions(tmp_path / "said.json", names)
    common = ["--root", tmp_path / "data", "--clip", folder / "tiny.pt", "--device", "cpu"]
    assert run(stage2, "--dataset", "eurosat", "--seeds", 2, "--descriptions", tmp_path / "said.json", "--epochs", 1,
               "--anchor-epochs", 1, "--no-plot", "--output", tmp_path / "output", *common) == 0
    tested, real = [], evaluation.evaluate_items
    monkeypatch.setattr(evaluation, "evaluate_items", lambda learner, settings, items, *rest: tested.append(items) or real(
        learner, settings, items, *rest))
    assert run(evaluation, next((tmp_path / "output" / "eurosat").glob("coop-*")), "--dataset", "eurosat", *common) == 0
    first, second = (data.load_dataset("eurosat", tmp_path / "data", seed).test for seed in (1, 2))
    assert tested == [second] and first != second


def test_maple_without_an_anchor_encodes_no_image_twice(monkeypatch):
    items = data.load_dataset("toy").test[:6]
    model = prompts.load_clip("toy")
    found = []
    for frozen in (evaluation.frozen_features, None):
        torch.manual_seed(0)
        settings = evaluation.default_settings("toy", "maple", "plain")
        learner = prompts.build_learner(settings, model, data.TOY_CLASSES)
        monkeypatch.setattr(evaluation, "frozen_features", frozen)
        if frozen:                                                          # by hand, with features that are there
            images = data.Images(items, data.test_transform(32))
            pixels = data.batches(images, range(6), 200)
            features, labels = frozen(model, "toy", images)
            found.append(evaluation.evaluate(learner, features, labels, None, True, pixels, 200))
        else:
            found.append(evaluation.evaluate_items(learner, settings, items))
    assert found[0] == found[1]


def test_a_run_on_imagenet_carries_its_prompt_and_anchor_to_other_datasets(world, capsys):
    folder, names = world
    path = run_in(folder)
    assert evaluate_on(folder, path, "--dataset", *TARGETS) == 0
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
        assert (result["images"], result["classes"], result["target"]) == (n, len(names[target]), target)
        assert result["dataset"] == "imagenet" and result["settings"]["classes"] == "all" and result["seed"] == 1
        shown = [cell.strip() for cell in line.strip("|").split("|")]
        assert shown[1:5] == ["1", target, str(len(names[target])), str(n)]
        assert shown[5:] == [f"{result['accuracy'][reading]:.2f}" for reading in evaluation.READINGS]
        differ += result["accuracy"]["normal"] != result["accuracy"]["ensemble"]
    assert differ >= 2 and len(names["imagenet_a"]) == 5
    assert not list(path.glob("*.part*")) and len(list(path.glob("eval-*.json"))) == len(TARGETS)


def test_finished_evaluations_skip_until_the_prompt_changes(world, capsys):
    folder, _ = world
    path = run_in(folder)
    assert evaluate_on(folder, folder / "output", "--dataset", "caltech101", "--overwrite") == 0     # a parent: all its runs
    file = path / "eval-caltech101.json"
    truth = json.loads(file.read_text())
    file.write_text(json.dumps(truth | {"accuracy": {"normal": 1.0, "final": 1.0}}))
    assert evaluate_on(folder, path, "--dataset", "caltech101") == 0
    assert "finished already" in (out := capsys.readouterr().out) and "1.00" in out
    file.write_text(json.dumps(truth | {"accuracy": {"final": 1.0}, "prompt": "another!"}))
    assert evaluation.load_transfer(path, "caltech101") is None
    assert evaluate_on(folder, path / "prompt.pt", "--dataset", "caltech101") == 0
    assert "finished already" not in capsys.readouterr().out and json.loads(file.read_text()) == truth
    file.write_text("{}")
    assert evaluate_on(folder, path, "--dataset", "caltech101") == 2 and "damaged" in one_line(capsys)
    assert evaluate_on(folder, path, "--dataset", "caltech101", "--overwrite") == 0 and json.loads(file.read_text()) == truth


def test_a_run_on_base_classes_is_evaluated_with_the_ensemble_and_says_so(world, capsys):
    folder, names = world
    assert train(folder, "--classes", "base") == 0
    (path,) = [path.parent for path in (folder / "output" / "imagenet").glob("coop-*/seed1/prompt.pt")
               if "classes" not in str(path)]
    capsys.readouterr()
    assert evaluate_on(folder, path, "--dataset", "imagenetv2") == 0
    assert "base classes alone" in capsys.readouterr().out
    result = json.loads((path / "eval-imagenetv2.json").read_text())
    assert result["accuracy"]["final"] == result["accuracy"]["ensemble"] and result["known"] is False


@pytest.mark.parametrize("options", [["--baseline", "maple", "--depth", 2], ["--baseline", "cocoop"], ["--baseline", "dept"],
                                     ["--arrangement", "after-class"], ["--baseline", "coop", "--template", "atprompt"],
                                     ["--baseline", "clip"]])
def test_every_kind_of_run_goes_to_other_datasets(world, tmp_path, capsys, options):
    folder, _ = world
    method = [word for word in options if word != "clip"]
    no_anchor = "atprompt" in options or "clip" in options
    extra = [] if no_anchor else ["--anchor-epochs", 1, "--descriptions", folder / "said.json"]
    assert run(stage2, "--dataset", "imagenet", "--classes", "all", "--root", folder / "data", "--clip", folder / "tiny.pt",
               *options, *([] if "clip" in method + options else ["--epochs", 1]), *extra, "--device", "cpu", "--no-plot",
               "--output", tmp_path) == 0
    assert evaluate_on(folder, tmp_path, "--dataset", "caltech101", "imagenet_sketch") == 0
    for target, rule in (("caltech101", "ensemble"), ("imagenet_sketch", "normal")):
        (file,) = tmp_path.rglob(f"eval-{target}.json")
        accuracy = json.loads(file.read_text())["accuracy"]
        assert set(accuracy) == ({"normal", "final"} if no_anchor else set(evaluation.READINGS))
        assert accuracy["final"] == accuracy["normal" if no_anchor else rule]


def test_the_base_class_head_of_dept_answers_only_for_the_classes_it_learnt(world, tmp_path):
    folder, names = world
    assert run(stage2, "--dataset", "imagenet", "--classes", "all", "--root", folder / "data", "--clip", folder / "tiny.pt",
               "--baseline", "dept", "--template", "plain", "--epochs", 1, "--device", "cpu", "--output", tmp_path) == 0
    (file,) = tmp_path.rglob("prompt.pt")
    saved = torch.load(file, weights_only=True)
    saved["state"]["head.weight"], saved["state"]["head.bias"] = torch.zeros(10, 64), 1e6 * torch.eye(10)[3]     # always class 3
    torch.save(saved, file)
    assert evaluate_on(folder, tmp_path, "--dataset", "imagenet_sketch", "caltech101") == 0
    assert names["imagenet_sketch"] == names["imagenet"]
    assert json.loads((file.parent / "eval-imagenet_sketch.json").read_text())["accuracy"]["final"] == 10.0
    with_head = json.loads((file.parent / "eval-caltech101.json").read_text())["accuracy"]["final"]
    torch.save(saved | {"state": saved["state"] | {"head.bias": torch.zeros(10)}}, file)
    assert evaluate_on(folder, tmp_path, "--dataset", "caltech101") == 0
    assert json.loads((file.parent / "eval-caltech101.json").read_text())["accuracy"]["final"] == with_head


def test_the_runs_own_settings_win_over_switches(world, tmp_path, capsys):
    folder, _ = world
    saved = torch.load(run_in(folder) / "prompt.pt", weights_only=True)
    saved["settings"]["dtype"] = "float32"
    torch.save(saved, tmp_path / "prompt.pt")
    assert evaluate_on(folder, tmp_path, "--dataset", "caltech101", "--dtype", "bfloat16") == 0
    assert "trained in float32" in capsys.readouterr().out
    assert json.loads((tmp_path / "eval-caltech101.json").read_text())["accuracy"] == pytest.approx(
        json.loads((run_in(folder) / "eval-caltech101.json").read_text())["accuracy"])


def test_each_run_is_evaluated_with_its_own_clip(world, tmp_path, monkeypatch):
    folder, _ = world
    saved, loaded, load_clip = torch.load(run_in(folder) / "prompt.pt", weights_only=True), [], evaluation.load_clip
    monkeypatch.setattr(evaluation, "load_clip", lambda *given: loaded.append(given[2]) or load_clip(*given))
    for seed, dtype in enumerate(("float32", "float32", "bfloat16")):
        (tmp_path / f"seed{seed}").mkdir()
        settings = saved["settings"] | {"dtype": dtype}
        torch.save(saved | {"settings": settings, "seed": seed}, tmp_path / f"seed{seed}" / "prompt.pt")
    assert evaluate_on(folder, tmp_path, "--dataset", "caltech101") == 0
    assert loaded == [torch.float32, torch.bfloat16] and len(list(tmp_path.rglob("eval-caltech101.json"))) == 3


def test_bad_prompts_and_clips_end_in_one_line(world, tmp_path, capsys):
    folder, _ = world
    good = torch.load(run_in(folder) / "prompt.pt", weights_only=True)
    identity = good["settings"]["clip"]

    def refused(*words, clip="tiny.pt", dataset="caltech101", root="data"):
        assert run(evaluation, tmp_path, "--dataset", dataset, "--root", folder / root, "--device", "cpu",
                   *(["--clip", folder / clip] if clip else [])) == 2
        error = one_line(capsys)
        assert all(word in error for word in words), error

    def damaged(**changed):
        torch.save(good | changed, tmp_path / "prompt.pt")

    damaged()
    torch.save(tiny_clip(seed=4, width=64, d=32).state_dict(), folder / "narrow.pt")
    refused(identity, "narrow-", clip="narrow.pt")                                      # says both
    refused(identity, "--clip", clip=None)
    damaged(settings=good["settings"] | {"clip": prompts.clip_identity(str(folder / "narrow.pt"))})
    refused("does not fit", clip="narrow.pt")                                           # another width
    damaged(state={key: value for key, value in good["state"].items() if "soft" not in key})
    refused("does not fit", "soft_tokens")
    damaged(state=good["state"] | {"template.soft_tokens": torch.zeros(2, 128)})
    refused("does not fit", "soft_tokens")
    damaged(state={key: value for key, value in good["state"].items() if "anchor" not in key})
    refused("does not fit", "anchor")
    damaged(settings={key: value for key, value in good["settings"].items() if key != "tau"})
    refused("does not fit", "tau")
    damaged(settings="default")
    refused("not a prompt.pt")
    torch.save([1, 2], tmp_path / "prompt.pt")
    refused("not a prompt.pt")
    (tmp_path / "prompt.pt").write_bytes(b"PK not quite")
    refused("could not be read")
    damaged()
    refused("did you mean", dataset="caltech")
    refused("missing", root="nowhere")
    assert not list(tmp_path.glob("eval-*"))


# ------------------------------------------------------------------------------------------ summary, feature cache

def test_summary_is_mean_and_standard_deviation_over_seeds(tmp_path, capsys):
    finals = {1: (60.0, 80.0), 2: (70.0, 82.0), 3: (65.0, 90.0)}
    for seed, (base, novel) in finals.items():
        folder = tmp_path / "toy" / "coop-plain" / f"seed{seed}"
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps({"dataset": "toy", "seed": seed, "settings": {}, "base": {"final": base},
                                                         "novel": {"final": novel}}))
    assert evaluation.main(["--summary", "final", str(tmp_path)]) == 0
    row = [line for line in capsys.readouterr().out.splitlines() if "coop-plain" in line][0]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == "65.00 ± 5.00" and cells[2] == "84.00 ± 5.29" and cells[4] == "3"          # sqrt((16 + 4 + 36) / 2)
    hms = [2 * b * n / (b + n) for b, n in finals.values()]
    assert cells[3].startswith(f"{2 * 65 * 84 / 149:.2f} ± ")
    assert float(cells[3].split("±")[1]) == pytest.approx(torch.tensor(hms, dtype=torch.float64).std().item(), abs=0.006)


def test_feature_cache_gives_the_same_features_and_is_never_stale(tmp_path, monkeypatch):
    worlds.dtd_tree(tmp_path / "data", per_class=4)
    items = data.load_dataset("dtd", tmp_path / "data").test
    model, other, cache = tiny_clip(), tiny_clip(seed=1), tmp_path / "cache"
    images = data.Images(items, data.test_transform(32))
    plain, labels = evaluation.frozen_features(model, "a", images)
    first, _ = evaluation.frozen_features(model, "a", images, cache=cache)
    (file,) = cache.iterdir()
    encoded = []
    encode = evaluation.image_features
    monkeypatch.setattr(evaluation, "image_features", lambda *a: encoded.append(1) or encode(*a))
    again, same = evaluation.frozen_features(model, "a", images, cache=cache)
    assert torch.equal(plain, first) and torch.equal(plain, again) and torch.equal(labels, same) and not encoded
    assert not torch.equal(plain, evaluation.frozen_features(other, "b", images, cache=cache)[0]) and len(encoded) == 1   # another CLIP
    larger = data.Images(items, data.test_transform(40))                                          # another transform
    monkeypatch.setattr(evaluation, "image_features", lambda *a: encoded.append(1) or (plain, labels))
    evaluation.frozen_features(model, "a", larger, cache=cache)
    assert len(encoded) == 2
    file.write_bytes(file.read_bytes()[:100])                                                     # damaged
    evaluation.frozen_features(model, "a", images, cache=cache)
    assert len(encoded) == 3
    os.utime(items[0].source, (1, 1))                                                             # a changed image
    evaluation.frozen_features(model, "a", images, cache=cache)
    assert len(encoded) == 4
