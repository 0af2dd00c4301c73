"""The objectives of AnchorOPT: Eqs. 5, 10-12 of the paper, and the ensemble that teaches in Eq. 11.

Every function takes tensors and returns a tensor; nothing here knows about CLIP, prompts or files,
so this module can be copied alone into any codebase. Symbols: B images, C classes, d feature width.
"""

import math

import torch
import torch.nn.functional as F


def anchor_mse(anchor_features, description_features):
    """Eq. 5:  L_theta_a = MSE( f_T(t_anc; theta_a), f_T(t_d) ).

    Mean over classes, over each class's descriptions and over the d channels: every class weighs
    the same, however many descriptions it has. Two classes a and b, with descriptions p, q and r:
    ((|a - p|^2 + |a - q|^2) / 2 + |b - r|^2) / (2 d).

    anchor_features (C, d): unit features of the anchor prompts t_anc, one per class.
    description_features: a list of C tensors (D_c, d), the unit features of each class's
        descriptions t_d: Eq. 5 written out. Or, as Stage I has it, their means (C, d), not
        renormalised. The two differ by a constant that does not depend on the anchor, since MSE to
        points = MSE to their mean + the points' variance: the gradient is the same, and each of
        the D_c sentences is encoded once.
    Returns a scalar. Raises ValueError when the classes or the means' shapes do not match.
    """
    if torch.is_tensor(description_features):
        if description_features.shape != anchor_features.shape:
            raise ValueError(f"anchor_mse: shapes {tuple(anchor_features.shape)} and "
                             f"{tuple(description_features.shape)} differ; means must be (C, d)")
        return (anchor_features - description_features).square().mean()
    per_class = [(f_anc - f_des).square().mean()               # (d,) against (D_c, d)
                 for f_anc, f_des in zip(anchor_features, description_features, strict=True)]
    return torch.stack(per_class).mean()


def cross_entropy(logits, labels):
    """Eq. 10:  L1 = CE(q_norm, y), the mean over images.

    logits (B, C): the normal prompt's; labels (B,): class indices in 0..C-1. Returns a scalar.
    """
    return F.cross_entropy(logits, labels)


def ensemble_logits(logits_normal, logits_anchor, average="logits"):
    """q_ens, as Algorithm 1 computes it:  l_ens = (l_anc + l_norm) / 2, with q = softmax(l).

    average: "logits"; or "probabilities", as in S3.1:  l_ens = log( (q_anc + q_norm) / 2 ).
    logits_normal, logits_anchor (B, C). Returns (B, C).
    """
    if average == "probabilities":
        log_q_norm, log_q_anc = logits_normal.log_softmax(-1), logits_anchor.log_softmax(-1)
        return torch.logaddexp(log_q_norm, log_q_anc) - math.log(2)
    return (logits_normal + logits_anchor) / 2


def distillation_kl(logits_normal, logits_ensemble, temperature):
    """Eq. 11:  L2 = KL(q_norm, q_ens): the ensemble teaches the normal prompt.

    The teacher q_ens is a constant here (detached). With T = temperature, and both q of this
    equation softened by it,  softmax(l / T),  this is  T^2  times the mean over the B C elements of
    q_ens (log q_ens - log q_norm):  what is usually written KL(q_ens || q_norm), divided by C.
    (The paper leaves direction and scale open. The tuned lambda_1 : lambda_2 belong to this scale.)

    logits_normal, logits_ensemble (B, C); temperature > 0. Returns a scalar.
    Raises AssertionError for a temperature that is not positive.
    """
    assert temperature > 0, temperature
    log_q_norm = F.log_softmax(logits_normal / temperature, dim=-1)
    log_q_ens = F.log_softmax(logits_ensemble.detach() / temperature, dim=-1)
    return temperature ** 2 * (log_q_ens.exp() * (log_q_ens - log_q_norm)).mean()


def total_loss(ce, kl, lambda_1, lambda_2):
    """Eq. 12:  L_total = lambda_1 * L1 + lambda_2 * L2.  Scalars in, a scalar out."""
    return lambda_1 * ce + lambda_2 * kl
