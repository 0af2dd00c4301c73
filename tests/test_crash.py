"""A night's run survives: kill -9 anywhere, Ctrl-C, full and read-only disks, two processes at once.

Every process here is a real one: forked from a clean one that has imported the project, and so quick to start. It runs
stage2.py on a small toy world, with a `sabotage` on its way.
"""

import csv
import errno
import functools
import io
import json
import multiprocessing
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch

import data
import eval as evaluation
import losses
import stage2
from anchor import load_anchor
from reference import tiny_clip

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals, file locks and limits of POSIX")
if os.name == "posix":
    PROCESSES = multiprocessing.get_context("forkserver")
    PROCESSES.set_forkserver_preload(["stage2"])
PLACES = {"Stage I": (losses, "anchor_mse", 15), "Stage II": (losses, "cross_entropy", 15),      # 12 steps an epoch: in epoch 2
          "features": (evaluation, "image_features", 1), "base": (evaluation, "evaluate", 1), "novel": (evaluation, "evaluate", 2), "log": (evaluation, "save_log", 3),
          "save": (torch, "save", 2), "rename": (os, "replace", 4)}


# ----------------------------------------------------------------------------------------------- the saboteurs

def at(place, action, n=None):
    """Does `action` (see below) when the function of this place is called for the n-th time."""
    module, name, n = *PLACES[place][:2], n or PLACES[place][2]
    original, calls = getattr(module, name), []

    @functools.wraps(original)
    def replaced(*args, **kwargs):
        calls.append(1)
        if len(calls) == n:
            action(original, args)
        return original(*args, **kwargs)
    setattr(module, name, replaced)


def killed(original, args):
    os.kill(os.getpid(), signal.SIGKILL)


def killed_behind(original, args):
    original(*args)
    os.kill(os.getpid(), signal.SIGKILL)


def killed_halfway(original, args):
    """Of torch.save: half of the bytes are on the disk."""
    whole = io.BytesIO()
    original(args[0], whole)
    pathlib.Path(args[1]).write_bytes(whole.getvalue()[:len(whole.getvalue()) // 2])
    os.kill(os.getpid(), signal.SIGKILL)


def control_c(original, args):
    signal.signal(signal.SIGINT, signal.default_int_handler)     # a shell's background job, as pytest may be, ignores it
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)


class Pause:
    """Says that it is there, and waits."""

    def __init__(self):
        self.there, self.go_on = PROCESSES.Event(), PROCESSES.Event()

    def __call__(self, original, args):
        self.there.set()
        self.go_on.wait(60)


class Fill:
    """Leaves no room on the disk of a folder."""

    def __init__(self, folder):
        self.filler = pathlib.Path(folder) / "filler"

    def __call__(self, original=None, args=None):
        free = os.statvfs(self.filler.parent)
        with open(self.filler, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_bsize)


def no_file_beyond(n_bytes):
    """Every write behind the n-th byte of a file fails, by the operating system itself."""
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


def read_only(folder):
    def refuse(original):
        def opened(path, *args, **kwargs):
            writes = original is not open or set("wax+") & set(args[0] if args else kwargs.get("mode", "r"))
            if writes and str(path).startswith(str(folder)):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return original(path, *args, **kwargs)
        return opened
    import builtins
    builtins.open, pathlib.Path.mkdir = refuse(open), refuse(pathlib.Path.mkdir)
    os.mkdir, os.makedirs = refuse(os.mkdir), refuse(os.makedirs)


# ---------------------------------------------------------------------------------------------- the processes

def child(argv, log, sabotage, details):
    with open(log, "wb", 0) as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr, sys.argv = open(1, "w", closefd=False), open(2, "w", closefd=False), ["stage2.py", *argv]
    data.toy_dataset = functools.partial(data.toy_dataset, n_train=4, n_val=1, n_test=2)
    torch.set_num_threads(1)
    if sabotage:
        sabotage(*details)
    sys.exit(stage2.main(argv))


class Run:
    """A process of stage2.py, started; `.code()` waits for its end, `.log()` is what it has printed."""

    logs = None                        # a folder, with clip.pt in it, from the fixture `unbroken`

    def __init__(self, output, sabotage=None, *details, options=()):
        self.output, self.file = pathlib.Path(output), self.logs / f"{time.monotonic_ns()}.log"
        argv = ["--output", str(output), "--clip", str(self.logs / "clip.pt"), "--max-descriptions", "2", "--no-plot", "--epochs", "2"]
        argv += [*([] if "--one-stage" in options else ["--anchor-epochs", "2"]), *options]
        self.argv, self.process = argv, PROCESSES.Process(target=child, args=(argv, self.file, sabotage, details))
        self.process.start()

    def code(self):
        self.process.join(120)
        return self.process.exitcode

    def log(self):
        return self.file.read_text() if self.file.exists() else ""

    def waits_for(self, text):
        for _ in range(1200):
            if text in self.log():
                return True
            time.sleep(0.05)

    def fails_in_one_line(self, code=2):
        assert self.code() == code, self.log()
        lines = [line for line in self.log().splitlines() if line.startswith("stage2.py: ")]
        assert len(lines) == 1 and self.log().endswith(lines[0] + "\n") and "Traceback" not in self.log(), self.log()
        return lines[0]


def figures(output):
    """All that a run and its anchor leave, but the seconds and the command."""
    (folder,) = [path.parent for path in pathlib.Path(output).rglob("results.json")]
    result = json.loads((folder / "results.json").read_text())
    prompt = torch.load(folder / "prompt.pt", weights_only=True)
    logs = {}
    for path in sorted(pathlib.Path(output).rglob("log.csv")):
        with open(path) as file:
            logs[str(path.relative_to(output))] = [row | {"seconds": None} for row in csv.DictReader(file)]
    anchors = [load_anchor(path) for path in pathlib.Path(output).rglob("anchor.pt")]
    tensors = {**prompt.pop("state"), **{f"anchor {i}": tokens for i, (tokens, _) in enumerate(anchors)}}
    return result | {"seconds": None, "environment": None}, prompt, logs, [saved for _, saved in anchors], tensors


def assert_same(output, unbroken):
    *texts, tensors = figures(output)
    *expected_texts, expected = figures(unbroken)
    assert texts == expected_texts and tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)                      # bit for bit
    assert not [path for path in pathlib.Path(output).rglob("*") if ".part" in path.name or path.name == "last.pt"]


def assert_whole_files(output):
    """Whatever stands under a final name can be read to its end."""
    for path in pathlib.Path(output).rglob("*"):
        if path.name.startswith("."):
            continue
        if path.suffix == ".pt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".csv":
            text = path.read_text()
            assert text.endswith("\n") and not any(None in row.values() for row in csv.DictReader(io.StringIO(text)))


def bytes_of(output):
    return {path: path.read_bytes() for path in pathlib.Path(output).rglob("*") if path.is_file() and path.name[0] != "."}


@pytest.fixture(scope="module", autouse=True)
def unbroken(tmp_path_factory):
    """The output folder of a run that nothing disturbs."""
    Run.logs = tmp_path_factory.mktemp("logs")
    torch.save(tiny_clip(layers=2, width=64).state_dict(), Run.logs / "clip.pt")
    run = Run(tmp_path_factory.mktemp("unbroken") / "o")
    assert run.code() == 0, run.log()
    return run.output


# --------------------------------------------------------------------------------------------------- kill -9

def test_a_killed_run_goes_on_to_the_same_figures(tmp_path, unbroken):
    places = ["Stage I", "Stage II", "log", "features", "base", "novel"]
    codes = [run.code() for run in [Run(tmp_path / place, at, place, killed) for place in places]]
    assert codes == len(places) * [-signal.SIGKILL]
    assert_whole_files(tmp_path)
    for run in [Run(tmp_path / place) for place in places]:
        assert run.code() == 0, run.log()
        assert ("going on after epoch 1" in run.log()) == (run.output.name == "Stage II")
        assert_same(run.output, unbroken)


@pytest.mark.parametrize("place, action", [("save", killed_halfway), ("rename", killed), ("rename", killed_behind)])
def test_a_run_that_is_killed_in_one_write_after_the_other_loses_no_more_than_that_write(tmp_path, unbroken, place, action):
    codes = []
    while not codes or codes[-1]:                           # each process gets a write or two further than the one before
        codes.append(Run(tmp_path / "o", at, place, action).code())
        assert codes[-1] in (0, -signal.SIGKILL) and len(codes) < 12
        assert_whole_files(tmp_path / "o")
    assert len(codes) >= 3
    assert_same(tmp_path / "o", unbroken)


def test_a_killed_one_stage_run_goes_on_to_the_same_figures(tmp_path):
    options = ["--one-stage"]
    runs = Run(tmp_path / "a", options=options), Run(tmp_path / "b", at, "Stage II", killed, options=options)
    assert [run.code() for run in runs] == [0, -signal.SIGKILL]
    assert Run(tmp_path / "b", options=options).code() == 0
    assert_same(tmp_path / "b", tmp_path / "a")


# ---------------------------------------------------------------------------------------------------- Ctrl-C

def test_control_c_ends_in_one_line_that_says_where_and_how_to_go_on(tmp_path, unbroken):
    places = {"Stage I": ["Stage I,", "epoch 2"], "Stage II": ["Stage II,", "epoch 2"], "novel": ["evaluation"]}
    for run in [Run(tmp_path / place, at, place, control_c) for place in places]:
        line = run.fails_in_one_line(code=130)
        assert all(words in line for words in places[run.output.name]) and "stage2.py " + shlex.join(run.argv) in line
    for run in [Run(tmp_path / place) for place in places]:
        assert run.code() == 0
        assert_same(run.output, unbroken)


# ----------------------------------------------------------------------------------------------- disks

def test_a_write_that_fails_at_the_nth_byte_damages_nothing_earlier(tmp_path, unbroken):
    folders = [tmp_path / name for name in ("early", "middle", "late")]
    for run in [Run(folder, at, "Stage II", killed) for folder in folders]:
        assert run.code() == -signal.SIGKILL
    before = [bytes_of(folder) for folder in folders]
    (size,) = [len(content) for path, content in before[0].items() if path.name == "last.pt"]
    limits = [800, size * 3 // 4, size - 1]
    for run, files in zip([Run(folder, no_file_beyond, limit) for folder, limit in zip(folders, limits)], before):
        line = run.fails_in_one_line()
        assert str(run.output) in line and ("could not write" in line and "last.pt" in line or run.output.name == "early")
        assert bytes_of(run.output) == files
    for run in [Run(folder) for folder in folders]:
        assert run.code() == 0
        assert_same(run.output, unbroken)


@pytest.fixture
def small_disk(tmp_path):
    """A real disk of 48 MB, where the tests may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", disk], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no right to mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_disk_that_fills_up_is_said_and_the_run_goes_on_when_there_is_room(small_disk, unbroken):
    for place in ("Stage I", "Stage II", "novel"):                                  # the same run, again and again
        fill = Fill(small_disk)
        line = Run(small_disk / "o", at, place, fill).fails_in_one_line()
        assert "could not write" in line and "make room" in line
        assert_whole_files(small_disk / "o")
        fill.filler.unlink()
    assert Run(small_disk / "o").code() == 0
    assert_same(small_disk / "o", unbroken)


def test_a_disk_that_is_full_or_read_only_is_said_before_anything_is_learnt(small_disk):
    fill = Fill(small_disk)
    fill()
    run = Run(small_disk / "o")
    assert str(small_disk) in run.fails_in_one_line() and "Stage I" not in run.log()
    fill.filler.unlink()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    run = Run(small_disk / "o")
    assert str(small_disk) in run.fails_in_one_line() and "Stage I" not in run.log()


@pytest.mark.parametrize("begun", [False, True])
def test_an_output_folder_that_refuses_writes_is_said_before_anything_is_learnt(tmp_path, unbroken, begun):
    if begun:
        assert Run(tmp_path / "o", at, "Stage I", killed).code() == -signal.SIGKILL
    before = bytes_of(tmp_path / "o")
    run = Run(tmp_path / "o", read_only, tmp_path / "o")
    line = run.fails_in_one_line()
    assert str(tmp_path / "o") in line and "choose another" in line and "Stage I" not in run.log()
    assert bytes_of(tmp_path / "o") == before


# ------------------------------------------------------------------------------------------- two at once

def test_the_second_process_on_a_run_says_so_and_stops(tmp_path, unbroken):
    pause = Pause()
    first = Run(tmp_path / "o", at, "Stage II", pause)
    assert pause.there.wait(60)
    for options in ([], ["--overwrite"]):
        line = Run(tmp_path / "o", options=options).fails_in_one_line()
        assert "another process is at work" in line
    pause.go_on.set()
    assert first.code() == 0
    assert_same(tmp_path / "o", unbroken)


@pytest.mark.parametrize("first_dies", [False, True])
def test_of_two_that_need_the_same_anchor_one_learns_and_the_other_waits(tmp_path, unbroken, first_dies):
    pause = Pause()
    first = Run(tmp_path / "o", at, "Stage I", pause)
    assert pause.there.wait(60)
    second = Run(tmp_path / "o", options=["--baseline", "dept"])
    assert second.waits_for("waiting for the process")
    if first_dies:
        first.process.kill()                                    # its lock dies with it
    else:
        pause.go_on.set()
    assert [first.code(), second.code()] == [-signal.SIGKILL if first_dies else 0, 0]
    assert ("anchor found" in second.log()) == (not first_dies) and ("Stage I learns" in second.log()) == first_dies
    if first_dies:
        assert Run(tmp_path / "o").code() == 0
    (anchor,), (expected,) = (list(pathlib.Path(output).rglob("anchor.pt")) for output in (tmp_path / "o", unbroken))
    assert torch.equal(load_anchor(anchor)[0], load_anchor(expected)[0])
    for path in (tmp_path / "o").rglob("prompt.pt"):
        assert torch.equal(torch.load(path, weights_only=True)["state"]["template.anchor_tokens"], load_anchor(anchor)[0])
    assert len(list((tmp_path / "o").rglob("prompt.pt"))) == 2
