"""Eqs. 5 and 10-12 and q_ens, each against the formula written out in loops, in float64."""

import math

import pytest
import torch

import losses

torch.manual_seed(0)
B, C, d = 5, 4, 6
NORMAL, ANCHOR = (7 * torch.randn(B, C, dtype=torch.float64) for _ in range(2))
LABELS = torch.tensor([0, 3, 1, 1, 2])
F_ANC = torch.randn(C, d, dtype=torch.float64, requires_grad=True)
F_DES = [torch.randn(n, d, dtype=torch.float64) for n in (1, 3, 10, 2)]         # ragged


def softmax(row):
    weights = [math.exp(x - max(row)) for x in row]
    return [w / sum(weights) for w in weights]


def test_anchor_mse_is_eq5_with_every_class_weighing_the_same():
    expected = 0.0
    for c in range(C):
        for f in F_DES[c]:
            for j in range(d):
                expected += (F_ANC[c, j].item() - f[j].item()) ** 2 / (C * len(F_DES[c]) * d)
    assert losses.anchor_mse(F_ANC, F_DES).item() == pytest.approx(expected, rel=1e-12)


def test_eq5_against_the_means_has_the_same_gradient_and_differs_by_the_variance():
    full = losses.anchor_mse(F_ANC, F_DES)
    short = losses.anchor_mse(F_ANC, torch.stack([f.mean(0) for f in F_DES]))
    variance = sum((f - f.mean(0)).square().mean() for f in F_DES) / C
    assert full.item() == pytest.approx((short + variance).item(), rel=1e-12)
    (g,) = torch.autograd.grad(full - short, F_ANC)
    assert g.abs().max() < 1e-15


@pytest.mark.parametrize("descriptions", [F_DES[:3], torch.zeros(3, d), torch.zeros(C, 1)])
def test_other_classes_or_widths_are_refused(descriptions):
    with pytest.raises(ValueError):
        losses.anchor_mse(F_ANC, descriptions)


def test_cross_entropy_is_eq10():
    expected = -sum(math.log(softmax(NORMAL[b].tolist())[LABELS[b]]) for b in range(B)) / B
    assert losses.cross_entropy(NORMAL, LABELS).item() == pytest.approx(expected, rel=1e-12)


def test_ensemble_is_algorithm_1s_mean_of_logits():
    assert torch.equal(losses.ensemble_logits(NORMAL, ANCHOR), (NORMAL + ANCHOR) / 2)


def test_ensemble_of_probabilities_is_s3_1s_mean_of_q():
    ensemble = losses.ensemble_logits(NORMAL, ANCHOR, "probabilities")
    for b in range(B):
        q_norm, q_anc = softmax(NORMAL[b].tolist()), softmax(ANCHOR[b].tolist())
        q_ens = [(n + a) / 2 for n, a in zip(q_norm, q_anc)]
        assert ensemble[b].exp().tolist() == pytest.approx(q_ens, rel=1e-12)
    # Where every q underflows in float32, its logarithm does not.
    far = torch.tensor([[0.0, 1e3, -1e3]])
    assert losses.ensemble_logits(far, far, "probabilities").tolist() == [[-1e3, 0.0, -2e3]]


@pytest.mark.parametrize("T", [0.1, 1, 4])
def test_distillation_is_eq11_with_the_ensemble_as_teacher(T):
    ensemble, expected = losses.ensemble_logits(NORMAL, ANCHOR), 0.0
    for b in range(B):
        q_ens, q_norm = softmax((ensemble[b] / T).tolist()), softmax((NORMAL[b] / T).tolist())
        expected += sum(q_ens[c] * math.log(q_ens[c] / q_norm[c]) for c in range(C) if q_ens[c] > 0)
    expected *= T ** 2 / (B * C)
    assert losses.distillation_kl(NORMAL, ensemble, T).item() == pytest.approx(expected, rel=1e-9)


def test_distillation_moves_the_normal_prompt_alone_towards_the_ensemble():
    normal, anchor = NORMAL.clone().requires_grad_(), ANCHOR.clone().requires_grad_()
    T = 2.0                                     # d L2 / d l_norm = T / (B C) (q_norm - q_ens)
    losses.distillation_kl(normal, losses.ensemble_logits(normal, anchor), T).backward()
    assert anchor.grad is None                                  # the teacher is a constant
    q_norm, q_ens = (NORMAL / T).softmax(-1), ((NORMAL + ANCHOR) / 2 / T).softmax(-1)
    torch.testing.assert_close(normal.grad, T / (B * C) * (q_norm - q_ens), rtol=1e-9, atol=1e-12)
    for wrong in (0, -1, math.nan):
        with pytest.raises(AssertionError, match=str(wrong)):
            losses.distillation_kl(NORMAL, NORMAL, wrong)


def test_total_loss_is_eq12():
    assert losses.total_loss(0.7, 0.02, 100, 1000) == pytest.approx(90.0)
