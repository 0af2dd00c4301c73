"""The shared-context text encoder, templates and baselines, against plain twins in float64.

The twins are in tests/reference.py. Loading CLIPs is at the end.
"""

import copy
import json
import os
import pathlib
import subprocess
import sys
import zipfile

import clip
import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F

import data
import eval as evaluation
import prompts
import stage2
import worlds
from prompts import AttributeTemplate, PlainTemplate, build_learner
from reference import (NAMES, SOS, TOKENIZER, Trap, as_exact_as, as_huggingface, encode_77,
                       encode_image_prompted, exact, images_by_hand, random_state, relative,
                       text_by_hand, tiny_clip, unit)

MODEL = tiny_clip(dtype=torch.float64)
SETTINGS = {"soft_tokens": 3, "arrangement": "adaptive", "tau": 1.0, "test_position": "argmax",
            "soft_W": False, "draw": "step", "feature_at": "eot", "depth": 3, "w_cat": 0.7,
            "attributes": ["playfulness", "shape"], "prompt": "a photo of a {}."}
BASELINES, TEMPLATES = ("coop", "cocoop", "maple", "dept"), ("plain", "atprompt", "anchoropt")
# W that moves the anchor (column 4) to the front, repeats it, repeats V2 and drops V3; for N = 2 it
# repeats Anc_2 too.
ORDERS = {1: [3, 1, 1, 3], 2: [4, 1, 3, 4, 0]}
START = {"soft_tokens": 2, "start_words": "a photo of a"}


def learner(baseline="coop", template="anchoropt", n_anchor=1, seed=0, names=NAMES, **changed):
    torch.manual_seed(seed)
    settings = SETTINGS | {"baseline": baseline, "template": template} | changed
    made = build_learner(settings, MODEL, names, torch.randn(n_anchor, 128)).double()
    for parameter in made.parameters():                 # far from the tiny start: every term shows
        parameter.data += 0.3 * torch.randn_like(parameter)
    return made


def set_order(made, order):
    W = 9 * torch.eye(len(order), dtype=torch.float64)[order]
    made.template.position_matrix.logits.data = W
    return made.eval()


def suffix_of(model, names=NAMES):
    return prompts.class_suffix(model, [name + "." for name in names])


def sos_of(model):
    return model.token_embedding.weight[SOS][None]


# ---------------------------------------------------------------------------- the encoder

@pytest.mark.parametrize("n_context", [0, 1, 3, 9])
@pytest.mark.parametrize("class_chunk", [0, 2])
def test_context_encoder_equals_77_position_encoder(n_context, class_chunk):
    torch.manual_seed(n_context)
    context = torch.randn(n_context, 128, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(len(NAMES), 64, dtype=torch.float64)
    fast = prompts.encode_text(MODEL, torch.cat([sos_of(MODEL), context]), *suffix_of(MODEL),
                               class_chunk=class_chunk)
    slow = encode_77(MODEL, context, NAMES)
    assert relative(fast, slow) < 1e-12
    if n_context:
        gradients = [torch.autograd.grad((f * weights).sum(), context)[0] for f in (fast, slow)]
        assert relative(*gradients) < 1e-12


@pytest.fixture
def sizes(monkeypatch):
    """How many classes and images each call of the encoders' inner functions takes."""
    found = []
    for name, at in (("_encode_classes", 2), ("_encode_vit", 1)):
        real = getattr(prompts, name)

        def noted(*args, real=real, at=at):
            found.append(len(args[at]))
            return real(*args)
        monkeypatch.setattr(prompts, name, noted)
    return found


def test_passes_without_gradient_are_split_on_a_cpu_and_change_nothing(sizes):
    contexts = torch.randn(130, 4, 128, dtype=torch.float64)
    images = torch.randn(20, 3, 32, 32, dtype=torch.float64)
    tokens, suffix = list(torch.randn(2, 3, 128, dtype=torch.float64)), suffix_of(MODEL)
    u = prompts.encode_image(MODEL, images, tokens)
    v = prompts.encode_text(MODEL, contexts, *suffix)
    with torch.no_grad():
        assert relative(prompts.encode_image(MODEL, images, tokens), u) < 1e-12
        assert relative(prompts.encode_text(MODEL, contexts, *suffix), v) < 1e-12
    assert sizes == [20, 5, 8, 8, 4, 3, 2]                      # 512 // 130 = 3 classes at a time


@pytest.mark.parametrize("class_chunk, forward, backward", [
    (2, [2, 2, 1], [1, 2, 2]), (0, [5], []), (5, [5], [])])
def test_class_chunk_is_how_many_classes_there_are_at_a_time(sizes, class_chunk, forward, backward):
    made = learner(class_chunk=class_chunk)
    features = made.text_features()
    assert sizes == forward
    features.sum().backward()                                   # computes them again
    assert sizes[:-len(backward) or None] == forward
    assert sorted(sizes[len(forward):]) == backward


def test_sentences_are_encoded_as_clip_encodes_them():
    model = tiny_clip()
    sentences = ["An ant is small, black, and has six legs.", "It is.", "word " * 75, "What?"]
    texts = clip.tokenize(sentences)
    with torch.no_grad():
        fast, slow = prompts.encode_sentences(model, sentences, 2), model.encode_text(texts)
        assert as_exact_as(fast, slow, exact(model).encode_text(texts))
    with pytest.raises(ValueError) as error:
        prompts.encode_sentences(model, ["It is.", "word " * 76])
    assert "word word" in worlds.one_line(error, "75") and "It is" not in str(error.value)


def test_clip_logits_is_eq1():
    u = unit(torch.randn(2, 8, dtype=torch.float64))
    v = unit(torch.randn(3, 8, dtype=torch.float64))
    tau = 0.01
    q = prompts.clip_logits(u, v, 1 / tau).softmax(-1)
    for i in range(2):
        weights = [torch.exp(sum(u[i, k] * v[j, k] for k in range(8)) / tau) for j in range(3)]
        torch.testing.assert_close(q[i], torch.stack(weights) / sum(weights))
    own = torch.stack([v, v.flip(0)])                           # an image's own prompts
    logits = prompts.clip_logits(u, own, 10.)
    torch.testing.assert_close(logits[0], 10 * (u[0] @ v.T))
    torch.testing.assert_close(logits[1], 10 * (u[1] @ v.flip(0).T))


def test_unit_features_are_float32_at_least():
    x = torch.randn(4, 8)
    assert prompts.unit(x.half()).dtype == torch.float32
    torch.testing.assert_close(prompts.unit(x.double()), unit(x.double()))


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
    torch.manual_seed(0)
    template = PlainTemplate(MODEL, 3)
    context, W = template()
    assert torch.equal(context, template.soft_tokens) and W is None
    assert template.position_matrix is None and template.length == 3
    more = PlainTemplate(MODEL, 50, "a photo of a")             # more than the words: random
    assert more.soft_tokens.std().item() == pytest.approx(0.02, rel=0.05) and more.length == 50


def read_tokens(embeddings):
    """The words whose embeddings these (n, d_t) are."""
    table = MODEL.token_embedding.weight
    distances = torch.cdist(embeddings.double(), table,
                            compute_mode="donot_use_mm_for_euclid_dist")
    return TOKENIZER.decode(distances.argmin(1).tolist()).strip()


@pytest.mark.parametrize("baseline, prompt", [
    ("coop", "a photo tench . <|endoftext|>"), ("cocoop", "a photo tench . <|endoftext|>"),
    ("maple", "a photo of a tench . <|endoftext|>")])
def test_of_two_soft_tokens_maple_alone_keeps_the_words_that_are_left(baseline, prompt):
    """MaPLe's released way: [V_1] [V_2] of a [CLS], with "of a" not learnt."""
    settings = SETTINGS | START | {"baseline": baseline, "template": "plain"}
    made = build_learner(settings, MODEL, ["tench", "ant"])
    context = made.template()[0]
    assert torch.equal(context[:2], made.template.soft_tokens)
    assert read_tokens(torch.cat([context, made.suffix[0]])) == prompt
    assert made.template.length == len(context)
    assert [name for name, _ in made.template.named_parameters()] == ["soft_tokens"]


def test_attribute_template_is_eq3_token_by_token():
    words = ["playfulness", "shape"]
    template = AttributeTemplate(MODEL, 2, words).double()
    table, shift = MODEL.token_embedding.weight, torch.randn(3, 128, dtype=torch.float64)
    for image, context in enumerate([template()[0], *template(shift)[0]]):
        expected = []
        for V_a, word in zip(template.attribute_soft_tokens, words):
            expected += [*V_a, *table[TOKENIZER.encode(word)]]
        for V in template.soft_tokens:                          # only these are shifted
            expected.append(V if image == 0 else V + shift[image - 1])
        assert len(TOKENIZER.encode("playfulness")) == 2
        assert len(expected) == template.length == 2 + 2 + 2 + 1 + 2
        assert torch.allclose(context, torch.stack(expected), atol=1e-7)
    started = AttributeTemplate(MODEL, 50, words).attribute_soft_tokens
    assert [V_a.std().item() for V_a in started] == pytest.approx([0.01, 0.01], rel=0.05)
    for attributes in (["shape", " "], []):
        with pytest.raises(ValueError, match="each must have tokens"):
            AttributeTemplate(MODEL, 2, attributes)


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
    assert torch.allclose(made.template(shift)[0][1], torch.stack(shifted))
    assert relative(made.text_features(), encode_77(MODEL, context, NAMES)) < 1e-12
    assert {name for name, _ in made.named_parameters()} == {       # the anchor is frozen, and kept
        "template.soft_tokens", "template.position_matrix.logits"}
    assert "template.anchor_tokens" in made.state_dict()


def test_settings_reach_the_position_matrix_and_the_ensemble():
    def matrices(n=3, training=True, **changed):
        made = learner(**changed).train(training)
        torch.manual_seed(0)
        return made.ensemble, [made.template()[1] for _ in range(n)]
    ensemble, usual = matrices()
    assert ensemble == "logits" and all(set(W.flatten().tolist()) == {0, 1} for W in usual)
    assert not torch.equal(usual[0], usual[1])
    _, once = matrices(draw="once")
    assert torch.equal(once[0], once[1])
    _, (argmax, again) = matrices(2, training=False)
    assert torch.equal(argmax, again)
    _, sampled = matrices(9, training=False, test_position="sample")
    assert not all(torch.equal(sampled[0], W) for W in sampled)
    _, (soft,) = matrices(1, soft_W=True)
    ensemble, (sharp,) = matrices(1, soft_W=True, tau=0.5, ensemble="probabilities")
    # softmax(2 s) of softmax(s)
    torch.testing.assert_close(sharp, soft ** 2 / (soft ** 2).sum(1, keepdim=True))
    assert ensemble == "probabilities" and 0 < soft.max() < 1


@pytest.mark.parametrize("arrangement, order", [("before", [3, 4, 0, 1, 2]),
                                                ("middle", [0, 3, 4, 1, 2])])
def test_fixed_arrangements_of_table_8(arrangement, order):
    made = learner(n_anchor=2, arrangement=arrangement)
    t_v = torch.cat([made.template.soft_tokens, made.template.anchor_tokens])
    assert relative(made.text_features(), encode_77(MODEL, t_v[order], NAMES)) < 1e-12
    assert made.template.position_matrix is None
    assert not any("position" in name for name, _ in made.named_parameters())


@pytest.mark.parametrize("baseline", ["coop", "maple"])
def test_after_class_puts_the_anchor_between_name_and_full_stop(baseline):
    made = learner(baseline, n_anchor=2, arrangement="after-class")
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


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("template", TEMPLATES)
def test_class_chunk_changes_no_logit_and_no_gradient(baseline, template):
    chunked = learner(baseline, template, class_chunk=2)
    whole = learner(baseline, template)
    logits = []
    for made in (chunked, whole):
        torch.manual_seed(5)
        logits.append(made(FEATURES, IMAGES))
    assert relative(*logits) < 1e-10
    g_fast, g_slow = (torch.autograd.grad(out.square().sum(), list(made.parameters()),
                                          allow_unused=True)
                      for made, out in zip((chunked, whole), logits))
    for (name, _), a, b in zip(chunked.named_parameters(), g_fast, g_slow):
        assert (a is None) == (b is None) and (a is None or relative(a, b) < 1e-9), name


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
        context = made.template(pi[None])[0][0]
        rows.append(SCALE * unit(encode_77(MODEL, context, NAMES)) @ unit(f))
    slow = torch.stack(rows)
    assert relative(fast, slow) < 1e-10
    check_gradients(made, fast, slow)
    assert made.prompts_per_image and not made.needs_images


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


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("template, n_anchor", [("plain", 1), ("plain of a", 1), ("atprompt", 1),
                                                ("anchoropt", 1), ("anchoropt", 2)])
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
    assert made.needs_images and not made.prompts_per_image


def test_maples_deep_projections_start_as_copies_and_the_first_is_its_own():
    torch.manual_seed(0)
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
    torch.testing.assert_close(made.head_of_images(FEATURES), head)
    torch.testing.assert_close(made(FEATURES), 0.3 * itm + 0.7 * head)          # base classes
    novel = made.set_classes(NAMES[::-1])(FEATURES)                             # others: ITM alone
    torch.testing.assert_close(novel, itm.flip(-1))


def test_dept_starts_as_its_head_on_clips_own_features():
    made = build_learner(SETTINGS | {"baseline": "dept", "template": "plain"}, MODEL, NAMES)
    expected = F.linear(FEATURES.float(), made.head.weight, made.head.bias)
    assert torch.equal(made.head_of_images(FEATURES), expected)
    assert torch.equal(made.head_of_texts(FEATURES), expected)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("template", TEMPLATES)
def test_set_classes_gives_the_logits_of_a_learner_built_on_those_classes(baseline, template):
    novel = ["saint bernard", "ant", "x-ray (old)"]
    moved, built = learner(baseline, template).eval(), learner(baseline, template).eval()
    other = learner(baseline, template, seed=9, names=novel).eval()
    shared = {k: v for k, v in built.state_dict().items() if not k.startswith("head.")}
    other.load_state_dict(shared, strict=False)
    assert moved.set_classes(novel) is moved and moved.class_names == novel
    if baseline == "dept":
        other.base_class_names = []                                     # its ITM head
    torch.testing.assert_close(moved(FEATURES, IMAGES), other(FEATURES, IMAGES),
                               rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("n_anchor", [1, 2, 4])
def test_feature_at_released_reads_n_positions_before_eot(baseline, n_anchor):
    order = list(range(3 + n_anchor))
    made = set_order(learner(baseline, n_anchor=n_anchor, feature_at="released"), order)
    deep = deep_rule(made, "anchoropt", made.template()[1]) if baseline == "maple" else None
    if baseline == "cocoop":
        features = made.text_features(FEATURES)
        contexts = made.template(made.meta_net(unit(FEATURES)))[0]
    else:
        features, contexts = made.text_features()[None], made.template()[0][None]
    for got, context in zip(features, contexts):
        slow = encode_77(MODEL, context, NAMES, read_back=n_anchor, deep=deep)
        assert relative(got, slow) < 1e-11
    at_eot = set_order(learner(baseline, n_anchor=n_anchor), order)
    assert relative(features, at_eot.text_features(FEATURES)) > 1e-2


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


@pytest.mark.parametrize("text", [" ", "."])
def test_a_name_without_tokens_is_named(text):
    with pytest.raises(ValueError, match=f"'{text}'"):
        prompts.class_suffix(MODEL, ["ant", text])


def test_a_prompt_longer_than_clips_77_tokens_is_refused():
    suffix, eot = suffix_of(MODEL, ["ant"])
    room = 77 - suffix.shape[1]
    assert prompts.encode_text(MODEL, torch.zeros(room, 128).double(), suffix, eot).shape == (1, 64)
    with pytest.raises(ValueError, match="78.*77"):
        prompts.encode_text(MODEL, torch.zeros(room + 1, 128).double(), suffix, eot)


def test_a_depth_beyond_the_towers_and_anchors_of_another_clip_are_refused():
    for depth in (0, 4):
        with pytest.raises(ValueError, match=f"depth {depth}.*1 to 3"):
            learner("maple", depth=depth)
    settings = SETTINGS | {"baseline": "coop", "template": "anchoropt"}
    with pytest.raises(ValueError, match="128.*512"):
        build_learner(settings, MODEL, NAMES, torch.zeros(1, 512))
    with pytest.raises(ValueError, match="128.*None"):
        build_learner(settings, MODEL, NAMES)


# ---------------------------------------------------------------------------- OpenAI's CLIPs

SMALL = tiny_clip(layers=1, width=64, d=16)
STATE = SMALL.state_dict()
TEXTS = ["a photo of an ant.", "yin yang, a symbol"]
PIXELS = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(6))


def refused(name, *facts, **options):
    """What `load_clip` says of what it does not take: one line with these facts."""
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        prompts.load_clip(name, **options)
    return worlds.one_line(error, *facts)


def check_towers(model, own, pixels=PIXELS):
    """Are the project's features of TEXTS and pixels as exact as the model's own, own(dtype)?"""
    with torch.no_grad():
        fast = prompts.encode_sentences(model, TEXTS), prompts.encode_image(model, pixels)
        for features, slow, right in zip(fast, own(model.dtype), own(torch.float64)):
            assert features.dtype == model.dtype
            assert as_exact_as(features, slow, right)


def check_coop_and_maple(model, maple, d=32):
    """CoOp takes every CLIP; MaPLe, whose prompts enter the image tower, plain ViTs alone."""
    settings = SETTINGS | {"template": "plain", "depth": 2}
    assert build_learner(settings | {"baseline": "coop"}, model, NAMES)(
        torch.randn(2, d)).shape == (2, len(NAMES))
    if maple:
        pixels = torch.randn(2, 3, *prompts.preprocess_of(model)["size"])
        made = build_learner(settings | {"baseline": "maple"}, model, NAMES)
        assert made(None, pixels).shape == (2, len(NAMES))
    else:
        with pytest.raises(ValueError, match="MaPLe"):
            build_learner(settings | {"baseline": "maple"}, model, NAMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_state_dict_is_read_unrounded_and_half_precision_is_clips_own_rule(tmp_path, dtype):
    told = {"input_resolution": torch.tensor(32), "context_length": 77, "vocab_size": 49408}
    torch.save(STATE | told, tmp_path / "clip.pt")
    loaded = prompts.load_clip(tmp_path / "clip.pt", dtype=dtype)
    assert loaded.dtype == dtype and not loaded.training
    assert loaded.state_dict().keys() == STATE.keys()
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
    loaded = prompts.load_clip(tmp_path / "RN.pt")
    pixels = torch.randn(9, 3, 64, 64)
    with torch.no_grad():
        fast, slow = prompts.encode_image(loaded, pixels), model.encode_image(pixels)
        assert as_exact_as(fast, slow, exact(model).encode_image(pixels.double()))
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


@pytest.mark.parametrize("text, vision, told", [
    ((64, 1, "gelu"), (128, 2, "quick_gelu", 24, 8), True),
    ((80, 1, "quick_gelu"), (96, 3, "gelu", 24, 8), True),
    # What a config leaves out: HuggingFace's defaults.
    ((64, 8, "quick_gelu"), (96, 12, "quick_gelu", 224, 32), False)])
def test_a_folder_of_huggingfaces_computes_as_written_out_by_hand(tmp_path, text, vision, told):
    """Heads of any width. Its code is not run: auto_map asks for it, and is not heard."""
    (d_t, text_heads, text_act), (d_v, vision_heads, vision_act, size, patch) = text, vision
    config = {"auto_map": {"AutoConfig": "modeling_mine.CLIP", "AutoModel": "modeling_mine.CLIP"},
              "text_config": {}, "vision_config": {}}
    if told:
        config["text_config"] = {"num_attention_heads": text_heads, "hidden_act": text_act}
        config["vision_config"] = {"num_attention_heads": vision_heads, "hidden_act": vision_act,
                                   "image_size": size, "patch_size": patch}
    state = random_state(d_t, d_v, patch=patch, grid=size // patch)
    write_folder(tmp_path / "m", config, as_huggingface(state))
    code = f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nclass CLIP: pass\n"
    (tmp_path / "m" / "modeling_mine.py").write_text(code)
    model = prompts.load_clip(tmp_path / "m")
    assert not (tmp_path / "ran").exists()
    pixels = torch.randn(2, 3, size, size)

    def by_hand(dtype):
        own = {key: value.to(dtype) for key, value in state.items()}
        return (text_by_hand(own, TEXTS, text_heads, text_act.replace("_", "")),
                images_by_hand(own, pixels.to(dtype), vision_heads, vision_act.replace("_", "")))
    check_towers(model, by_hand, pixels)
    check_coop_and_maple(model, maple=True)


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_a_folder_that_transformers_has_saved_computes_as_transformers_does(tmp_path, act):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    size = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4,
            "num_hidden_layers": 2, "hidden_act": act}
    torch.manual_seed(0)
    theirs = transformers.CLIPModel(transformers.CLIPConfig(
        text_config=size, vision_config=size | {"image_size": 24, "patch_size": 8},
        projection_dim=32)).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    model = prompts.load_clip(tmp_path)
    ids = clip.tokenize(TEXTS)
    with torch.no_grad():
        own = theirs(ids, PIXELS)
        whole = theirs.double()(ids, PIXELS.double())
        for fast, slow, right in (
                (prompts.encode_sentences(model, TEXTS), own.text_embeds, whole.text_embeds),
                (prompts.encode_image(model, PIXELS), own.image_embeds, whole.image_embeds)):
            assert as_exact_as(unit(fast), slow, right)


# ---------------------------------------------------------------------------- open_clip's

OPEN_CLIPS = {
    "gelu": {}, "quickgelu": {"quick_gelu": True}, "custom": {"custom_text": True},
    "oblong": {"vision_cfg": {"image_size": [24, 40]}},
    "short": {"text_cfg": {"context_length": 20}},
    "resnet": {"vision_cfg": {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64}},
    "average": {"vision_cfg": {"pool_type": "avg"}},
    "scaled": {"vision_cfg": {"ls_init_value": 0.5}},
    "bidirectional": {"custom_text": True, "text_cfg": {"no_causal_mask": True}},
    "last": {"custom_text": True, "text_cfg": {"pool_type": "last"}},
    "coca": {"custom_text": True,
             "text_cfg": {"context_length": 76, "embed_cls": True, "output_tokens": True},
             "multimodal_cfg": {"width": 64, "heads": 2, "layers": 1, "context_length": 76}}}


def config_of(kind):
    """A small architecture in open_clip's words."""
    config = {"embed_dim": 32,
              "vision_cfg": {"image_size": 24, "patch_size": 8, "width": 128, "layers": 2,
                             "head_width": 32},
              "text_cfg": {"width": 64, "heads": 2, "layers": 2}}
    for key, value in OPEN_CLIPS[kind].items():
        config[key] = config.get(key, {}) | value if isinstance(value, dict) else value
    return config


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
    ("gelu", True, torch.float32), ("quickgelu", True, torch.float32),
    ("gelu", True, torch.float16), ("custom", True, torch.bfloat16),
    ("oblong", True, torch.float32), ("short", True, torch.float32),
    ("resnet", False, torch.float32), ("average", False, torch.float32),
    ("scaled", False, torch.float32)])
def test_open_clips_models_compute_as_open_clip_does(open_clips, kind, plain_vit, dtype):
    """A tower that is no plain ViT goes its own way, and not with MaPLe."""
    name, theirs = open_clips(kind)
    model = prompts.load_clip(name, dtype=dtype)
    assert model.dtype == dtype and prompts.is_plain_vit(model) == plain_vit
    ids = clip.tokenize(TEXTS, theirs.context_length)
    pixels = torch.randn(2, 3, *prompts.preprocess_of(model)["size"])

    def own(dtype):
        own = copy.deepcopy(theirs).to(dtype)
        return own.encode_text(ids), own.encode_image(pixels.to(dtype))
    check_towers(model, own, pixels)
    check_coop_and_maple(model, plain_vit)


@pytest.mark.parametrize("kind", ["bidirectional", "last", "coca"])
def test_a_text_tower_that_is_not_clips_is_refused(open_clips, kind):
    refused(open_clips(kind)[0], f"small-{kind}", "text tower")


def test_open_clips_preprocessing_is_that_of_its_config(open_clips, tmp_path):
    own = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "interpolation": "bilinear",
           "resize_mode": "squash"}
    config = {"model_cfg": config_of("oblong"), "preprocess_cfg": own}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(open_clips("oblong")[1].state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    found = prompts.preprocess_of(prompts.load_clip(f"local-dir:{tmp_path}"))
    assert {key: found[key] for key in own} == own and list(found["size"]) == [24, 40]


def test_a_clips_preprocessing_reaches_all_transforms(tmp_path, monkeypatch):
    model = tiny_clip(layers=2, width=64)
    model.preprocess = {"size": (32, 32), "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7),
                        "interpolation": "bilinear", "resize_mode": "squash"}
    worlds.write_image(tmp_path / "one.png", 1, 2, "P", (70, 50))
    picture = PIL.Image.open(tmp_path / "one.png").convert("RGB").resize((32, 32), 2)   # bilinear
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    x = (x - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / \
        torch.tensor([0.5, 0.6, 0.7])[:, None, None]
    items = (data.Item(str(tmp_path / "one.png"), 0),)
    f = evaluation.frozen_features(model, "its name", "default", items, None, 0)
    assert as_exact_as(f, model.encode_image(x[None]),
                       exact(copy.deepcopy(model)).encode_image(x[None].double()))

    # And in a run that trains on crops.
    monkeypatch.setattr(stage2.stage1, "load_clip", lambda *args: model)
    seen = set()
    for name, at in (("train_transform", 0), ("test_transform", 0), ("normalize", 1)):
        real = getattr(data, name)

        def noted(*args, name=name, at=at, real=real):
            seen.add((name, args[at]["mean"]))
            return real(*args)
        monkeypatch.setattr(data, name, noted)
    worlds.dtd_tree(tmp_path, 4, 4)
    argv = f"--dataset dtd --root {tmp_path} --output {tmp_path / 'o'} --epochs 1 --no-plot"
    assert stage2.main(argv.split() + "--baseline maple --template plain --depth 1".split()) == 0
    assert seen == {(name, (0.1, 0.2, 0.3))
                    for name in ("train_transform", "test_transform", "normalize")}


# ---------------------------------------------------------------------------- what is no CLIP

def without(*keys):
    return {key: value for key, value in STATE.items() if key not in keys}


@pytest.mark.parametrize("content, fact", [
    (b"", ""), (b"not a checkpoint", ""), (b"<!DOCTYPE html><html>403 Forbidden</html>", ""),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", ""),
    ([1, 2], ""), (SMALL, "clip.model.CLIP"), ({"model": SMALL}, "clip.model.CLIP"),
    ({"base_model.model.q_proj.lora_A.weight": torch.zeros(4, 64)}, ""),            # an adapter
    ({"state_dict": STATE, "epoch": 3, "pytorch-lightning_version": "2.1"}, ""),    # Lightning's
    (without("visual.conv1.weight"), "visual.conv1.weight"),
    (without("ln_final.bias"), "ln_final.bias"),
    (STATE | {"visual.\x1b[31mred\n": torch.zeros(1)}, "red"),
    (STATE | {"ln_final.bias": torch.zeros(3)}, "ln_final.bias"),
    (STATE | {"text_projection": torch.zeros(3)}, ""),
    (STATE | {"token_embedding.weight": torch.zeros(9, 64)}, "vocabulary"),
])
def test_files_that_are_no_clip_are_refused_with_their_path(tmp_path, content, fact):
    path = tmp_path / "ViT-B-16.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    refused(path, path, fact)


def test_damaged_files_are_refused_with_their_path(tmp_path):
    path = tmp_path / "clip.pt"
    torch.save(STATE, path)
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1                             # one bit of one number
    for damaged in (content[:len(content) // 2], flipped):
        path.write_bytes(damaged)
        refused(path, path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "a zip of something else")
    refused(path, path)


@pytest.mark.parametrize("name", ["{}/pytorch_model.bin", "{}",
                                  "open_clip:ViT-B-32:{}/pytorch_model.bin"])
def test_no_code_of_a_file_is_run(tmp_path, name):
    if name.startswith("open_clip"):
        pytest.importorskip("open_clip")
    write_folder(tmp_path / "m", CONFIG, {"state_dict": STATE, "s": Trap(tmp_path / "ran")})
    name = name.format(tmp_path / "m")
    refused(name, name)
    assert not (tmp_path / "ran").exists()


CONFIG = {"text_config": {"num_attention_heads": 1},
          "vision_config": {"num_attention_heads": 1, "image_size": 32, "patch_size": 8}}


@pytest.mark.parametrize("config, state", [
    (None, None), (CONFIG, None), ({}, STATE), (CONFIG, STATE), (CONFIG, {"a": torch.zeros(1)}),
    (CONFIG | {"text_config": {"hidden_act": "relu"}}, as_huggingface(STATE)),
    (CONFIG | {"text_config": {"num_attention_heads": 5}}, as_huggingface(STATE)),
    (CONFIG | {"text_config": None}, as_huggingface(STATE))])
def test_folders_that_are_no_clip_are_refused_with_their_path(tmp_path, config, state):
    write_folder(tmp_path / "model", config, state)
    refused(tmp_path / "model", tmp_path / "model")


@pytest.mark.parametrize("name, fact", [
    ("ViT-B-16", "did you mean ViT-B/16"), ("ViT-L-14-336px", "did you mean ViT-L/14@336px"),
    ("siglip", "ViT-B/16"), ("none.pt", "ViT-B/16"),
    ("open_clip:ViT-B-32", "TAG"), ("open_clip:no-such:file.pt", "no-such"),
    ("open_clip:ViT-B-32:none.pt", "none.pt"), ("local-dir:none", "none")])
def test_unknown_names_are_refused_with_what_is_near(name, fact):
    if name.startswith(prompts.OTHER_CLIPS):
        pytest.importorskip("open_clip")
    refused(name, name, fact)


@pytest.mark.parametrize("device", ["cuda:77", "tpu", "meta"])
def test_a_device_that_is_not_there_is_refused(device):
    refused("toy", device, device=device)


@pytest.mark.parametrize("package", ["open_clip", "safetensors"])
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.torch", None)
    name = "open_clip:ViT-B-32:openai"
    if package == "safetensors":
        name = tmp_path / "model"
        write_folder(name, CONFIG)
        (name / "model.safetensors").write_bytes(b"")
    refused(name, name, f"pip install {package}")


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
    script = pathlib.Path(stage2.__file__)
    done = subprocess.run([sys.executable, script, "--help"], text=True, capture_output=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)}, timeout=300)
    assert done.returncode == 2 and not done.stdout
    worlds.one_line(done.stderr, "stage2.py", package)
