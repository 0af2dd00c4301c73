"""Slow, obvious twins of what the project computes fast, and random CLIPs to compare them on.

`encode_77` is the conventional text encoder of the CoOp family: all 77 positions of every class
through CLIP's own residual blocks. Everything here uses `clip` alone, nothing of the project's.
"""

import os
import warnings

import torch
import torch.nn as nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import clip
    import clip.model
    from clip.simple_tokenizer import SimpleTokenizer

TOKENIZER = SimpleTokenizer()
SOS, EOT = TOKENIZER.encoder["<|startoftext|>"], TOKENIZER.encoder["<|endoftext|>"]
NAMES = ["ant", "water lilly", "yin yang", "a very long class name of many words", "playfulness"]


# ---------------------------------------------------------------------------- comparisons

def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def relative(a, b):
    """||a - b|| / ||b||."""
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


def as_exact_as(fast, slow, exact, factor=8):
    """Is `fast` as near to `exact` (float64) as the obvious `slow`, up to a small factor?

    fast and slow: the same thing in the same lower precision. On any processor, what the obvious
    computation loses by rounding is what the fast one may lose.
    """
    rounding = max(relative(slow.double(), exact), torch.finfo(slow.dtype).eps)
    error = relative(fast.double(), exact)
    assert error <= factor * rounding, f"off by {error:.1e}, the obvious one by {rounding:.1e}"
    return True


# ---------------------------------------------------------------------------- random CLIPs

class ExactLayerNorm(nn.LayerNorm):
    """For float64 tests: CLIP's own LayerNorm casts to float32 in between."""


def tiny_clip(seed=0, layers=3, width=128, resolution=32, dtype=torch.float32, d=64):
    """A random CLIP of OpenAI's architecture, frozen. float64 for tests of exactness."""
    torch.manual_seed(seed)
    heads = width // 64
    model = clip.model.CLIP(d, resolution, layers, width, 8, 77, 49408, width, heads, layers)
    # Rougher than at the start of training: every term counts.
    for block in [*model.transformer.resblocks, *model.visual.transformer.resblocks]:
        for parameter in block.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    model = model.eval().requires_grad_(False)
    return exact(model) if dtype == torch.float64 else model.to(dtype)


def exact(model):
    """The same CLIP in float64, in place."""
    model = model.double()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, clip.model.LayerNorm):
                layer = ExactLayerNorm(child.normalized_shape, eps=child.eps).double()
                layer.load_state_dict(child.state_dict())
                setattr(module, name, layer.requires_grad_(False))
    return model


# ---------------------------------------------------------------------------- 77 positions a class

def encode_77(model, contexts, names, read_back=0, deep=None, inside=None):
    """The text features of  [SOS] context name . [EOT] [pad ...]  with 77 positions each.

    contexts: (P, d_t) for all names, or one per name.
    deep: None or a function (layer, (P, d_t)) -> (P, d_t).
    inside: tokens between a name and its full stop. Returns (C, d), not normalised.
    """
    table = model.token_embedding.weight
    features = []
    for i, name in enumerate(names):
        context = contexts if torch.is_tensor(contexts) else contexts[i]
        if inside is None:
            behind = table[torch.tensor(TOKENIZER.encode(name + ".") + [EOT])]
        else:
            behind = torch.cat([table[torch.tensor(TOKENIZER.encode(name))],
                                inside.to(table.dtype),
                                table[torch.tensor(TOKENIZER.encode(".") + [EOT])]])
        x = torch.cat([table[SOS][None], context.to(table.dtype), behind])
        eot, P = len(x) - 1, len(context)
        x = torch.cat([x, table[0].expand(77 - len(x), -1)]) + model.positional_embedding
        for layer, block in enumerate(model.transformer.resblocks):
            if deep is not None:
                x = torch.cat([x[:1], deep(layer, x[1:1 + P]), x[1 + P:]])
            x = block(x.unsqueeze(1)).squeeze(1)
        features.append(model.ln_final(x)[eot - read_back] @ model.text_projection)
    return torch.stack(features)


def encode_image_prompted(model, images, tokens):
    """MaPLe's image tower with CLIP's own blocks: tokens[l] (M, d_v) enter before block l."""
    visual, out = model.visual, []
    for image in images:
        x = visual.conv1(image[None]).reshape(visual.conv1.weight.shape[0], -1).T
        x = torch.cat([visual.class_embedding[None], x]) + visual.positional_embedding
        if tokens:
            x = torch.cat([x, tokens[0]])
        x = visual.ln_pre(x)
        for layer, block in enumerate(visual.transformer.resblocks):
            if 0 < layer < len(tokens):
                x = torch.cat([x[:-len(tokens[layer])], tokens[layer]])
            x = block(x.unsqueeze(1)).squeeze(1)
        out.append(visual.ln_post(x[0]) @ visual.proj)
    return torch.stack(out)


# ---------------------------------------------------------------------------- files of others

def as_huggingface(state):
    """A state dict with OpenAI's keys under those of transformers' CLIPModel."""
    names = {"visual.transformer.resblocks.": "vision_model.encoder.layers.",
             "transformer.resblocks.": "text_model.encoder.layers.", "ln_1": "layer_norm1",
             "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
             "visual.class_embedding": "vision_model.embeddings.class_embedding",
             "visual.conv1": "vision_model.embeddings.patch_embedding",
             "visual.ln_pre": "vision_model.pre_layrnorm",
             "visual.ln_post": "vision_model.post_layernorm",
             "ln_final": "text_model.final_layer_norm",
             "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
             "token_embedding": "text_model.embeddings.token_embedding"}
    theirs = {"text_projection.weight": state["text_projection"].T.contiguous(),
              "visual_projection.weight": state["visual.proj"].T.contiguous(),
              "text_model.embeddings.position_ids": torch.arange(77)[None],
              "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
              "logit_scale": state["logit_scale"]}
    for key, value in state.items():
        if key in ("text_projection", "visual.proj", "positional_embedding", "logit_scale"):
            continue
        for ours, name in names.items():
            key = key.replace(ours, name)
        key = key.replace(".attn.", ".self_attn.")
        if "in_proj_" in key:
            for name, part in zip("qkv", value.chunk(3)):
                theirs[key.replace("in_proj_", f"{name}_proj.")] = part.clone()
        else:
            theirs[key] = value
    return theirs


class Trap:
    """What a file of others may hold: to unpickle it would run code, and make a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)
