"""CLIP seen through its token embeddings, the three prompt templates, and the four baselines.

    templates  PlainTemplate (Eq. 2), AttributeTemplate (Eq. 3, ATPrompt), AnchorTemplate (Eqs. 8-9)
    baselines  CoOp, CoCoOp, MaPLe, DePT, and zero-shot CLIP: each takes any of the templates

A learnt prompt reads  [SOS] context [CLS] . [EOT]  with [CLS] the tokens of a class name. A
template makes the context; a baseline says what the context depends on (nothing, the image, the
layer) and what else is learnt. Only `position.py` is needed beside this file.

Symbols: B images, C classes, d feature width, d_t text-token width, d_v image-token width, M soft
tokens, N anchor tokens, K = M + N, L context positions with [SOS], S suffix positions, T the suffix
tokens of all C classes without padding, R image resolution, H attention heads, d_h a head's width.
"""

import contextlib
import copy
import functools
import hashlib
import inspect
import json
import os
import pathlib
import warnings
import zipfile

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

with warnings.catch_warnings():
    warnings.simplefilter("ignore")     # clip imports the deprecated pkg_resources
    import clip
    import clip.model
    from clip.simple_tokenizer import SimpleTokenizer

from position import PositionMatrix, fixed_matrix, rearrange

if len(inspect.signature(clip.model.build_model).parameters) > 1:      # MaPLe's: design_details
    raise ImportError(f"{clip.__file__} is another repository's clip, changed for its own use: "
                      "take its folder off the path")

TOKENIZER = SimpleTokenizer()
SOS, EOT = TOKENIZER.encoder["<|startoftext|>"], TOKENIZER.encoder["<|endoftext|>"]


# ---------------------------------------------------------------------------- features and logits

def unit(x):
    """x / ||x||_2 along the last axis, in float32 at least (Sec. 3.1: u and v_c have length 1)."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)


def clip_logits(u, v, scale):
    """Eq. 1:  q(c | x) = softmax_c( u v_c^T / tau ); this returns what stands in the softmax.

    u (B, d): unit image features. v (C, d): unit text features, or (B, C, d) where each image has
    prompts of its own. scale: 1 / tau, CLIP's `logit_scale.exp()`. Returns (B, C). (This tau is
    CLIP's temperature; the tau of Eq. 7 and the T of Eq. 11 are others.)
    """
    if v.dim() == 2:
        return scale * u @ v.T
    return scale * (v @ u.unsqueeze(-1)).squeeze(-1)


# ---------------------------------------------------------------------------- tokens of a prompt

def embed(clip_model, token_ids):
    """Token ids, a list of n -> their embeddings (n, d_t), no position added."""
    weight = clip_model.token_embedding.weight
    return F.embedding(torch.tensor(token_ids, dtype=torch.long, device=weight.device), weight)


def new_tokens(clip_model, n, std=0.02):
    """n learnable tokens (n, d_t) ~ N(0, std^2), in float32 whatever CLIP's precision."""
    weight = clip_model.token_embedding.weight
    return nn.Parameter(torch.randn(n, weight.shape[1]).to(weight.device) * std)


def class_suffix(clip_model, texts, before=1, inside=None):
    """What comes after the context: the tokens of each text, then [EOT].

    texts: C strings, e.g. class names with their full stop.
    before: how many tokens stand in front, [SOS] and the context.
    inside: tokens (N, d_t) to put between a class name and its full stop (Tab. 8, "after class
        token"), or None.
    Returns suffix (C, S, d_t), padded with zeros to the longest, and eot, the index of [EOT] in
    each of the C rows. ["ant.", "yin yang."] -> rows  ant . E 0  and  yin yang . E, so S = 4 and
    eot = (2, 3): plain numbers, since reading a tensor back from a GPU would stall every step.
    Raises ValueError naming the texts that have no tokens, or too many for CLIP's 77.
    """
    # What is left of CLIP's 77 tokens for a name and its full stop, with [EOT] after them?
    max_tokens = len(clip_model.positional_embedding)
    room = max_tokens - before - 1 - (0 if inside is None else len(inside))
    names = [TOKENIZER.encode(text.removesuffix(".")) for text in texts]
    ids = [TOKENIZER.encode(text) for text in texts]
    wrong = [text for text, name, own in zip(texts, names, ids) if not name or len(own) > room]
    if wrong:
        raise ValueError(f"of CLIP's {max_tokens} tokens {max(0, room)} are left for each of these "
                         f"texts, which need more or none: {', '.join(map(repr, wrong))}; shorten "
                         "them, or take fewer soft, anchor or attribute tokens")

    if inside is None:
        rows = [embed(clip_model, own + [EOT]) for own in ids]
    else:
        # With N = 1,  yin yang . E  becomes  yin yang Anc . E:  S and every eot grow by N.
        stop = embed(clip_model, TOKENIZER.encode(".") + [EOT])
        rows = [torch.cat([embed(clip_model, own), inside, stop]) for own in names]
    suffix = nn.utils.rnn.pad_sequence(rows, batch_first=True)      # (C, S, d_t)
    return suffix, tuple(len(row) - 1 for row in rows)


# ---------------------------------------------------------------------------- f_T, the text encoder
# CLIP's residual blocks, written out: their own code has a mask of fixed size.

def layer_norm(ln, x):
    """CLIP's LayerNorm: computed in the precision of its weights, returned in that of x."""
    y = F.layer_norm(x.to(ln.weight.dtype), ln.normalized_shape, ln.weight, ln.bias, ln.eps)
    return y.to(x.dtype)


def queries_keys_values(block, x):
    """What attention works with: x (B, n, width) -> every head's q, k and v (B, 3 H, n, d_h)."""
    x = layer_norm(block.ln_1, x)
    # in_proj stacks q, k and v: of the 3 H heads the first H are the q, then come the k, the v.
    qkv = F.linear(x, block.attn.in_proj_weight, block.attn.in_proj_bias)       # (B, n, 3 width)
    return qkv.unflatten(-1, (3 * block.attn.num_heads, -1)).transpose(1, 2)


def after_attention(block, x, attended):
    """The rest of a residual block: x and attended (B, n, width) -> (B, n, width)."""
    x = x + block.attn.out_proj(attended)
    h = block.mlp.c_fc(layer_norm(block.ln_2, x))
    if isinstance(block.mlp.gelu, clip.model.QuickGELU):
        h = F.silu(1.702 * h) / 1.702       # = h sigmoid(1.702 h), and keeps one tensor, not two
    else:
        h = block.mlp.gelu(h)
    return x + block.mlp.c_proj(h)


def encode_text(clip_model, context, suffix, eot, deep=None, read_back=0):
    """f_T for C prompts that share their context: the feature at [EOT], exactly as in CLIP.

    CLIP's text attention is causal. So what comes after [EOT] cannot reach the feature and is
    left out, and the states of [SOS] and the context are the same for every class: they are
    computed once, and each class's suffix attends to them. Context and suffixes stand in one row,
    packed end to end, so that no class pays for a longer one; only attention sees the suffixes as
    a padded (C, S) grid.

    context (..., L, d_t): [SOS] and the context, with one leading axis at most (an image's own
        context, CoCoOp).
    suffix (C, S, d_t), eot (a tuple of C numbers): see `class_suffix`.
    deep: None, or a function (layer, context states (B, L-1, d_t) without [SOS]) -> the states to
        go on with, called before each block (Sec. 3.2.3); B = 1 where the context has no such axis.
    read_back: 0, or n: read the feature n positions before [EOT], as the released code does; that
        place may be in the context.
    Returns (..., C, d), not normalised. L + S must be within CLIP's 77, see `class_suffix`.
    """
    contexts = context if context.dim() == 3 else context.unsqueeze(0)          # (B, L, d_t)
    n = len(suffix)
    if not torch.is_grad_enabled():
        # Bounds the memory of a test batch; on a CPU 512 prompts are also 2x faster than 5,000.
        prompts = 512 if suffix.device.type == "cpu" else 8192
        n = max(1, prompts // len(contexts))                        # classes at a time
    features = []
    for start in range(0, len(suffix), n):
        features.append(_encode_classes(clip_model, contexts, suffix[start:start + n],
                                        eot[start:start + n], deep, read_back))     # (B, n, d)
    return torch.cat(features, dim=1).reshape(*context.shape[:-2], len(suffix), -1)


def _encode_classes(clip_model, contexts, suffix, eot, deep, read_back):
    """`encode_text` for C classes at a time and B contexts (B, L, d_t) -> (B, C, d).

    The slow, obvious way that it equals, 77 positions for every class, is `encode_77` in
    tests/reference.py.
    """
    (B, L, _), (C, S, _) = contexts.shape, suffix.shape
    dtype, device = clip_model.dtype, suffix.device
    packed, grid, read = _places(eot, S, L, read_back, device)
    T = len(packed)                                                 # tokens of all C classes
    # Within a class alone: the L context tokens stand in front of all, and need no mask.
    causal = torch.full((S, S), -torch.inf, dtype=dtype, device=device).triu(1)
    position = clip_model.positional_embedding.to(dtype)            # (77, d_t)

    # Here [CLS] joins the context: concat(W . t_v, [CLS]) of Eq. 9, and the end of Eqs. 2, 3, 4.
    # One row of tokens for each context: its L, then the T of all classes. The context has
    # positions 0..L-1, and every class goes on from L, as if it stood there alone.
    class_tokens = suffix.to(dtype) + position[L:L + S]             # (C, S, d_t)
    class_tokens = class_tokens.flatten(0, 1).index_select(0, packed)           # (T, d_t)
    h = contexts.to(dtype) + position[:L]                           # (B, L, d_t)
    h = torch.cat([h, class_tokens.expand(B, -1, -1)], dim=1)       # (B, L + T, d_t)

    blocks = clip_model.transformer.resblocks
    for layer, block in enumerate(blocks):
        if deep is not None:
            # Sec. 3.2.3 changes the context alone; in this block the classes attend to it anew.
            sos, inner, rest = h.split([1, L - 1, T], dim=1)
            h = torch.cat([sos, deep(layer, inner).to(dtype), rest], dim=1)
        qkv = queries_keys_values(block, h)                         # (B, 3 H, L + T, d_h)
        qkv_context, qkv_class = qkv.split([L, T], dim=2)

        # The context attends to itself,
        q, k, v = qkv_context.chunk(3, dim=1)                       # (B, H, L, d_h)
        of_context = F.scaled_dot_product_attention(q, k, v, is_causal=True)

        # and each class to the context, of which nothing is copied, and to its own tokens. The
        # grid puts the padding back, from T to C S places: one product then does all classes.
        qkv_class = qkv_class.index_select(2, grid)                 # (B, 3 H, C S, d_h)
        q_class, k_class, v_class = qkv_class.chunk(3, dim=1)       # (B, H, C S, d_h)
        q_class = q_class * q_class.shape[-1] ** -0.5               # above, torch's own does it
        to_context = (q_class @ k.mT).unflatten(2, (C, S))          # (B, H, C, S, L)
        q_class = q_class.unflatten(2, (C, S))                      # (B, H, C, S, d_h)
        k_class = k_class.unflatten(2, (C, S))
        v_class = v_class.unflatten(2, (C, S))
        to_class = q_class @ k_class.mT + causal                    # (B, H, C, S, S)

        # One softmax over L + S keys, as if they stood in one row. Its product with the values is
        # A v = A_context v_context + A_class v_class: the first of these v is the same for all C.
        A = torch.cat([to_context, to_class], dim=-1).softmax(-1)   # (B, H, C, S, L + S)
        A_context, A_class = A.split([L, S], dim=-1)
        from_context = A_context.flatten(2, 3) @ v                  # (B, H, C S, d_h)
        from_class = (A_class @ v_class).flatten(2, 3)              # (B, H, C S, d_h)
        of_class = (from_context + from_class).index_select(2, packed)          # (B, H, T, d_h)

        attended = torch.cat([of_context, of_class], dim=2)         # (B, H, L + T, d_h)
        attended = attended.transpose(1, 2).flatten(2)              # (B, L + T, d_t)
        if block is blocks[-1]:                 # of the last states only those that are read
            h = h.index_select(1, read)                             # (B, C, d_t)
            attended = attended.index_select(1, read)
        h = after_attention(block, h, attended)
    return layer_norm(clip_model.ln_final, h) @ clip_model.text_projection      # (B, C, d)


@functools.lru_cache(maxsize=256)               # so that a training step copies nothing to the GPU
@torch.inference_mode(False)                    # what is kept must serve a training step as well
def _places(eot, S, L, read_back, device):
    """Index tensors of `_encode_classes`. Two classes carried through, with L = 3 and S = 4:

        class      its row in the grid    eot    places in the grid    in the row of L + T tokens
        ant        ant  .    E  pad       2      0 1 2 -               3 4 5
        yin yang   yin  yang .  E         3      4 5 6 7               6 7 8 9

    packed (T,): the places of the grid that are used             0 1 2 4 5 6 7
    grid (C S,): which of the T tokens stands at each place       0 1 2 2 3 4 5 6
                 (padding repeats the last one: it comes after [EOT], so nothing attends to it)
    read (C,): where among the L + T each feature is read         5 9
                 (with read_back = 1 at each ".": 4 8; with 3, ant's in the context: 2 6)
    """
    eot = torch.tensor(eot)
    used = torch.arange(S) <= eot[:, None]                          # (C, S)
    packed = used.flatten().nonzero().flatten()
    grid = used.flatten().cumsum(0) - 1
    end = L + (eot + 1).cumsum(0)                                   # after each class's [EOT]
    start = end - (eot + 1)                                         # its first token
    at = eot - read_back                                            # below 0: in the context
    read = torch.where(at < 0, L + at, start + at).clamp_min(0)
    return packed.to(device), grid.to(device), read.to(device)


@torch.no_grad()
def encode_sentences(clip_model, sentences):
    """f_T of whole sentences, each after [SOS]: (n, d), not normalised, without gradient.

    The same as `clip_model.encode_text(clip.tokenize(sentences))` without the padding. Raises
    ValueError naming the sentences that are too long for CLIP or have no tokens.
    """
    suffix, eot = class_suffix(clip_model, sentences)
    return encode_text(clip_model, embed(clip_model, [SOS]), suffix, eot)


# --------------------------------------------------------------------------- f_I, the image encoder

def encode_image(clip_model, images, tokens=()):
    """f_I with visual prompts: (B, 3, R, R) -> (B, d), not normalised. With no tokens, CLIP's own.

    tokens: the prompts (M, d_v) of blocks 0, 1, ...: the first are appended after the patches,
    with no position, before `ln_pre`; each later one replaces the last M states before its block
    (MaPLe).
    """
    if len(images) > 8 and images.device.type == "cpu" and not torch.is_grad_enabled():
        # 256 at once take 1.4x longer an image, and 3 GB: the system reclaims large temporaries.
        return torch.cat([encode_image(clip_model, part, tokens) for part in images.split(8)])
    if is_plain_vit(clip_model):
        return _encode_vit(clip_model, images, tokens)
    return clip_model.encode_image(images.to(clip_model.dtype))     # no prompts: CLIP's own path


def is_plain_vit(clip_model):
    """Is its image tower OpenAI's vision transformer, which can be prompted, and no ResNet?"""
    return getattr(clip_model, "plain_vit", hasattr(clip_model.visual, "transformer"))


def _encode_vit(clip_model, images, tokens=()):
    """`encode_image`, written out for a vision transformer."""
    visual = clip_model.visual
    patches = visual.conv1(images.to(clip_model.dtype)).flatten(2).transpose(1, 2)  # (B, n, d_v)
    dtype = patches.dtype
    # CLIP's token for the whole image. (It is no [CLS], which is a class name's tokens here.)
    whole = visual.class_embedding.to(dtype).expand(len(patches), 1, -1)
    x = torch.cat([whole, patches], dim=1)                                      # (B, 1 + n, d_v)
    x = x + visual.positional_embedding.to(dtype)
    prompts = [V_l.to(dtype).expand(len(x), -1, -1) for V_l in tokens]          # (B, M, d_v) each
    x = layer_norm(visual.ln_pre, torch.cat([x, *prompts[:1]], dim=1))
    blocks = visual.transformer.resblocks
    for layer, block in enumerate(blocks):
        if 1 <= layer < len(prompts):
            # MaPLe: the states of the last M tokens go, this layer's Linear_l(V_l) comes in.
            kept = x[:, :x.shape[1] - prompts[layer].shape[1]]
            x = torch.cat([kept, prompts[layer]], dim=1)
        q, k, v = queries_keys_values(block, x).chunk(3, dim=1)         # (B, H, 1 + n + M, d_h)
        if block is blocks[-1]:                 # of the last states only the first is read
            q, x = q[:, :, :1], x[:, :1]
        attended = F.scaled_dot_product_attention(q, k, v)              # (B, H, 1 + n + M, d_h)
        x = after_attention(block, x, attended.transpose(1, 2).flatten(2))
    return layer_norm(visual.ln_post, x[:, 0]) @ visual.proj


# ---------------------------------------------------------------------------- templates

class PlainTemplate(nn.Module):
    """Eq. 2:  t_v = [V_1] ... [V_M] [CLS].  The learnable context of CoOp, CoCoOp, MaPLe and DePT.

    n_soft: M.
    words: start the soft tokens at the embeddings of the first M of these words ("a photo of a")
        where there are that many, else at N(0, 0.02^2). Words beyond the first M stay in the
        prompt, not learnt: plain MaPLe's M = 2 reads  [V_1] [V_2] of a [CLS].

    Every template has:
    `soft_tokens` (M, d_t), the V above;
    `length`, how many positions its context has;
    `position_matrix`, the `PositionMatrix` that learns W, or None;
    a call, given 0 or an image's shift (B, 1, d_t) of all soft tokens (CoCoOp), that returns the
        context (..., length, d_t) and the W that made it, or None;
    `deepen`, the deep variant's rule for what enters a deeper block.
    """
    anchor_in_suffix = False

    def __init__(self, clip_model, n_soft, words=""):
        super().__init__()
        self.soft_tokens = new_tokens(clip_model, n_soft)                       # theta_s
        self.position_matrix = None
        start = embed(clip_model, TOKENIZER.encode(words)).float()
        if n_soft <= len(start):
            self.soft_tokens.data.copy_(start[:n_soft])
        # "of a" in  [V_1] [V_2] of a [CLS]: not learnt, and not saved, since `words` say it.
        self.rest = start[n_soft:]
        self.length = n_soft + len(self.rest)

    def forward(self, shift=0):
        """The context, (..., length, d_t), and None: there is no W. shift: 0, or (B, 1, d_t)."""
        V = self.soft_tokens + shift                                # (M, d_t), or (B, M, d_t)
        return torch.cat([V, self.rest.expand(*V.shape[:-2], -1, -1)], dim=-2), None

    def deepen(self, W, V_l, hidden):
        """MaPLe, Fig. 3a: this layer's V_l (M, d_t) replaces the states of the soft tokens."""
        # The first M states go; those of `rest`, after them, stay.
        kept = hidden[..., len(V_l):, :]
        return torch.cat([V_l.expand(*kept.shape[:-2], -1, -1), kept], dim=-2)


class AttributeTemplate(PlainTemplate):
    """Eq. 3:  t_attr = [V_a1] ... [V_am] [Anc^e] [V_1] ... [V_M] [CLS].  (ATPrompt.)

    attributes: 1 to 3 words. Each (all of its tokens) stands after m = M soft tokens of its own:
        M = 2 and ["color", "shape"] give  V_a V_a color  V_b V_b shape  V_1 V_2,  8 positions.
    """

    def __init__(self, clip_model, n_soft, attributes):
        super().__init__(clip_model, n_soft)
        # ATPrompt starts these at a standard deviation of 0.01, and the others at 0.02.
        self.attribute_soft_tokens = nn.ParameterList(new_tokens(clip_model, n_soft, 0.01)
                                                      for _ in attributes)
        self.words = [embed(clip_model, TOKENIZER.encode(word)) for word in attributes]     # Anc^e
        self.length += sum(n_soft + len(Anc) for Anc in self.words)

    def forward(self, shift=0):
        """Eq. 3 up to its [CLS], (..., length, d_t), and None. shift: 0, or (B, 1, d_t)."""
        parts = []
        for V_a, Anc in zip(self.attribute_soft_tokens, self.words):
            parts += [V_a, Anc]
        V = self.soft_tokens + shift                # only the class-related V are shifted
        attributes = torch.cat(parts).expand(*V.shape[:-2], -1, -1)
        return torch.cat([attributes, V], dim=-2), None

    def deepen(self, W, V_l, hidden):
        """ATPrompt, Fig. 3b: V_l replaces the states of the V; all others stay."""
        # V stands last (Eq. 3): of all states but the last M each is kept.
        kept = hidden[..., :self.length - len(V_l), :]
        return torch.cat([kept, V_l.expand(*kept.shape[:-2], -1, -1)], dim=-2)


class AnchorTemplate(PlainTemplate):
    """Eqs. 8-9:  t_v = [V_1] ... [V_M] [Anc_1] ... [Anc_N],  t_norm = concat(W . t_v, [CLS]).

    anchor_tokens (N, d_t): frozen, from Stage I.
    arrangement (Tab. 8): "adaptive" (W is learnt), "before" or "middle" (a fixed W), "after-class"
        (soft tokens alone in front; the anchor stands between the class name and its full stop).
    matrix: further arguments of `position.PositionMatrix`.
    """

    def __init__(self, clip_model, n_soft, anchor_tokens, arrangement="adaptive", **matrix):
        super().__init__(clip_model, n_soft)
        n_anchor, device = len(anchor_tokens), self.soft_tokens.device
        # Saved with the prompt, unlike a fixed W: evaluation builds t_anc from it.
        anchor_tokens = anchor_tokens.detach().to(device, torch.float32).clone()
        self.register_buffer("anchor_tokens", anchor_tokens)
        self.anchor_in_suffix = arrangement == "after-class"
        self.length = n_soft if self.anchor_in_suffix else n_soft + n_anchor
        if arrangement == "adaptive":                               # theta_pos
            self.position_matrix = PositionMatrix(n_soft + n_anchor, **matrix).to(device)
            return
        if self.anchor_in_suffix:
            W = torch.eye(n_soft, n_soft + n_anchor)                # no row takes an anchor
        else:
            W = fixed_matrix(arrangement, n_soft, n_anchor)
        self.fixed_W = W.to(device)

    def forward(self, shift=0):
        """Eq. 9 up to its [CLS], (..., length, d_t), and its W. shift: 0, or (B, 1, d_t)."""
        # W first: a sample of Eq. 6. With M = 2 and N = 1, rows that choose the columns 2, 3, 2
        # make  V_2 Anc V_2  of  t_v = V_1 V_2 Anc.
        W = self.fixed_W if self.position_matrix is None else self.position_matrix()
        V = self.soft_tokens + shift                                # the anchor is not shifted
        anchor = self.anchor_tokens.expand(*V.shape[:-2], -1, -1)
        t_v = torch.cat([V, anchor], dim=-2)                        # Eq. 8: (..., K, d_t)
        # Eq. 9 except its [CLS], which joins in `_encode_classes`: (..., length, d_t)
        return rearrange(W, t_v), W

    def deepen(self, W, V_l, hidden):
        """Sec. 3.2.3, Fig. 3c: V_l replaces the soft tokens' states, anchors keep theirs.

        Both stand where W put them: row i of W holds its 1 among the first M columns (a soft
        token: V_l comes in) or among the last N (an anchor: the state at position i stays).
        In the example above, V_2 Anc V_2 with the states h_1 h_2 h_3 becomes  V_l[2] h_2 V_l[2],
        with V_l[2] the second of this layer's soft tokens.
        hidden (..., length, d_t); returns the same shape.
        """
        # W is straight-through, so theta_pos learns from every layer. (The released code takes
        # W . [V_l; an anchor's state]: the same value where one row at most holds the anchor,
        # another gradient.)
        W, M = W.to(hidden.dtype), len(V_l)
        soft = W[:, :M] @ V_l.to(hidden.dtype)                      # (length, d_t)
        is_anchor = W[:, M:].sum(1, keepdim=True)                   # (length, 1)
        return soft + is_anchor * hidden


# ---------------------------------------------------------------------------- baselines

class CoOp(nn.Module):
    """CoOp: one context for all classes and images. The learner that the other baselines extend.

    template: one of the templates above. read_back: 0, or N where the feature is read as in the
    released code.
    A learner maps the frozen CLIP's image features f (B, d), not normalised, to logits (B, C);
    `set_classes(names)` rebinds the learnt prompt to other classes. It lives on the device of its
    clip_model: build it there, since `.to(device)` would leave CLIP and the class tokens behind.
    Raises ValueError naming class names that do not fit into CLIP's 77 tokens.
    """
    needs_images = False            # True where the image tower is prompted too
    prompts_per_image = False       # True where every image has a prompt of its own
    ensemble = "logits"             # what its ensemble with the anchor prompt averages

    def __init__(self, clip_model, class_names, template, read_back=0):
        super().__init__()
        object.__setattr__(self, "clip_model", clip_model)     # not a submodule: not ours to save
        self.template = template
        self.read_back = read_back
        self.base_class_names = list(class_names)
        self.sos = embed(clip_model, [SOS])
        self.set_classes(class_names)

    def set_classes(self, class_names):
        """Binds the learnt prompt to these C classes."""
        # An anchor that stands after the name is copied: whoever moves it must call this again.
        inside = self.template.anchor_tokens if self.template.anchor_in_suffix else None
        texts = [name + "." for name in class_names]
        before = 1 + self.template.length
        self.suffix, self.eot = class_suffix(self.clip_model, texts, before, inside)
        self.class_names = list(class_names)
        return self

    def encode_context(self, context, deep=None):
        """context (..., length, d_t) -> f_T of it and each [CLS], not normalised: (..., C, d)."""
        sos = self.sos.to(context.dtype).expand(*context.shape[:-2], -1, -1)
        context = torch.cat([sos, context], dim=-2)                             # (..., L, d_t)
        return encode_text(self.clip_model, context, self.suffix, self.eot, deep, self.read_back)

    def text_features(self, f_img=None):
        """f_T(t_norm), not normalised: (C, d), or (B, C, d) with `prompts_per_image`."""
        context, W = self.template()            # one call, one sample of W
        return self.encode_context(context)

    def image_features(self, f, images=None):
        """f_I(x), not normalised: (B, d). Here it is the frozen CLIP's own f, computed already."""
        return f

    def logits(self, f_img, f_text):
        """Eq. 1's logits, of features that need not be unit: (B, C)."""
        return clip_logits(unit(f_img), unit(f_text), self.clip_model.logit_scale.exp())

    def own_loss(self, ce, f_img, f_norm, labels):
        """What the baseline makes of Eq. 10's cross entropy, a scalar: the same, except in DePT."""
        return ce

    def forward(self, f, images=None):
        """l_norm, the logits of q_norm (B, C), for f (B, d) and, where needed, the images."""
        f_img = self.image_features(f, images)
        return self.logits(f_img, self.text_features(f_img))


class CoCoOp(CoOp):
    """CoCoOp: a meta-network pi shifts the soft tokens by pi(u), u the unit image feature.

    pi = Linear(d, d / 16), ReLU, Linear(d / 16, d_t). Each image has a context of its own; W
    rearranges what was shifted.
    """
    prompts_per_image = True

    def __init__(self, clip_model, class_names, template, **options):
        super().__init__(clip_model, class_names, template, **options)
        d_t, d = clip_model.text_projection.shape
        pi = nn.Sequential(nn.Linear(d, d // 16), nn.ReLU(), nn.Linear(d // 16, d_t))
        self.meta_net = pi.to(self.sos.device)

    def text_features(self, f_img):
        """f_T(t_norm) for each of the images f_img (B, d), not normalised: (B, C, d)."""
        u = unit(f_img).to(self.meta_net[0].weight.dtype)
        # Shift first, then W: a token that W repeats is shifted alike in each place.
        shift = self.meta_net(u).unsqueeze(1)                       # (B, 1, d_t)
        context, W = self.template(shift)
        return self.encode_context(context)                         # (B, C, d)


class MaPLe(CoOp):
    """MaPLe: soft tokens V_l at the input of the first `depth` blocks of both towers (1 = shallow).

    Text: V_0 are the template's soft tokens; before blocks 1..depth-1 `template.deepen` brings in
    V_l. Image: Linear_l(V_l), (M, d_v). Linear_0 maps the soft tokens before W rearranges them
    (Fig. S4).
    Raises ValueError for a depth beyond the towers, or an image tower that is a ResNet.
    """
    needs_images = True

    def __init__(self, clip_model, class_names, template, depth=9, **options):
        if not is_plain_vit(clip_model):
            raise ValueError("MaPLe prompts OpenAI's kind of vision transformer, and this CLIP's "
                             "image tower is another (a ResNet, EVA, ConvNeXt, ...)")
        layers = min(len(tower.resblocks) for tower in
                     (clip_model.transformer, clip_model.visual.transformer))
        if not 1 <= depth <= layers:
            raise ValueError(f"depth {depth}: this CLIP's towers share {layers} blocks")
        super().__init__(clip_model, class_names, template, **options)
        d_v = clip_model.visual.conv1.weight.shape[0]
        M, d_t = template.soft_tokens.shape
        # As in MaPLe's code: Linear_0 starts by itself, the deeper ones as copies of one another.
        first, deeper = nn.Linear(d_t, d_v), nn.Linear(d_t, d_v)
        linears = [first] + [copy.deepcopy(deeper) for _ in range(depth - 1)]
        self.to_visual = nn.ModuleList(linears).to(self.sos.device)
        self.deep_tokens = nn.ParameterList(new_tokens(clip_model, M) for _ in range(depth - 1))

    def text_features(self, f_img=None):
        """f_T(t_norm) with the deeper layers' V_l, not normalised: (C, d)."""
        context, W = self.template()                # one sample of W for all layers

        def deep(layer, hidden):
            # Block 0 has V_0 in its context; from block `depth` on nothing comes in.
            if 1 <= layer <= len(self.deep_tokens):
                V_l = self.deep_tokens[layer - 1].to(hidden.dtype)
                return self.template.deepen(W, V_l, hidden)
            return hidden
        return self.encode_context(context, deep)

    def image_features(self, f, images=None):
        """f_I(x) with visual prompts, of images (B, 3, R, R), not normalised: (B, d)."""
        # V_0 before W (S2.2.4): W may drop a token, and the image side would lose it.
        V = [self.template.soft_tokens, *self.deep_tokens]
        visual_tokens = [linear(V_l) for linear, V_l in zip(self.to_visual, V)]     # (M, d_v) each
        return encode_image(self.clip_model, images, visual_tokens)


class DePT(CoOp):
    """DePT on CoOp: beside the image-text matching (ITM) head, a head for the base classes alone.

    Per channel a scale and a bias on image and on text features (before normalisation), then
    Linear(d, C_base). w_cat in [0, 1]: the weight of that head, in the loss and in the prediction.
    """

    def __init__(self, clip_model, class_names, template, w_cat=0.7, **options):
        super().__init__(clip_model, class_names, template, **options)
        d = clip_model.text_projection.shape[1]
        self.w_cat = w_cat
        self.scale_image = nn.Parameter(torch.ones(d))
        self.scale_text = nn.Parameter(torch.ones(d))
        self.bias_image = nn.Parameter(torch.zeros(d))
        self.bias_text = nn.Parameter(torch.zeros(d))
        self.head = nn.Linear(d, len(class_names))
        self.to(self.sos.device)

    def head_logits(self, features, scale, bias):
        """The head's logits of image or text features (n, d): (n, C_base)."""
        return self.head(features.to(scale.dtype) * scale + bias)

    def own_loss(self, ce, f_img, f_norm, labels):
        """(1 - w_cat) CE_itm + w_cat CE_cat; CE_cat is over B texts (the labels') and B images."""
        # Each image's label picks the text of its class, so both halves have B rows.
        of_texts = self.head_logits(f_norm[labels], self.scale_text, self.bias_text)
        of_images = self.head_logits(f_img, self.scale_image, self.bias_image)  # (B, C_base)
        ce_cat = F.cross_entropy(torch.cat([of_texts, of_images]), torch.cat([labels, labels]))
        return (1 - self.w_cat) * ce + self.w_cat * ce_cat

    def forward(self, f, images=None):
        """The base classes, in order: (1 - w_cat) ITM logits + w_cat head logits; else ITM's."""
        # For inference alone: training has the ITM head's logits, and `own_loss` for the other.
        itm = super().forward(f, images)
        if self.class_names != self.base_class_names:
            return itm
        of_images = self.head_logits(f, self.scale_image, self.bias_image)
        return (1 - self.w_cat) * itm + self.w_cat * of_images


class ZeroShot(CoOp):
    """CLIP as it is (Fig. 1a): a written prompt such as "a photo of a {}." and nothing to learn."""

    def __init__(self, clip_model, class_names, prompt="a photo of a {}."):
        nn.Module.__init__(self)
        object.__setattr__(self, "clip_model", clip_model)
        self.template = PlainTemplate(clip_model, 0)            # M = 0: what others ask a template
        self.prompt = prompt
        self.base_class_names = list(class_names)
        self.set_classes(class_names)

    def set_classes(self, class_names):
        """Encodes the written prompt of each of these C classes."""
        self.class_names = list(class_names)
        texts = [self.prompt.format(name) for name in class_names]
        self.features = encode_sentences(self.clip_model, texts)
        return self

    def text_features(self, f_img=None):
        """f_T of the written prompts, not normalised: (C, d)."""
        return self.features


BASELINES = {"clip": ZeroShot, "coop": CoOp, "cocoop": CoCoOp, "maple": MaPLe, "dept": DePT}
TEMPLATES = ("plain", "atprompt", "anchoropt")


def build_learner(settings, clip_model, class_names, anchor_tokens=None):
    """The learner that saved settings describe, with fresh values; then load its state dict.

    settings: a dict as stage2.py saves it (baseline, template, soft_tokens, ...). anchor_tokens
    (N, d_t): of the template "anchoropt"; None: zeros, in whose place they come later.
    Raises ValueError where the CLIP or the names do not suit, KeyError for an unknown baseline.
    """
    baseline, template_name = settings["baseline"], settings["template"]
    if baseline == "clip":
        return ZeroShot(clip_model, class_names, settings["prompt"])

    # Three templates,
    M, options = settings["soft_tokens"], {}
    if template_name == "plain":
        words = settings.get("start_words", "")
        if baseline != "maple":             # MaPLe alone keeps words beyond the first M
            words = " ".join(words.split()[:M])
        template = PlainTemplate(clip_model, M, words)
    elif template_name == "atprompt":
        template = AttributeTemplate(clip_model, M, settings["attributes"])
    else:
        if anchor_tokens is None:
            anchor_tokens = torch.zeros(settings["anchor_length"], len(clip_model.ln_final.weight))
        # A fixed W has none of these settings.
        matrix = {key: settings[key] for key in ("tau", "test_position", "soft_W", "draw")
                  if key in settings}
        template = AnchorTemplate(clip_model, M, anchor_tokens, settings["arrangement"], **matrix)
        if settings["feature_at"] == "released":
            options["read_back"] = len(anchor_tokens)
    # times four baselines.
    if baseline == "maple":
        options["depth"] = settings["depth"]
    if baseline == "dept":
        options["w_cat"] = settings["w_cat"]
    learner = BASELINES[baseline](clip_model, class_names, template, **options)
    learner.ensemble = settings.get("ensemble", "logits")
    return learner


# ---------------------------------------------------------------------------- loading CLIP

TOY_CLIP = pathlib.Path(__file__).resolve().parent / "assets" / "toy_clip.npz"
OTHER_CLIPS = ("open_clip:", "hf-hub:", "local-dir:")
# As OpenAI's CLIPs read a picture; `preprocess_of` says what the entries are.
OPENAI_PREPROCESS = {"mean": (0.48145466, 0.4578275, 0.40821073),
                     "std": (0.26862954, 0.26130258, 0.27577711),
                     "interpolation": "bicubic", "resize_mode": "shortest"}


def load_clip(name_or_path, device="cpu", dtype=None):
    """A frozen CLIP in eval mode.

    name_or_path:
        "toy", the small CLIP under assets/;
        a name of `clip.available_models()`, OpenAI's own file of one, or a state dict (torch.save)
            of the same architecture;
        "open_clip:ARCHITECTURE:TAG" or "open_clip:ARCHITECTURE:FILE", "hf-hub:OWNER/NAME" and
            "local-dir:FOLDER": what `open_clip.create_model` takes;
        a folder with HuggingFace's CLIPModel: config.json and the weights.
    dtype: of its weights, default float16 on CUDA and float32 elsewhere. In half precision CLIP's
        own rule leaves LayerNorms and embeddings in float32.
    Returns a `clip.model.CLIP`, or open_clip's model with the same names for its text tower. Raises
    FileNotFoundError for an unknown name, and ValueError for what holds no CLIP or lacks weights,
    a text tower that is not CLIP's, or a device that is not there. All files are read as data: no
    code of theirs is ever run.
    """
    # Does a kernel run there? Better asked now than after a minute of loading.
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device} cannot be used here ({reason}): see --device") from error
    if dtype is None:
        dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32

    name = str(name_or_path)
    if name.startswith(OTHER_CLIPS):
        return _load_open_clip(name, device, dtype)
    if name == "toy":
        model = _openai_architecture(_toy_state_dict())
    elif name in clip.available_models():
        try:
            model = clip.load(name, device="cpu", jit=False)[0].float()     # fetched, and checked
        except OSError as error:
            raise OSError(f"CLIP {name}: {error}; offline give its file with --clip") from error
    elif os.path.isdir(name):
        model = _load_huggingface(pathlib.Path(name))
    elif os.path.isfile(name):
        model = _load_file(name)
    else:
        raise FileNotFoundError(f"CLIP {name} is no file, folder or known name; known: toy, "
                                f"{', '.join(clip.available_models())}, open_clip:ARCHITECTURE:TAG")
    if dtype == torch.float16:
        clip.model.convert_weights(model)
    else:
        model.to(dtype)
    return model.to(device).eval().requires_grad_(False)


def preprocess_of(clip_model):
    """How this CLIP reads pictures: size (H, W), mean, std, interpolation, resize_mode."""
    if hasattr(clip_model, "preprocess"):
        return clip_model.preprocess
    return OPENAI_PREPROCESS | {"size": (clip_model.visual.input_resolution,) * 2}


def clip_identity(name_or_path):
    """A short name that two CLIPs (or other files) share only if they are the same.

    A name as it is; a file by its stem and the start of its SHA-256, a folder by its name and that
    of its files.
    """
    kind, _, path = str(name_or_path).rpartition(":")
    if os.path.isdir(path):
        files = sorted(file for file in pathlib.Path(path).iterdir() if file.is_file())
        digest = hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()
        return f"{pathlib.Path(path).resolve().name}-{digest[:8]}"
    if not os.path.isfile(path):
        return str(name_or_path)
    digest = sha256(path)
    openai = {url.split("/")[-2]: name for name, url in clip.clip._MODELS.items()}
    own = openai.get(digest, f"{pathlib.Path(path).stem}-{digest[:8]}")
    return f"{kind}:{own}" if kind else own


def sha256(path):
    """The SHA-256 of a file, in hexadecimal digits."""
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


def read_as_data(file):
    """`torch.load` of a file as data, never code, after a look at the checksums.

    Raises OSError where it cannot be opened, or ValueError for a damaged or foreign file.
    """
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                if archive.testzip():       # torch.load takes a flipped bit for another number
                    raise ValueError("its checksums differ")
        return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:              # unpicklers fail in many ways on damaged files
        raise ValueError("damaged, or more than the tensors that torch.save(state_dict) writes: "
                         "code in it is not run") from error


def _toy_state_dict():
    """The toy CLIP keeps the rows of the token table that its words use; the others are noise."""
    with np.load(TOY_CLIP, allow_pickle=False) as file:
        arrays = {key: file[key].astype(np.float32) for key in file.files if key != "token_ids"}
        token_ids = file["token_ids"]
    # The noise is the same everywhere: RandomState's stream is fixed for all time.
    rows = arrays.pop("token_rows")
    table = np.random.RandomState(0).normal(0, 0.02, (len(TOKENIZER.encoder), rows.shape[1]))
    table[token_ids] = rows
    arrays["token_embedding.weight"] = table.astype(np.float32)
    return {key: torch.from_numpy(value) for key, value in arrays.items()}


def _load_file(path):
    """OpenAI's own file, or a state dict of the same architecture, in float32."""
    if clip_identity(path) in clip.available_models():          # a TorchScript archive of theirs
        return clip.load(path, device="cpu", jit=False)[0].float()
    try:
        return _openai_architecture(read_as_data(path))
    except Exception as error:              # a state dict may hold anything
        raise ValueError(f"{path} holds no CLIP of OpenAI's architecture ({error!r:.160}); other "
                         "files: --clip open_clip:ARCHITECTURE:FILE, or a HuggingFace folder with "
                         "its config.json") from error


def _openai_architecture(state):
    """A `clip.model.CLIP` in float32 with the values of a state dict that has OpenAI's keys."""
    told = ("input_resolution", "context_length", "vocab_size")
    state = {key: value for key, value in state.items() if key not in told}
    model = clip.model.build_model(dict(state)).float()     # has rounded them to float16,
    model.load_state_dict(state)                            # so once more
    return model


# HuggingFace's CLIPModel -> OpenAI's keys. (Its q, k, v are joined, its projections transposed.)
HUGGINGFACE = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.encoder.layers.": "transformer.resblocks.",
    "text_model.final_layer_norm.": "ln_final.",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.": "visual.ln_pre.",
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
    "vision_model.post_layernorm.": "visual.ln_post.",
    ".self_attn.": ".attn.",
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
}
ACTIVATIONS = {"quick_gelu": clip.model.QuickGELU, "gelu": nn.GELU}
# What a config.json leaves out is as in HuggingFace's own defaults.
CONFIG = {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8,
          "hidden_act": "quick_gelu"}
VISION_CONFIG = CONFIG | {"hidden_size": 768, "num_attention_heads": 12, "image_size": 224,
                          "patch_size": 32}


def _load_huggingface(folder):
    """HuggingFace's CLIPModel in a folder: config.json says what its weights do not."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text, vision = CONFIG | config["text_config"], VISION_CONFIG | config["vision_config"]
        if (folder / "model.safetensors").is_file():
            import safetensors.torch
            state = safetensors.torch.load_file(folder / "model.safetensors")
        else:
            state = read_as_data(folder / "pytorch_model.bin")
        state = _openai_keys(state)
        d = state["visual.proj"].shape[1]
        shape = vision["image_size"], vision["patch_size"]
        # OpenAI's class makes its vision heads 64 wide. So it gets a stub first, then the tower.
        model = clip.model.CLIP(d, shape[0], 1, 64, shape[1], len(state["positional_embedding"]),
                                len(TOKENIZER.encoder), text["hidden_size"],
                                text["num_attention_heads"], text["num_hidden_layers"])
        model.visual = clip.model.VisionTransformer(
            *shape, vision["hidden_size"], vision["num_hidden_layers"],
            vision["num_attention_heads"], d)
        for tower, own in ((model.transformer, text), (model.visual.transformer, vision)):
            for block in tower.resblocks:
                block.mlp.gelu = ACTIVATIONS[own["hidden_act"]]()
        model.load_state_dict(state)
    except Exception as error:              # a config may say anything; safetensors be missing
        raise ValueError(f"{folder} holds no CLIPModel of HuggingFace ({error!r:.160})") from error
    return model


def _openai_keys(state):
    """The tensors of HuggingFace's CLIPModel under OpenAI's keys."""
    # First the names,
    converted = {}
    for key, value in state.items():
        for theirs, ours in HUGGINGFACE.items():
            key = key.replace(theirs, ours)
        if not key.endswith("position_ids"):
            converted[key] = value
    # then projections as x @ P instead of a Linear's x @ W.T, and q, k, v in one matrix.
    converted["text_projection"] = converted.pop("text_projection.weight").T
    converted["visual.proj"] = converted.pop("visual_projection.weight").T
    for key in [key for key in converted if ".attn.q_proj." in key]:
        q, k, v = [converted.pop(key.replace("q_proj", f"{name}_proj")) for name in "qkv"]
        converted[key.replace("q_proj.", "in_proj_")] = torch.cat([q, k, v])
    return converted


TEXT_TOWER = ("token_embedding", "positional_embedding", "transformer", "ln_final",
              "text_projection")


def _load_open_clip(name, device, dtype):
    """A CLIP of open_clip's, whose text tower `encode_text` computes as open_clip does."""
    import open_clip                        # pip install open_clip_torch

    architecture, pretrained = name, None
    quick_gelu = False
    if name.startswith("open_clip:"):
        architecture, _, pretrained = name.removeprefix("open_clip:").partition(":")
        if not pretrained:
            raise ValueError(f"{name} must be open_clip:ARCHITECTURE:TAG, or :FILE")
        # Some tags need this, and open_clip merely warns.
        tag = open_clip.get_pretrained_cfg(architecture, pretrained)
        quick_gelu = bool(tag.get("quick_gelu"))
    precision = "fp16" if dtype == torch.float16 else "fp32"
    try:
        model = open_clip.create_model(architecture, pretrained, precision=precision,
                                       device=device, force_quick_gelu=quick_gelu)
        text = getattr(model, "text", model)
        for part in TEXT_TOWER:             # under the names that OpenAI's have
            setattr(model, part, getattr(text, part))
        model.eval().requires_grad_(False)
        model.dtype = dtype
        model.preprocess = open_clip.get_model_preprocess_cfg(model)
        if isinstance(model.preprocess["size"], int):
            model.preprocess["size"] = (model.preprocess["size"],) * 2
        _check_towers(model)
    except Exception as error:              # of any of the libraries that it loads with
        raise ValueError(f"open_clip has no CLIP of OpenAI's kind for {name} ({error!r:.160})"
                         ) from error
    return model


@torch.no_grad()
def _check_towers(model):
    """Is what this module writes out what the model computes? Raises for another text tower.

    Sets `plain_vit`: may `encode_image` do the same with its image tower, and MaPLe prompt it?
    """
    def differ(ours, theirs):
        return float((ours - theirs).float().abs().max() / theirs.float().abs().max())

    allowed = 1e-3 if model.dtype == torch.float32 else 5e-2
    model.plain_vit = False                 # until an image says so
    device = model.logit_scale.device
    ids = clip.tokenize("a photo of a cat.", len(model.positional_embedding)).to(device)
    off = differ(encode_sentences(model, ["a photo of a cat."]), model.encode_text(ids))
    if not off < allowed:
        raise ValueError(f"its text tower is another: computed as CLIP's, it is off by {off:.1%}")
    image = torch.rand(1, 3, *model.preprocess["size"], device=device)
    with contextlib.suppress(RuntimeError, AttributeError, TypeError):      # another kind of tower
        model.plain_vit = differ(_encode_vit(model, image), encode_image(model, image)) < allowed
