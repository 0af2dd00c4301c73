"""What README.md and assets/PAPER.md name is there: functions, files, options, commands."""

import ast
import contextlib
import importlib
import io
import pathlib
import re
import shlex

import pytest

import data
import eval as evaluation
import stage1
import stage2

ROOT = pathlib.Path(stage2.__file__).parent
README, PAPER = [(ROOT / name).read_text(encoding="utf-8")
                 for name in ("README.md", "assets/PAPER.md")]
PAGES = README + PAPER
SCRIPTS = {"stage1": stage1, "stage2": stage2, "eval": evaluation, "data": data}


def rows(page):
    """(what of the paper, functions, modules) of every table row whose last cell names modules."""
    for line in page.splitlines():
        paper, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        modules = re.findall(r"`(\w+)\.py`", cells[-1]) if len(cells) == 2 else []
        if modules:
            functions = re.findall(r"`(\w+)`", cells[0])
            yield paper, functions, [importlib.import_module(name) for name in modules]


def test_every_function_stands_in_the_file_that_is_named_beside_it():
    pairs = [(name, modules) for _, names, modules in rows(PAGES) for name in names]
    assert len(pairs) > 30
    for name, modules in pairs:
        classes = [value for module in modules for value in vars(module).values()
                   if isinstance(value, type)]
        assert any(hasattr(owner, name) for owner in (*modules, *classes)), (name, modules)


@pytest.mark.parametrize("number", range(1, 13))
def test_every_equation_has_a_row_and_stands_in_the_docstring_of_its_function(number):
    pattern = r"\bEqs?\. " + ("8-9" if number in (8, 9) else rf"{number}\b")
    ((names, modules),) = [(names, modules) for paper, names, modules in rows(README)
                           if re.match(pattern, paper)]
    texts = [getattr(module, name).__doc__ for name in names for module in modules
             if hasattr(module, name)]
    assert any(re.search(pattern, text) for text in texts)


def commands():
    """(script, arguments) of every `python SCRIPT.py ...`, with something for its variables."""
    values = {"$DATA": "/data", "$d": "dtd", "$b": "coop", "$t": "plain", "$s": "1", "$1": "dtd",
              "$2": "coop", "$3": "plain", "$4": "1", "{1}": "dtd", "{2}": "coop", "{3}": "plain",
              "{4}": "1"}
    text = PAGES.replace("\\\n", " ")
    for script, words in re.findall(r"python (stage1|stage2|eval|data)\.py([^`\n;&'|#]*)", text):
        yield script, [values.get(word, word) for word in shlex.split(words)]


@pytest.mark.parametrize("script, argv", list(commands()))
def test_every_command_is_understood_and_every_option_means_something(script, argv, monkeypatch):
    called = []
    for name in ("run", "inventory", "describe"):
        monkeypatch.setattr(SCRIPTS[script], name, called.append, raising=False)
    assert SCRIPTS[script].main(argv) in (0, None)
    (args,) = called
    if script.startswith("stage"):          # the files that a command names are the reader's
        monkeypatch.setattr(stage1.os, "stat", lambda path: None)
        monkeypatch.setattr(stage1, "clip_identity", str)
        given = {"baseline": "coop", "template": "anchoropt"} | vars(args)
        stage1.resolve(args, args.dataset, given["baseline"], given["template"])


def test_every_option_that_is_named_is_one():
    known = set()
    for script in SCRIPTS.values():
        for argv in (["--help"], ["describe", "--help"]):
            with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
                script.main(argv)
            known |= set(re.findall(r"--[\w-]+", text.getvalue()))
    named = {option for code in re.findall(r"`(--[^`]+)`", PAGES)
             for option in re.findall(r"--[\w-]+", code)}
    assert len(named) > 15 and not named - known


def test_every_file_that_is_named_is_there():
    links = re.findall(r"\]\(([\w./]+)(?:#[\w-]+)?\)|`((?:assets/|tests/|\.ci/)[\w./]+)`", README)
    links += re.findall(r"\]\(([\w.]+)\)|`([\w]+\.csv)`", PAPER)
    assert len(links) > 8
    for path in {link or code for link, code in links}:
        assert (ROOT / path).exists() or (ROOT / "assets" / path).exists(), path


def test_every_line_of_python_parses_and_imports_what_is_there():
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    imports = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    assert len(imports) >= 3
    for node in imports:
        assert all(hasattr(importlib.import_module(node.module), each.name) for each in node.names)
