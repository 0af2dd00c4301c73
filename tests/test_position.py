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
from position import PositionMatrix, fixed_matrix, in_words, rearrange

ROOT = pathlib.Path(position.__file__).parent


def noise_of_next_call(matrix, seed):
    torch.manual_seed(seed)
    return position.gumbel_noise(matrix.logits)


def eq7(log_p, noise, tau):
    """W-hat (K, K), entry by entry."""
    K, rows = len(log_p), []
    for i in range(K):
        numerators = [torch.exp((log_p[i, j] + noise[i, j]) / tau) for j in range(K)]
        rows.append(torch.stack([numerator / sum(numerators) for numerator in numerators]))
    return torch.stack(rows)


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


@pytest.mark.parametrize("tau, soft", [(0.1, False), (4.0, False), (0.7, True)])
def test_gradient_of_the_hard_and_of_the_soft_matrix_is_that_of_eq7(tau, soft):
    torch.manual_seed(1)
    matrix = PositionMatrix(4, tau, soft_W=soft).double()
    weights = torch.randn(4, 4, dtype=torch.float64)
    noise = noise_of_next_call(matrix, 7)
    torch.manual_seed(7)
    (found,) = torch.autograd.grad((matrix() * weights).sum(), matrix.logits)

    log_p = matrix.logits.detach().log_softmax(-1).requires_grad_(True)
    (g,) = torch.autograd.grad((eq7(log_p, noise, tau) * weights).sum(), log_p)
    # Through log p = log_softmax(logits): Eq. 7 sees no constant of a row, so g's rows sum to 0.
    torch.testing.assert_close(found, g, rtol=1e-9, atol=1e-12)


def test_the_soft_matrix_is_eq7_in_training_and_hard_in_tests():
    matrix = PositionMatrix(4, 0.7, soft_W=True).double()
    noise = noise_of_next_call(matrix, 3)
    torch.manual_seed(3)
    W = matrix()
    torch.testing.assert_close(W, eq7(matrix.logits.log_softmax(-1), noise, 0.7))
    for test_position in ("argmax", "sample"):
        matrix.test_position = test_position
        assert set(matrix.eval()().flatten().tolist()) == {0.0, 1.0}


def test_noise_is_drawn_once_or_at_each_call():
    torch.manual_seed(4)
    once, step = PositionMatrix(6, draw="once"), PositionMatrix(6)
    torch.manual_seed(5)
    assert len({str(step().tolist()) for _ in range(20)}) > 1
    first = once().detach()
    assert all(torch.equal(first, once().detach()) for _ in range(20))
    assert first.argmax(-1).tolist() == (once.logits + once.noise).argmax(-1).tolist()
    assert torch.equal(once.eval()(), first)            # what was trained is tested
    once.train()
    # A run that goes on has the same noise.
    again = PositionMatrix(6, draw="once")
    again.load_state_dict(once.state_dict())
    assert torch.equal(again(), first) and "noise" not in step.state_dict()


def test_gumbel_noise_samples_the_probabilities_of_w():
    torch.manual_seed(2)
    matrix = PositionMatrix(3)
    mean = torch.stack([matrix().detach() for _ in range(4000)]).mean(0)
    four_sigma = 4 * 0.5 / math.sqrt(4000)                                      # of a frequency
    assert (mean - matrix.logits.softmax(-1)).abs().max() < four_sigma
    noise = PositionMatrix(450, draw="once").noise
    assert noise.mean() == pytest.approx(0.5772, abs=0.02)
    assert noise.var() == pytest.approx(math.pi ** 2 / 6, abs=0.05)


def test_noise_stays_finite_where_u_is_1(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "exponential_", torch.Tensor.zero_)       # -log U = 0
    assert position.gumbel_noise(torch.empty(3)).isfinite().all()


def test_log_p_starts_as_standard_normal():
    torch.manual_seed(0)
    logits = PositionMatrix(100).logits
    assert logits.requires_grad and logits.mean().item() == pytest.approx(0, abs=0.05)
    assert logits.std().item() == pytest.approx(1, abs=0.05)


def test_eval_mode_is_the_argmax_without_noise_and_leaves_the_random_state_alone():
    matrix = PositionMatrix(6).eval()
    before = torch.get_rng_state()
    W = matrix()
    assert torch.equal(before, torch.get_rng_state()) and torch.equal(W, matrix())
    assert torch.equal(W, torch.eye(6)[matrix.logits.argmax(-1)]) and not W.requires_grad
    sampled = PositionMatrix(6, test_position="sample").eval()
    assert any(not torch.equal(sampled(), sampled()) for _ in range(20))


def test_rearrange_is_eq9_and_moves_repeats_and_drops_tokens():
    tokens = torch.randn(2, 3, 4)
    W = torch.tensor([[0., 0, 1], [1, 0, 0], [0, 0, 1]])                    # 3 twice, 2 dropped
    for b in range(2):
        for i, j in enumerate([2, 0, 2]):
            assert torch.equal(rearrange(W, tokens)[b, i], tokens[b, j])


def test_fixed_matrix_is_table_8():
    assert torch.equal(fixed_matrix("before", 3, 2), torch.eye(5)[[3, 4, 0, 1, 2]])
    assert torch.equal(fixed_matrix("middle", 3, 2), torch.eye(5)[[0, 3, 4, 1, 2]])


def test_a_matrix_in_words_names_tokens_by_column():
    rows = [[0, 1, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]
    assert in_words(rows) == "V2 V1 V2 A1"
    assert in_words(torch.tensor(rows), n_anchor=2) == "V2 V1 V2 A2"


@pytest.mark.parametrize("call, named", [
    (lambda: PositionMatrix(2, 0), "0, 'argmax'"),
    (lambda: PositionMatrix(2, test_position="x"), "'x'"),
    (lambda: fixed_matrix("after-class", 2, 1), "'after-class'")])
def test_bad_arguments_are_named(call, named):
    with pytest.raises((AssertionError, KeyError), match=named):
        call()


# ---------------------------------------------------------------------------- Fig. 4

def test_plot_writes_a_picture_in_the_format_of_its_name(tmp_path):
    pytest.importorskip("matplotlib")
    position.plot_position_matrix(torch.eye(3)[[2, 0, 0]], tmp_path / "w.svg")
    assert "<svg" in (tmp_path / "w.svg").read_text()
    # Seven panels: five in a row.
    panels = {f"run {i}": torch.eye(3) for i in range(7)}
    position.plot_position_matrix(panels, tmp_path / "w.png")
    with Image.open(tmp_path / "w.png") as picture:
        assert picture.format == "PNG" and 3500 > picture.width > 2 * picture.height > 2 * 1000


def test_plot_names_rows_columns_and_entries_and_says_in_words_what_w_does(monkeypatch):
    """Fig. 4: columns are tokens of the original sequence, rows positions in the prompt."""
    drawn = []
    monkeypatch.setattr(pytest.importorskip("matplotlib.figure").Figure, "savefig",
                        lambda self, path, **_: drawn.append(self))
    panels = {"a": torch.eye(3)[[2, 0, 0]], "b": [[0, 1, 0], [0, 1, 0], [1, 0, 0]]}
    position.plot_position_matrix(panels, "w.png", {"a": 1, "b": 2})
    first, second = drawn[0].axes[:2]
    assert [label.get_text() for label in first.get_xticklabels()] == ["V1", "V2", "A1"]
    assert [label.get_text() for label in first.get_yticklabels()] == ["1", "2", "3"]
    ones = [text.get_position() for text in first.texts if text.get_text() == "1"]
    assert ones == [(2, 0), (0, 1), (0, 2)]                                     # (column, row)
    assert "A1 V1 V1" in first.get_xlabel() and first.get_title() == "a"
    assert [label.get_text() for label in second.get_xticklabels()] == ["V1", "A1", "A2"]


# ---------------------------------------------------------------------------- copies of the modules

ALONE = {"losses": [], "position": [], "prompts": ["position"], "anchor": ["prompts", "position"]}


def test_modules_work_alone_in_an_empty_folder(tmp_path):
    """One process, which imports torch once and sees one folder of copies after the other."""
    script, expected = ["import sys"], []
    for module, needed in ALONE.items():
        folder = tmp_path / module
        folder.mkdir()
        for name in (module, *needed):
            shutil.copy(ROOT / f"{name}.py", folder)
        script += [f"sys.path[0] = {str(folder)!r}",
                   f"for name in {list(ALONE)}: sys.modules.pop(name, None)",
                   f"import {module}", f"print({module}.__file__)"]
        expected.append(str(folder / f"{module}.py"))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", "\n".join(script)], cwd=tmp_path, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split() == expected, done.stderr
