"""The benchmark compares like with like: its conventional step computes what the project's does."""

import collections

import bench
import position
import pytest
import torch
from reference import as_exact_as, encode_77, relative, tiny_clip

EXACT, SINGLE = tiny_clip(dtype=torch.float64), tiny_clip()         # the same weights


def rough_case(row, model, seed=0):
    """A case far from tiny start values, so that every term shows; the same in any precision."""
    case, generator = bench.make_case(row, model, 7, 3), torch.Generator().manual_seed(seed)
    for parameter in case.learner.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return case


@pytest.mark.parametrize("row", bench.ROWS)
def test_conventional_step_equals_the_projects_step(row):
    case = rough_case(row, EXACT)
    for _ in range(2):
        loss, gradients = bench.differences(case)
        assert loss < 1e-10 and gradients < 1e-10
        bench.step(case, "project")              # and where training has moved the prompt


@pytest.mark.parametrize("row", bench.ROWS)
def test_the_projects_step_loses_no_more_in_float32_than_the_conventional_one(row, monkeypatch):
    """Both against float64: on any processor the fast may be as far off as the obvious one."""
    drawn = {}

    def noise(like):                             # a draw in float32 is another than in float64
        generator = torch.Generator().manual_seed(4)
        gumbel = -torch.empty(like.shape).exponential_(generator=generator).log()
        return drawn.setdefault(like.shape, gumbel).to(like.dtype)
    monkeypatch.setattr(position, "gumbel_noise", noise)
    # Four draws beside each other: one loss is a single number, which rounds well by luck at times.
    found = collections.defaultdict(list)
    for seed in range(4):
        exact = bench.loss_and_gradients(rough_case(row, EXACT, seed), "conventional")
        case = rough_case(row, SINGLE, seed)
        project, conventional = (bench.loss_and_gradients(case, side) for side in bench.STEPS)
        assert project.keys() == conventional.keys() == exact.keys() and drawn
        for name in exact:
            found[name].append((project[name], conventional[name], exact[name]))
    for name, draws in found.items():
        assert as_exact_as(*map(torch.stack, zip(*draws))), name


def test_both_steps_reach_every_parameter_that_is_learnt():
    for row in bench.ROWS:
        case = bench.make_case(row, SINGLE, 5, 2)
        for side in bench.STEPS:
            found = bench.loss_and_gradients(case, side)
            missed = [name for name, _ in case.learner.named_parameters()
                      if name not in found or not found[name].any()]
            assert not missed, (row, side, missed)


def test_looking_at_the_gradients_moves_nothing():
    case = bench.make_case("coop", SINGLE, 5, 2)
    before = {name: value.clone() for name, value in case.learner.state_dict().items()}
    bench.differences(case)
    after = case.learner.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    bench.step(case, "project")
    assert not torch.equal(before["template.soft_tokens"], case.learner.template.soft_tokens)


@pytest.mark.parametrize("text_only", [False, True])
def test_a_wrong_step_shows_in_the_differences(monkeypatch, text_only):
    case = bench.make_case("coop", EXACT, 5, 3)
    assert max(bench.differences(case, text_only)) < 1e-10
    early = (case.normal[0], case.normal[1] - 1)                    # [EOT] read one position early
    monkeypatch.setattr(case, "normal", early)
    assert max(bench.differences(case, text_only)) > 1e-3


def test_batched_text_encoder_equals_the_one_that_goes_name_by_name():
    case = bench.make_case("coop", EXACT, 9, 2)
    context = torch.randn(5, 128, dtype=torch.float64)
    batched = bench.encode_77(EXACT, context, case.normal)
    assert relative(batched, encode_77(EXACT, context, case.names)) < 1e-12


def test_kernels_are_counted_without_views():
    x = torch.randn(4, 6, requires_grad=True)
    with bench.Kernels() as counter:
        y = x.view(6, 4).transpose(0, 1)[:, 1:]                     # views alone
        assert counter.count == 0
        y = y.exp().sum()
        assert counter.count == 2
    del y
    case = bench.make_case("coop", SINGLE, 5, 2)
    counts = []
    for _ in range(2):
        bench.differences(case)
        counts.append(case.kernels["project", False])
    assert counts[0] == counts[1] > 100
    bench.differences(case, text_only=True)
    assert case.kernels["project", True] < counts[0]


def test_class_names_look_real_and_are_stable():
    names = bench.class_names(1000)
    assert len(set(names)) == 1000 and names[:50] == bench.class_names(50)
    assert {len(name.split()) for name in names} == {1, 2, 3, 4}


def test_cell_that_does_not_fit_is_extrapolated_and_says_so(monkeypatch):
    def alone(side, row, n, options, exact):
        return {"gb": 1 + 0.04 * n, "seconds": 0.1 * n}
    monkeypatch.setattr(bench, "alone", alone)
    monkeypatch.setattr(bench, "available_gb", lambda device: 20)
    args = bench.parse([])
    assert bench.too_much(args, "coop", 100) is None
    expected = "n/a (needs 21.0 GB and 50 s, extrapolated from 80 and 200 classes)"
    assert bench.too_much(args, "coop", 500) == expected
    assert "from 20 and 50 classes" in bench.too_much(args, "cocoop", 500)
    monkeypatch.setattr(bench, "available_gb", lambda device: 1000)
    assert "200 s" in bench.too_much(args, "coop", 2000)            # fits, but outlasts --patience


def test_the_command_prints_its_tables(capsys):
    bench.main(["--tiny", "--no-memory", "--quick", "--repeats", "1", "--classes", "3", "6"])
    out = capsys.readouterr().out
    assert out.count("| CoOp, text side |") == 2
    for row, name in bench.ROWS.items():
        assert out.count(f"| {name} + AnchorOPT |") == 2
        assert out.count(f"| {name}, second method, features kept |") == 2 * (row != "maple")
        assert f"| Stage II, {name}: an epoch" in out
        assert f"| Evaluation, {name}, 3 classes" in out
    starts = tuple(f"| {name}" for name in ["step", *bench.ROWS.values()])
    widths = {text.count("|") for text in out.splitlines() if text.startswith(starts)}
    assert widths == {len(bench.COLUMNS) + 1}


def test_peak_memory_is_that_of_a_process_of_its_own():
    options = bench.parse(["--tiny", "--quick"]).options
    ballast = torch.ones(300_000_000)                           # 1.2 GB here must not show there
    peak = bench.alone("project", "coop", 3, options)["gb"]
    assert 0.05 < peak < 1.2 and len(ballast)
