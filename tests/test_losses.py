"""Eqs. 5 and 10-12 and q_ens, each against the formula written out in loops, in float64."""

import math

import pytest
import torch

import losses

torch.manual_seed(0)
B, C, d = 5, 4, 6
NORMAL, ANCHOR = (7 * torch.randn(B, C, dtype=torch.float64) for _ in range(2))
LABELS = torch.tensor([0, 3, 1, 1, 2])


def softmax(row):
    top = max(row)
    weights = [math.exp(x - top) for x in row]
    return [w / sum(weights) for w in weights]


def test_anchor_mse_is_eq5_with_every_class_weighing_the_same():
    f_anc = torch.randn(C, d, dtype=torch.float64)
    f_des = [torch.randn(n, d, dtype=torch.float64) for n in (1, 3, 10, 2)]         # ragged
    expected = 0.0
    for c in range(C):
        for k in range(len(f_des[c])):
            for j in range(d):
                expected += float(f_anc[c, j] - f_des[c][k, j]) ** 2 / (C * len(f_des[c]) * d)
    assert losses.anchor_mse(f_anc, f_des).item() == pytest.approx(expected, rel=1e-12)


def test_eq5_against_the_means_has_the_same_gradient_and_differs_by_the_variance():
    f_anc = torch.randn(C, d, dtype=torch.float64, requires_grad=True)
    f_des = [torch.randn(n, d, dtype=torch.float64) for n in (1, 3, 10, 2)]
    means = torch.stack([f.mean(0) for f in f_des])
    full, short = losses.anchor_mse(f_anc, f_des), losses.anchor_mse(f_anc, means)
    variance = losses.description_variance(f_des)
    assert full.item() == pytest.approx((short + variance).item(), rel=1e-12)
    (g_full,), (g_short,) = torch.autograd.grad(full, f_anc), torch.autograd.grad(short, f_anc)
    torch.testing.assert_close(g_full, g_short, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("anchors, descriptions, named", [
    (torch.zeros(4, 2), torch.zeros(3, 2), ["4", "3"]),
    (torch.zeros(4, 2), torch.zeros(4, 3), ["(4, 2)", "(4, 3)"]),
    (torch.zeros(2, 2), [torch.zeros(5, 2), torch.zeros(1, 3)], ["2"]),
    (torch.zeros(2, 2), [torch.zeros(5, 2), torch.zeros(1, 1)], ["2"])])    # 1 would be broadcast
def test_anchor_mse_names_what_does_not_match(anchors, descriptions, named):
    with pytest.raises(ValueError) as error:
        losses.anchor_mse(anchors, descriptions)
    assert all(part in str(error.value) for part in named)


def test_cross_entropy_is_eq10():
    expected = -sum(math.log(softmax(NORMAL[b].tolist())[LABELS[b]]) for b in range(B)) / B
    assert losses.cross_entropy(NORMAL, LABELS).item() == pytest.approx(expected, rel=1e-12)


def test_ensemble_is_algorithm_1s_mean_of_logits():
    ensemble = losses.ensemble_logits(NORMAL, ANCHOR)
    for b in range(B):
        for c in range(C):
            assert ensemble[b, c] == (NORMAL[b, c] + ANCHOR[b, c]) / 2


def test_ensemble_of_probabilities_is_s3_1s_mean_of_q():
    ensemble = losses.ensemble_logits(NORMAL, ANCHOR, "probabilities")
    for b in range(B):
        q_norm, q_anc = softmax(NORMAL[b].tolist()), softmax(ANCHOR[b].tolist())
        q_ens = [(n + a) / 2 for n, a in zip(q_norm, q_anc)]
        assert ensemble[b].exp().tolist() == pytest.approx(q_ens, rel=1e-12)
        assert softmax(ensemble[b].tolist()) == pytest.approx(q_ens, rel=1e-12)
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


def test_distillation_moves_the_normal_prompt_only_and_vanishes_where_both_agree():
    normal = NORMAL.clone().requires_grad_(True)
    anchor = ANCHOR.clone().requires_grad_(True)
    losses.distillation_kl(normal, losses.ensemble_logits(normal, anchor), 2.0).backward()
    assert anchor.grad is None                                  # the teacher is a constant
    T = 2.0                                     # d L2 / d l_norm = T / (B C) (q_norm - q_ens)
    q_norm, q_ens = (NORMAL / T).softmax(-1), ((NORMAL + ANCHOR) / 2 / T).softmax(-1)
    torch.testing.assert_close(normal.grad, T / (B * C) * (q_norm - q_ens), rtol=1e-9, atol=1e-12)
    assert losses.distillation_kl(NORMAL, NORMAL, 2.0).abs() < 1e-15
    for wrong in (0, -1, math.nan):
        with pytest.raises(ValueError, match=str(wrong)):
            losses.distillation_kl(NORMAL, NORMAL, wrong)


def test_total_loss_is_eq12():
    loss = losses.total_loss(torch.tensor(0.7), torch.tensor(0.02), 100, 1000)
    assert loss.item() == pytest.approx(90.0)
