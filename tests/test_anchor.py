"""Eq. 4, anchor files (our own and the authors' released ones), the words nearest to an anchor."""

import collections
import pathlib
import pickle

import pytest
import torch

import worlds
from anchor import AnchorPrompt, anchor_features, load_anchor, nearest_words, save_anchor
from reference import NAMES, TOKENIZER, Trap, encode_77, relative, tiny_clip, unit

MODEL = tiny_clip(dtype=torch.float64)
RELEASED = pathlib.Path(__file__).parents[2] / "shared" / "released_anchors" / "eurosat.pth.tar"
TOKENS = torch.randn(2, 128)


@pytest.mark.parametrize("n_anchor, preposition", [(1, "of"), (3, "because of"), (2, "none")])
def test_anchor_prompt_is_eq4_token_by_token(n_anchor, preposition):
    torch.manual_seed(0)
    prompt = AnchorPrompt(MODEL, NAMES, n_anchor, preposition).double()
    words = TOKENIZER.encode("" if preposition == "none" else preposition)
    t_anc = torch.cat([prompt.tokens, MODEL.token_embedding.weight[words]])     # then [CLS]
    assert relative(prompt(), unit(encode_77(MODEL, t_anc, NAMES))) < 1e-12
    assert [name for name, _ in prompt.named_parameters()] == ["tokens"]
    assert list(prompt.state_dict()) == ["tokens"] and prompt.tokens.shape == (n_anchor, 128)


def test_anchor_tokens_start_small_and_in_float32():
    torch.manual_seed(0)
    tokens = AnchorPrompt(MODEL, ["ant"], 50).tokens
    assert tokens.dtype == torch.float32 and tokens.requires_grad
    assert tokens.std().item() == pytest.approx(0.02, rel=0.05)


def test_features_of_frozen_anchors_are_those_of_their_prompt_on_any_classes():
    features = anchor_features(MODEL, ["rhino"], TOKENS, "none")
    prompt = AnchorPrompt(MODEL, ["rhino"], 2, "none")
    prompt.tokens.data.copy_(TOKENS)
    assert not features.requires_grad and torch.equal(features, prompt())


@pytest.mark.parametrize("n_anchor, preposition, room", [(1, "of", 72), (3, "because of", 69)])
def test_the_longest_class_name_fits_and_one_token_more_is_named(n_anchor, preposition, room):
    longest = " ".join(["ant"] * room)      # [SOS] + N + preposition + name + "." + [EOT] = 77
    prompt = AnchorPrompt(MODEL, ["ant", longest], n_anchor, preposition).double()
    words = TOKENIZER.encode(preposition)
    t_anc = torch.cat([prompt.tokens, MODEL.token_embedding.weight[words]])
    assert relative(prompt(), unit(encode_77(MODEL, t_anc, ["ant", longest]))) < 1e-12
    with pytest.raises(ValueError) as error:
        AnchorPrompt(MODEL, ["yak", longest + " ant"], n_anchor, preposition)
    assert "yak" not in worlds.one_line(error, longest, room + 1)


def test_saved_anchors_come_back_with_their_settings(tmp_path):
    save_anchor(tmp_path / "anchor.pt", TOKENS, {"preposition": "of", "anchor_length": 2})
    again, settings = load_anchor(tmp_path / "anchor.pt")
    assert torch.equal(again, TOKENS) and settings == {"preposition": "of", "anchor_length": 2}
    with pytest.raises(FileNotFoundError):
        load_anchor(tmp_path / "none.pt")


def test_released_checkpoints_load_without_their_live_optimizer(tmp_path):
    optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1)
    optimizer.state = collections.defaultdict(dict, {0: {"momentum_buffer": torch.zeros(1)}})
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    # Several anchor tokens come in the order of their numbers.
    state = {f"anchor_ctx_{i}": torch.full((1, 4), float(i)).half() for i in (10, 2, 1)}
    torch.save({"state_dict": state | {"ctx": torch.zeros(4, 4)}, "epoch": 100,
                "optimizer": {"state": optimizer.state, "held": optimizer},
                "scheduler": schedule}, tmp_path / "model.pth.tar-100")
    tokens, settings = load_anchor(tmp_path / "model.pth.tar-100")
    assert tokens.dtype == torch.float32 and settings == {}
    assert tokens.tolist() == [4 * [1.0], 4 * [2.0], 4 * [10.0]]


@pytest.mark.skipif(not RELEASED.exists(), reason="the authors' file is not beside the project")
def test_the_authors_eurosat_anchor_loads():
    tokens, settings = load_anchor(RELEASED)
    assert tokens.shape == (1, 512) and tokens.abs().max() > 0 and settings == {}


def refused(path, *facts):
    with pytest.raises(ValueError) as error:
        load_anchor(path)
    worlds.one_line(error, path, *facts)


@pytest.mark.parametrize("beside", [False, True])
def test_a_pickle_with_other_globals_is_refused_and_nothing_runs(tmp_path, beside):
    content = Trap(tmp_path / "ran")
    if beside:
        content = {"state_dict": {"anchor_ctx_1": torch.zeros(1, 4)}, "scheduler": content}
    torch.save(content, tmp_path / "bad.pt")
    refused(tmp_path / "bad.pt", "not run")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(content))
    refused(tmp_path / "plain.pkl")
    assert not (tmp_path / "ran").exists()


def test_a_flipped_bit_is_found(tmp_path):
    save_anchor(tmp_path / "anchor.pt", torch.ones(4, 512), {})
    content = bytearray((tmp_path / "anchor.pt").read_bytes())
    content[content.find(torch.ones(100).numpy().tobytes())] ^= 1
    (tmp_path / "anchor.pt").write_bytes(content)
    refused(tmp_path / "anchor.pt")


@pytest.mark.parametrize("content", [
    [1], {"a": 1}, {"anchor_tokens": TOKENS}, {"anchor_tokens": TOKENS, "settings": 1},
    *({"anchor_tokens": wrong, "settings": {}} for wrong in (
        TOKENS[0], TOKENS * torch.inf, "text")),
    {"state_dict": {"x": TOKENS}},
    {"state_dict": {"anchor_ctx": TOKENS, "anchor_ctx_2": torch.zeros(1, 5)}}])
def test_files_without_anchor_tokens_are_refused_with_their_path(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    refused(tmp_path / "other.pt")


def test_nearest_words_of_a_words_own_embedding_start_with_that_word():
    ids = TOKENIZER.encode("lamp") + TOKENIZER.encode("rooster")
    words = nearest_words(MODEL.token_embedding.weight[ids], MODEL, 3)
    assert [row[0][0] for row in words] == ["lamp", "rooster"]
    others = (MODEL.token_embedding.weight - MODEL.token_embedding.weight[ids[0]]).norm(dim=1)
    expected = others.topk(3, largest=False).values[1:].tolist()
    assert [distance for _, distance in words[0][1:]] == pytest.approx(expected, rel=1e-3)
