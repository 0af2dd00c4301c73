"""What the README says is there: every function beside a file, every command that it shows."""

import importlib
import pathlib
import re
import shlex

import pytest

import eval as evaluation
import stage1
import stage2

ROOT = pathlib.Path(stage2.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def named_functions():
    """(function, file) of every table row whose last cell names files."""
    pairs = []
    for line in README.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        files = re.findall(r"`(\w+)\.py`", cells[-1])
        if len(cells) == 3 and files:
            pairs += [(name, files) for name in re.findall(r"`(\w+)`", cells[1])]
    return pairs


def test_every_function_that_the_readme_names_stands_where_it_says():
    pairs = named_functions()
    assert len(pairs) > 30
    for name, files in pairs:
        modules = [importlib.import_module(file) for file in files]
        owners = list(modules)
        for module in modules:
            owners += [value for value in vars(module).values() if isinstance(value, type)]
        found = [owner for owner in owners if hasattr(owner, name)]
        assert found, f"README: `{name}` is not in {files}"


@pytest.mark.parametrize("number", range(1, 13))
def test_every_equation_is_in_the_readme_and_in_the_docstring_of_its_function(number):
    pattern = "8-9" if number in (8, 9) else rf"\b{number}\b"
    rows = [line for line in README.splitlines()
            if line.startswith("| Eq") and re.search(pattern, line.split("|")[1])]
    assert len(rows) == 1
    names = re.findall(r"`(\w+)`", rows[0].split("|")[2])
    modules = [importlib.import_module(file) for file in re.findall(r"`(\w+)\.py`", rows[0])]
    texts = [getattr(module, name).__doc__ for name in names for module in modules
             if hasattr(module, name)]
    assert any(re.search(rf"Eqs?\. {pattern}", text) for text in texts), names


def commands():
    """Every `python X.py ...` of the README, without shell placeholders, as (script, arguments)."""
    found = []
    for script, rest in re.findall(r"python (stage1|stage2|eval|data)\.py([^`\n|]*)", README):
        rest = re.split(r" #|\\$|'|&&|;", rest)[0]
        for variable, value in (("$DATA", "/data"), ("$b", "coop"), ("$t", "plain")):
            rest = rest.replace(variable, value)
        if not set("{$") & set(rest):
            found.append((script, shlex.split(rest)))
    return found


def test_the_readme_shows_commands():
    assert len(commands()) > 15


def as_text(value):
    return " ".join(value) if isinstance(value, list) else value


@pytest.mark.parametrize("script, argv", commands(), ids=as_text)
def test_every_command_that_the_readme_shows_is_understood(script, argv, monkeypatch):
    called = []
    for module in (stage1, stage2):
        monkeypatch.setattr(module, "run", lambda args: called.append(args))
    if script == "stage1":
        stage1.main(argv)
    elif script == "stage2":
        stage2.main(argv)
    elif script == "eval":
        called.append(evaluation.parse(argv))
    else:
        import data
        monkeypatch.setattr(data, "inventory", lambda root: called.append(root))
        monkeypatch.setattr(data, "describe", lambda *a: called.append(a))
        data.main(argv)
    assert len(called) == 1


def test_files_that_the_readme_names_exist():
    names = set(re.findall(r"`((?:assets|tests)/[\w./]+\.\w+)`|\]\((assets/[\w.]+)\)", README))
    for name in {a or b for a, b in names}:
        assert (ROOT / name).exists(), name
