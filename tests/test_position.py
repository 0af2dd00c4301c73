"""Eqs. 6-9 and Tab. 8 against loops, the straight-through gradient, and modules copied to an empty folder."""

import math
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

import position
from position import PositionMatrix, fixed_matrix, rearrange

ROOT = pathlib.Path(position.__file__).parent


def noise_of_next_call(matrix, seed):
    torch.manual_seed(seed)
    return position.gumbel_noise(matrix.logits)


def test_position_matrix_forward_is_eq6():
    torch.manual_seed(0)
    matrix = PositionMatrix(5)
    for seed in range(20):
        noise = noise_of_next_call(matrix, seed)
        torch.manual_seed(seed)
        W = matrix()
        log_p = matrix.logits.log_softmax(-1)
        for i in range(5):
            scores = [(log_p[i, j] + noise[i, j]).item() for j in range(5)]
            assert W[i].tolist() == [float(j == scores.index(max(scores))) for j in range(5)]      # exactly 0 and 1


@pytest.mark.parametrize("tau", [0.1, 1.0, 4.0])
def test_gradient_of_the_hard_matrix_is_that_of_eq7(tau):
    torch.manual_seed(1)
    matrix, weights = PositionMatrix(4, tau).double(), torch.randn(4, 4, dtype=torch.float64)
    noise = noise_of_next_call(matrix, 7)
    torch.manual_seed(7)
    (straight_through,) = torch.autograd.grad((matrix() * weights).sum(), matrix.logits)

    log_p = matrix.logits.detach().log_softmax(-1).requires_grad_(True)          # Eq. 7 in loops
    total = 0
    for i in range(4):
        numerators = [torch.exp((log_p[i, j] + noise[i, j]) / tau) for j in range(4)]
        total = total + sum(weights[i, j] * numerators[j] / sum(numerators) for j in range(4))
    (g,) = torch.autograd.grad(total, log_p)
    # through log p = log_softmax(logits); Eq. 7 does not see a row's constant, so the rows of g sum to 0
    torch.testing.assert_close(straight_through, g, rtol=1e-9, atol=1e-12)


def test_gumbel_noise_samples_the_probabilities_of_w():
    torch.manual_seed(2)
    matrix = PositionMatrix(3)
    mean = torch.stack([matrix().detach() for _ in range(4000)]).mean(0)
    assert (mean - matrix.logits.softmax(-1)).abs().max() < 4 * 0.5 / math.sqrt(4000)        # 4 sigma of a frequency
    noise = position.gumbel_noise(torch.empty(200_000))
    assert noise.mean() == pytest.approx(0.5772, abs=0.02) and noise.var() == pytest.approx(math.pi ** 2 / 6, abs=0.05)


def test_eval_mode_is_the_argmax_without_noise_and_leaves_the_random_state_alone():
    matrix = PositionMatrix(6).eval()
    before = torch.get_rng_state()
    W = matrix()
    assert torch.equal(before, torch.get_rng_state()) and torch.equal(W, matrix())
    assert W.argmax(-1).tolist() == matrix.logits.argmax(-1).tolist() and W.sum().item() == 6
    sampled = PositionMatrix(6, test_position="sample").eval()
    assert any(not torch.equal(sampled(), sampled()) for _ in range(20))


def test_rearrange_is_eq9_and_moves_repeats_and_drops_tokens():
    tokens = torch.randn(2, 3, 4)
    W = torch.tensor([[0., 0, 1], [1, 0, 0], [0, 0, 1]])                      # token 3 twice, token 2 dropped
    for b in range(2):
        for i, j in enumerate([2, 0, 2]):
            assert torch.equal(rearrange(W, tokens)[b, i], tokens[b, j])
    with pytest.raises(ValueError, match="3 columns for 2 tokens"):
        rearrange(W, tokens[:, :2])


@pytest.mark.parametrize("arrangement, expected", [("before", "A1 A2 V1 V2 V3"), ("middle", "V1 A1 A2 V2 V3")])
def test_fixed_matrix_is_table_8(arrangement, expected):
    tokens = torch.arange(5.0)[:, None]                                        # V1 V2 V3 A1 A2
    order = rearrange(fixed_matrix(arrangement, 3, 2), tokens)[:, 0].int().tolist()
    assert [["V1", "V2", "V3", "A1", "A2"][i] for i in order] == expected.split()


def test_bad_arguments_are_named():
    for call, match in [(lambda: PositionMatrix(0), "size"), (lambda: PositionMatrix(2, 0), "tau"),
                        (lambda: PositionMatrix(2, test_position="x"), "test_position"),
                        (lambda: fixed_matrix("after-class", 2, 1), "arrangement")]:
        with pytest.raises(ValueError, match=match):
            call()


def test_plot_writes_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    position.plot_position_matrix({"a": torch.eye(3), "b": [[0, 1], [1, 0]]}, tmp_path / "w.png", n_anchor=1)
    assert (tmp_path / "w.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("modules", [["losses"], ["position"], ["prompts", "position"], ["anchor", "prompts", "position"]])
def test_modules_work_alone_in_an_empty_folder(tmp_path, modules):
    for module in modules:
        shutil.copy(ROOT / f"{module}.py", tmp_path)
    uses = {"losses": "losses.cross_entropy(torch.zeros(2, 3), torch.tensor([0, 1]))",
            "position": "position.rearrange(position.PositionMatrix(3)(), torch.ones(3, 2))",
            "prompts": "prompts.clip_logits(torch.ones(1, 2), torch.ones(3, 2), 100)", "anchor": "anchor.AnchorPrompt"}
    code = f"import torch, {modules[0]}; {uses[modules[0]]}; print('works')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "works\n" and done.stderr == "", done.stderr
