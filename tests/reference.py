"""Slow, obvious twins of what the project computes fast, and random CLIPs to compare them on.

`encode_77` is the conventional text encoder of the CoOp family: all 77 positions of every class through CLIP's own
residual blocks. Everything here uses `clip` alone, nothing of the project's modules.
"""

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


class ExactLayerNorm(nn.LayerNorm):
    """For float64 tests: CLIP's own LayerNorm casts to float32 in between."""


def tiny_clip(seed=0, layers=3, width=128, resolution=32, dtype=torch.float32, d=64):
    """A random CLIP of OpenAI's architecture, frozen. float64 for tests of exactness."""
    torch.manual_seed(seed)
    model = clip.model.CLIP(d, resolution, layers, width, 8, 77, 49408, width, width // 64, layers)
    for block in [*model.transformer.resblocks, *model.visual.transformer.resblocks]:       # rougher than at the start of
        for parameter in block.parameters():                                                # training: every term counts
            parameter.data += 0.05 * torch.randn_like(parameter)
    model = model.eval().requires_grad_(False).to(dtype)
    if dtype == torch.float64:
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, clip.model.LayerNorm):
                    exact = ExactLayerNorm(child.normalized_shape, eps=child.eps)
                    exact.load_state_dict(child.state_dict())
                    setattr(module, name, exact.to(dtype).requires_grad_(False))
    return model


def encode_77(model, contexts, names, read_back=0, deep=None, inside=None):
    """The text features of  [SOS] context name . [EOT] [pad ...]  with 77 positions each.

    contexts: (P, d_t) for all names, or one per name. deep: None or a function (layer, (P, d_t)) -> (P, d_t).
    inside: tokens between a name and its full stop. Returns (C, d), not normalised.
    """
    features = []
    for i, name in enumerate(names):
        context = contexts if torch.is_tensor(contexts) else contexts[i]
        table = model.token_embedding.weight
        if inside is None:
            behind = table[torch.tensor(TOKENIZER.encode(name + ".") + [EOT])]
        else:
            behind = torch.cat([table[torch.tensor(TOKENIZER.encode(name))], inside.to(table.dtype),
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


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def relative(a, b):
    """||a - b|| / ||b||."""
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()
