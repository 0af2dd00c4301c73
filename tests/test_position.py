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
from position import PositionMatrix, fixed_matrix, in_words, rearrange, token_names

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


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("tau", [0.1, 1.0, 4.0])
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
    once.load_state_dict({"logits": step.logits.detach(), "noise": once.noise})
    torch.manual_seed(5)
    assert len({str(step().tolist()) for _ in range(20)}) > 1
    first = once().detach()
    assert all(torch.equal(first, once().detach()) for _ in range(20))
    assert first.argmax(-1).tolist() == (once.logits + once.noise).argmax(-1).tolist()
    assert once.eval()().argmax(-1).tolist() == once.logits.argmax(-1).tolist()         # without it
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
    for noise in (position.gumbel_noise(torch.empty(200_000)),
                  PositionMatrix(450, draw="once").noise):
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


@pytest.mark.parametrize("arrangement, expected", [("before", "A1 A2 V1 V2 V3"),
                                                   ("middle", "V1 A1 A2 V2 V3")])
def test_fixed_matrix_is_table_8(arrangement, expected):
    W = fixed_matrix(arrangement, 3, 2)
    order = rearrange(W, torch.arange(5.0)[:, None])[:, 0].int().tolist()
    assert [["V1", "V2", "V3", "A1", "A2"][i] for i in order] == expected.split()
    assert in_words(W, 2) == expected


def test_a_matrix_in_words_names_tokens_by_column_and_says_where_no_anchor_is_used():
    assert token_names(5, 2) == ["V1", "V2", "V3", "A1", "A2"]
    rows = [[0, 1, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]
    assert in_words(rows) == "V2 V1 V2 A1"
    assert in_words(torch.tensor(rows), n_anchor=2) == "V2 V1 V2 A2"
    assert in_words(torch.eye(3)[[1, 0, 0]]) == "V2 V1 V1; the anchor is not used"


@pytest.mark.parametrize("call, named", [
    (lambda: PositionMatrix(0), "0, 1.0"), (lambda: PositionMatrix(2, 0), "2, 0"),
    (lambda: PositionMatrix(2, math.nan), "nan"),
    (lambda: PositionMatrix(2, test_position="x"), "'x'"),
    (lambda: fixed_matrix("after-class", 2, 1), "'after-class'"),
    (lambda: rearrange(torch.eye(3), torch.zeros(2, 4)), "3 columns for 2 tokens")])
def test_bad_arguments_are_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()


# ---------------------------------------------------------------------------- Fig. 4

@pytest.fixture
def drawn(monkeypatch):
    """The figures that would be written, so that tests can look into them."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    found = []
    monkeypatch.setattr(figure, "savefig", lambda self, path, **_: found.append(self))
    return found


def test_plot_writes_a_picture_in_the_format_of_its_name(tmp_path):
    pytest.importorskip("matplotlib")
    position.plot_position_matrix(torch.eye(3)[[2, 0, 0]], tmp_path / "w.svg", 1, "CoOp")
    assert "<svg" in (tmp_path / "w.svg").read_text()
    # Seven panels of several lengths: five in a row.
    panels = {f"run {i}": torch.eye(2 + i) for i in range(7)}
    position.plot_position_matrix(panels, tmp_path / "w.png", {name: 1 for name in panels})
    with Image.open(tmp_path / "w.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 2 * picture.height > 2 * 1000            # 200 dots an inch


def test_plot_names_rows_columns_and_entries_and_says_in_words_what_w_does(drawn):
    """Fig. 4: columns are tokens of the original sequence, rows positions in the prompt."""
    panels = {"a": torch.eye(3)[[2, 0, 0]], "b": [[0, 1, 0], [0, 1, 0], [1, 0, 0]]}
    position.plot_position_matrix(panels, "w.png", {"a": 1, "b": 2})
    first, second = drawn[0].axes[:2]
    assert [label.get_text() for label in first.get_xticklabels()] == ["V1", "V2", "A1"]
    assert [label.get_text() for label in first.get_yticklabels()] == ["1", "2", "3"]
    ones = [text.get_position() for text in first.texts if text.get_text() == "1"]
    assert ones == [(2, 0), (0, 1), (0, 2)]                                     # (column, row)
    assert "A1 V1 V1" in first.get_xlabel() and first.get_title() == "a"
    assert [label.get_text() for label in second.get_xticklabels()] == ["V1", "A1", "A2"]
    assert "A1 A1 V1" in second.get_xlabel() and second.get_title() == "b"


# ---------------------------------------------------------------------------- copies of the modules

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
