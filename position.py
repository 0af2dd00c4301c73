"""The position matrix W of AnchorOPT: Eqs. 6, 7 and 9, Tab. 8's fixed matrices, Fig. 4's picture.

W is (K, K) with K = M + N (M soft tokens, N anchor tokens). Row i is a position of the rearranged
prompt, column j a token of the original sequence [V_1]..[V_M][Anc_1]..[Anc_N]; a 1 at (i, j) puts
token j at position i. Rows are chosen one by one, so a token may be repeated or dropped (Sec. 4.2).
W is the hard matrix of Eq. 6; W-hat, its softened form of Eq. 7, serves the gradient alone: this is
Algorithm 1's `hard=True`. Eq. 9 as printed multiplies by W-hat; soft_W=True is that reading.

This module needs torch alone (matplotlib only when a picture is drawn): copy it into any codebase.
"""

import textwrap

import torch
import torch.nn as nn
import torch.nn.functional as F


class PositionMatrix(nn.Module):
    """The learnable W.  `PositionMatrix(K)()` returns (K, K), by default one 1 in every row.

    In training each call draws fresh Gumbel noise: the value is the hard assignment of Eq. 6, the
    gradient that of the soft assignment of Eq. 7 (straight-through). In eval mode it is the arg-max
    without noise, so it is deterministic. That is a reading: "the hard assignment version is
    applied during inference" says the paper, and its hard version, Eq. 6, contains the noise. So
    this is open; test_position="sample" is the other reading.

    size: K = M + N.
    tau: the temperature of Eq. 7, > 0; smaller is sharper (Tab. S3 tries 0.1 to 4).
    test_position: "argmax", or "sample": with noise in eval mode too, as the authors' code does.
    soft_W: W-hat in value, too, in training: Eq. 9 as printed.
    draw: "step", or "once": one noise for training and test, as Algorithm 1 shows it.
    Raises AssertionError for a tau that is not positive, or another test_position.
    """

    def __init__(self, size, tau=1.0, test_position="argmax", soft_W=False, draw="step"):
        super().__init__()
        assert tau > 0 and test_position in ("argmax", "sample"), (tau, test_position)
        self.tau = tau
        self.test_position = test_position
        self.soft_W = soft_W
        # Algorithm 1: pos_params = randn(N + M, N + M). Row i holds log p^i up to a constant, which
        # neither the arg-max of Eq. 6 nor the softmax of Eq. 7 can see.
        self.logits = nn.Parameter(torch.randn(size, size))
        self.register_buffer("noise", gumbel_noise(self.logits) if draw == "once" else None)

    def scores(self):
        """log p^i of each row i, (K, K), plus the noise where it was drawn once for all."""
        return self.logits if self.noise is None else self.logits + self.noise

    def forward(self):
        """Returns W (K, K). One call is one sample (Algorithm 1's gumbel_softmax).

        One sample serves all classes, images and layers of a step.
        """
        scores = self.scores()
        if self.noise is None and (self.training or self.test_position == "sample"):
            # A draw for each of the K x K entries, as gumbel_softmax makes it (Eq. 6 writes eps_j,
            # for each row i), anew at each call. (Algorithm 1 shows the call once, above its loop;
            # the released code draws in every step as well.)
            scores = scores + gumbel_noise(scores)                  # log p_j^i + eps_j
        hard = hard_assignment(scores)                              # Eq. 6
        if not self.training:
            return hard
        soft = soft_assignment(scores, self.tau)                    # Eq. 7
        if self.soft_W:
            return soft
        return hard + (soft - soft.detach())        # the bracket is exactly 0: Eq. 6, to the bit


def gumbel_noise(like):
    """Independent samples of Gumbel(0, 1), -log(-log U); shape, dtype and device of `like`."""
    exponential = torch.empty_like(like).exponential_()                   # -log U ~ Exp(1)
    # It can be 0, whose logarithm would make a score infinite.
    return -exponential.clamp_min(torch.finfo(exponential.dtype).tiny).log()


def hard_assignment(scores):
    """Eq. 6:  w^i = one_hot( arg max_j (log p_j^i + eps_j) ).

    scores (K, K): log p + eps; or log p alone, as in eval mode and in Fig. 4. Returns (K, K) of 0
    and 1 in the dtype of scores.
    """
    return F.one_hot(scores.argmax(-1), scores.shape[-1]).to(scores.dtype)


def soft_assignment(scores, tau):
    """Eq. 7:  w_j^i = exp((log p_j^i + eps_j) / tau) / sum_k exp((log p_k^i + eps_k) / tau).

    scores (K, K): log p + eps; tau > 0. Returns (K, K), rows sum to 1.
    """
    return (scores / tau).softmax(-1)


def rearrange(W, tokens):
    """Eq. 9 (its first half):  W . t_v, position i gets the token that row i of W chooses.

    With M = 2, N = 1 and W = [[0, 1, 0], [0, 0, 1], [0, 1, 0]],  V_1 V_2 Anc -> V_2 Anc V_2.
    (The paper writes a circled dot; its shapes ask for the matrix product.)
    W (R, K), usually R = K; tokens (..., K, d): t_v of Eq. 8. Returns (..., R, d).
    """
    return W.to(tokens.dtype) @ tokens


def fixed_matrix(arrangement, n_soft, n_anchor):
    """The fixed arrangements of Tab. 8 that move tokens within the context, as matrices.

    "before": the anchor tokens stand before all soft tokens; "middle": after floor(M / 2) of them.
    ("After class token" is not a matter of W: there the anchor stands after the class name.)
    With M = 2 and N = 1, "before" is  Anc V_1 V_2  and "middle" is  V_1 Anc V_2.
    n_soft = M, n_anchor = N. Returns (M + N, M + N) of 0 and 1. Raises KeyError for another name.
    """
    in_front = {"before": 0, "middle": n_soft // 2}[arrangement]
    soft, anchor = list(range(n_soft)), list(range(n_soft, n_soft + n_anchor))
    order = soft[:in_front] + anchor + soft[in_front:]
    return torch.eye(n_soft + n_anchor)[order]


def in_words(W, n_anchor=1):
    """What W does: "V2 V1 V2 A1 V1", the prompt's positions from the left. Anchors may be dropped.

    W (R, K) of 0 and 1, or rows of a list; n_anchor = N: how many of the last columns are anchors.
    """
    W = torch.as_tensor(W)
    names = token_names(W.shape[1], n_anchor)
    return " ".join(names[j] for j in W.argmax(1).tolist())


def token_names(K, n_anchor):
    """V1 .. VM, A1 .. AN: the original sequence, Eq. 8."""
    names = [f"V{j + 1}" for j in range(K - n_anchor)]
    return names + [f"A{j + 1}" for j in range(n_anchor)]


def plot_position_matrix(W, path, n_anchor=1):
    """Fig. 4: draws W with tokens of the original sequence as columns and prompt positions as rows.

    W (K, K), or a dict title -> W to draw several side by side as the paper does, five in a row;
    path: the picture to write (its ending sets the format); n_anchor = N: how many of the last
    columns are anchors, or a dict title -> N. Below each W stands in words what it does.
    Raises ImportError where matplotlib is missing.
    """
    # It needs no display and changes no global state of pyplot.
    from matplotlib.figure import Figure

    # One panel, or one for each title: five in a row.
    panels = W if isinstance(W, dict) else {"": W}
    across = min(5, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(3.2 * across, 3.8 * down), dpi=200, layout="constrained")
    for place, (name, matrix) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(down, across, place)
        matrix = torch.as_tensor(matrix, dtype=torch.float32).detach().cpu()
        rows, columns = matrix.shape
        N = n_anchor[name] if isinstance(n_anchor, dict) else n_anchor
        # A 1 is white on dark; the anchors' columns have a frame.
        axes.imshow(matrix.numpy(), cmap="Blues", vmin=0, vmax=1)
        axes.axvspan(columns - N - 0.5, columns - 0.52, fill=False, edgecolor="tab:orange", lw=3)
        for i in range(rows):
            for j in range(columns):
                color = "white" if matrix[i, j] > 0.5 else "gray"
                axes.text(j, i, f"{matrix[i, j]:.0f}", ha="center", va="center", color=color)
        axes.set_xticks(range(columns), token_names(columns, N))
        axes.set_yticks(range(rows), [str(i + 1) for i in range(rows)])
        axes.set_ylabel("position in the prompt")
        lines = textwrap.wrap(f"positions: {in_words(matrix, N)}", 34)
        axes.set_xlabel("\n".join(["token of the original sequence", *lines]), fontsize=8)
        axes.set_title("\n".join(textwrap.wrap(name, 34)), fontsize=9)
    figure.savefig(path, bbox_inches="tight")       # however long a title is
