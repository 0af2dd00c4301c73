"""Eq. 4, anchor files (our own and the authors' released ones), and the words nearest to an anchor."""

import collections
import os
import pathlib
import pickle

import pytest
import torch

from anchor import AnchorPrompt, load_anchor, nearest_words, save_anchor
from reference import NAMES, TOKENIZER, encode_77, relative, tiny_clip, unit

MODEL = tiny_clip(dtype=torch.float64)
RELEASED = pathlib.Path(__file__).parents[2] / "shared" / "released_anchors" / "eurosat.pth.tar"


@pytest.mark.parametrize("n_anchor", [1, 3])
@pytest.mark.parametrize("preposition", ["of", "sun", "none", None, "because of"])
def test_anchor_prompt_is_eq4_token_by_token(n_anchor, preposition):
    torch.manual_seed(0)
    prompt = AnchorPrompt(MODEL, NAMES, n_anchor, preposition).double()
    words = TOKENIZER.encode("" if preposition in (None, "none") else preposition)
    t_anc = torch.cat([prompt.tokens, MODEL.token_embedding.weight[words]])        # [Anc_1] .. [Anc_N] [of], then [CLS]
    assert relative(prompt(), unit(encode_77(MODEL, t_anc, NAMES))) < 1e-6         # the words' buffer is float32
    assert [name for name, _ in prompt.named_parameters()] == ["tokens"] and prompt.tokens.shape == (n_anchor, 128)


def test_set_classes_rebinds_the_same_anchor():
    torch.manual_seed(0)
    prompt = AnchorPrompt(MODEL, NAMES, 2)
    torch.manual_seed(0)
    assert torch.equal(prompt.set_classes(["rhino"])(), AnchorPrompt(MODEL, ["rhino"], 2)())


def test_bad_anchors_are_named():
    with pytest.raises(ValueError, match="at least one"):
        AnchorPrompt(MODEL, NAMES, 0)
    with pytest.raises(ValueError, match="too long"):
        AnchorPrompt(MODEL, ["ant", "ant " * 76], 1)


def test_saved_anchors_come_back_with_their_settings(tmp_path):
    tokens = torch.randn(2, 16)
    save_anchor(tmp_path / "anchor.pt", tokens, {"preposition": "of", "anchor_length": 2})
    again, settings = load_anchor(tmp_path / "anchor.pt")
    assert torch.equal(again, tokens) and settings == {"preposition": "of", "anchor_length": 2}
    with pytest.raises(FileNotFoundError):
        load_anchor(tmp_path / "none.pt")


def released_style(tokens):
    """A checkpoint as the authors' trainer writes it: the anchor beside live optimizer and schedule objects."""
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    optimizer.state = collections.defaultdict(dict, {0: {"momentum_buffer": torch.zeros(1)}})
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    return {"state_dict": {"ctx": torch.zeros(4, 512).half(), "anchor_ctx_1": tokens}, "epoch": 100,
            "optimizer": {"state": optimizer.state, "held": optimizer}, "scheduler": schedule}


def test_released_checkpoints_load_without_their_optimizer(tmp_path):
    tokens = torch.randn(1, 512).half()
    torch.save(released_style(tokens), tmp_path / "model.pth.tar-100")
    again, settings = load_anchor(tmp_path / "model.pth.tar-100")
    assert torch.equal(again, tokens.float()) and settings == {}


@pytest.mark.skipif(not RELEASED.exists(), reason="the authors' file is not beside the project")
def test_the_authors_eurosat_anchor_loads():
    tokens, settings = load_anchor(RELEASED)
    assert tokens.shape == (1, 512) and tokens.dtype == torch.float32 and tokens.abs().max() > 0 and settings == {}


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("beside", ["alone", "beside an anchor"])
def test_a_pickle_with_other_globals_is_refused_and_nothing_runs(tmp_path, beside):
    trap = Malicious(str(tmp_path / "executed"))
    content = trap if beside == "alone" else {"state_dict": {"anchor_ctx_1": torch.zeros(1, 4)}, "scheduler": trap}
    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"nothing in it was run: it asks for (posix|nt)\.mkdir"):
        load_anchor(tmp_path / "bad.pt")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(trap))
    with pytest.raises(ValueError, match="nothing in it was run"):
        load_anchor(tmp_path / "plain.pkl")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [{"a": 1}, [1], {"anchor_tokens": torch.zeros(3)}, {"state_dict": {"x": torch.zeros(1)}},
                                     {"anchor_tokens": torch.full((1, 4), float("nan"))}, {"anchor_tokens": "text"}])
def test_files_without_anchor_tokens_are_named(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt holds no anchor tokens"):
        load_anchor(tmp_path / "other.pt")


def test_nearest_words_of_a_words_own_embedding_start_with_that_word():
    ids = TOKENIZER.encode("lamp") + TOKENIZER.encode("rooster")
    words = nearest_words(MODEL.token_embedding.weight[ids], MODEL, 3)
    assert [row[0][0] for row in words] == ["lamp", "rooster"] and len(words[0]) == 3
    assert words[0][0][1] == pytest.approx(0, abs=1e-3) and words[0][1][1] <= words[0][2][1]
