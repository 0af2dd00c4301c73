"""assets/settings.csv against its sources: the numbers stand here a second time, typed anew.

The tables: the authors' reproduction guides (docs/AnchorOPT.md and docs/ATPrompt.md of their
repository), the paper's S2.2, and the scripts of CoOp, MaPLe and DePT behind the printed baselines.
"""

import csv
import re

import pytest

import data
import stage1

# The columns, in this order, of every table below.
DATASETS = ("imagenet", "caltech101", "oxford_pets", "stanford_cars", "oxford_flowers", "food101",
            "fgvc_aircraft", "sun397", "dtd", "eurosat", "ucf101")
BASELINES = ("coop", "cocoop", "maple", "dept")

# Stage I: epochs, MSE weight.
STAGE_1 = {
    "imagenet": (10, 1000), "caltech101": (100, 1000), "oxford_pets": (100, 1000),
    "stanford_cars": (40, 100), "oxford_flowers": (100, 1000), "food101": (20, 1000),
    "fgvc_aircraft": (20, 1000), "sun397": (20, 1000), "dtd": (100, 1000), "eurosat": (100, 1000),
    "ucf101": (100, 1000)}

# Stage II with AnchorOPT: M, epochs, CE, KD, T.
ANCHOROPT = {
    "coop": {
        "imagenet": (6, 20, 100, 1000, 1),
        "caltech101": (4, 100, 100, 1000, 2),
        "oxford_pets": (4, 100, 100, 1000, 1),
        "stanford_cars": (8, 100, 100, 100, 4),
        "oxford_flowers": (4, 100, 100, 100, 2),
        "food101": (4, 20, 100, 1000, 4),
        "fgvc_aircraft": (4, 100, 100, 1, 4),
        "sun397": (8, 20, 100, 1, 2),
        "dtd": (4, 100, 100, 10, 4),
        "eurosat": (4, 100, 1, 0, 1),
        "ucf101": (8, 100, 100, 1000, 1)},
    "cocoop": {
        "imagenet": (4, 10, 100, 100, 4),
        "caltech101": (4, 20, 10, 1000, 4),
        "oxford_pets": (4, 20, 10, 100, 2),
        "stanford_cars": (4, 20, 100, 100, 4),
        "oxford_flowers": (4, 20, 10, 100, 4),
        "food101": (4, 20, 10, 100, 4),
        "fgvc_aircraft": (4, 20, 10, 100, 0.5),
        "sun397": (8, 10, 10, 1000, 2),
        "dtd": (4, 20, 10, 100, 4),
        "eurosat": (4, 20, 100, 100, 0.5),
        "ucf101": (4, 20, 10, 100, 0.1)},
    "maple": {
        "imagenet": (8, 5, 1, 100, 1),
        "caltech101": (8, 10, 10, 1000, 2),
        "oxford_pets": (8, 10, 1, 10, 0.5),
        "stanford_cars": (4, 20, 10, 0, 1),         # the guide's T is 0.0: nothing is distilled
        "oxford_flowers": (4, 20, 10, 100, 2),
        "food101": (8, 10, 1, 100, 1),
        "fgvc_aircraft": (4, 10, 1, 10, 4),
        "sun397": (4, 20, 10, 1000, 4),
        "dtd": (4, 20, 1, 10, 4),
        "eurosat": (4, 20, 1, 1, 2),
        "ucf101": (8, 10, 1, 1, 2)}}

# DePT with AnchorOPT: M, epochs, CE, W_cat. No distillation.
DEPT_ANCHOROPT = {
    "imagenet": (4, 10, 10, 0.5), "caltech101": (4, 10, 10, 0.5), "oxford_pets": (4, 10, 10, 0.5),
    "stanford_cars": (8, 20, 10, 0.6), "oxford_flowers": (8, 10, 10, 0.9),
    "food101": (4, 10, 10, 0.5), "fgvc_aircraft": (4, 20, 10, 0.6), "sun397": (8, 10, 10, 0.6),
    "dtd": (8, 10, 10, 0.8), "eurosat": (8, 20, 10, 0.9), "ucf101": (8, 10, 10, 0.8)}

# Batch, lr of a baseline; CoOp + AnchorOPT has its own (paper, S2.2.2).
STEP = {"coop": (32, 0.002), "cocoop": (1, 0.002), "maple": (4, 0.0035), "dept": (4, 0.0035)}
COOP_ANCHOROPT_STEP = (8, 0.0005)

# Plain baselines: M, epochs.
PLAIN = {"coop": (4, 200), "cocoop": (4, 10), "maple": (2, 5), "dept": (4, 20)}
START_WORDS = {"coop": "a photo of a", "cocoop": "a photo of a", "maple": "a photo of a"}

# ATPrompt: M, epochs; what a dataset has in its own way.
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
    "imagenet": ["color", "shape"], "caltech101": ["shape", "size"],
    "oxford_pets": ["playfulness", "energy"], "stanford_cars": ["luxury"],
    "oxford_flowers": ["color", "habitat", "growth"], "food101": ["flavor", "preparation"],
    "fgvc_aircraft": ["design", "range"], "sun397": ["function"],
    "dtd": ["pattern", "color", "design"], "eurosat": ["habitat"], "ucf101": ["precision"]}

METHOD = ("soft_tokens", "epochs", "batch_size", "lr", "lambda_1")


def settings_of(dataset, baseline, template, classes="base"):
    return stage1.default_settings(dataset, baseline, template, classes)


def values(settings, keys):
    return tuple(settings[key] for key in keys)


def check_what_depends_on_the_baseline_alone(settings, baseline, depth=9):
    assert settings.get("depth") == (depth if baseline == "maple" else None)
    assert ("w_cat" in settings) == (baseline == "dept")
    assert values(settings, ("shots", "clip")) == (16, "ViT-B/16")


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("baseline", BASELINES)
def test_plain_baselines_run_as_the_scripts_behind_their_printed_figures(baseline, dataset):
    settings = settings_of(dataset, baseline, "plain")
    M, epochs = PLAIN[baseline]
    if (baseline, dataset) == ("coop", "imagenet"):
        epochs = 50
    assert values(settings, METHOD) == (M, epochs, *STEP[baseline], 1)
    assert settings.get("start_words") == START_WORDS.get(baseline)
    assert settings.get("w_cat") == (0.7 if baseline == "dept" else None)
    assert not {"lambda_2", "temperature", "attributes", "anchor_epochs"} & set(settings)
    check_what_depends_on_the_baseline_alone(settings, baseline)


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("baseline", BASELINES)
def test_atprompt_runs_as_its_guide_says(baseline, dataset):
    settings = settings_of(dataset, baseline, "atprompt")
    M, epochs = ATPROMPT_OWN.get((baseline, dataset), ATPROMPT[baseline])
    assert values(settings, METHOD) == (M, epochs, *STEP[baseline], 1)
    assert settings["attributes"] == ATTRIBUTES[dataset]
    if baseline == "dept":
        assert settings["w_cat"] == ATPROMPT_W_CAT.get(dataset, 0.7)
    assert not {"lambda_2", "temperature", "start_words", "anchor_epochs"} & set(settings)
    check_what_depends_on_the_baseline_alone(settings, baseline)


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("baseline", ("coop", "cocoop", "maple"))
def test_anchoropt_runs_as_its_guide_says(baseline, dataset):
    settings = settings_of(dataset, baseline, "anchoropt")
    M, epochs, ce, kd, T = ANCHOROPT[baseline][dataset]
    step = COOP_ANCHOROPT_STEP if baseline == "coop" else STEP[baseline]
    assert values(settings, METHOD) == (M, epochs, *step, ce)
    assert values(settings, ("lambda_2", "temperature")) == (kd, T)
    check_what_depends_on_the_baseline_alone(settings, baseline)


@pytest.mark.parametrize("dataset", DATASETS)
def test_dept_with_anchoropt_runs_as_its_guide_says(dataset):
    settings = settings_of(dataset, "dept", "anchoropt")
    M, epochs, ce, w_cat = DEPT_ANCHOROPT[dataset]
    assert values(settings, METHOD) == (M, epochs, *STEP["dept"], ce)
    assert values(settings, ("lambda_2", "w_cat")) == (0, w_cat)
    check_what_depends_on_the_baseline_alone(settings, "dept")


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("baseline", BASELINES)
def test_every_anchor_is_learnt_as_the_guide_says(baseline, dataset):
    settings = settings_of(dataset, baseline, "anchoropt")
    epochs, weight = STAGE_1[dataset]
    descriptions = 5 if dataset == "imagenet" else 10
    assert values(settings, ("anchor_epochs", "anchor_weight", "anchor_lr", "max_descriptions")) \
        == (epochs, weight, 0.002, descriptions)
    assert values(settings, ("anchor_length", "preposition", "tau", "arrangement")) \
        == (1, "of", 1, "adaptive")
    assert not {"start_words", "attributes"} & set(settings)


# Tables 2 and 4, all of ImageNet: M, epochs, batch, lr, CE.
ALL_CLASSES = {
    ("coop", "plain"): (4, 50, 32, 0.002, 1),
    ("cocoop", "plain"): (4, 10, 1, 0.002, 1),
    ("maple", "plain"): (2, 2, 4, 0.0026, 1),
    ("coop", "atprompt"): (4, 10, 32, 0.002, 1),
    ("cocoop", "atprompt"): (4, 5, 1, 0.002, 1),
    ("maple", "atprompt"): (4, 2, 4, 0.0026, 1),
    ("coop", "anchoropt"): (4, 20, 32, 0.002, 1)}


@pytest.mark.parametrize("baseline, template", ALL_CLASSES)
def test_tables_2_and_4_have_settings_of_their_own(baseline, template):
    settings = settings_of("imagenet", baseline, template, "all")
    assert settings["classes"] == "all"
    assert values(settings, METHOD) == ALL_CLASSES[baseline, template]
    words = "a photo of a" if template == "plain" else None
    assert settings.get("start_words") == words
    check_what_depends_on_the_baseline_alone(settings, baseline, depth=3)
    if template == "anchoropt":
        assert values(settings, ("lambda_2", "temperature", "max_descriptions")) == (1, 1, 5)
        assert values(settings, ("anchor_epochs", "anchor_weight")) == STAGE_1["imagenet"]


@pytest.mark.parametrize("baseline, template", [
    ("cocoop", "anchoropt"), ("maple", "anchoropt"), *(("dept", name) for name in
                                                       ("plain", "atprompt", "anchoropt"))])
def test_cells_without_a_source_run_on_all_classes_as_on_base_classes(baseline, template):
    base = settings_of("imagenet", baseline, template)
    assert settings_of("imagenet", baseline, template, "all") == base | {"classes": "all"}


def test_other_datasets_have_no_row_for_all_classes():
    for dataset in DATASETS[1:]:
        base = settings_of(dataset, "coop", "anchoropt")
        assert settings_of(dataset, "coop", "anchoropt", "all") == base | {"classes": "all"}


def test_a_dataset_of_ones_own_gets_what_most_of_the_eleven_have():
    settings = settings_of("my_flowers", "coop", "anchoropt")
    assert values(settings, METHOD) == (4, 100, 8, 0.0005, 100)
    assert values(settings, ("anchor_epochs", "anchor_weight", "max_descriptions")) \
        == (100, 1000, 10)
    assert None not in settings.values()


# ------------------------------------------------------------------------------ where from

DOCUMENT = re.compile(
    r"(authors' reproduction guide docs/AnchorOPT\.md, Stage (I|II): "
    r"(Anchor Pretraining|(CoOp|CoCoOp|MaPLe|DePT)\+AnchorOPT)"
    r"|ATPrompt's reproduction guide docs/ATPrompt\.md, "
    r"(Base-to-Novel Experiments|Cross-dataset & Domain Generalization): "
    r"(CoOp|CoCoOp|MaPLe|DePT)\+ATPrompt"
    r"|ATPrompt's reproduction guide docs/ATPrompt\.md, Detailed Hyperparameters for Reproducing: "
    r"the table of attributes"
    r"|paper S2\.2\.[2-5]"
    r"|(ATPrompt|CoOp|MaPLe) repository, (scripts|configs|anchor_weights)/\S+\.(sh|yaml|txt)"
    r"|toy row, chosen on validation images)")


def table_rows():
    with open(stage1.SETTINGS_FILE, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_row_names_a_document_and_a_place_in_it():
    for row in table_rows():
        assert DOCUMENT.search(row["source"]), (row["source"], row)


def test_a_row_names_the_section_of_its_own_method():
    names = {"coop": "CoOp", "cocoop": "CoCoOp", "maple": "MaPLe", "dept": "DePT"}
    titles = {"atprompt": "ATPrompt", "anchoropt": "AnchorOPT"}
    for row in table_rows():
        found = re.search(r"(\w+)\+(\w+)", row["source"])
        if found and row["baseline"] != "*":
            assert found[1] == names[row["baseline"]] and found[2] == titles[row["template"]], row


def test_no_guide_is_cited_for_dept_with_atprompt_on_imagenet():
    (row,) = [row for row in table_rows() if (row["baseline"], row["template"], row["dataset"])
              == ("dept", "atprompt", "imagenet")]
    assert row["source"].startswith("no guide names it")
    assert "scripts/dept/atprompt_base2new_train.sh" in row["source"]


def test_the_table_knows_all_datasets_and_no_others():
    known = {row["dataset"] for row in table_rows()} - {"*"}
    assert known == {*DATASETS, "toy"} and set(DATASETS) == set(stage1.ELEVEN) <= set(data.DATASETS)
