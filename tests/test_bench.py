"""The benchmark compares like with like: its conventional step computes what the project's does."""

import collections
import json
import sys

import bench
import position
import pytest
import torch
from reference import as_exact_as, tiny_clip

EXACT, SINGLE = tiny_clip(dtype=torch.float64), tiny_clip()         # the same weights


def rough_case(row, model, seed=0):
    """A case far from tiny start values, so that every term shows."""
    case, generator = bench.make_case(row, model, 7, 3), torch.Generator().manual_seed(seed)
    for parameter in case.learner.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return case


def learnt(case):
    return torch.cat([parameter.detach().flatten() for parameter in case.learner.parameters()])


@pytest.mark.parametrize("row", bench.ROWS)
def test_conventional_step_equals_the_projects_step(row):
    case = rough_case(row, EXACT)
    for lr in (0, 0.1):                             # nothing moves; and where training has moved it
        case.optimizer.param_groups[0]["lr"] = lr
        before = learnt(case)
        found = bench.gradients(case, "project")
        assert all(found[name].any() for name, _ in case.learner.named_parameters())
        assert learnt(case).equal(before) == (lr == 0)
        case.optimizer.param_groups[0]["lr"] = 0
        assert max(bench.differences(case).values()) < 1e-10


@pytest.mark.parametrize("row", bench.ROWS)
def test_the_projects_step_loses_no_more_in_float32_than_the_conventional_one(row, monkeypatch):
    """Both against float64: on any processor the fast may be as far off as the obvious one."""
    drawn = {}

    def noise(like):                                # a draw in float32 is another than in float64
        generator = torch.Generator().manual_seed(4)
        gumbel = -torch.empty(like.shape).exponential_(generator=generator).log()
        return drawn.setdefault(like.shape, gumbel).to(like.dtype)
    monkeypatch.setattr(position, "gumbel_noise", noise)
    # Four cases beside each other: one loss is a single number, which rounds well by luck at times.
    found = collections.defaultdict(list)
    for seed in range(4):
        exact = bench.gradients(rough_case(row, EXACT, seed), "conventional")
        case = rough_case(row, SINGLE, seed)
        project, conventional = (bench.gradients(case, side) for side in bench.SIDES)
        for name in exact:
            found[name].append((project[name], conventional[name], exact[name]))
    assert drawn
    for name, draws in found.items():
        assert as_exact_as(*map(torch.stack, zip(*draws))), name


def test_a_wrong_step_shows_in_the_differences():
    case = rough_case("coop", EXACT)
    case.normal = (case.normal[0], case.normal[1] - 1)              # [EOT] read one position early
    assert min(bench.differences(case).values()) > 1e-3


def test_kernels_are_counted_without_views():
    x = torch.randn(4, 6, requires_grad=True)
    with bench.Kernels() as counter:
        y = x.view(6, 4).transpose(0, 1)[:, 1:]                     # views alone
        assert counter.count == 0
        y.exp().sum()
        assert counter.count == 2


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells the peak")
def test_peak_memory_is_what_a_function_takes_at_most():
    def take(numbers):
        return bench.peak_gb(lambda: torch.ones(numbers), torch.device("cpu"))
    take(200_000_000)
    assert 0.7 < take(200_000_000) - take(1) < 0.9                  # 0.8 GB; nothing stays behind


def test_the_command_measures_everything_and_writes_it(tmp_path, capsys):
    assert bench.main(["--quick", "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "bench.json").read_text())
    assert all(f"\n{table}\n" in out for table in found)
    assert [row["learner"] for row in found["a. a step"]] == list(bench.ROWS)
    for row in found["a. a step"]:
        assert row["loss_differs_by"] < 1e-4 and row["gradients_differ_by"] < 1e-3
    stages = {row["stage"]: row for row in found["c. a run of CoOp"]}
    whole = stages.pop("all of it")
    for run in ("first_s", "features_kept_s"):
        assert 0 < sum(row[run] for row in stages.values()) < whole[run]
    for step in found["d. losses"]:
        for row in bench.ROWS:
            assert step[f"{row} float16"] == pytest.approx(step[f"{row} float32"], rel=0.05)


def test_what_takes_too_long_or_fails_is_said_and_leaves_the_rest(monkeypatch, capsys):
    assert bench.main(["--quick", "--minutes", "0"]) == 0
    assert capsys.readouterr().out.count("left out") == 7
    args = bench.parse(["--quick"])
    args.clip_model, args.image_seconds, args.encode, args.memory = SINGLE, 1e-3, list, 0.1
    bench.measure_cell(args, "coop", 5)                             # more memory than there is
    (row,) = args.tables["a. a step"]
    assert "left out" in row["conventional_s"] and row["project_s"] > 0
    monkeypatch.setattr(bench, "make_case", None)                   # so all that needs one fails
    assert bench.main(["--quick"]) == 1
    out = capsys.readouterr().out
    assert out.count("FAILED") == 6 and "b. " in out
