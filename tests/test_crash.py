"""A night's run survives: kill -9 anywhere, Ctrl-C, bad disks, two processes at once.

Every process here is a real one, forked from a clean one that has imported the project, and so
quick to start. It runs stage2.py on a few toy pictures, with a saboteur on its way.
"""

import csv
import errno
import functools
import io
import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy
import pytest
import torch

import data
import eval as evaluation
import losses
import stage1
import stage2
import worlds
from anchor import load_anchor
from reference import tiny_clip
from test_scripts import STEPS, few_pictures

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX")
if os.name == "posix":
    PROCESSES = multiprocessing.get_context("forkserver")
    PROCESSES.set_forkserver_preload(["stage2", "torch._subclasses.fake_tensor"])

# Where a run of two epochs can be hit: whose function, at which of its calls.
PLACES = {"Stage I": (losses, "anchor_mse", STEPS + 2),             # in epoch 2
          "Stage II": (losses, "cross_entropy", STEPS + 2),
          "features": (data, "normalize", 2),
          "base": (evaluation, "evaluate", 1), "novel": (evaluation, "evaluate", 2),
          "log": (stage1, "save_csv", 3),                           # Stage II's first
          "save": (torch, "save", 2), "rename": (os, "replace", 4),
          "kept": (numpy, "savez", 2)}


# ------------------------------------------------------------------------------ the saboteurs

def at(place, action, n=None):
    """Does `action` (see below) when the function of this place is called for the n-th time."""
    owner, name, nth = PLACES[place]
    original, calls = getattr(owner, name), []

    @functools.wraps(original)
    def replaced(*args, **kwargs):
        calls.append(1)
        if len(calls) == (n or nth):
            action(original, args)
        return original(*args, **kwargs)
    setattr(owner, name, replaced)


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


def killed_with_a_few_bytes_written(original, args):
    """Of numpy.savez."""
    args[0].write(b"PK\x03\x04")
    args[0].flush()
    os.kill(os.getpid(), signal.SIGKILL)


def control_c(original, args):
    # A shell's background job, as pytest may be, ignores it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)


class Pause:
    """Says that it is there, and waits."""

    def __init__(self):
        self.there = PROCESSES.Event()
        self.go_on = PROCESSES.Event()

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
    """As on a disk that is mounted so: nothing below the folder can be made or opened to write."""
    real_open, real_mkdir = os.open, os.mkdir

    def refuse(path):
        if str(path).startswith(str(folder)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    def open_(path, flags, *args, **kwargs):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            refuse(path)
        return real_open(path, flags, *args, **kwargs)

    def mkdir(path, *args, **kwargs):
        if not os.path.isdir(path):
            refuse(path)
        return real_mkdir(path, *args, **kwargs)
    os.open, os.mkdir = open_, mkdir


# ------------------------------------------------------------------------------ the processes

def child(argv, log, sabotage, details):
    with open(log, "wb", 0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    sys.argv = ["stage2.py", *argv]
    data.load_dataset = few_pictures
    torch.set_num_threads(1)
    if sabotage:
        sabotage(*details)
    sys.exit(stage2.main(argv))


class Run:
    """A process of stage2.py: `.code()` waits for its end, `.log()` is what it has printed."""

    logs = None                        # a folder, with clip.pt in it, from the fixture `unbroken`

    def __init__(self, output, sabotage=None, *details, options=()):
        self.output = pathlib.Path(output)
        self.file = self.logs / f"{time.monotonic_ns()}.log"
        argv = ["--output", output, "--clip", self.logs / "clip.pt", "--max-descriptions", 2,
                "--no-plot", "--epochs", 2, *options]
        if "--one-stage" not in options:
            argv += ["--anchor-epochs", 2]
        details = [str(word) for word in argv], self.file, sabotage, details
        self.process = PROCESSES.Process(target=child, args=details)
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
        return False

    def fails_in_one_line(self, code=2):
        """The line."""
        assert self.code() == code, self.log()
        before, name, line = self.log().partition("stage2.py: ")
        assert name and line.endswith("\n") and "Traceback" not in before, self.log()
        return worlds.one_line(line)


def figures(output):
    """All that a run and its anchor leave, but times and surroundings."""
    (folder,) = [path.parent for path in pathlib.Path(output).rglob("results.json")]
    result = json.loads((folder / "results.json").read_text())
    prompt = torch.load(folder / "prompt.pt", weights_only=True)
    logs = {}
    for path in sorted(pathlib.Path(output).rglob("log.csv")):
        with open(path) as file:
            rows = [row | {"seconds": None} for row in csv.DictReader(file)]
        logs[str(path.relative_to(output))] = rows
    tensors = prompt.pop("state")
    for path in pathlib.Path(output).rglob("anchor.pt"):
        tensors["anchor"], prompt["anchor"] = load_anchor(path)
    return result | {"environment": None}, prompt, logs, tensors


def assert_same(output, unbroken):
    """To the last digit and bit, and no litter."""
    *texts, tensors = figures(output)
    *expected_texts, expected = figures(unbroken)
    assert texts == expected_texts and tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    litter = [path for path in pathlib.Path(output).rglob("*")
              if ".part" in path.name or path.name == "last.pt"]
    assert not litter


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
            rows = list(csv.DictReader(io.StringIO(text)))
            assert text.endswith("\n") and not any(None in row.values() for row in rows)


def bytes_of(output):
    return {path: path.read_bytes() for path in pathlib.Path(output).rglob("*")
            if path.is_file() and not path.name.startswith(".")}


@pytest.fixture(scope="module", autouse=True)
def unbroken(tmp_path_factory):
    """The output folder of a run that nothing disturbs."""
    Run.logs = tmp_path_factory.mktemp("logs")
    torch.save(tiny_clip(layers=2, width=64).state_dict(), Run.logs / "clip.pt")
    run = Run(tmp_path_factory.mktemp("unbroken") / "o")
    assert run.code() == 0, run.log()
    return run.output


# ------------------------------------------------------------------------------------ kill -9

GOING_ON = {"Stage I": "stage I: going on after epoch 1",
            "features": "stage II: going on after epoch 1",
            "Stage II": "stage II: going on after epoch 1",
            "log": "stage II: going on after epoch 1",
            "base": "stage II: going on after epoch 2",
            "novel": "stage II: going on after epoch 2"}


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, unbroken):
    for run in [Run(tmp_path / place, at, place, killed) for place in GOING_ON]:
        assert run.code() == -signal.SIGKILL, run.log()
    assert_whole_files(tmp_path)
    for run in [Run(tmp_path / place) for place in GOING_ON]:
        assert run.code() == 0, run.log()
        assert GOING_ON[run.output.name] in run.log() and run.log().count("going on") == 1
        assert_same(run.output, unbroken)


@pytest.mark.parametrize("place, action", [("save", killed_halfway), ("rename", killed),
                                           ("rename", killed_behind)])
def test_a_run_that_is_killed_in_one_write_after_the_other_loses_no_more_than_that_write(
        tmp_path, unbroken, place, action):
    codes = [-signal.SIGKILL]
    while codes[-1]:                    # each process gets a write or two further than the last
        codes.append(Run(tmp_path / "o", at, place, action).code())
        assert codes[-1] in (0, -signal.SIGKILL) and len(codes) < 12
        assert_whole_files(tmp_path / "o")
    assert len(codes) >= 4
    assert_same(tmp_path / "o", unbroken)


def test_a_killed_one_stage_run_goes_on_to_the_same_bits(tmp_path):
    options = ["--one-stage"]
    runs = [Run(tmp_path / "a", options=options),
            Run(tmp_path / "b", at, "Stage II", killed, options=options)]
    assert [run.code() for run in runs] == [0, -signal.SIGKILL]
    assert Run(tmp_path / "b", options=options).code() == 0
    assert_same(tmp_path / "b", tmp_path / "a")


def test_control_c_ends_in_one_line_and_the_same_command_goes_on(tmp_path, unbroken):
    places = ["Stage I", "Stage II", "novel"]
    for run in [Run(tmp_path / place, at, place, control_c) for place in places]:
        worlds.one_line(run.fails_in_one_line(code=130), "stopped", "the same command goes on")
    for run in [Run(tmp_path / place) for place in places]:
        assert run.code() == 0
        assert_same(run.output, unbroken)


# -------------------------------------------------------------------------- the feature cache

@pytest.mark.parametrize("action", [killed, killed_with_a_few_bytes_written])
def test_a_cache_that_a_killed_process_was_filling_gives_the_same_bits(tmp_path, unbroken, action):
    cache = ["--feature-cache", tmp_path / "cache"]
    run = Run(tmp_path / "a", at, "kept", action, options=cache)
    assert run.code() == -signal.SIGKILL, run.log()
    kept = [path for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")]
    assert len(kept) == 1
    runs = [Run(tmp_path / name, options=cache) for name in ("a", "b")]
    for run in runs:
        assert run.code() == 0, run.log()
        assert_same(run.output, unbroken)


def test_two_processes_that_fill_a_cache_at_once_find_the_same_bits(tmp_path, unbroken):
    cache, pause = ["--feature-cache", tmp_path / "cache"], Pause()
    first = Run(tmp_path / "a", at, "kept", pause, 1, options=cache)
    assert pause.there.wait(60)
    second = Run(tmp_path / "b", options=cache)
    assert second.code() == 0, second.log()
    pause.go_on.set()
    assert first.code() == 0, first.log()
    third = Run(tmp_path / "c", options=cache)
    assert third.code() == 0, third.log()
    for run in (first, second, third):
        assert_same(run.output, unbroken)
    assert len(list((tmp_path / "cache").iterdir())) == 4           # two epochs, two test sides


# -------------------------------------------------------------------------------------- disks

def test_a_write_that_fails_at_the_nth_byte_damages_nothing_earlier(tmp_path, unbroken):
    folders = [tmp_path / name for name in ("early", "middle", "late")]
    for run in [Run(folder, at, "Stage II", killed) for folder in folders]:
        assert run.code() == -signal.SIGKILL
    before = [bytes_of(folder) for folder in folders]
    (size,) = [len(content) for path, content in before[0].items() if path.name == "last.pt"]
    limits = [2000, size * 3 // 4, size - 1]
    runs = [Run(folder, no_file_beyond, limit) for folder, limit in zip(folders, limits)]
    for run, files in zip(runs, before):
        worlds.one_line(run.fails_in_one_line(), f"could not write {run.output}", "last.pt",
                        "what was finished before is kept")
        assert bytes_of(run.output) == files
    for run in [Run(folder) for folder in folders]:
        assert run.code() == 0
        assert_same(run.output, unbroken)


@pytest.fixture
def small_disk(tmp_path):
    """A real disk of 48 MB, where the tests may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", disk]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no right to mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_disk_that_fills_up_is_said_and_the_run_goes_on_when_there_is_room(small_disk, unbroken):
    for place in ("Stage I", "Stage II", "novel"):                  # the same run, again and again
        fill = Fill(small_disk)
        run = Run(small_disk / "o", at, place, fill)
        worlds.one_line(run.fails_in_one_line(), "could not write", "make room")
        assert_whole_files(small_disk / "o")
        fill.filler.unlink()
    assert Run(small_disk / "o").code() == 0
    assert_same(small_disk / "o", unbroken)


def test_a_disk_that_is_mounted_read_only_is_said_before_anything_is_learnt(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    run = Run(small_disk / "o")
    worlds.one_line(run.fails_in_one_line(), f"cannot write to {small_disk / 'o'}")
    assert "Stage I" not in run.log()


@pytest.mark.parametrize("begun", [False, True])
def test_an_output_folder_that_refuses_writes_is_said_before_anything_is_learnt(tmp_path, begun):
    if begun:
        assert Run(tmp_path / "o", at, "Stage I", killed).code() == -signal.SIGKILL
    before = bytes_of(tmp_path / "o")
    run = Run(tmp_path / "o", read_only, tmp_path / "o")
    worlds.one_line(run.fails_in_one_line(), f"cannot write to {tmp_path / 'o'}",
                    "choose another --output")
    assert "Stage I" not in run.log() and bytes_of(tmp_path / "o") == before


# -------------------------------------------------------------------------------- two at once

def test_the_second_process_on_a_run_says_so_and_stops(tmp_path, unbroken):
    pause = Pause()
    first = Run(tmp_path / "o", at, "Stage II", pause)
    assert pause.there.wait(60)
    for options in ([], ["--overwrite"]):
        line = Run(tmp_path / "o", options=options).fails_in_one_line()
        worlds.one_line(line, "another process is at work on seed 1", "choose another --output")
    pause.go_on.set()
    assert first.code() == 0
    assert_same(tmp_path / "o", unbroken)


@pytest.mark.parametrize("first_dies", [False, True])
def test_of_two_that_need_the_same_anchor_one_learns_and_the_other_waits(tmp_path, unbroken,
                                                                         first_dies):
    pause = Pause()
    first = Run(tmp_path / "o", at, "Stage I", pause)
    assert pause.there.wait(60)
    second = Run(tmp_path / "o", options=["--baseline", "dept"])
    assert second.waits_for("the anchor: waiting for the process")
    if first_dies:
        first.process.kill()                                    # its lock dies with it
    else:
        pause.go_on.set()
    assert first.code() == (-signal.SIGKILL if first_dies else 0)
    assert second.code() == 0, second.log()
    found = "stage I: going on after epoch 1" if first_dies else "anchor found"
    assert found in second.log()
    assert ("Stage I learns the anchor now" in second.log()) == first_dies

    # Whoever learnt it, it is the same anchor, and both runs have it.
    if first_dies:
        assert Run(tmp_path / "o").code() == 0
    (file,) = (tmp_path / "o").rglob("anchor.pt")
    (expected,) = unbroken.rglob("anchor.pt")
    tokens = load_anchor(expected)[0]
    assert torch.equal(load_anchor(file)[0], tokens)
    prompts = list((tmp_path / "o").rglob("prompt.pt"))
    assert len(prompts) == 2
    for path in prompts:
        state = torch.load(path, weights_only=True)["state"]
        assert torch.equal(state["template.anchor_tokens"], tokens)
