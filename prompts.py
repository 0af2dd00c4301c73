"""CLIP seen through its token embeddings, the three prompt templates, and the four baselines they plug into.

    templates   PlainTemplate (Eq. 2), AttributeTemplate (Eq. 3, ATPrompt), AnchorTemplate (Eqs. 8-9)
    baselines   CoOp, CoCoOp, MaPLe, DePT, and zero-shot CLIP: each takes any of the templates

Every prompt here reads  [SOS] context [CLS] . [EOT].  A template makes the context, a baseline says
what the context depends on (nothing, the image, the layer) and what else is learnt. Only `position.py` is
needed beside this file.

Symbols: B images, C classes, d feature width, d_t text-token width, d_v image-token width, M soft tokens,
N anchor tokens, K = M + N, P context positions with [SOS], S suffix positions, H heads.
"""

import copy
import functools
import hashlib
import os
import pathlib
import warnings
import zipfile

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

with warnings.catch_warnings():
    warnings.simplefilter("ignore")             # clip imports the deprecated pkg_resources
    import clip
    from clip.simple_tokenizer import SimpleTokenizer

from position import PositionMatrix, fixed_matrix, rearrange

TOY_CLIP = pathlib.Path(__file__).resolve().parent / "assets" / "toy_clip.npz"
TOKENIZER = SimpleTokenizer()
SOS, EOT = TOKENIZER.encoder["<|startoftext|>"], TOKENIZER.encoder["<|endoftext|>"]


# ---------------------------------------------------------------------------------------------- loading CLIP

def load_clip(name_or_path, device="cpu", dtype=None):
    """A frozen CLIP in eval mode.

    name_or_path: "toy" (the small CLIP under assets/), a name of `clip.available_models()`, or the path of
        a checkpoint: a state dict saved with torch.save, or one of OpenAI's own TorchScript files.
    dtype: of its large matrices, default float16 on CUDA and float32 elsewhere (CLIP's own rule).
    Returns a `clip.model.CLIP`. Raises FileNotFoundError for an unknown name or missing weights, ValueError for a file that
    is not a CLIP or a device that is not there. Files are read as data: no pickled code of theirs is ever run.
    """
    try:
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device} cannot be used here ({str(error).splitlines()[0]}); try --device cpu") from error
    if name_or_path == "toy":
        model = clip.model.build_model(_toy_state_dict())
    elif name_or_path in clip.available_models():
        model = _load_openai(name_or_path)
    elif os.path.isfile(name_or_path):
        model = _load_checkpoint(name_or_path)
    else:
        raise FileNotFoundError(f"--clip {name_or_path}: neither a file nor one of toy, {', '.join(clip.available_models())}")
    dtype = dtype or (torch.float16 if torch.device(device).type == "cuda" else torch.float32)
    clip.model.convert_weights(model)           # float16 where CLIP has it (exact: its checkpoints do), then `dtype` there
    for parameter in model.parameters():
        if dtype in (torch.float32, torch.float64) or parameter.dtype == torch.float16:
            parameter.data = parameter.data.to(dtype)
    return model.to(device).eval().requires_grad_(False)


def clip_identity(name_or_path):
    """A short name that two CLIPs (or other files) share only if they are the same: OpenAI's, or file-<SHA-256's start>."""
    if not os.path.isfile(name_or_path):
        return str(name_or_path)
    digest, stem = sha256(name_or_path), pathlib.Path(name_or_path).stem
    return {url.split("/")[-2]: name for name, url in clip.clip._MODELS.items()}.get(digest, f"{stem}-{digest[:8]}")


def sha256(path):
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


def _toy_state_dict():
    """The toy CLIP keeps the rows of the token table that its words use; the others are filled with noise."""
    with np.load(TOY_CLIP, allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    rows = arrays.pop("token_rows").astype(np.float32)
    table = np.random.RandomState(0).normal(0, 0.02, (len(TOKENIZER.encoder), rows.shape[1])).astype(np.float32)
    table[arrays.pop("token_ids")] = rows
    return {"token_embedding.weight": torch.from_numpy(table),
            **{key: torch.from_numpy(value.astype(np.float32)) for key, value in arrays.items()}}


def _load_openai(name):
    url = clip.clip._MODELS[name]
    try:
        return clip.load(name, device="cpu", jit=False)[0]           # checks the file's SHA-256
    except (OSError, RuntimeError) as error:
        target = pathlib.Path("~/.cache/clip").expanduser() / url.rsplit("/", 1)[1]
        raise FileNotFoundError(
            f"the weights of CLIP {name} could not be had ({str(error) or type(error).__name__}): put {url} at {target} "
            f"(SHA-256 {url.split('/')[-2]}), or pass that file with --clip") from error


def _load_checkpoint(path):
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                holds_code = any(name.endswith("constants.pkl") for name in archive.namelist())      # TorchScript
            if holds_code and clip_identity(path) not in clip.available_models():
                raise ValueError(f"a TorchScript file, but none of OpenAI's (SHA-256 {sha256(path)})")
            if holds_code:
                return clip.load(path, device="cpu", jit=False)[0]
        state = dict(torch.load(path, map_location="cpu", weights_only=True))
        if len(state["token_embedding.weight"]) != len(TOKENIZER.encoder):
            raise ValueError("a token table of another vocabulary")
        return clip.model.build_model(state)
    except Exception as error:           # unpicklers and build_model fail in many ways on a foreign file
        reason = str(error).strip().split("\n")[0][:160] or type(error).__name__
        raise ValueError(f"{path} is not the state dict of a CLIP ({reason}); expected what torch.save("
                         "model.state_dict(), path) writes for a clip.model.CLIP") from error


# -------------------------------------------------------------------------------------- features and logits

def unit(x):
    """x / ||x||_2 along the last axis, in float32 at least (Sec. 3.1: u and v_c are unit vectors)."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)


def clip_logits(u, v, scale):
    """Eq. 1:  q(c | x) = softmax_c( u v_c^T / tau ); this returns what stands in the softmax, with scale = 1 / tau.

    u (B, d): unit image features; v (C, d), or (B, C, d) where each image has prompts of its own: unit text
    features. scale: CLIP's `logit_scale.exp()`. Returns (B, C).
    """
    if v.dim() == 2:
        return scale * u @ v.T
    return scale * (v @ u.unsqueeze(-1)).squeeze(-1)


def embed(clip_model, token_ids):
    """Token ids (L,) as a list -> their embeddings (L, d_t) in float32 (no position added)."""
    weight = clip_model.token_embedding.weight
    return F.embedding(torch.tensor(token_ids, dtype=torch.long, device=weight.device), weight)


def class_suffix(clip_model, texts, before=1, inside=None):
    """What stands behind the context: the tokens of each text, then [EOT].

    texts: C strings, e.g. class names with their full stop. before: tokens in front, [SOS] and context. inside:
    tokens (N, d_t) to put between a class name and its full stop (Tab. 8, "after class token"), or None.
    Returns suffix (C, S, d_t), padded with zeros to the longest, and eot (C,), the index of [EOT] in it, on the CPU (it
    shapes the computation). Raises ValueError naming all texts that are empty or too long for CLIP's 77 tokens.
    """
    ids = [TOKENIZER.encode(text) for text in texts]
    room = len(clip_model.positional_embedding) - before - 1 - (0 if inside is None else len(inside))
    long = [text for text, own in zip(texts, ids) if len(own) > room]
    if long:
        raise ValueError(f"too long for CLIP's {len(clip_model.positional_embedding)} tokens, of which {room} are left for "
                         "each; shorten: " + ", ".join(map(repr, long)))
    if any(not TOKENIZER.encode(text.removesuffix(".")) for text in texts):
        raise ValueError("a class name or sentence is empty: it has no tokens")
    if inside is None:
        rows = [embed(clip_model, own + [EOT]) for own in ids]
    else:
        stop = embed(clip_model, TOKENIZER.encode(".") + [EOT])
        rows = [torch.cat([embed(clip_model, TOKENIZER.encode(text.removesuffix("."))), inside, stop]) for text in texts]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(row) - 1 for row in rows])


def layer_norm(ln, x):
    """CLIP's LayerNorm: computed in the precision of its weights, returned in that of x."""
    return F.layer_norm(x.to(ln.weight.dtype), ln.normalized_shape, ln.weight, ln.bias, ln.eps).to(x.dtype)


def queries_keys_values(block, x):
    """x (..., L, d_t) -> three of (..., H, L, d_t / H): the first half of a CLIP residual block."""
    qkv = F.linear(layer_norm(block.ln_1, x), block.attn.in_proj_weight, block.attn.in_proj_bias)
    return qkv.unflatten(-1, (3, block.attn.num_heads, -1)).movedim(-3, 0).transpose(-3, -2).unbind(0)


def after_attention(block, x, attended):
    """x (..., L, d_t), attended (..., H, L, d_t / H) -> (..., L, d_t): the second half of a CLIP residual block."""
    x = x + block.attn.out_proj(attended.transpose(-3, -2).flatten(-2))
    h = block.mlp.c_fc(layer_norm(block.ln_2, x))
    return x + block.mlp.c_proj(F.silu(1.702 * h) / 1.702)      # QuickGELU, h sigmoid(1.702 h): one tensor kept, not two


def encode_text(clip_model, context, suffix, eot, deep=None, read_back=0, class_chunk=0):
    """f_T for C prompts that share their context: the feature at [EOT], exactly as CLIP computes it.

    CLIP's text attention is causal. So what stands behind [EOT] cannot reach the feature and is left out, and
    the hidden states of [SOS] and the context are the same for every class: they run through the blocks
    once, and each class's suffix attends to their keys and values. Suffixes are packed end to end, so
    that no class pays for a longer one; only attention sees them as a padded (C, S) grid.

    context (..., P, d_t): [SOS] and the context, with one leading axis at most (an image's own context,
        CoCoOp); suffix (C, S, d_t), eot (C,): see `class_suffix`.
    deep: None, or a function (layer, context states (..., P-1, d_t) without [SOS]) -> states to go on with,
        called before each block (Sec. 3.2.3).
    read_back: 0, or n: read the feature n positions before [EOT], as the released code does; may be in the context.
    class_chunk: 0, or how many classes at a time: less memory for a second forward pass in the backward pass.
    Returns (..., C, d), not normalised. Raises ValueError when P + S exceeds CLIP's context length.
    """
    P, S = context.shape[-2], suffix.shape[1]
    if P + S > len(clip_model.positional_embedding):
        raise ValueError(f"a prompt of {P + S} tokens is longer than CLIP's {len(clip_model.positional_embedding)}")
    positions = clip_model.positional_embedding.to(clip_model.dtype)
    h = (context if context.dim() == 3 else context.unsqueeze(0)).to(clip_model.dtype) + positions[:P]       # (B, P, d_t)

    keys_values = []                                      # of the context, per block: 2 x (B, H, P, d_t / H)
    for layer, block in enumerate(clip_model.transformer.resblocks):
        if deep is not None:
            h = torch.cat([h[:, :1], deep(layer, h[:, 1:]).to(h.dtype)], dim=1)
        q, k, v = queries_keys_values(block, h)
        keys_values += [k, v]
        h = after_attention(block, h, F.scaled_dot_product_attention(q, k, v, is_causal=True))

    learning, class_chunk = torch.is_grad_enabled(), class_chunk or len(suffix)
    if not learning:                                      # bounds a test batch's memory; on a CPU 512 are 2x faster than 5,000
        class_chunk = min(class_chunk, max(1, (512 if h.device.type == "cpu" else 8192) // len(h)))
    recomputed = functools.partial(checkpoint, _encode_suffix, use_reentrant=False, preserve_rng_state=False)
    encode, features = recomputed if learning and class_chunk < len(suffix) else _encode_suffix, []
    for x, own_eot in zip(suffix.split(class_chunk), eot.split(class_chunk)):
        x = (x.to(clip_model.dtype) + positions[P:P + S]).expand(len(h), *x.shape)
        features.append(encode(clip_model, x, own_eot, read_back, h, *keys_values))
    return torch.cat(features, dim=1).reshape(*context.shape[:-2], len(suffix), -1)


@functools.lru_cache(maxsize=1024)                              # so that a training step copies nothing to the GPU
def _places(eot, S, P, read_back, device):
    """Index tensors of `_encode_suffix`: which of the C x S places are used (T,), and where each feature is read (C,)."""
    eot = torch.tensor(eot)
    packed = (torch.arange(S) <= eot[:, None]).flatten().nonzero().squeeze(1)      # up to [EOT]
    at = eot - read_back                                        # from the suffix's start; below 0: in the context
    in_grid = torch.arange(len(eot)) * S + at.clamp_min(0)      # among the C * S,
    in_pack = (eot + 1).cumsum(0) - (eot + 1) + at.clamp_min(0)                    # and among the T
    return [t.to(device) for t in (packed, in_grid, in_pack, (at < 0)[:, None], (P + at).clamp(0, P - 1))]


def _encode_suffix(clip_model, x, eot, read_back, context_states, *keys_values):
    """The classes' own part of `encode_text`: x (B, C, S, d_t) behind the context -> features (B, C, d)."""
    B, C, S, d_t = x.shape
    P, heads = context_states.shape[1], keys_values[0].shape[1]
    packed, in_grid, in_pack, early, in_context = _places(tuple(eot.tolist()), S, P, read_back, x.device)
    later = torch.ones(S, S, dtype=torch.bool, device=x.device).triu(1)         # suffix position s sees 0..s

    def spread(t):                                              # (B, T, d_t) -> (B, H, C, S, d_t / H)
        grid = t.new_zeros(B, heads, C * S, d_t // heads)
        grid[:, :, packed] = t.unflatten(-1, (heads, -1)).transpose(1, 2)
        return grid.unflatten(2, (C, S))

    x = x.reshape(B, C * S, d_t).index_select(1, packed)        # (B, T, d_t)
    for block, k, v in zip(clip_model.transformer.resblocks, keys_values[::2], keys_values[1::2]):
        qkv = F.linear(layer_norm(block.ln_1, x), block.attn.in_proj_weight, block.attn.in_proj_bias)
        q, k_own, v_own = (spread(t) for t in qkv.chunk(3, dim=-1))
        q = q * (d_t // heads) ** -0.5
        shared = (q.flatten(2, 3) @ k.mT).view(B, heads, C, S, P)       # scores of the context: nothing is copied to each class
        own = (q @ k_own.mT).masked_fill(later, -torch.inf)             # and of the class's own tokens: (B, H, C, S, S)
        A = torch.cat([shared, own], dim=-1).softmax(-1)
        attended = A[..., :P].flatten(2, 3) @ v + (A[..., P:] @ v_own).flatten(2, 3)      # (B, H, C * S, d_t / H)
        if block is clip_model.transformer.resblocks[-1]:       # of the last states, only those read: (B, C, d_t)
            x, packed = x.index_select(1, in_pack), in_grid
        x = after_attention(block, x, attended.index_select(2, packed))

    if read_back:                                               # before the suffix: the context's own states
        x = torch.where(early, context_states.index_select(1, in_context), x)
    return layer_norm(clip_model.ln_final, x) @ clip_model.text_projection


def encode_sentences(clip_model, sentences, batch_size=256):
    """f_T of whole sentences, each behind [SOS]: (n, d), not normalised, without gradient.

    The same as `clip_model.encode_text(clip.tokenize(sentences))` without the padding. Raises ValueError
    naming a sentence that is too long for CLIP.
    """
    parts = [sentences[start:start + batch_size] for start in range(0, len(sentences), batch_size)]
    with torch.no_grad():
        return torch.cat([encode_text(clip_model, embed(clip_model, [SOS]), *class_suffix(clip_model, part)) for part in parts])


def encode_image(clip_model, images, tokens=()):
    """f_I with visual prompts: (B, 3, R, R) -> (B, d), not normalised. With no tokens it is CLIP's own.

    tokens: the prompts (M, d_v) of blocks 0, 1, ...: the first are appended behind the patches, with no
    position, before `ln_pre`; each later one replaces the last M states before its block (MaPLe).
    """
    # Without gradient on a CPU, 8 at a time: 256 take 1.4x longer an image, and 3 GB, as the system reclaims large temporaries.
    if len(images) > 8 and images.device.type == "cpu" and not torch.is_grad_enabled():
        return torch.cat([encode_image(clip_model, part, tokens) for part in images.split(8)])
    visual = clip_model.visual
    if not hasattr(visual, "transformer"):                                  # a ResNet: no prompts, CLIP's own path
        return clip_model.encode_image(images)
    x = visual.conv1(images.to(clip_model.dtype)).flatten(2).transpose(1, 2)          # (B, patches, d_v)
    x = torch.cat([visual.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
    x = x + visual.positional_embedding.to(x.dtype)
    prompts = [V_l.to(x.dtype).expand(len(x), -1, -1) for V_l in tokens]                # (B, M, d_v)
    x = layer_norm(visual.ln_pre, torch.cat([x, *prompts[:1]], dim=1))
    for layer, block in enumerate(visual.transformer.resblocks):
        if 1 <= layer < len(prompts):
            x = torch.cat([x[:, :x.shape[1] - prompts[layer].shape[1]], prompts[layer]], dim=1)
        q, k, v = queries_keys_values(block, x)
        if block is visual.transformer.resblocks[-1]:           # of the last states, only [CLS]'s is read
            q, x = q[:, :, :1], x[:, :1]
        x = after_attention(block, x, F.scaled_dot_product_attention(q, k, v))
    return layer_norm(visual.ln_post, x[:, 0]) @ visual.proj


# ----------------------------------------------------------------------------------------------- templates

def new_tokens(clip_model, n, std=0.02):
    """n learnable tokens (n, d_t) ~ N(0, std^2), in float32 whatever CLIP's precision."""
    weight = clip_model.token_embedding.weight
    return nn.Parameter(torch.randn(n, weight.shape[1]).to(weight.device) * std)


class PlainTemplate(nn.Module):
    """Eq. 2:  t_v = [V_1] ... [V_M] [CLS].  The learnable context of CoOp, CoCoOp, MaPLe and DePT.

    n_soft = M; words: start the soft tokens at the embeddings of the first M of these words ("a photo of a")
    when there are that many, else at N(0, 0.02^2).

    Every template has: `soft_tokens` (M, d_t), the V above; `length`, its context positions; a call, given
    None or a shift (B, d_t) for the soft tokens (CoCoOp), that returns the context (..., length, d_t) and the
    W that made it; and `deepen`, the deep variant's rule for what enters a deeper block.
    """

    def __init__(self, clip_model, n_soft, words=""):
        super().__init__()
        self.soft_tokens = new_tokens(clip_model, n_soft)
        ids = TOKENIZER.encode(words)
        if ids and n_soft <= len(ids):
            self.soft_tokens.data.copy_(embed(clip_model, ids[:n_soft]))
        self.length = n_soft

    def forward(self, shift=None):
        return self.V(shift), None

    def V(self, shift=None):
        """The soft tokens (M, d_t); CoCoOp shifts each of them by the image's shift: (B, M, d_t)."""
        return self.soft_tokens if shift is None else self.soft_tokens + shift.unsqueeze(-2)

    def deepen(self, W, V_l, hidden):
        """MaPLe, Fig. 3a: all states are dropped and this layer's V_l (M, d_t) comes in."""
        return V_l.expand_as(hidden)


class AttributeTemplate(PlainTemplate):
    """Eq. 3:  t_attr = [V_a1] ... [V_am] [Anc^e] [V_1] ... [V_M] [CLS].  ATPrompt, for 1 to 3 attributes.

    Each attribute word (all of its tokens) stands behind m = M soft tokens of its own.
    Raises ValueError for no attribute, or one without tokens.
    """

    def __init__(self, clip_model, n_soft, attributes):
        super().__init__(clip_model, n_soft)
        if not attributes or not all(map(TOKENIZER.encode, attributes)):
            raise ValueError(f"--attributes {attributes}: a word has no tokens; give one to three words, e.g. shape size")
        self.attribute_soft_tokens = nn.ParameterList(new_tokens(clip_model, n_soft, 0.01) for _ in attributes)
        for i, word in enumerate(attributes):
            self.register_buffer(f"word_{i}", embed(clip_model, TOKENIZER.encode(word)), persistent=False)
            self.length += n_soft + len(getattr(self, f"word_{i}"))

    def forward(self, shift=None):
        parts = []
        for i, V_a in enumerate(self.attribute_soft_tokens):
            parts += [V_a, getattr(self, f"word_{i}")]
        V = self.V(shift)                      # only the class-related V are shifted
        return torch.cat([torch.cat(parts).expand(*V.shape[:-2], -1, -1), V], dim=-2), None

    def deepen(self, W, V_l, hidden):
        """ATPrompt, Fig. 3b: attribute words and their soft tokens keep their states, V_l replaces the V."""
        kept = hidden[..., :self.length - len(V_l), :]
        return torch.cat([kept, V_l.expand(*kept.shape[:-2], -1, -1)], dim=-2)


class AnchorTemplate(PlainTemplate):
    """Eqs. 8-9:  t_v = [V_1] ... [V_M] [Anc_1] ... [Anc_N],  t_norm = concat(W . t_v, [CLS]).

    anchor_tokens (N, d_t): frozen, from Stage I. arrangement (Tab. 8): "adaptive" (W is learnt), "before" or
    "middle" (a fixed W), "after-class" (soft tokens alone in front; the anchor stands between the class
    name and its full stop). tau, test_position: see `position.PositionMatrix`.
    """

    def __init__(self, clip_model, n_soft, anchor_tokens, arrangement="adaptive", tau=1.0, test_position="argmax"):
        super().__init__(clip_model, n_soft)
        n_anchor, device = len(anchor_tokens), self.soft_tokens.device
        self.register_buffer("anchor_tokens", anchor_tokens.detach().to(device, torch.float32).clone())
        self.anchor_in_suffix = arrangement == "after-class"
        if arrangement == "adaptive":
            self.position_matrix = PositionMatrix(n_soft + n_anchor, tau, test_position).to(device)
        elif self.anchor_in_suffix:
            self.register_buffer("fixed_W", torch.eye(n_soft, n_soft + n_anchor, device=device), persistent=False)
        else:
            self.register_buffer("fixed_W", fixed_matrix(arrangement, n_soft, n_anchor).to(device), persistent=False)
        self.length = n_soft if self.anchor_in_suffix else n_soft + n_anchor

    def forward(self, shift=None):
        W = self.position_matrix() if hasattr(self, "position_matrix") else self.fixed_W
        V = self.V(shift)                                                                  # the anchor is not
        t_v = torch.cat([V, self.anchor_tokens.expand(*V.shape[:-2], -1, -1)], dim=-2)     # Eq. 8
        return rearrange(W, t_v), W                                                        # Eq. 9

    def deepen(self, W, V_l, hidden):
        """Sec. 3.2.3, Fig. 3c: soft tokens are replaced, anchors keep their state, both where W put them.

        Row i of W holds its 1 among the first M columns (a soft token: V_l comes in) or among the last N
        (an anchor: the state at position i stays). hidden (..., K, d_t); returns the same shape.
        """
        W, M = W.to(hidden.dtype), len(V_l)
        return W[:, :M] @ V_l.to(hidden.dtype) + W[:, M:].sum(1, keepdim=True) * hidden


# ----------------------------------------------------------------------------------------------- baselines

class CoOp(nn.Module):
    """CoOp: one context for all classes and images. The learner that the other baselines extend.

    template: one of the templates above. read_back: 0, or N with `--feature-at released`; class_chunk: see
    `encode_text`. A learner maps image features (B, d) as CLIP gives them, before normalisation, to logits
    (B, C); `set_classes(names)` rebinds the learnt prompt to other classes.
    Raises ValueError naming class names that do not fit into CLIP's 77 tokens.
    """
    per_image = False              # True where a prediction needs more than the frozen CLIP's image feature

    def __init__(self, clip_model, class_names, template, read_back=0, class_chunk=0):
        super().__init__()
        object.__setattr__(self, "clip_model", clip_model)     # not a submodule: it is not ours to save
        self.template, self.read_back, self.class_chunk = template, read_back, class_chunk
        self.base_class_names = list(class_names)
        self.register_buffer("sos", embed(clip_model, [SOS]), persistent=False)
        self.set_classes(class_names)

    def set_classes(self, class_names):
        """Binds the learnt prompt to these C classes."""
        inside = self.template.anchor_tokens if getattr(self.template, "anchor_in_suffix", False) else None
        texts = [name + "." for name in class_names]
        self.suffix, self.eot = class_suffix(self.clip_model, texts, 1 + self.template.length, inside)
        self.class_names = list(class_names)
        return self

    def encode_context(self, context, deep=None):
        """context (..., length, d_t) -> text features (..., C, d) of t_norm = concat(context, [CLS])."""
        prompt = torch.cat([self.sos.to(context.dtype).expand(*context.shape[:-2], -1, -1), context], dim=-2)
        return encode_text(self.clip_model, prompt, self.suffix, self.eot, deep, self.read_back, self.class_chunk)

    def text_features(self, image_features=None):
        """f_T(t_norm): (C, d), or (B, C, d) where the prompt depends on the image. Not normalised."""
        return self.encode_context(self.template()[0])

    def image_features(self, features, images=None):
        """f_I(x): (B, d), not normalised. Here the frozen CLIP's own, which the caller has computed."""
        return features

    def logits(self, image_features, text_features):
        """Eq. 1 of unit features: (B, C)."""
        return clip_logits(unit(image_features), unit(text_features), self.clip_model.logit_scale.exp())

    def forward(self, features, images=None):
        """q_norm as logits (B, C), given the frozen CLIP's features (B, d) and, for MaPLe, the images."""
        u = self.image_features(features, images)
        return self.logits(u, self.text_features(u))


class CoCoOp(CoOp):
    """CoCoOp: a meta-network shifts the soft tokens by pi(u), u the unit image feature; then W rearranges.

    pi = Linear(d, d / 16), ReLU, Linear(d / 16, d_t). Each image has a context of its own.
    """
    per_image = True

    def __init__(self, clip_model, class_names, template, **options):
        super().__init__(clip_model, class_names, template, **options)
        d_t, d = clip_model.text_projection.shape
        self.meta_net = nn.Sequential(nn.Linear(d, d // 16), nn.ReLU(), nn.Linear(d // 16, d_t)).to(self.sos.device)

    def text_features(self, image_features):
        shift = self.meta_net(unit(image_features).to(self.meta_net[0].weight.dtype))      # (B, d_t)
        return self.encode_context(self.template(shift)[0])


class MaPLe(CoOp):
    """MaPLe: soft tokens V_l at the input of the first `depth` blocks of both towers (1 = shallow).

    Text: V_0 are the template's soft tokens; before blocks 1..depth-1 `template.deepen` brings in V_l.
    Image: Linear_l(V_l), (M, d_v). Linear_0 maps the soft tokens before W rearranges them (Fig. S4).
    Raises ValueError for a depth beyond the towers, or an image tower that is no vision transformer.
    """
    per_image = True

    def __init__(self, clip_model, class_names, template, depth=9, **options):
        super().__init__(clip_model, class_names, template, **options)
        if not hasattr(clip_model.visual, "transformer"):
            raise ValueError("MaPLe prompts a vision transformer; this CLIP has a ResNet: --clip ViT-B/16")
        layers = min(clip_model.transformer.layers, clip_model.visual.transformer.layers)
        if not 1 <= depth <= layers:
            raise ValueError(f"--depth {depth}: this CLIP has {layers} blocks that both towers share, "
                             f"so use a depth of 1 to {layers}")
        d_v, (M, d_t) = clip_model.visual.conv1.weight.shape[0], template.soft_tokens.shape
        first, deeper = nn.Linear(d_t, d_v), nn.Linear(d_t, d_v)
        self.to_visual = nn.ModuleList([first] + [copy.deepcopy(deeper) for _ in range(depth - 1)]).to(self.sos.device)
        self.deep_tokens = nn.ParameterList(new_tokens(clip_model, M) for _ in range(depth - 1))

    def text_features(self, image_features=None):
        context, W = self.template()

        def deep(layer, hidden):
            inside = 1 <= layer <= len(self.deep_tokens)
            return self.template.deepen(W, self.deep_tokens[layer - 1].to(hidden.dtype), hidden) if inside else hidden
        return self.encode_context(context, deep)

    def image_features(self, features, images=None):
        V = [self.template.soft_tokens, *self.deep_tokens]
        return encode_image(self.clip_model, images, [linear(V_l) for linear, V_l in zip(self.to_visual, V)])


class DePT(CoOp):
    """DePT on CoOp: beside the image-text matching (ITM) head, a head for the base classes alone.

    Per channel a scale and a bias on image and on text features (before normalisation), then Linear(d, C_base).
    w_cat in [0, 1]: the weight of that head, in the loss and in the prediction of base classes.
    """

    def __init__(self, clip_model, class_names, template, w_cat=0.7, **options):
        super().__init__(clip_model, class_names, template, **options)
        d, device = clip_model.text_projection.shape[1], self.sos.device
        self.w_cat = w_cat
        self.scale_image, self.scale_text = (nn.Parameter(torch.ones(d, device=device)) for _ in range(2))
        self.bias_image, self.bias_text = (nn.Parameter(torch.zeros(d, device=device)) for _ in range(2))
        self.head = nn.Linear(d, len(class_names)).to(device)

    def head_logits(self, image_features, text_features=None, labels=None):
        """The base-class head: (B, C_base); in training (2B, C_base), first the B labels' text features.

        Returns the logits in training together with the labels of their rows, (2B,).
        """
        rows = self.head(image_features.to(self.scale_image.dtype) * self.scale_image + self.bias_image)
        if labels is None:
            return rows
        text = text_features[labels].to(self.scale_text.dtype) * self.scale_text + self.bias_text
        return torch.cat([self.head(text), rows]), torch.cat([labels, labels])

    def forward(self, features, images=None):
        """Base classes: (1 - w_cat) ITM logits + w_cat head logits. Any other classes: ITM logits."""
        itm = super().forward(features, images)
        if self.class_names != self.base_class_names:
            return itm
        return (1 - self.w_cat) * itm + self.w_cat * self.head_logits(features)


class ZeroShot(CoOp):
    """CLIP as it is: a hand-written prompt such as "a photo of a {}." and nothing to learn."""

    def __init__(self, clip_model, class_names, prompt="a photo of a {}."):
        nn.Module.__init__(self)
        object.__setattr__(self, "clip_model", clip_model)
        self.prompt, self.base_class_names = prompt, list(class_names)
        self.set_classes(class_names)

    def set_classes(self, class_names):
        self.class_names = list(class_names)
        self.features = encode_sentences(self.clip_model, [self.prompt.format(name) for name in class_names])
        return self

    def text_features(self, image_features=None):
        return self.features


BASELINES = {"clip": ZeroShot, "coop": CoOp, "cocoop": CoCoOp, "maple": MaPLe, "dept": DePT}
TEMPLATES = ("plain", "atprompt", "anchoropt")


def build_learner(settings, clip_model, class_names, anchor_tokens=None):
    """The learner that saved settings describe, with fresh values; load its state dict to get the learnt ones.

    settings: a dict as stage2.py saves it (baseline, template, soft_tokens, ...). anchor_tokens (N, d_t): needed
    by template "anchoropt". Raises ValueError for an unknown baseline or template, or anchors of another width.
    """
    baseline, kind, M = settings["baseline"], settings["template"], settings.get("soft_tokens")
    if baseline not in BASELINES or kind not in TEMPLATES:
        raise ValueError(f"unknown baseline or template {baseline}-{kind}; known: {', '.join([*BASELINES, *TEMPLATES])}")
    if baseline == "clip":
        return ZeroShot(clip_model, class_names, settings["prompt"])
    read_back = 0
    if kind == "plain":
        template = PlainTemplate(clip_model, M, settings.get("start_words", ""))
    elif kind == "atprompt":
        template = AttributeTemplate(clip_model, M, settings["attributes"])
    else:
        width = clip_model.token_embedding.weight.shape[1]
        if anchor_tokens is None or anchor_tokens.shape[1] != width:
            raise ValueError(f"the anchoropt template needs anchor tokens of this CLIP's width {width}, got "
                             + ("none" if anchor_tokens is None else f"{anchor_tokens.shape[1]}"))
        template = AnchorTemplate(clip_model, M, anchor_tokens, settings["arrangement"], settings["tau"],
                                  settings["test_position"])
        read_back = len(anchor_tokens) if settings["feature_at"] == "released" else 0
    own = {"maple": ("depth",), "dept": ("w_cat",)}.get(baseline, ())
    options = {"read_back": read_back, "class_chunk": settings.get("class_chunk", 0)} | {key: settings[key] for key in own}
    return BASELINES[baseline](clip_model, class_names, template, **options)
