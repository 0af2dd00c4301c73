"""The benchmark compares like with like: its conventional step computes what the project's step computes."""

import pytest
import torch

import bench
from reference import encode_77, relative, tiny_clip

EXACT, SINGLE = tiny_clip(dtype=torch.float64), tiny_clip()


# In float32 only rounding is left: over 12 draws of inputs and noise, at most 7.6e-6 for CoOp, MaPLe, DePT. CoCoOp's
# gradients are small differences of large terms (every token carries the same shift): up to 1.5e-5, as far as either
# side then is from float64.
FLOAT32 = {"coop": 1e-5, "cocoop": 3e-5, "maple": 1e-5, "dept": 1e-5}


@pytest.mark.parametrize("row", bench.ROWS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_conventional_step_equals_the_projects_step(row, dtype):
    model, tolerance = (EXACT, 1e-10) if dtype == "float64" else (SINGLE, FLOAT32[row])
    case = bench.make_case(row, model, 7, 3)
    for parameter in case.learner.parameters():              # far from the tiny start, so that every term shows
        parameter.data += 0.3 * torch.randn_like(parameter)
    for _ in range(2):
        loss, gradients = bench.differences(case)
        assert loss < tolerance and gradients < tolerance
        bench.step(case, "project")                          # and once more, where training has moved the prompt


def test_both_steps_reach_every_parameter_that_is_learnt():
    for row in bench.ROWS:
        case = bench.make_case(row, SINGLE, 5, 2)
        for side in bench.LOSSES:
            bench.step(case, side, update=False)
            missed = {name for name, p in case.learner.named_parameters() if p.grad is None or not p.grad.any()}
            assert not missed, (row, side, missed)


@pytest.mark.parametrize("text_only", [False, True])
def test_a_wrong_step_shows_in_the_differences(monkeypatch, text_only):
    case = bench.make_case("coop", EXACT, 5, 3)
    assert max(bench.differences(case, text_only)) < 1e-10
    early = (case.normal[0], case.normal[1] - 1)                      # [EOT] read one position early
    monkeypatch.setattr(case, "normal", early)
    assert max(bench.differences(case, text_only)) > 1e-3


def test_batched_text_encoder_equals_the_one_that_goes_name_by_name():
    case = bench.make_case("coop", EXACT, 9, 2)
    context = torch.randn(5, 128, dtype=torch.float64)
    assert relative(bench.encode_77(EXACT, context, case.normal), encode_77(EXACT, context, case.names)) < 1e-12


def test_class_names_look_real_and_are_stable():
    names = bench.class_names(1000)
    assert len(set(names)) == 1000 and names[:50] == bench.class_names(50)
    assert {len(name.split()) for name in names} == {1, 2, 3, 4}


def test_cell_that_does_not_fit_is_extrapolated_and_says_so(monkeypatch):
    monkeypatch.setattr(bench, "alone", lambda side, row, n, options, exact: {"gb": 1 + 0.04 * n, "seconds": 0.1 * n})
    monkeypatch.setattr(bench, "available_gb", lambda device: 20)
    args = bench.parse([])
    assert bench.too_much(args, "coop", 100) is None
    assert bench.too_much(args, "coop", 500) == "n/a (needs 21.0 GB and 50 s, extrapolated from 80 and 200 classes)"
    assert "from 20 and 50 classes" in bench.too_much(args, "cocoop", 500)
    monkeypatch.setattr(bench, "available_gb", lambda device: 1000)
    assert "200 s" in bench.too_much(args, "coop", 2000)                  # fits, but takes longer than --patience


def test_the_command_prints_its_tables(capsys):
    bench.main(["--tiny", "--no-memory", "--quick", "--repeats", "1", "--classes", "3", "6"])
    out = capsys.readouterr().out
    assert out.count("| CoOp, text side |") == 2
    for name in bench.ROWS.values():
        assert out.count(f"| {name} + AnchorOPT |") == 2
        assert f"| Stage II, {name}: an epoch" in out and f"| Evaluation, {name}, 3 classes" in out
    widths = {line.count("|") for line in out.splitlines() if "AnchorOPT" in line or line.startswith("| step")}
    assert widths == {12}


def test_peak_memory_is_that_of_a_process_of_its_own():
    options = bench.parse(["--tiny", "--quick"]).options
    ballast = torch.ones(300_000_000)                                     # 1.2 GB here must not show there
    peak = bench.alone("project", "coop", 3, options)["gb"]
    assert 0.05 < peak < 1.2 and len(ballast)
