"""assets/settings.csv against its sources: the numbers stand here a second time, typed anew.

The tables: the authors' reproduction guides (docs/AnchorOPT.md and docs/ATPrompt.md of their
repository), the paper's S2.2, and the scripts of CoOp, MaPLe and DePT behind the printed baselines.
"""

import argparse
import hashlib
import re

import pytest

import stage1
import stage2
import worlds

# Stage I: epochs, MSE weight.
STAGE_1 = {
    "imagenet": (10, 1000), "caltech101": (100, 1000), "oxford_pets": (100, 1000),
    "stanford_cars": (40, 100), "oxford_flowers": (100, 1000), "food101": (20, 1000),
    "fgvc_aircraft": (20, 1000), "sun397": (20, 1000), "dtd": (100, 1000), "eurosat": (100, 1000),
    "ucf101": (100, 1000)}
DATASETS = tuple(STAGE_1)
BASELINES = ("coop", "cocoop", "maple", "dept")

# Stage II with AnchorOPT: M, epochs, CE, KD, T. stanford_cars with maple: the guide's T is 0.0.
ANCHOROPT = {
    "coop": {
        "imagenet": (6, 20, 100, 1000, 1), "caltech101": (4, 100, 100, 1000, 2),
        "oxford_pets": (4, 100, 100, 1000, 1), "stanford_cars": (8, 100, 100, 100, 4),
        "oxford_flowers": (4, 100, 100, 100, 2), "food101": (4, 20, 100, 1000, 4),
        "fgvc_aircraft": (4, 100, 100, 1, 4), "sun397": (8, 20, 100, 1, 2),
        "dtd": (4, 100, 100, 10, 4), "eurosat": (4, 100, 1, 0, 1),
        "ucf101": (8, 100, 100, 1000, 1)},
    "cocoop": {
        "imagenet": (4, 10, 100, 100, 4), "caltech101": (4, 20, 10, 1000, 4),
        "oxford_pets": (4, 20, 10, 100, 2), "stanford_cars": (4, 20, 100, 100, 4),
        "oxford_flowers": (4, 20, 10, 100, 4), "food101": (4, 20, 10, 100, 4),
        "fgvc_aircraft": (4, 20, 10, 100, 0.5), "sun397": (8, 10, 10, 1000, 2),
        "dtd": (4, 20, 10, 100, 4), "eurosat": (4, 20, 100, 100, 0.5),
        "ucf101": (4, 20, 10, 100, 0.1)},
    "maple": {
        "imagenet": (8, 5, 1, 100, 1), "caltech101": (8, 10, 10, 1000, 2),
        "oxford_pets": (8, 10, 1, 10, 0.5), "stanford_cars": (4, 20, 10, 0, 1),
        "oxford_flowers": (4, 20, 10, 100, 2), "food101": (8, 10, 1, 100, 1),
        "fgvc_aircraft": (4, 10, 1, 10, 4), "sun397": (4, 20, 10, 1000, 4),
        "dtd": (4, 20, 1, 10, 4), "eurosat": (4, 20, 1, 1, 2), "ucf101": (8, 10, 1, 1, 2)}}
# DePT with AnchorOPT: M, epochs, CE, W_cat. No distillation.
DEPT_ANCHOROPT = {
    "imagenet": (4, 10, 10, 0.5), "caltech101": (4, 10, 10, 0.5), "oxford_pets": (4, 10, 10, 0.5),
    "stanford_cars": (8, 20, 10, 0.6), "oxford_flowers": (8, 10, 10, 0.9),
    "food101": (4, 10, 10, 0.5), "fgvc_aircraft": (4, 20, 10, 0.6), "sun397": (8, 10, 10, 0.6),
    "dtd": (8, 10, 10, 0.8), "eurosat": (8, 20, 10, 0.9), "ucf101": (8, 10, 10, 0.8)}

# Batch, lr of a baseline; CoOp + AnchorOPT has its own (paper, S2.2.2).
STEP = {"coop": (32, 0.002), "cocoop": (1, 0.002), "maple": (4, 0.0035), "dept": (4, 0.0035)}
COOP_ANCHOROPT_STEP = (8, 0.0005)

# Plain baselines: M, epochs; what a dataset has in its own way.
PLAIN = {"coop": (4, 200), "cocoop": (4, 10), "maple": (2, 5), "dept": (4, 20)}
PLAIN_OWN = {("coop", "imagenet"): (4, 50)}

# ATPrompt: the same. No guide names dept on imagenet.
ATPROMPT = {"coop": (2, 100), "cocoop": (2, 10), "maple": (4, 5), "dept": (4, 10)}
ATPROMPT_OWN = {
    ("coop", "dtd"): (4, 100), ("coop", "imagenet"): (2, 10),
    ("cocoop", "ucf101"): (4, 10), ("cocoop", "stanford_cars"): (6, 10),
    ("cocoop", "oxford_flowers"): (6, 10), ("cocoop", "eurosat"): (6, 10),
    ("maple", "fgvc_aircraft"): (2, 5), ("maple", "ucf101"): (2, 5),
    ("maple", "caltech101"): (4, 10), ("maple", "oxford_pets"): (4, 10),
    ("maple", "oxford_flowers"): (4, 10), ("maple", "eurosat"): (4, 10),
    ("dept", "stanford_cars"): (2, 10), ("dept", "oxford_pets"): (2, 10)}
ATPROMPT_W_CAT = {"caltech101": 0.6, "dtd": 0.6, "stanford_cars": 0.6, "ucf101": 0.5}
ATTRIBUTES = {
    "imagenet": "color shape", "caltech101": "shape size", "oxford_pets": "playfulness energy",
    "stanford_cars": "luxury", "oxford_flowers": "color habitat growth",
    "food101": "flavor preparation", "fgvc_aircraft": "design range", "sun397": "function",
    "dtd": "pattern color design", "eurosat": "habitat", "ucf101": "precision"}

# Tables 2 and 4, all of ImageNet: M, epochs, batch, lr, CE.
ALL_CLASSES = {
    ("coop", "plain"): (4, 50, 32, 0.002, 1), ("cocoop", "plain"): (4, 10, 1, 0.002, 1),
    ("maple", "plain"): (2, 2, 4, 0.0026, 1), ("coop", "atprompt"): (4, 10, 32, 0.002, 1),
    ("cocoop", "atprompt"): (4, 5, 1, 0.002, 1), ("maple", "atprompt"): (4, 2, 4, 0.0026, 1),
    ("coop", "anchoropt"): (4, 20, 32, 0.002, 1)}

METHOD = ("soft_tokens", "epochs", "batch_size", "lr", "lambda_1")
COMMON = {"classes", "shots", "clip", "dtype", "dataset", "baseline", "template", *METHOD}
OF_BASELINE = {"coop": set(), "cocoop": set(), "maple": {"depth"}, "dept": {"w_cat"}}
OF_ANCHOROPT = {
    "anchor_length", "preposition", "descriptions", "max_descriptions", "anchor_epochs",
    "anchor_lr", "anchor_weight", "one_stage", "anchor", "arrangement", "tau", "test_position",
    "soft_W", "draw", "ensemble", "feature_at", "lambda_2", "temperature"}

settings_of = stage1.default_settings
each_dataset = pytest.mark.parametrize("dataset", DATASETS)
each_baseline = pytest.mark.parametrize("baseline", BASELINES)


def values(settings, *keys):
    return tuple(settings[key] for key in keys)


def check_common(settings, baseline, own, depth=9):
    """What depends on the baseline alone; and the cell has these settings and no others."""
    assert set(settings) == COMMON | OF_BASELINE[baseline] | own
    assert values(settings, "shots", "clip", "dtype") == (16, "ViT-B/16", "default")
    assert settings.get("depth") == (depth if baseline == "maple" else None)


@each_dataset
@each_baseline
def test_plain_baselines_run_as_the_scripts_behind_their_printed_figures(baseline, dataset):
    settings = settings_of(dataset, baseline, "plain")
    expected = PLAIN_OWN.get((baseline, dataset), PLAIN[baseline])
    assert values(settings, *METHOD) == (*expected, *STEP[baseline], 1)
    assert settings.get("start_words") == (None if baseline == "dept" else "a photo of a")
    assert settings.get("w_cat") == (0.7 if baseline == "dept" else None)
    check_common(settings, baseline, set() if baseline == "dept" else {"start_words"})


@each_dataset
@each_baseline
def test_atprompt_runs_as_its_guide_says(baseline, dataset):
    settings = settings_of(dataset, baseline, "atprompt")
    expected = ATPROMPT_OWN.get((baseline, dataset), ATPROMPT[baseline])
    assert values(settings, *METHOD) == (*expected, *STEP[baseline], 1)
    assert settings["attributes"] == ATTRIBUTES[dataset].split()
    if baseline == "dept":
        assert settings["w_cat"] == ATPROMPT_W_CAT.get(dataset, 0.7)
    check_common(settings, baseline, {"attributes"})


@each_dataset
@each_baseline
def test_anchoropt_runs_as_its_guide_says(baseline, dataset):
    settings = settings_of(dataset, baseline, "anchoropt")
    if baseline == "dept":
        M, epochs, ce, w_cat = DEPT_ANCHOROPT[dataset]
        kd, T = 0, 1
        assert settings["w_cat"] == w_cat
    else:
        M, epochs, ce, kd, T = ANCHOROPT[baseline][dataset]
    step = COOP_ANCHOROPT_STEP if baseline == "coop" else STEP[baseline]
    assert values(settings, *METHOD, "lambda_2", "temperature") == (M, epochs, *step, ce, kd, T)
    check_common(settings, baseline, OF_ANCHOROPT)
    # Stage I.
    assert values(settings, "anchor_epochs", "anchor_weight") == STAGE_1[dataset]
    sentences = 5 if dataset == "imagenet" else 10
    assert values(settings, "anchor_lr", "max_descriptions") == (0.002, sentences)
    assert values(settings, "anchor_length", "preposition", "tau") == (1, "of", 1)
    # The paper's choices: one hard sample of W a step, the argmax in testing, Eq. 1's logits.
    assert values(settings, "arrangement", "test_position", "soft_W", "draw", "ensemble",
                  "feature_at") == ("adaptive", "argmax", False, "step", "logits", "eot")


@each_baseline
@pytest.mark.parametrize("template", ("plain", "atprompt", "anchoropt"))
def test_tables_2_and_4_have_settings_of_their_own_where_a_source_says_so(baseline, template):
    of_all = {dataset: settings_of(dataset, baseline, template, {"classes": "all"})
              for dataset in DATASETS}
    base = {dataset: settings_of(dataset, baseline, template) for dataset in DATASETS}
    if (baseline, template) in ALL_CLASSES:
        settings = of_all.pop("imagenet")
        assert values(settings, *METHOD) == ALL_CLASSES[baseline, template]
        assert settings.get("depth") == (3 if baseline == "maple" else None)
        if template == "anchoropt":
            assert values(settings, "lambda_2", "temperature", "max_descriptions") == (1, 1, 5)
    assert of_all == {dataset: base[dataset] for dataset in of_all}


@each_baseline
def test_a_dataset_of_ones_own_gets_what_most_of_the_eleven_have(baseline):
    settings = settings_of("my_flowers", baseline, "anchoropt")
    for key in ("soft_tokens", "epochs", "lambda_1", "anchor_epochs", "anchor_weight"):
        found = [settings_of(dataset, baseline, "anchoropt")[key] for dataset in DATASETS]
        assert found.count(settings[key]) == max(map(found.count, found)), key


@each_baseline
def test_the_toy_world_has_a_clip_and_settings_of_its_own(baseline):
    settings = settings_of("toy", baseline, "anchoropt")
    assert values(settings, "clip", "epochs", "batch_size", "anchor_epochs") == ("toy", 20, 8, 30)
    assert settings["lambda_2"] == {"coop": 100, "dept": 0}.get(baseline, 1000)


@pytest.mark.parametrize("given, gone", [
    ({"one_stage": True}, {"anchor_epochs", "anchor", "lambda_2", "temperature"}),
    ({"anchor": "a.pt"}, {"anchor_epochs", "descriptions", "max_descriptions", "anchor_lr",
                          "anchor_weight"}),
    ({"arrangement": "before"}, {"tau", "test_position", "soft_W", "draw"})])
def test_what_is_given_decides_what_else_there_is_to_set(given, gone):
    usual = settings_of("dtd", "coop", "anchoropt")
    own = settings_of("dtd", "coop", "anchoropt", given)
    assert set(usual) - set(own) == gone
    assert own == {key: usual[key] for key in own}


def test_zero_shot_clip_has_the_fields_prompt_and_nothing_to_learn():
    settings = settings_of("dtd", "clip", "anchoropt")
    assert set(settings) == COMMON - set(METHOD) | {"prompt"}
    assert values(settings, "template", "prompt") == ("plain", "{} texture.")
    assert settings_of("my_flowers", "clip", "plain")["prompt"] == "a photo of a {}."


NAMES = {"coop": "CoOp", "cocoop": "CoCoOp", "maple": "MaPLe", "dept": "DePT",
         "atprompt": "ATPrompt", "anchoropt": "AnchorOPT"}
SOURCE = r"docs/\w+\.md|paper S2|repository, |toy row|one's own"


def test_every_row_names_its_source_and_there_the_place_of_its_own_method():
    for row in stage1.SETTINGS_ROWS:
        assert re.search(SOURCE, row["source"]), row
        section = re.search(r"(\w+)\+(\w+)", row["source"])
        if section and row["baseline"] != "*" and not row["source"].startswith("no guide names it"):
            assert section.groups() == (NAMES[row["baseline"]], NAMES[row["template"]]), row
    assert {row["dataset"] for row in stage1.SETTINGS_ROWS} == {*DATASETS, "toy", "*"}
    assert set(stage1.ELEVEN) == set(DATASETS)


def resolved(baseline="coop", template="anchoropt", **given):
    """(settings, changed) of a cell on dtd with these options; None is one that is not given."""
    return stage1.resolve(argparse.Namespace(**given), "dtd", baseline, template)


@pytest.mark.parametrize("given, changed", [
    ({"tau": 0.5, "epochs": 100, "lambda_1": None}, {"tau": 0.5}),      # 100 epochs are its own
    ({"classes": "all"}, {"classes": "all"}),
    ({"arrangement": "before"}, {"arrangement": "before"})])
def test_an_option_is_set_and_named_where_it_is_off_the_cells_default(given, changed):
    settings, found = resolved(**given)
    assert settings == settings_of("dtd", "coop", "anchoropt", given) | changed
    assert found == changed


def test_files_are_named_by_content_and_an_anchor_has_a_length_and_a_word(tmp_path):
    file = tmp_path / "mine.pt"
    file.write_bytes(b"x")
    name = f"mine-{hashlib.sha256(b'x').hexdigest()[:8]}"
    assert resolved(descriptions=str(file))[1] == {"descriptions": name}
    of_anchor = {"anchor_length": 2, "preposition": "sun"}
    assert resolved(anchor=str(file), **of_anchor)[1] == {"anchor": name} | of_anchor


@pytest.mark.parametrize("cell, given, option", [
    (("coop", "plain"), {"one_stage": True}, "--one-stage"),
    (("coop", "anchoropt"), {"depth": 3}, "--depth"),
    (("coop", "anchoropt"), {"attributes": ["color"]}, "--attributes"),
    (("clip", "plain"), {"epochs": 3}, "--epochs"),
    (("coop", "anchoropt"), {"one_stage": True, "temperature": 2.0}, "--temperature"),
    (("coop", "anchoropt"), {"arrangement": "middle", "soft_W": True}, "--soft-W"),
    (("coop", "anchoropt"), {"anchor": __file__, "anchor_epochs": 3}, "--anchor-epochs"),
    (("coop", "anchoropt"), {"anchor": "no/such/file"}, "no/such/file")])
def test_an_option_without_meaning_is_refused(cell, given, option):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        resolved(*cell, **given)
    worlds.one_line(error, option)


@pytest.mark.parametrize("option, wrong, right", [
    ("--shots", "0", "1"), ("--soft-tokens", "1.5", "2"), ("--lr", "inf", "1.0"),
    ("--tau", "nan", "9.0"), ("--w-cat", "1.1", "1.0"), ("--draw", "twice", "once")])
def test_values_out_of_range_are_refused_in_one_line(option, wrong, right, capsys):
    parser = stage1.make_parser("x.py", "", stage2.GROUPS)
    given = vars(parser.parse_args([option, right]))
    assert str(given[option[2:].replace("-", "_")]) == right
    with pytest.raises(SystemExit) as error:
        parser.parse_args([option, wrong])
    assert error.value.code == 2
    worlds.one_line(capsys.readouterr().err, option, wrong)
