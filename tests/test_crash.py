"""A night's run survives: kill -9 anywhere, Ctrl-C, bad disks, two processes at once.

Every process here is a real one, forked from a clean one that has imported the project. It runs
stage2.py on a few toy pictures and the CPU, with a saboteur on its way.
"""

import csv
import functools
import io
import json
import multiprocessing
import os
import pathlib
import signal
import sys
import time

import numpy
import pytest
import torch

import data
import eval as evaluation
import losses
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
          "log": (data, "save_csv", 4),                             # Stage II's second
          "novel": (evaluation, "evaluate", 2),
          "save": (torch, "save", 2), "rename": (os, "replace", 4), "kept": (numpy, "savez", 2)}


def at(place, action):
    """Does `action` (see below) when the function of this place is called for the n-th time."""
    owner, name, n = PLACES[place]
    original, calls = getattr(owner, name), []

    @functools.wraps(original)
    def replaced(*args, **kwargs):
        calls.append(1)
        if len(calls) == n:
            action(original, args)
        return original(*args, **kwargs)
    setattr(owner, name, replaced)


def killed(original, args):
    os.kill(os.getpid(), signal.SIGKILL)


def killed_after(original, args):
    original(*args)
    killed(original, args)


def killed_halfway(original, args):
    """Of torch.save: half of the bytes are on the disk."""
    whole = io.BytesIO()
    original(args[0], whole)
    pathlib.Path(args[1]).write_bytes(whole.getvalue()[:len(whole.getvalue()) // 2])
    killed(original, args)


def control_c(original, args):
    # A shell's background job, as pytest may be, ignores it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)


class Pause:
    """Says that it is there, and waits."""

    def __init__(self):
        self.there, self.go_on = PROCESSES.Event(), PROCESSES.Event()

    def __call__(self, original, args):
        self.there.set()
        self.go_on.wait(300)


def no_file_beyond(n_bytes):
    """Every write after the n-th byte of a file fails, by the operating system itself."""
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(n_bytes), int(n_bytes)))


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
                "--no-plot", "--epochs", 2, "--anchor-epochs", 2, "--device", "cpu",
                "--workers", 0, *options]
        details = [str(word) for word in argv], self.file, sabotage, details
        self.process = PROCESSES.Process(target=child, args=details)
        self.process.start()

    def code(self):
        self.process.join(300)
        return self.process.exitcode

    def log(self):
        return self.file.read_text() if self.file.exists() else ""

    def finishes_as(self, unbroken):
        """It ends well, with the figures of an unbroken run to the last digit and bit."""
        assert self.code() == 0, self.log()
        assert found(self.output) == found(unbroken)
        assert not list(self.output.rglob(".*.part*"))          # of processes that were killed
        return True

    def fails_in_one_line(self, *says, code=2):
        assert self.code() == code, self.log()
        before, name, line = self.log().partition("stage2.py: ")
        assert name and line.endswith("\n") and "Traceback" not in before, self.log()
        worlds.one_line(line, *says)


def found(output):
    """All that a run and its anchor leave, to the bit, except times, surroundings and locks."""
    left = {}
    for path in pathlib.Path(output).rglob("[!.]*"):
        name = path.relative_to(output).as_posix()
        if path.name == "results.json":
            left[name] = json.loads(path.read_text()) | {"environment": None, "prompt": None}
        elif path.name == "log.csv":
            rows = csv.DictReader(io.StringIO(path.read_text()))
            left[name] = [row | {"seconds": None} for row in rows]
        elif path.suffix == ".pt":              # whose bytes hold the name that it was written by
            content = torch.load(path, weights_only=True)
            left[name] = json.dumps(content, default=torch.Tensor.tolist)
        elif path.is_file():
            left[name] = path.read_bytes()
    return left


@pytest.fixture(scope="module", autouse=True)
def unbroken(tmp_path_factory):
    """The output folder of a run that nothing disturbs."""
    Run.logs = tmp_path_factory.mktemp("logs")
    torch.save(tiny_clip(layers=1, width=64).state_dict(), Run.logs / "clip.pt")
    run = Run(tmp_path_factory.mktemp("unbroken") / "o")
    assert run.code() == 0, run.log()
    return run.output


GOING_ON = {"Stage I": "stage I: going on after epoch 1",
            "Stage II": "stage II: going on after epoch 1",
            "log": "stage II: going on after epoch 1",
            "novel": "stage II: going on after epoch 2"}


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, unbroken):
    for run in [Run(tmp_path / place, at, place, killed) for place in GOING_ON]:
        assert run.code() == -signal.SIGKILL, run.log()
    found(tmp_path)
    for run in [Run(tmp_path / place) for place in GOING_ON]:
        assert run.finishes_as(unbroken)
        assert GOING_ON[run.output.name] in run.log() and run.log().count("going on") == 1


@pytest.mark.parametrize("place, action", [("save", killed_halfway), ("rename", killed_after)])
def test_a_run_that_is_killed_in_one_write_after_the_other_loses_no_more_than_that_write(
        tmp_path, unbroken, place, action):
    runs = []
    while not runs or runs[-1].code() == -signal.SIGKILL and len(runs) < 12:
        # Each process gets a write or two further than the last.
        runs.append(Run(tmp_path / "o", at, place, action))
        assert runs[-1].code() in (0, -signal.SIGKILL), runs[-1].log()
        found(tmp_path / "o")
    assert len(runs) >= 4 and runs[-1].finishes_as(unbroken)


def test_control_c_ends_in_one_line_and_the_same_command_goes_on(tmp_path, unbroken):
    Run(tmp_path, at, "Stage II", control_c).fails_in_one_line("stopped", code=130)
    assert Run(tmp_path).finishes_as(unbroken)


def test_a_cache_that_a_killed_process_was_filling_gives_the_same_bits(tmp_path, unbroken):
    cache = ["--feature-cache", tmp_path / "cache"]
    run = Run(tmp_path / "a", at, "kept", killed, options=cache)
    assert run.code() == -signal.SIGKILL, run.log()
    for name in ("a", "b"):
        assert Run(tmp_path / name, options=cache).finishes_as(unbroken)


def test_writes_that_fail_for_want_of_room_damage_nothing_and_more_room_is_enough(tmp_path,
                                                                                 unbroken):
    runs, room = [], 2000
    while not runs or runs[-1].code() and len(runs) < 12:
        if runs:
            runs[-1].fails_in_one_line("could not write", tmp_path, "kept")
            found(tmp_path)
        runs.append(Run(tmp_path, no_file_beyond, room))
        room *= 1.3
    assert len(runs) > 3 and runs[-1].finishes_as(unbroken)


def test_the_second_process_on_a_run_says_so_and_stops(tmp_path, unbroken):
    pause = Pause()
    first = Run(tmp_path, at, "Stage II", pause)
    assert pause.there.wait(300)
    for options in ([], ["--overwrite"]):
        Run(tmp_path, options=options).fails_in_one_line("seed 1", "at work", "--output")
    pause.go_on.set()
    assert first.finishes_as(unbroken)


@pytest.mark.parametrize("first_dies", [False, True])
def test_of_two_that_need_the_same_anchor_one_learns_and_the_other_waits(tmp_path, unbroken,
                                                                         first_dies):
    pause = Pause()
    first = Run(tmp_path, at, "Stage I", pause)
    assert pause.there.wait(300)
    second = Run(tmp_path, options=["--baseline", "dept"])
    while "the anchor: another process is at work" not in second.log():
        assert second.process.is_alive(), second.log()
        time.sleep(0.05)
    if first_dies:
        first.process.kill()                                    # its lock dies with it
        assert first.code() == -signal.SIGKILL
    else:
        pause.go_on.set()
        assert first.code() == 0, first.log()
    assert second.code() == 0, second.log()
    assert ("anchor found" in second.log()) != first_dies
    assert ("stage I: going on after epoch 1" in second.log()) == first_dies
    # Whoever learnt it, it is the same anchor.
    (expected,), (file,) = unbroken.rglob("anchor.pt"), tmp_path.rglob("anchor.pt")
    assert torch.equal(load_anchor(file)[0], load_anchor(expected)[0])
