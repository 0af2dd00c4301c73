"""The shared-context text encoder, templates and baselines, against plain twins in float64.

The twins are in tests/reference.py. Loading CLIPs is at the end.
"""

import copy
import io
import json
import os
import subprocess
import sys

import clip
import pytest
import torch
import torch.nn.functional as F

import data
import prompts
import stage2
import worlds
from prompts import AttributeTemplate, PlainTemplate, build_learner
from reference import (NAMES, SOS, TOKENIZER, Trap, as_exact_as, as_huggingface, encode_77,
                       encode_image_prompted, exact, relative, tiny_clip, unit)

MODEL = tiny_clip(dtype=torch.float64)
TABLE = MODEL.token_embedding.weight
SUFFIX = prompts.class_suffix(MODEL, [f"{name}." for name in NAMES])
SETTINGS = {"soft_tokens": 3, "arrangement": "adaptive", "tau": 1.0, "test_position": "argmax",
            "soft_W": False, "draw": "step", "feature_at": "eot", "depth": 3, "w_cat": 0.7,
            "attributes": ["playfulness", "shape"], "prompt": "a photo of a {}."}
BASELINES, TEMPLATES = ("coop", "cocoop", "maple", "dept"), ("plain", "atprompt", "anchoropt")
# W that moves the anchor (column 4) to the front, repeats it, repeats V2 and drops V3; for N = 2 it
# repeats Anc_2 too.
ORDERS = {1: [3, 1, 1, 3], 2: [4, 1, 3, 4, 0]}
START = {"soft_tokens": 2, "start_words": "a photo of a"}
W_SETTINGS = ("tau", "test_position", "soft_W", "draw")


def learner(baseline="coop", template="anchoropt", n_anchor=1, names=NAMES, without=(), **changed):
    torch.manual_seed(0)
    settings = SETTINGS | {"baseline": baseline, "template": template} | changed
    settings = {key: value for key, value in settings.items() if key not in without}
    made = build_learner(settings, MODEL, names, torch.randn(n_anchor, 128)).double()
    for parameter in made.parameters():                 # far from the tiny start: every term shows
        parameter.data += 0.3 * torch.randn_like(parameter)
    return made


def set_order(made, order):
    W = 9 * torch.eye(len(order), dtype=torch.float64)[order]
    made.template.position_matrix.logits.data = W
    return made.eval()


# ---------------------------------------------------------------------------- the encoder

@pytest.mark.parametrize("n_context", [0, 1, 9])
def test_context_encoder_equals_77_position_encoder(n_context):
    torch.manual_seed(n_context)
    context = torch.randn(n_context, 128, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(len(NAMES), 64, dtype=torch.float64)
    fast = prompts.encode_text(MODEL, torch.cat([TABLE[SOS][None], context]), *SUFFIX)
    slow = encode_77(MODEL, context, NAMES)
    assert relative(fast, slow) < 1e-12
    if n_context:
        gradients = [torch.autograd.grad((f * weights).sum(), context)[0] for f in (fast, slow)]
        assert relative(*gradients) < 1e-12


def test_passes_without_gradient_are_split_on_a_cpu_and_change_nothing(monkeypatch):
    sizes = []

    def noted(at, real):
        return lambda *args: sizes.append(len(args[at])) or real(*args)
    monkeypatch.setattr(prompts, "_encode_classes", noted(2, prompts._encode_classes))
    monkeypatch.setattr(prompts, "_encode_vit", noted(1, prompts._encode_vit))
    contexts, images = torch.randn(130, 4, 128).double(), torch.randn(20, 3, 32, 32).double()
    tokens = list(torch.randn(2, 3, 128).double())
    u = prompts.encode_image(MODEL, images, tokens)
    v = prompts.encode_text(MODEL, contexts, *SUFFIX)
    with torch.no_grad():
        assert relative(prompts.encode_image(MODEL, images, tokens), u) < 1e-12
        assert relative(prompts.encode_text(MODEL, contexts, *SUFFIX), v) < 1e-12
    assert sizes == [20, 5, 8, 8, 4, 3, 2]                      # 512 // 130 = 3 classes at a time


def test_sentences_are_encoded_as_clip_encodes_them():
    model = tiny_clip()
    sentences = ["An ant is small, black, and has six legs.", "It is.", "word " * 75, "What?"]
    texts = clip.tokenize(sentences)
    with torch.no_grad():
        fast, slow = prompts.encode_sentences(model, sentences), model.encode_text(texts)
        assert as_exact_as(fast, slow, exact(model).encode_text(texts))
    with pytest.raises(ValueError) as error:
        prompts.encode_sentences(model, ["It is.", "word " * 76])
    assert "word word" in worlds.one_line(error, "75") and "It is" not in str(error.value)


def test_clip_logits_is_eq1():
    u, v, tau = unit(torch.randn(2, 8).double()), unit(torch.randn(3, 8).double()), 0.01
    q = prompts.clip_logits(u, v, 1 / tau).softmax(-1)
    for i in range(2):
        weights = [torch.exp(sum(u[i, k] * v[j, k] for k in range(8)) / tau) for j in range(3)]
        torch.testing.assert_close(q[i], torch.stack(weights) / sum(weights))
    logits = prompts.clip_logits(u, torch.stack([v, v.flip(0)]), 10.)       # an image's own prompts
    torch.testing.assert_close(logits, 10 * torch.stack([v @ u[0], v.flip(0) @ u[1]]))
    assert prompts.unit(u.half()).dtype == torch.float32
    torch.testing.assert_close(prompts.unit(3 * u), u)


def test_a_step_copies_no_index_tensors_and_goes_well_after_inference_mode():
    prompts._places.cache_clear()
    made = learner("coop")
    with torch.inference_mode():
        made.text_features()
    misses = prompts._places.cache_info().misses
    made.text_features().sum().backward()
    assert made.template.soft_tokens.grad.norm() > 0
    assert prompts._places.cache_info().misses == misses


# ---------------------------------------------------------------------------- templates

def test_plain_template_is_eq2():
    template = PlainTemplate(MODEL, 50, "a photo of a")         # more than the words: random
    context, W = template()
    assert torch.equal(context, template.soft_tokens) and W is None and template.length == 50
    assert template.soft_tokens.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("baseline, words", [("coop", "a photo"), ("cocoop", "a photo"),
                                             ("maple", "a photo of a")])
def test_of_two_soft_tokens_maple_alone_keeps_the_words_that_are_left(baseline, words):
    """MaPLe's released way: [V_1] [V_2] of a [CLS], with "of a" not learnt."""
    settings = SETTINGS | START | {"baseline": baseline, "template": "plain"}
    template = build_learner(settings, MODEL, NAMES).template
    context = template()[0]
    assert torch.equal(context, TABLE[TOKENIZER.encode(words)].float())
    assert torch.equal(context[:2], template.soft_tokens) and template.length == len(context)
    assert [name for name, _ in template.named_parameters()] == ["soft_tokens"]


def test_attribute_template_is_eq3_token_by_token():
    words = ["playfulness", "shape"]                            # the first is two tokens
    template = AttributeTemplate(MODEL, 2, words).double()
    shift = torch.randn(3, 128, dtype=torch.float64)
    for image, context in enumerate([template()[0], *template(shift[:, None])[0]]):
        expected = []
        for V_a, word in zip(template.attribute_soft_tokens, words):
            expected += [*V_a, *TABLE[TOKENIZER.encode(word)]]
        for V in template.soft_tokens:                          # only these are shifted
            expected.append(V if image == 0 else V + shift[image - 1])
        assert len(expected) == template.length == 2 + 2 + 2 + 1 + 2
        assert torch.allclose(context, torch.stack(expected), atol=1e-7)
    started = AttributeTemplate(MODEL, 50, words).attribute_soft_tokens
    assert [V_a.std().item() for V_a in started] == pytest.approx([0.01, 0.01], rel=0.05)


@pytest.mark.parametrize("n_anchor", [1, 2])
def test_anchor_template_is_eqs_8_and_9(n_anchor):
    order = ORDERS[n_anchor]
    made = set_order(learner(n_anchor=n_anchor), order)
    t_v = [*made.template.soft_tokens, *made.template.anchor_tokens]            # Eq. 8
    context, W = made.template()
    assert torch.equal(context, torch.stack([t_v[j] for j in order]))           # Eq. 9
    assert W.argmax(1).tolist() == order
    shift = torch.randn(2, 128, dtype=torch.float64)
    shifted = [t_v[j] + (shift[1] if j < 3 else 0) for j in order]              # the anchor is not
    assert torch.allclose(made.template(shift[:, None])[0][1], torch.stack(shifted))
    assert relative(made.text_features(), encode_77(MODEL, context, NAMES)) < 1e-12
    assert {name for name, _ in made.named_parameters()} == {       # the anchor is frozen, and kept
        "template.soft_tokens", "template.position_matrix.logits"}
    assert "template.anchor_tokens" in made.state_dict()


@pytest.mark.parametrize("arrangement, order", [("before", [3, 4, 0, 1, 2]),
                                                ("middle", [0, 3, 4, 1, 2])])
def test_fixed_arrangements_of_table_8(arrangement, order):
    """Such a run has no settings of W's."""
    made = learner(n_anchor=2, without=W_SETTINGS, arrangement=arrangement)
    t_v = torch.cat([made.template.soft_tokens, made.template.anchor_tokens])
    assert relative(made.text_features(), encode_77(MODEL, t_v[order], NAMES)) < 1e-12
    assert [name for name, _ in made.named_parameters()] == ["template.soft_tokens"]


@pytest.mark.parametrize("baseline", ["coop", "maple"])
def test_after_class_puts_the_anchor_between_name_and_full_stop(baseline):
    made = learner(baseline, n_anchor=2, without=W_SETTINGS, arrangement="after-class")
    assert made.template.length == 3

    def replace_all(layer, hidden):                 # the soft tokens in front, as in plain MaPLe
        return made.deep_tokens[layer - 1] if layer else hidden
    slow = encode_77(MODEL, made.template.soft_tokens, NAMES, inside=made.template.anchor_tokens,
                     deep=replace_all if baseline == "maple" else None)
    assert relative(made.text_features(), slow) < 1e-12


# ---------------------------------------------------------------------------- baselines

FEATURES = torch.randn(3, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
IMAGES = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
LABELS = torch.tensor([1, 0, 4])
SCALE = MODEL.logit_scale.exp()


def check_gradients(made, fast, slow, unused=()):
    """Do all parameters learn alike from both logits, except those with these names?"""
    parameters = {name: parameter for name, parameter in made.named_parameters()
                  if not name.startswith(unused)}
    g_fast, g_slow = (torch.autograd.grad(F.cross_entropy(logits, LABELS), parameters.values())
                      for logits in (fast, slow))
    for name, a, b in zip(parameters, g_fast, g_slow):
        assert b.norm() > 0 and relative(a, b) < 1e-9, name


@pytest.mark.parametrize("baseline", ["coop", "dept"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_itm_logits_equal_the_conventional_step_values_and_gradients(baseline, template):
    made = learner(baseline, template)
    torch.manual_seed(5)
    fast = made.logits(FEATURES, made.text_features())
    torch.manual_seed(5)                                                # the same Gumbel noise
    slow = SCALE * unit(FEATURES) @ unit(encode_77(MODEL, made.template()[0], NAMES)).T
    assert relative(fast, slow) < 1e-10
    check_gradients(made, fast, slow, ("head", "scale", "bias"))        # DePT's other half


@pytest.mark.parametrize("template", TEMPLATES)
def test_cocoops_batched_logits_equal_a_loop_over_images(template):
    made = learner("cocoop", template)
    torch.manual_seed(5)
    fast, rows = made(FEATURES), []
    first, second = made.meta_net[0], made.meta_net[2]
    for f in FEATURES:
        hidden = F.relu(first.weight @ unit(f) + first.bias)    # pi(u): d -> d / 16 -> d_t
        pi = second.weight @ hidden + second.bias
        assert hidden.shape == (4,)
        torch.manual_seed(5)                                    # one W for all images of the batch
        context = made.template(pi)[0]
        rows.append(SCALE * unit(encode_77(MODEL, context, NAMES)) @ unit(f))
    slow = torch.stack(rows)
    assert relative(fast, slow) < 1e-10
    check_gradients(made, fast, slow)


def deep_rule(made, template, W=None):
    """Fig. 3 token by token: what stands at each context position before block `layer`."""
    V = [made.template.soft_tokens, *made.deep_tokens]
    M = len(V[0])

    def rule(layer, hidden):
        if layer == 0 or layer >= len(V):
            return hidden
        out = []
        for i in range(len(hidden)):
            if template == "plain":                             # words behind the V keep theirs
                out.append(V[layer][i] if i < M else hidden[i])
            elif template == "atprompt":
                j = i - (len(hidden) - M)
                out.append(V[layer][j] if j >= 0 else hidden[i])
            else:                                               # 1 at one place of row i, else 0
                soft = sum(W[i, j] * V[layer][j] for j in range(M))
                out.append(soft + sum(W[i, j] * hidden[i] for j in range(M, W.shape[1])))
        return torch.stack(out)
    return rule


@pytest.mark.parametrize("template, n_anchor, depth", [
    ("plain", 1, 3), ("plain of a", 1, 3), ("atprompt", 1, 3), ("anchoropt", 1, 3),
    ("anchoropt", 2, 2), ("anchoropt", 1, 1)])
def test_maples_deep_rule_token_by_token_on_both_towers(template, n_anchor, depth):
    template, *words = template.split(maxsplit=1)
    made = learner("maple", template, n_anchor, depth=depth, **(START if words else {}))
    if template == "anchoropt":
        set_order(made, ORDERS[n_anchor]).train()
    torch.manual_seed(5)                                        # one W for both towers and all
    fast = made(FEATURES, IMAGES)                               # layers: they all teach it
    torch.manual_seed(5)
    context, W = made.template()
    if W is not None:
        assert W.argmax(1).tolist() == ORDERS[n_anchor]
    text = encode_77(MODEL, context, NAMES, deep=deep_rule(made, template, W))
    V = [made.template.soft_tokens, *made.deep_tokens]
    assert len(V) == depth
    tokens = [(linear.weight @ V_l.T + linear.bias[:, None]).T
              for linear, V_l in zip(made.to_visual, V)]
    visual = encode_image_prompted(MODEL, IMAGES, tokens)
    assert relative(made.image_features(None, IMAGES), visual) < 1e-11
    slow = SCALE * unit(visual) @ unit(text).T
    assert relative(fast, slow) < 1e-10
    check_gradients(made, fast, slow)


def test_maples_deep_projections_start_as_copies_and_the_first_is_its_own():
    made = build_learner(SETTINGS | {"baseline": "maple", "template": "plain"}, MODEL, NAMES)
    first, second, third = made.to_visual
    assert torch.equal(second.weight, third.weight) and second.weight is not third.weight
    assert not torch.equal(first.weight, second.weight)


def test_depts_loss_and_base_prediction_by_hand():
    made, labels = learner("dept", "anchoropt"), torch.tensor([4, 1, 1])
    v, ce_cat = made.text_features(), 0.0
    for k in range(3):                              # 2 B rows: text of the labels, then images
        for feature, scale, bias in ((v[labels[k]], made.scale_text, made.bias_text),
                                     (FEATURES[k], made.scale_image, made.bias_image)):
            row = made.head.weight @ (feature * scale + bias) + made.head.bias
            ce_cat = ce_cat - row.log_softmax(-1)[labels[k]] / 6
    ce = torch.tensor(0.25, dtype=torch.float64)
    loss = made.own_loss(ce, FEATURES, v, labels)
    torch.testing.assert_close(loss, 0.3 * ce + 0.7 * ce_cat)
    assert learner("coop").own_loss(ce, FEATURES, v, labels) is ce      # the others leave it

    set_order(made, ORDERS[1])
    itm = made.logits(FEATURES, made.text_features())
    head = (FEATURES * made.scale_image + made.bias_image) @ made.head.weight.T + made.head.bias
    torch.testing.assert_close(made(FEATURES), 0.3 * itm + 0.7 * head)          # base classes
    novel = made.set_classes(NAMES[::-1])(FEATURES)                             # others: ITM alone
    torch.testing.assert_close(novel, itm.flip(-1))


def test_dept_starts_as_its_head_on_clips_own_features():
    made = build_learner(SETTINGS | {"baseline": "dept", "template": "plain"}, MODEL, NAMES)
    expected = F.linear(FEATURES.float(), made.head.weight, made.head.bias)
    for scale, bias in ((made.scale_image, made.bias_image), (made.scale_text, made.bias_text)):
        assert torch.equal(made.head_logits(FEATURES, scale, bias), expected)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("template", TEMPLATES)
def test_set_classes_gives_the_logits_of_a_learner_built_on_those_classes(baseline, template):
    novel = ["saint bernard", "ant", "x-ray (old)", "yak", "gnu"]
    moved, built = learner(baseline, template), learner(baseline, template, names=novel)
    built.base_class_names = []                         # of DePT its ITM head alone
    assert moved.set_classes(novel) is moved and moved.class_names == novel
    torch.testing.assert_close(moved.eval()(FEATURES, IMAGES), built.eval()(FEATURES, IMAGES),
                               rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("baseline, n_anchor", [("coop", 1), ("coop", 4), ("maple", 2)])
def test_feature_at_released_reads_n_positions_before_eot(baseline, n_anchor):
    order = list(range(3 + n_anchor))                           # at N = 4 it lands in the context
    made = set_order(learner(baseline, n_anchor=n_anchor, feature_at="released"), order)
    context, W = made.template()
    deep = deep_rule(made, "anchoropt", W) if baseline == "maple" else None
    slow = encode_77(MODEL, context, NAMES, read_back=n_anchor, deep=deep)
    assert relative(made.text_features(), slow) < 1e-11


def test_zero_shot_is_clips_own_prediction():
    model, images = tiny_clip(), torch.randn(2, 3, 32, 32)
    settings = {"baseline": "clip", "template": "plain",
                "prompt": "a photo of a {}, a type of pet."}
    made = build_learner(settings, model, NAMES)
    texts = clip.tokenize([f"a photo of a {name}, a type of pet." for name in NAMES])
    with torch.no_grad():
        fast, slow = made(model.encode_image(images)), model(images, texts)[0]
        assert as_exact_as(fast, slow, exact(model)(images.double(), texts)[0])
    assert sum(parameter.numel() for parameter in made.parameters()) == 0


# ---------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("arrangement, n_anchor, room", [
    ("adaptive", 1, 71),                    # [SOS], 3 + 1 tokens, a name of 70, "." and [EOT]: 77
    ("after-class", 2, 70)])                # [SOS], 3 tokens, a name of 69, 2 + "." and [EOT]: 77
def test_the_longest_class_name_fits_and_one_token_more_is_named(arrangement, n_anchor, room):
    options = {"n_anchor": n_anchor, "arrangement": arrangement}
    fits = " ".join(["ant"] * (room - 1))
    assert learner(names=["yak", fits], **options)(FEATURES).shape == (3, 2)
    with pytest.raises(ValueError) as error:
        learner(names=["yak", fits + " ant"], **options)
    assert "yak" not in worlds.one_line(error, fits, room, 77)
    for text in (" ", "."):                                     # of no tokens
        with pytest.raises(ValueError, match=f"'{text}'"):
            prompts.class_suffix(MODEL, ["ant", text])


def test_a_depth_beyond_the_towers_is_refused():
    for depth in (0, 4):
        with pytest.raises(ValueError, match=f"depth {depth}.* 3 blocks"):
            learner("maple", depth=depth)


# ---------------------------------------------------------------------------- OpenAI's CLIPs

SMALL = tiny_clip(layers=1, width=64, d=16)
STATE = SMALL.state_dict()
TEXTS = ["a photo of an ant.", "yin yang, a symbol"]


def refused(name, *facts, **options):
    """What `load_clip` says of what it does not take: one line with these facts."""
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        prompts.load_clip(name, **options)
    worlds.one_line(error, *facts)


def check_towers(model, own, pixels, change=lambda features: features):
    """Are the project's features of TEXTS and pixels as exact as the model's own, own(dtype)?"""
    with torch.no_grad():
        fast = prompts.encode_sentences(model, TEXTS), prompts.encode_image(model, pixels)
        for features, slow, right in zip(fast, own(model.dtype), own(torch.float64)):
            assert features.dtype == model.dtype
            assert as_exact_as(change(features), slow, right)


def clips_own(model, pixels):
    def own(dtype):
        twin = exact(copy.deepcopy(model)) if dtype == torch.float64 else model
        return twin.encode_text(clip.tokenize(TEXTS)), twin.encode_image(pixels.to(dtype))
    return own


def check_coop_and_maple(model, maple):
    """CoOp takes every CLIP; MaPLe, whose prompts enter the image tower, plain ViTs alone."""
    settings = SETTINGS | {"template": "plain", "depth": 2}
    pixels = torch.randn(2, 3, *prompts.preprocess_of(model)["size"])
    f = prompts.encode_image(model, pixels)
    for baseline in ("coop", "maple")[:1 + maple]:
        made = build_learner(settings | {"baseline": baseline}, model, NAMES)
        assert made(f, pixels).shape == (2, len(NAMES))
    if not maple:
        with pytest.raises(ValueError, match="MaPLe"):
            build_learner(settings | {"baseline": "maple"}, model, NAMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_state_dict_is_read_unrounded_and_half_precision_is_clips_own_rule(tmp_path, dtype):
    told = {"input_resolution": torch.tensor(32), "context_length": 77, "vocab_size": 49408}
    torch.save(STATE | told, tmp_path / "clip.pt")
    loaded = prompts.load_clip(tmp_path / "clip.pt", dtype=dtype)
    assert loaded.dtype == dtype and not loaded.training
    rounded = clip.model.build_model(dict(STATE)).state_dict()          # to float16, where it may
    for name, value in loaded.state_dict().items():
        own = dtype if rounded[name].dtype == torch.float16 else torch.float32
        assert value.dtype == own and torch.equal(value, STATE[name].to(own)), name
    settings = SETTINGS | {"baseline": "coop", "template": "anchoropt"}
    made = build_learner(settings, loaded, NAMES, torch.randn(1, 64))
    assert made.text_features().dtype == dtype
    assert all(parameter.dtype == torch.float32 for parameter in made.parameters())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_openais_own_file_is_known_by_its_checksum_under_any_name(tmp_path, monkeypatch):
    """It is TorchScript, a program: run where the checksum is OpenAI's, and no other."""
    path = tmp_path / "mine.pt"
    inputs = (torch.randn(1, 3, 32, 32), clip.tokenize(["ant"]))
    torch.jit.trace(SMALL, inputs, check_trace=False).save(str(path))
    refused(path, path)
    url = f"https://host/{prompts.sha256(path)}/ViT-B-16.pt"
    monkeypatch.setitem(clip.clip._MODELS, "ViT-B/16", url)
    monkeypatch.setattr(clip.clip, "_download", lambda *args: str(path))
    assert prompts.clip_identity(path) == prompts.clip_identity("ViT-B/16") == "ViT-B/16"
    for name in ("ViT-B/16", path):
        loaded = prompts.load_clip(name)
        assert loaded.dtype == torch.float32
        assert relative(loaded.visual.proj, SMALL.visual.proj) < 1e-3       # theirs are in float16


def test_a_resnet_works_with_coop_and_not_with_maple(tmp_path):
    torch.manual_seed(0)
    model = clip.model.CLIP(32, 64, (1, 2, 1, 1), 8, None, 77, 49408, 64, 1, 2).eval()
    torch.save(model.state_dict(), tmp_path / "RN.pt")
    loaded, pixels = prompts.load_clip(tmp_path / "RN.pt"), torch.randn(9, 3, 64, 64)
    check_towers(loaded, clips_own(model, pixels), pixels)
    check_coop_and_maple(loaded, maple=False)


def test_words_that_the_toy_clip_does_not_know_are_small_noise():
    table = prompts.load_clip("toy").token_embedding.weight
    assert len(table) == len(TOKENIZER.encoder)
    assert table.median().item() == pytest.approx(0, abs=1e-3)
    assert table.abs().median().item() == pytest.approx(0.02 * 0.6745, rel=0.02)
    assert torch.equal(table, prompts.load_clip("toy").token_embedding.weight)


# ---------------------------------------------------------------------------- HuggingFace's folders

def write_folder(folder, config=None, state=None):
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if state is not None:
        torch.save(state, folder / "pytorch_model.bin")


@pytest.mark.parametrize("text, vision, file", [
    ({"num_attention_heads": 2, "hidden_act": "gelu"}, {"image_size": 24, "patch_size": 8},
     "pytorch_model.bin"),
    ({}, {"hidden_act": "gelu"}, "model.safetensors")])             # what is off the defaults
def test_a_folder_that_huggingfaces_transformers_has_saved_computes_as_it_does(
        tmp_path, text, vision, file):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    size = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 2}
    torch.manual_seed(0)
    theirs = transformers.CLIPModel(transformers.CLIPConfig(
        text_config=text | size, vision_config=vision | size, projection_dim=32)).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)
    if file == "pytorch_model.bin":
        (tmp_path / "model.safetensors").unlink()
        torch.save(theirs.state_dict(), tmp_path / file)
    model = prompts.load_clip(tmp_path)
    pixels = torch.randn(2, 3, *prompts.preprocess_of(model)["size"])

    def own(dtype):
        found = theirs.to(dtype)(clip.tokenize(TEXTS), pixels.to(dtype))
        return found.text_embeds, found.image_embeds
    check_towers(model, own, pixels, change=unit)
    check_coop_and_maple(model, maple=True)
    for ours, config in ((prompts.CONFIG, transformers.CLIPTextConfig()),
                         (prompts.VISION_CONFIG, transformers.CLIPVisionConfig())):
        assert ours == {key: getattr(config, key) for key in ours}


# ---------------------------------------------------------------------------- open_clip's

OPEN_CLIPS = {
    "gelu": {}, "quickgelu": {"quick_gelu": True}, "custom": {"custom_text": True},
    "oblong": {"vision_cfg": {"image_size": [24, 40]}},
    "short": {"text_cfg": {"context_length": 20}},
    "resnet": {"vision_cfg": {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64}},
    "scaled": {"vision_cfg": {"ls_init_value": 0.5}},
    "bidirectional": {"custom_text": True, "text_cfg": {"no_causal_mask": True}}}


def config_of(kind):
    """A small architecture in open_clip's words."""
    changed, vision = OPEN_CLIPS[kind], {"image_size": 24, "patch_size": 8, "width": 128}
    return {"embed_dim": 32} | changed | {
        "vision_cfg": vision | {"layers": 2, "head_width": 32} | changed.get("vision_cfg", {}),
        "text_cfg": {"width": 64, "heads": 2, "layers": 2} | changed.get("text_cfg", {})}


@pytest.fixture(scope="module")
def open_clips(tmp_path_factory):
    """A function kind -> --clip's name of a model with random weights in a file, and that model."""
    open_clip = pytest.importorskip("open_clip")
    folder = tmp_path_factory.mktemp("open_clip")

    def make(kind):
        (folder / f"small-{kind}.json").write_text(json.dumps(config_of(kind)))
        open_clip.add_model_config(folder / f"small-{kind}.json")
        torch.manual_seed(0)
        model = open_clip.create_model(f"small-{kind}").eval()
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        torch.save(model.state_dict(), folder / f"{kind}.pt")
        return f"open_clip:small-{kind}:{folder / kind}.pt", model
    return make


@pytest.mark.parametrize("kind, plain_vit, dtype", [
    ("gelu", True, torch.float32), ("gelu", True, torch.float16),
    ("quickgelu", True, torch.float32), ("custom", True, torch.float32),
    ("oblong", True, torch.float32), ("short", True, torch.float32),
    ("resnet", False, torch.float32), ("scaled", False, torch.float32)])
def test_open_clips_models_compute_as_open_clip_does(open_clips, kind, plain_vit, dtype):
    """A tower that is no plain ViT goes its own way, and not with MaPLe."""
    name, theirs = open_clips(kind)
    model = prompts.load_clip(name, dtype=dtype)
    ids = clip.tokenize(TEXTS, theirs.context_length)
    pixels = torch.randn(2, 3, *prompts.preprocess_of(model)["size"])

    def own(dtype):
        own = copy.deepcopy(theirs).to(dtype)
        return own.encode_text(ids), own.encode_image(pixels.to(dtype))
    check_towers(model, own, pixels)
    check_coop_and_maple(model, plain_vit)


def test_a_text_tower_of_open_clip_that_is_not_clips_is_refused(open_clips):
    refused(open_clips("bidirectional")[0], "small-bidirectional")


def test_open_clips_preprocessing_is_that_of_its_config(open_clips, tmp_path):
    own = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "interpolation": "bilinear",
           "resize_mode": "squash"}
    config = {"model_cfg": config_of("oblong"), "preprocess_cfg": own}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(open_clips("oblong")[1].state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    found = prompts.preprocess_of(prompts.load_clip(f"local-dir:{tmp_path}"))
    assert {key: found[key] for key in own} == own and list(found["size"]) == [24, 40]


def test_a_clips_preprocessing_reaches_all_transforms(tmp_path, monkeypatch):
    model, seen = tiny_clip(layers=2, width=64), set()
    model.preprocess = prompts.OPENAI_PREPROCESS | {"size": (32, 32), "mean": (0.1, 0.2, 0.3)}
    monkeypatch.setattr(stage2.stage1, "load_clip", lambda *args: model)

    def noted(name, real, at=0):
        return lambda *args: seen.add((name, args[at]["mean"])) or real(*args)
    for name in ("train_transform", "test_transform"):
        monkeypatch.setattr(data, name, noted(name, getattr(data, name)))
    monkeypatch.setattr(data, "normalize", noted("normalize", data.normalize, 1))
    worlds.dtd_tree(tmp_path, 4, 4)
    argv = f"--dataset dtd --root {tmp_path} --output {tmp_path / 'o'} --epochs 1 --no-plot"
    assert stage2.main(argv.split() + "--baseline maple --template plain --depth 1".split()) == 0
    assert seen == {(name, (0.1, 0.2, 0.3))
                    for name in ("train_transform", "test_transform", "normalize")}


# ---------------------------------------------------------------------------- what is no CLIP

CONFIG = {"text_config": {"num_attention_heads": 1},
          "vision_config": {"num_attention_heads": 1, "image_size": 32, "patch_size": 8}}


def saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return bytearray(file.getvalue())


FLIPPED = saved(STATE)
FLIPPED[len(FLIPPED) // 2] ^= 1                                 # one bit of one number


@pytest.mark.parametrize("content, fact", [
    (b"<!DOCTYPE html><html>403 Forbidden</html>", ""), (FLIPPED, "damaged"),
    (saved([1, 2]), ""), (saved({"m": SMALL}), "is not run"),
    (saved({"state_dict": STATE, "epoch": 3}), "open_clip:ARCHITECTURE:FILE"),
    (saved(STATE | {"ln_final.bias": torch.zeros(3)}), "ln_final.bias")])
def test_files_that_are_no_clip_are_refused_with_their_path(tmp_path, content, fact):
    (tmp_path / "ViT-B-16.pt").write_bytes(content)
    refused(tmp_path / "ViT-B-16.pt", tmp_path / "ViT-B-16.pt", fact)


@pytest.mark.parametrize("config, state", [
    (None, None), (CONFIG, None), ({}, STATE), (CONFIG, STATE),
    (CONFIG | {"text_config": {"hidden_act": "relu"}}, as_huggingface(STATE)),
    (CONFIG | {"text_config": None}, as_huggingface(STATE))])
def test_folders_that_are_no_clip_are_refused_with_their_path(tmp_path, config, state):
    write_folder(tmp_path / "model", config, state)
    refused(tmp_path / "model", tmp_path / "model")


@pytest.mark.parametrize("name", ["{}/pytorch_model.bin", "{}",
                                  "open_clip:ViT-B-32:{}/pytorch_model.bin"])
def test_no_code_of_a_file_is_run(tmp_path, name):
    if name.startswith("open_clip"):
        pytest.importorskip("open_clip")
    write_folder(tmp_path / "m", CONFIG, {"state_dict": STATE, "s": Trap(tmp_path / "ran")})
    name = name.format(tmp_path / "m")
    refused(name, name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["siglip", "open_clip:ViT-B-32", "local-dir:none",
                                  "open_clip:no-such:file.pt", "open_clip:ViT-B-32:none.pt"])
def test_unknown_names_and_devices_are_refused(name):
    if name.startswith(prompts.OTHER_CLIPS):
        pytest.importorskip("open_clip")
    refused(name, name)
    refused("toy", "cuda:77", device="cuda:77")


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    for package in ("open_clip", "safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match="open_clip"):
        prompts.load_clip("open_clip:ViT-B-32:openai")
    write_folder(tmp_path / "model", CONFIG)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    refused(tmp_path / "model", tmp_path / "model", "safetensors")


def test_a_clip_is_known_by_its_content_wherever_it_lies(tmp_path):
    identity = prompts.clip_identity
    for folder, content in (("a/clip", "1"), ("b/clip", "1"), ("c/clip", "2")):
        worlds.write_text(tmp_path / folder / "clip.pt", content)
    for path in ("clip", "clip/clip.pt"):                       # a folder, a file
        same, moved, other = [identity(tmp_path / folder / path) for folder in "abc"]
        assert same == moved != other and same.startswith("clip-")
    file = tmp_path / "a" / "clip" / "clip.pt"
    assert identity(f"open_clip:ViT-B-32:{file}") == f"open_clip:ViT-B-32:{identity(file)}"
    for name in ("toy", "ViT-B/16", "open_clip:ViT-B-32:openai", "hf-hub:someone/model"):
        assert identity(name) == name


def test_another_repositorys_clip_on_the_path_is_refused_with_its_path(tmp_path):
    """MaPLe's and others' folders hold a clip of their own, whose build_model takes more."""
    package = tmp_path / "clip"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "model.py").write_text("def build_model(state_dict, design_details): pass\n")
    (package / "simple_tokenizer.py").write_text("class SimpleTokenizer: pass\n")
    done = subprocess.run([sys.executable, stage2.__file__], text=True, capture_output=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)}, timeout=300)
    assert done.returncode != 0 and not done.stdout
    worlds.one_line(done.stderr, package)
