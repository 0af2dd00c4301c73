"""Anchor tokens: the anchor prompt of Eq. 4, its files, and the words nearest to its tokens (S4).

The anchor prompt reads  [SOS] [Anc_1] ... [Anc_N] [of] [CLS] . [EOT].  Stage I learns its N tokens;
Stage II freezes them. Needs `prompts.py` (and so `position.py`) beside this file.
"""

import torch
import torch.nn as nn

from prompts import SOS, TOKENIZER, class_suffix, embed, encode_text, new_tokens, read_as_data, unit


class AnchorPrompt(nn.Module):
    """Eq. 4:  t_anc = [Anc_1] ... [Anc_N] [of] [CLS].  A call: unit features f_T(t_anc) (C, d).

    tokens (N, d_t): theta_a, learnable, in float32, started at N(0, 0.02^2).
    preposition: the word between anchor and class, or "none" for no word (Tabs. 6, S2).
    It lives on the device of clip_model: build it there.
    Raises ValueError for class names that do not fit into CLIP's 77 tokens.
    """

    def __init__(self, clip_model, class_names, n_anchor=1, preposition="of"):
        super().__init__()
        object.__setattr__(self, "clip_model", clip_model)     # not a submodule: not ours to save
        self.tokens = new_tokens(clip_model, n_anchor)
        word = "" if preposition == "none" else preposition
        self.sos = embed(clip_model, [SOS])
        self.preposition = embed(clip_model, TOKENIZER.encode(word))        # [of], or (0, d_t)
        before = 1 + n_anchor + len(self.preposition)
        texts = [name + "." for name in class_names]
        self.suffix, self.eot = class_suffix(clip_model, texts, before)

    def forward(self):
        """f_T(t_anc), Eq. 4: unit features (C, d)."""
        # Eq. 4 up to [of] is shared by all classes; [CLS] . [EOT] are the suffix.
        # (1 + N + tokens of the preposition, d_t)
        context = torch.cat([self.sos, self.tokens, self.preposition])
        return unit(encode_text(self.clip_model, context, self.suffix, self.eot))


@torch.no_grad()
def anchor_features(clip_model, class_names, tokens, preposition="of"):
    """Unit features f_T(t_anc) (C, d) of these classes, for frozen anchor tokens (N, d_t)."""
    prompt = AnchorPrompt(clip_model, class_names, len(tokens), preposition)
    prompt.tokens.data.copy_(tokens)            # in place of its random start values
    return prompt()


def nearest_words(tokens, clip_model, k=10):
    """S4: for each anchor token the k vocabulary entries nearest to it, by Euclidean distance.

    tokens (N, d_t). Returns N lists of (word, distance), nearest first. (The paper finds them
    incoherent.)
    """
    table = clip_model.token_embedding.weight.float()                       # (vocabulary, d_t)
    distances = torch.cdist(tokens.detach().to(table), table)               # (N, vocabulary)
    nearest, ids = distances.topk(min(k, len(table)), largest=False)
    words = []
    for row_ids, row in zip(ids.tolist(), nearest.tolist()):
        names = [TOKENIZER.decoder[i].replace("</w>", "") for i in row_ids]
        words.append(list(zip(names, row)))
    return words


# ---------------------------------------------------------------------------- files

def save_anchor(path, tokens, settings):
    """Writes anchor tokens (N, d_t) and the settings (plain values) they were learnt with.

    The file is loaded with weights_only=True. Raises OSError where the path cannot be written.
    """
    torch.save({"anchor_tokens": tokens.detach().cpu().clone(), "settings": dict(settings)}, path)


def load_anchor(path):
    """Reads anchor tokens: (tokens (N, d_t) float32 on the CPU, settings dict).

    Takes the files of `save_anchor` and the authors' released .pth.tar checkpoints, whose settings
    are unknown: their dict comes back empty. A file is read as data: no code of its pickle is run;
    the optimizer state beside a released anchor is read past, and any other class is refused.
    Raises FileNotFoundError for a missing file, ValueError for one that is damaged or holds
    anything else.
    """
    try:
        with torch.serialization.safe_globals(RELEASED_GLOBALS):
            content = read_as_data(path)
        # Ours: one tensor and its settings. Theirs: a prompt learner's state, a key for each token.
        if "anchor_tokens" in content:
            parts, settings = [content["anchor_tokens"]], dict(content["settings"])
        else:
            state, settings = content["state_dict"], {}
            keys = [key for key in state if key.startswith("anchor_ctx")]
            keys.sort(key=lambda key: (len(key), key))                      # 2 before 10
            parts = [state[key] for key in keys]
        tokens = torch.cat(parts).float()                                   # (N, d_t)
        if tokens.dim() != 2 or not tokens.isfinite().all():
            raise ValueError("it holds no anchor tokens (N, d_t) of finite numbers")
        return tokens, settings
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is no anchor file that can be read ({error}); nothing in it was "
                         "run") from error


class Inert:
    """Stands for the optimizer and the schedule beside the anchor in a released checkpoint."""


def plain_dict(*factory):
    """Stands for `collections.defaultdict`, which the weights-only reader cannot fill."""
    return {}


# The globals that the released files name, and the harmless things that they get: no foreign class
# is built.
RELEASED_GLOBALS = [(Inert, "torch.optim.sgd.SGD"),
                    (Inert, "torch.optim.lr_scheduler.CosineAnnealingLR"),
                    (plain_dict, "collections.defaultdict"), dict]
