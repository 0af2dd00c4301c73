"""Eqs. 6-9 and Tab. 8 against loops, the straight-through gradient, modules in an empty folder."""

import math
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

import position
from position import PositionMatrix, fixed_matrix, rearrange

ROOT = pathlib.Path(position.__file__).parent


def noise_of_next_call(matrix, seed):
    torch.manual_seed(seed)
    return position.gumbel_noise(matrix.logits)


def test_position_matrix_forward_is_eq6():
    torch.manual_seed(0)
    matrix = PositionMatrix(5).double()
    for seed in range(20):
        noise = noise_of_next_call(matrix, seed)
        torch.manual_seed(seed)
        W = matrix()
        log_p = matrix.logits.log_softmax(-1)
        for i in range(5):
            scores = [(log_p[i, j] + noise[i, j]).item() for j in range(5)]
            chosen = scores.index(max(scores))
            assert W[i].tolist() == [float(j == chosen) for j in range(5)]      # exactly 0 and 1


@pytest.mark.parametrize("tau", [0.1, 1.0, 4.0])
def test_gradient_of_the_hard_matrix_is_that_of_eq7(tau):
    torch.manual_seed(1)
    matrix, weights = PositionMatrix(4, tau).double(), torch.randn(4, 4, dtype=torch.float64)
    noise = noise_of_next_call(matrix, 7)
    torch.manual_seed(7)
    (straight_through,) = torch.autograd.grad((matrix() * weights).sum(), matrix.logits)

    log_p = matrix.logits.detach().log_softmax(-1).requires_grad_(True)         # Eq. 7 in loops
    total = 0
    for i in range(4):
        numerators = [torch.exp((log_p[i, j] + noise[i, j]) / tau) for j in range(4)]
        total = total + sum(weights[i, j] * numerators[j] / sum(numerators) for j in range(4))
    (g,) = torch.autograd.grad(total, log_p)
    # Through log p = log_softmax(logits): Eq. 7 sees no constant of a row, so g's rows sum to 0.
    torch.testing.assert_close(straight_through, g, rtol=1e-9, atol=1e-12)


def test_gumbel_noise_samples_the_probabilities_of_w():
    torch.manual_seed(2)
    matrix = PositionMatrix(3)
    mean = torch.stack([matrix().detach() for _ in range(4000)]).mean(0)
    four_sigma = 4 * 0.5 / math.sqrt(4000)                                      # of a frequency
    assert (mean - matrix.logits.softmax(-1)).abs().max() < four_sigma
    noise = position.gumbel_noise(torch.empty(200_000))
    assert noise.isfinite().all() and noise.mean() == pytest.approx(0.5772, abs=0.02)
    assert noise.var() == pytest.approx(math.pi ** 2 / 6, abs=0.05)


def test_noise_stays_finite_where_u_is_1(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "exponential_", torch.Tensor.zero_)       # -log U = 0
    assert position.gumbel_noise(torch.empty(3)).isfinite().all()


def test_log_p_starts_as_standard_normal():
    torch.manual_seed(0)
    logits = PositionMatrix(100).logits
    assert logits.shape == (100, 100) and logits.requires_grad
    assert logits.mean().item() == pytest.approx(0, abs=0.05)
    assert logits.std().item() == pytest.approx(1, abs=0.05)


def test_eval_mode_is_the_argmax_without_noise_and_leaves_the_random_state_alone():
    matrix = PositionMatrix(6).eval()
    before = torch.get_rng_state()
    W = matrix()
    assert torch.equal(before, torch.get_rng_state()) and torch.equal(W, matrix())
    assert W.argmax(-1).tolist() == matrix.logits.argmax(-1).tolist()
    assert W.sum().item() == 6 and not W.requires_grad
    sampled = PositionMatrix(6, test_position="sample").eval()
    assert any(not torch.equal(sampled(), sampled()) for _ in range(20))


def test_rearrange_is_eq9_and_moves_repeats_and_drops_tokens():
    tokens = torch.randn(2, 3, 4)
    W = torch.tensor([[0., 0, 1], [1, 0, 0], [0, 0, 1]])                    # 3 twice, 2 dropped
    for b in range(2):
        for i, j in enumerate([2, 0, 2]):
            assert torch.equal(rearrange(W, tokens)[b, i], tokens[b, j])
    with pytest.raises(ValueError, match="3 columns for 2 tokens"):
        rearrange(W, tokens[:, :2])


@pytest.mark.parametrize("arrangement, expected", [("before", "A1 A2 V1 V2 V3"),
                                                   ("middle", "V1 A1 A2 V2 V3")])
def test_fixed_matrix_is_table_8(arrangement, expected):
    tokens = torch.arange(5.0)[:, None]                                        # V1 V2 V3 A1 A2
    order = rearrange(fixed_matrix(arrangement, 3, 2), tokens)[:, 0].int().tolist()
    assert [["V1", "V2", "V3", "A1", "A2"][i] for i in order] == expected.split()


def test_bad_arguments_are_named():
    assert PositionMatrix(1)().tolist() == [[1.0]]
    for call, match in [(lambda: PositionMatrix(0), "size must be at least 1, got 0"),
                        (lambda: PositionMatrix(2, 0), "tau must be positive, got 0"),
                        (lambda: PositionMatrix(2, math.nan), "tau must be positive, got nan"),
                        (lambda: PositionMatrix(2, test_position="x"), "'sample', got 'x'"),
                        (lambda: fixed_matrix("after-class", 2, 1), "got 'after-class'")]:
        with pytest.raises(ValueError, match=match):
            call()


def test_plot_writes_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    panels = {"a": torch.eye(3), "b": [[0, 1], [1, 0]]}
    position.plot_position_matrix(panels, tmp_path / "w.png", n_anchor=1)
    assert (tmp_path / "w.png").read_bytes().startswith(b"\x89PNG")
    position.plot_position_matrix(torch.eye(3)[[2, 0, 0]], tmp_path / "w.svg", 1, "CoOp")
    assert (tmp_path / "w.svg").stat().st_size > 1000


def test_many_matrices_of_several_lengths_go_into_rows_of_five(tmp_path):
    pytest.importorskip("matplotlib")
    panels = {f"run {i}": torch.eye(2 + i) for i in range(7)}
    position.plot_position_matrix(panels, tmp_path / "w.png", {name: 1 for name in panels})
    with Image.open(tmp_path / "w.png") as picture:
        assert picture.size == (1340, 600)                      # 5 x 2.6 + 0.4 by 2 x 3 inches


def test_plot_names_rows_columns_and_entries(tmp_path, monkeypatch):
    """Fig. 4: columns are tokens of the original sequence, rows positions in the prompt."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    drawn = []
    monkeypatch.setattr(figure, "savefig", lambda self, path: drawn.append(self))
    position.plot_position_matrix(torch.eye(3)[[2, 0, 0]], tmp_path / "w.png", n_anchor=1)
    axes, = drawn[0].axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["V1", "V2", "A1"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "2", "3"]
    ones = [text.get_position() for text in axes.texts if text.get_text() == "1"]
    assert ones == [(2, 0), (0, 1), (0, 2)]                                     # (column, row)


ALONE = {
    ("losses",): """
logits = torch.zeros(2, 3, requires_grad=True)
losses.distillation_kl(logits, torch.ones(2, 3), 2.0).backward()
assert losses.cross_entropy(logits, torch.tensor([0, 1])) > 1""",
    ("position",): """
assert position.rearrange(position.PositionMatrix(3)(), torch.ones(3, 2)).shape == (3, 2)""",
    ("prompts", "position"): """
model = prompts.clip.model.CLIP(8, 32, 1, 64, 8, 77, 49408, 64, 1, 1)
template = prompts.AnchorTemplate(model, 2, torch.zeros(1, 64))
assert prompts.MaPLe(model, ["ant"], template, depth=1).text_features().shape == (1, 8)""",
    ("anchor", "prompts", "position"): """
prompt = anchor.AnchorPrompt(model, ["ant", "rhino"])
prompt().sum().backward()
assert prompt.tokens.grad.shape == (1, 64)
anchor.save_anchor("a.pt", prompt.tokens, {})
assert torch.equal(anchor.load_anchor("a.pt")[0], prompt.tokens)"""}


def test_modules_work_alone_in_an_empty_folder(tmp_path):
    """One process, which imports torch once and sees one folder of copies after the other."""
    script = ["import sys, torch"]
    for modules, use in ALONE.items():
        folder = tmp_path / modules[0]
        folder.mkdir()
        for name in modules:
            shutil.copy(ROOT / f"{name}.py", folder)
        script += [f"sys.path[0] = {str(folder)!r}",
                   f"for name in {[name for each in ALONE for name in each]}:",
                   "    sys.modules.pop(name, None)",
                   f"import {modules[0]}", use, f"print({modules[0]}.__file__)"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", "\n".join(script)], cwd=tmp_path, env=environment,
                          capture_output=True, text=True)
    assert done.stderr == "" and done.returncode == 0, done.stderr
    imported = [str(pathlib.Path(file).relative_to(tmp_path)) for file in done.stdout.split()]
    assert imported == ["losses/losses.py", "position/position.py", "prompts/prompts.py",
                        "anchor/anchor.py"]
