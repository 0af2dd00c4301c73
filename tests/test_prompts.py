"""The shared-context text encoder, templates and baselines, against plain twins in float64.

The twins are in tests/reference.py. Loading CLIPs is at the end.
"""

import io
import json
import re
import sys
import zipfile

import clip
import pytest
import torch
import torch.nn.functional as F

import prompts
from prompts import AttributeTemplate, PlainTemplate, build_learner
from reference import (NAMES, SOS, TOKENIZER, as_exact_as, encode_77, encode_image_prompted,
                       exact, images_by_hand, random_state, relative, text_by_hand, tiny_clip, unit)

MODEL = tiny_clip(dtype=torch.float64)
SETTINGS = {"soft_tokens": 3, "arrangement": "adaptive", "tau": 1.0, "test_position": "argmax",
            "feature_at": "eot", "depth": 3, "w_cat": 0.7, "attributes": ["playfulness", "shape"],
            "prompt": "a photo of a {}."}
BASELINES, TEMPLATES = ("coop", "cocoop", "maple", "dept"), ("plain", "atprompt", "anchoropt")
# W that moves the anchor (column 4) to the front, repeats it, repeats V2 and drops V3; for N = 2 it
# repeats Anc_2 too.
ORDERS = {1: [3, 1, 1, 3], 2: [4, 1, 3, 4, 0]}
START = {"soft_tokens": 2, "start_words": "a photo of a"}       # plain MaPLe's


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


def test_context_encoder_is_as_exact_as_clips_own_in_float32():
    model, names = tiny_clip(), NAMES
    context = prompts.embed(model, [SOS] + TOKENIZER.encode("a photo of a"))
    texts = clip.tokenize([f"a photo of a {name}." for name in names])
    with torch.no_grad():
        fast = prompts.encode_text(model, context, *suffix_of(model))
        slow = model.encode_text(texts)
        assert as_exact_as(fast, slow, exact(model).encode_text(texts))


def test_places_are_those_of_the_docstrings_example():
    cpu = torch.device("cpu")
    packed, grid, read = prompts._places((2, 3), 4, 3, 0, cpu)
    assert packed.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert grid.tolist() == [0, 1, 2, 2, 3, 4, 5, 6]
    assert read.tolist() == [5, 9]
    reads = [prompts._places((2, 3), 4, 3, n, cpu)[2].tolist() for n in (2, 3, 4, 9)]
    assert reads == [[3, 7], [2, 6], [1, 2], [0, 0]]       # from the name back through the context


def test_contexts_of_their_own_equal_one_call_per_context():
    contexts = torch.randn(3, 4, 128, dtype=torch.float64)
    together = prompts.encode_text(MODEL, contexts, *suffix_of(MODEL))
    assert together.shape == (3, 5, 64)
    for context, features in zip(contexts, together):
        assert relative(features, prompts.encode_text(MODEL, context, *suffix_of(MODEL))) < 1e-12


def test_passes_without_gradient_are_split_on_a_cpu_and_change_nothing():
    contexts = torch.randn(130, 4, 128, dtype=torch.float64)
    images = torch.randn(20, 3, 32, 32, dtype=torch.float64)
    tokens, suffix = list(torch.randn(2, 3, 128, dtype=torch.float64)), suffix_of(MODEL)
    sizes = []
    parts = [MODEL.visual.conv1, MODEL.transformer.resblocks[0].mlp.c_fc]
    hooks = [part.register_forward_hook(lambda module, args, out: sizes.append(len(args[0])))
             for part in parts]
    try:
        u = prompts.encode_image(MODEL, images, tokens)
        v = prompts.encode_text(MODEL, contexts, *suffix)
        whole = sizes.copy()
        sizes.clear()
        with torch.no_grad():
            u_split = prompts.encode_image(MODEL, images, tokens)
            v_split = prompts.encode_text(MODEL, contexts, *suffix)
    finally:
        for hook in hooks:
            hook.remove()
    assert whole == [20, 130]
    assert sizes == [8, 8, 4, 130, 130]                         # 3 + 2 classes of 130 contexts
    assert relative(u_split, u) < 1e-12 and relative(v_split, v) < 1e-12


def test_sentences_are_encoded_as_clip_encodes_them():
    model = tiny_clip()
    sentences = ["An ant is small, black, and has six legs.", "It is.", "word " * 75, "What?"]
    texts = clip.tokenize(sentences)
    with torch.no_grad():
        fast, slow = prompts.encode_sentences(model, sentences, 2), model.encode_text(texts)
        assert as_exact_as(fast, slow, exact(model).encode_text(texts))
    with pytest.raises(ValueError, match="too long for CLIP's 77 tokens, of which 75"):
        prompts.encode_sentences(model, ["word " * 76])


def test_image_tower_without_prompts_is_clips_own():
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert relative(prompts.encode_image(MODEL, images), MODEL.encode_image(images)) < 1e-12


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
    assert prompts.unit(x.double()).dtype == torch.float64
    torch.testing.assert_close(prompts.unit(x.double()), unit(x.double()))


def test_a_step_copies_no_index_tensors_to_the_device():
    made = learner("coop")
    made.text_features()
    misses = prompts._places.cache_info().misses
    made.text_features()
    assert prompts._places.cache_info().misses == misses


def test_a_step_goes_well_after_inference_mode():
    prompts._places.cache_clear()
    made = learner("coop")
    with torch.inference_mode():
        made.text_features()
    made.text_features().sum().backward()
    assert made.template.soft_tokens.grad.norm() > 0


# ---------------------------------------------------------------------------- templates

def test_plain_template_is_eq2_and_starts_at_words_where_told():
    torch.manual_seed(0)
    template = PlainTemplate(MODEL, 3)
    context, W = template()
    assert torch.equal(context, template.soft_tokens) and W is None
    assert template.position_matrix is None and template.length == 3
    assert PlainTemplate(MODEL, 50).soft_tokens.std().item() == pytest.approx(0.02, rel=0.05)
    started = PlainTemplate(MODEL, 4, "a photo of a")
    words = MODEL.token_embedding.weight[TOKENIZER.encode("a photo of a")]
    assert torch.allclose(started.soft_tokens.double(), words, atol=1e-6) and started.length == 4
    more = PlainTemplate(MODEL, 50, "a photo of a")             # more than the words: random
    assert more.soft_tokens.std().item() == pytest.approx(0.02, rel=0.05) and more.length == 50


def read_tokens(embeddings):
    """The words whose embeddings these (n, d_t) are."""
    table = MODEL.token_embedding.weight
    distances = torch.cdist(embeddings.double(), table,
                            compute_mode="donot_use_mm_for_euclid_dist")
    return TOKENIZER.decode(distances.argmin(1).tolist()).strip()


def test_plain_maples_prompt_for_tench_reads_as_the_released_one():
    """MaPLe's own way: soft tokens replace the first M words of "a photo of a", the rest stays."""
    made = learner("maple", "plain", names=["tench", "ant"], **START)
    template = made.template
    context, W = template()
    assert W is None and template.length == 4 and len(context) == 4
    assert torch.equal(context[:2], template.soft_tokens)
    assert [name for name, _ in template.named_parameters()] == ["soft_tokens"]
    assert read_tokens(torch.cat([context[2:], made.suffix[0]])) == "of a tench . <|endoftext|>"
    assert made.eot[0] == len(made.suffix[0]) - 1

    settings = SETTINGS | START | {"baseline": "maple", "template": "plain"}
    fresh = build_learner(settings, MODEL, ["tench"])
    assert read_tokens(fresh.template()[0]) == "a photo of a"


def test_plain_maples_deeper_layers_leave_the_words_behind_the_soft_tokens_alone():
    template = learner("maple", "plain", **START).template
    for shape in ((4, 128), (3, 4, 128)):
        hidden = torch.randn(shape, dtype=torch.float64)
        V_l = torch.randn(2, 128, dtype=torch.float64)
        out = template.deepen(None, V_l, hidden)
        assert out.shape == hidden.shape
        assert torch.equal(out[..., 2:, :], hidden[..., 2:, :])
        assert torch.equal(out[..., :2, :], V_l.expand(*shape[:-2], 2, 128))


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


def test_anchors_are_frozen_and_kept_with_the_learner():
    made = learner()
    assert not made.template.anchor_tokens.requires_grad
    assert "template.anchor_tokens" in made.state_dict()
    assert {name for name, _ in made.named_parameters()} == {"template.soft_tokens",
                                                             "template.position_matrix.logits"}


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


def check_gradients(made, fast, slow):
    parameters = list(made.parameters())
    g_fast, g_slow = (torch.autograd.grad(F.cross_entropy(logits, LABELS), parameters,
                                          allow_unused=True) for logits in (fast, slow))
    assert any(g is not None for g in g_slow)
    for a, b in zip(g_fast, g_slow):
        assert (a is None) == (b is None) and (a is None or relative(a, b) < 1e-9)


@pytest.mark.parametrize("baseline", ["coop", "dept"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_itm_logits_equal_the_conventional_step_values_and_gradients(baseline, template):
    made = learner(baseline, template)
    torch.manual_seed(5)
    fast = made.logits(FEATURES, made.text_features())
    torch.manual_seed(5)                                                # the same Gumbel noise
    slow = SCALE * unit(FEATURES) @ unit(encode_77(MODEL, made.template()[0], NAMES)).T
    assert relative(fast, slow) < 1e-10
    check_gradients(made, fast, slow)


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


def test_class_chunk_takes_so_many_classes_at_a_time_and_again_in_the_backward(monkeypatch):
    sizes, encode = [], prompts._encode_classes

    def counted(clip_model, contexts, suffix, *rest):
        sizes.append(len(suffix))
        return encode(clip_model, contexts, suffix, *rest)
    monkeypatch.setattr(prompts, "_encode_classes", counted)
    for class_chunk, forward, backward in [(2, [2, 2, 1], [1, 2, 2]), (0, [5], []), (5, [5], [])]:
        made = learner(class_chunk=class_chunk)
        sizes.clear()
        features = made.text_features()
        assert sizes == forward
        features.sum().backward()
        assert sorted(sizes[len(forward):]) == backward
        with torch.no_grad():
            sizes.clear()
            made.text_features()
            assert sizes == forward


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
    assert first.weight.requires_grad and made.template.soft_tokens.requires_grad
    assert made.prompts_per_image and not made.needs_images


def deep_rule(made, template, order=None):
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
            else:
                out.append(V[layer][order[i]] if order[i] < M else hidden[i])
        return torch.stack(out)
    return rule


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("template, n_anchor", [("plain", 1), ("plain of a", 1), ("atprompt", 1),
                                                ("anchoropt", 1), ("anchoropt", 2)])
def test_maples_deep_rule_token_by_token_on_both_towers(template, n_anchor, depth):
    template, *words = template.split(maxsplit=1)
    made = learner("maple", template, n_anchor, depth=depth, **(START if words else {}))
    order = ORDERS[n_anchor] if template == "anchoropt" else None
    if order:
        set_order(made, order)
    context = made.template()[0]
    text = encode_77(MODEL, context, NAMES, deep=deep_rule(made, template, order))
    V = [made.template.soft_tokens, *made.deep_tokens]
    assert len(V) == depth
    tokens = [(linear.weight @ V_l.T + linear.bias[:, None]).T
              for linear, V_l in zip(made.to_visual, V)]
    visual = encode_image_prompted(MODEL, IMAGES, tokens)
    assert relative(made.text_features(), text) < 1e-11
    assert made.needs_images and not made.prompts_per_image
    assert relative(made.image_features(None, IMAGES), visual) < 1e-11
    slow = SCALE * unit(visual) @ unit(text).T
    fast = made(FEATURES, IMAGES)
    assert relative(fast, slow) < 1e-10
    check_gradients(made, fast, slow)


def test_maples_deep_projections_start_as_copies_and_the_first_is_its_own():
    torch.manual_seed(0)
    made = build_learner(SETTINGS | {"baseline": "maple", "template": "plain"}, MODEL, NAMES)
    first, second, third = made.to_visual
    assert torch.equal(second.weight, third.weight) and second.weight is not third.weight
    assert not torch.equal(first.weight, second.weight)


def test_maple_with_its_prompts_removed_is_clip_on_both_towers():
    made = learner("maple", "plain", depth=1)
    made.template.soft_tokens.data = made.template.soft_tokens.data[:0]
    made.to_visual = torch.nn.ModuleList()
    made.template.length = 0
    text = MODEL.encode_text(clip.tokenize([name + "." for name in NAMES]))
    assert relative(made.text_features(), text) < 1e-11
    assert relative(made.image_features(None, IMAGES), MODEL.encode_image(IMAGES)) < 1e-12


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
    f = FEATURES.float()
    expected = F.linear(f, made.head.weight, made.head.bias)
    assert torch.equal(made.head_of_images(f), expected)
    assert torch.equal(made.head_of_texts(f), expected)


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
    deep = deep_rule(made, "anchoropt", order) if baseline == "maple" else None
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

def test_long_class_names_are_named():
    long = "very " * 72 + "long"
    with pytest.raises(ValueError, match="very very") as error:
        learner(names=["ant", long])
    assert "'ant'" not in str(error.value)
    fits = " ".join(["ant"] * (77 - 1 - 4 - 2))             # [SOS] + K + name + "." + [EOT] = 77
    assert learner(names=[fits])(FEATURES).shape == (3, 1)
    with pytest.raises(ValueError, match="too long for CLIP's 77 tokens, of which 71 are left"):
        learner(names=[fits + " ant"])
    fits = fits.removesuffix(" ant")                        # behind the class, in the suffix: 3 + 2
    inside = {"n_anchor": 2, "arrangement": "after-class"}
    assert learner(names=[fits], **inside)(FEATURES).shape == (3, 1)
    with pytest.raises(ValueError, match="too long for CLIP's 77 tokens, of which 70 are left"):
        learner(names=[fits + " ant"], **inside)
    for empty in (" ", "."):
        with pytest.raises(ValueError, match="a text without any token: "):
            prompts.class_suffix(MODEL, ["ant", empty])


def test_a_prompt_longer_than_clips_77_tokens_is_refused():
    suffix, eot = suffix_of(MODEL, ["ant"])
    room = 77 - suffix.shape[1]
    assert prompts.encode_text(MODEL, torch.zeros(room, 128).double(), suffix, eot).shape == (1, 64)
    with pytest.raises(ValueError, match="a prompt of 78 tokens is longer than CLIP's 77"):
        prompts.encode_text(MODEL, torch.zeros(room + 1, 128).double(), suffix, eot)


def test_bad_settings_are_named():
    for depth in (0, 4):
        with pytest.raises(ValueError, match=f"depth {depth}: .* a depth of 1 to 3 is possible"):
            learner("maple", depth=depth)
    with pytest.raises(ValueError, match="unknown baseline or template coopp-anchoropt"):
        learner("coopp")
    with pytest.raises(ValueError, match="unknown baseline or template coop-ancho"):
        learner(template="ancho")
    settings = SETTINGS | {"baseline": "coop", "template": "anchoropt"}
    with pytest.raises(ValueError, match="width 512 do not fit this CLIP.* width of 128"):
        build_learner(settings, MODEL, NAMES, torch.zeros(1, 512))
    with pytest.raises(ValueError, match="needs anchor tokens"):
        build_learner(settings, MODEL, NAMES)


# ---------------------------------------------------------------------------- loading CLIP

SMALL = tiny_clip(layers=1, width=64, d=16)
STATE = SMALL.state_dict()
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(6))
TEXTS = ["a photo of an ant.", "yin yang, a symbol"]


def features_of(model):
    """Text and image features, by the project's functions and by the model's own methods."""
    with torch.no_grad():
        return [prompts.encode_sentences(model, TEXTS), model.encode_text(clip.tokenize(TEXTS)),
                prompts.encode_image(model, PIXELS), model.encode_image(PIXELS)]


def refused(path):
    """What `load_clip` says of a file that it does not take: one clean line that names it."""
    with pytest.raises(ValueError) as error:
        prompts.load_clip(str(path))
    message = str(error.value)
    assert message.isprintable() and message.startswith(f"{path} cannot be used as a CLIP: ")
    return message.removeprefix(f"{path} cannot be used as a CLIP: ")


def test_load_clip_reads_a_state_dict_in_any_precision(tmp_path):
    torch.save(STATE, tmp_path / "clip.pt")
    loaded = prompts.load_clip(str(tmp_path / "clip.pt"))
    assert loaded.dtype == torch.float32 and not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, STATE[name]), name
    assert all(torch.equal(*pair) for pair in zip(features_of(loaded), features_of(SMALL)))
    for dtype in (torch.float16, torch.bfloat16):
        half = prompts.load_clip(str(tmp_path / "clip.pt"), dtype=dtype)
        settings = SETTINGS | {"baseline": "coop", "template": "anchoropt"}
        made = build_learner(settings, half, NAMES, torch.randn(1, 64))
        assert half.dtype == dtype and made.text_features().dtype == dtype
        assert half.visual.ln_pre.weight.dtype == torch.float32             # CLIP's own rule
        assert half.visual.conv1.weight.dtype == dtype
        assert torch.equal(half.visual.proj, STATE["visual.proj"].to(dtype))
        assert all(p.dtype == torch.float32 for p in made.parameters())


def under(prefix):
    return {prefix + key: value for key, value in STATE.items()}


@pytest.mark.parametrize("content", [
    {"epoch": 3, "state_dict": STATE}, {"model_state_dict": STATE}, {"model": STATE, "best": 71.5},
    under("module."), {"state_dict": under("module.")}, {"model": {"state_dict": STATE}},
    {"state_dict": {"model": under("module.")}}, {"model_state_dict": under("_orig_mod.module.")},
    STATE | {"input_resolution": torch.tensor(32), "vocab_size": 49408, "note": "mine"}])
def test_wrapped_checkpoints_load(tmp_path, content):
    torch.save(content, tmp_path / "clip.pt")
    loaded = prompts.load_clip(str(tmp_path / "clip.pt"))
    assert loaded.state_dict().keys() == STATE.keys()
    assert all(torch.equal(value, STATE[name]) for name, value in loaded.state_dict().items())


def as_huggingface(state):
    """The same weights under the keys of transformers' CLIPModel."""
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
        if "attn.in_proj_" in key:
            for name, part in zip("qkv", value.chunk(3)):
                part_key = key.replace("in_proj_", f"{name}_proj.").replace(".attn.", ".self_attn.")
                theirs[part_key] = part.clone()
        else:
            theirs[key.replace(".attn.", ".self_attn.")] = value
    return theirs


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"model": state}])
def test_huggingface_keys_load(tmp_path, wrap):
    torch.save(wrap(as_huggingface(STATE)), tmp_path / "pytorch_model.bin")
    loaded = prompts.load_clip(str(tmp_path / "pytorch_model.bin"))
    assert loaded.state_dict().keys() == STATE.keys()
    assert all(torch.equal(value, STATE[name]) for name, value in loaded.state_dict().items())


def write_safetensors(path, state):
    header, data = {}, io.BytesIO()
    for key, value in state.items():
        begin = data.tell()
        data.write(value.float().contiguous().numpy().tobytes())
        header[key] = {"dtype": "F32", "shape": list(value.shape),
                       "data_offsets": [begin, data.tell()]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data.getvalue())


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_safetensors_load_where_the_library_is_and_are_named_where_not(tmp_path, monkeypatch, name):
    write_safetensors(tmp_path / name, as_huggingface(STATE))
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "safetensors", None)
        without.setitem(sys.modules, "safetensors.torch", None)
        assert refused(tmp_path / name) == \
            "it is a file of safetensors; to read it: pip install safetensors"
    pytest.importorskip("safetensors")
    loaded = prompts.load_clip(str(tmp_path / name))
    assert all(torch.equal(value, STATE[key]) for key, value in loaded.state_dict().items())
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:-100])
    assert refused(tmp_path / name) == "damaged, or not written by safetensors"


@pytest.mark.parametrize("d_t, text_heads, d_v, vision_heads, mlp, activation", [
    (128, None, 192, None, 4, None), (128, None, 192, None, 4, "gelu"),
    (160, 2, 320, 4, 4, "gelu"), (352, 4, 160, 2, 4, "quickgelu"),
    (176, 2, 352, 4, 4.3637, "gelu"), (88, 1, 176, 2, 3, None)])
def test_other_clips_compute_as_written_out_by_hand(tmp_path, d_t, text_heads, d_v, vision_heads,
                                                    mlp, activation):
    """Heads 64, 80 and 88 wide; QuickGELU and GELU; MLPs that are not 4 times as wide."""
    state = random_state(d_t, d_v, mlp)
    torch.save(state, tmp_path / "clip.pt")
    model = prompts.load_clip(str(tmp_path / "clip.pt"), activation=activation,
                              vision_heads=vision_heads, text_heads=text_heads)
    pixels = torch.randn(2, 3, 24, 24)

    def by_hand(dtype, act=activation or "quickgelu", more_heads=1):
        own = {key: value.to(dtype) for key, value in state.items()}
        H_t, H_v = text_heads or d_t // 64, vision_heads or d_v // 64
        return (text_by_hand(own, TEXTS, more_heads * H_t, act),
                images_by_hand(own, pixels.to(dtype), more_heads * H_v, act))
    (text, image), (exact_text, exact_image) = by_hand(torch.float32), by_hand(torch.float64)
    with torch.no_grad():
        assert as_exact_as(prompts.encode_sentences(model, TEXTS), text, exact_text)
        assert as_exact_as(model.encode_text(clip.tokenize(TEXTS)), text, exact_text)
        assert as_exact_as(prompts.encode_image(model, pixels), image, exact_image)
        assert as_exact_as(model.encode_image(pixels), image, exact_image)
    assert f"{activation or 'quickgelu'}, {text_heads or d_t // 64} text heads" in model.notes[0]
    # The comparison sees the activation and the heads:
    for other in (by_hand(torch.float64, "quickgelu" if activation == "gelu" else "gelu"),
                  by_hand(torch.float64, more_heads=2)):
        assert relative(other[0], exact_text) > 1e-3 and relative(other[1], exact_image) > 1e-3


def test_a_resnet_loads(tmp_path):
    torch.manual_seed(0)
    model = clip.model.CLIP(16, 64, (1, 2, 1, 1), 8, None, 77, 49408, 64, 1, 2).eval()
    torch.save(model.state_dict(), tmp_path / "RN.pt")
    loaded = prompts.load_clip(str(tmp_path / "RN.pt"))
    pixels = torch.randn(9, 3, 64, 64)
    with torch.no_grad():
        assert relative(prompts.encode_image(loaded, pixels), model.encode_image(pixels)) < 1e-5
    settings = SETTINGS | {"template": "plain"}
    coop = build_learner(settings | {"baseline": "coop"}, loaded, NAMES)
    assert coop(torch.randn(2, 16)).shape == (2, len(NAMES))
    with pytest.raises(ValueError, match="image tower is a ResNet"):
        build_learner(settings | {"baseline": "maple"}, loaded, NAMES)
    with pytest.raises(ValueError, match="a ResNet: vision_heads cannot be set"):
        prompts.load_clip(str(tmp_path / "RN.pt"), vision_heads=4)


def test_what_a_file_does_not_tell_is_noted_or_asked_for(tmp_path):
    path = tmp_path / "ViT.pt"
    torch.save(STATE, path)
    assert prompts.load_clip(str(path), activation="gelu").notes == [
        "ViT.pt is not one of OpenAI's files; taken to have: gelu, 1 text heads of width 64, "
        "1 vision heads of width 64 (a state dict does not tell)"]
    for changed, match in [({"activation": "relu"}, "'quickgelu' or 'gelu', not 'relu'"),
                           ({"vision_heads": 3}, "3 vision heads do not divide a tower 64 wide"),
                           ({"text_heads": 5}, "5 text heads do not divide a tower 64 wide")]:
        with pytest.raises(ValueError, match=match):
            prompts.load_clip(str(path), **changed)
    for width, heads in [(1280, 16), (1408, 16), (1664, 16)]:
        torch.save(random_state(64, width, layers=1, mlp=0.05), path)
        message = refused(path)
        assert f"{width} wide has heads that are not 64 wide ({heads} heads" in message
        assert "vision_heads" in message and "--" not in message
        told = prompts.load_clip(str(path), vision_heads=heads)
        assert f"{heads} vision heads of width {width // heads}" in told.notes[0]
    torch.save(random_state(64, 96, layers=1), path)
    assert refused(path) == "its vision tower is 96 wide, no multiple of 64: tell its vision_heads"


def test_openais_own_clips_are_not_told_what_they_are(tmp_path, monkeypatch):
    for told in ({"activation": "gelu"}, {"vision_heads": 2}, {"text_heads": 2}):
        for name in ("toy", "ViT-B/16"):
            with pytest.raises(ValueError, match=f"CLIP {name} has an activation and heads of its"):
                prompts.load_clip(name, **told)
    assert prompts.load_clip("toy").notes == []


def test_openais_clip_by_name_is_in_the_precision_asked_for_and_known_by_its_file(tmp_path,
                                                                                  monkeypatch):
    """`clip.load` on a CPU turns all to float32; the rule of its own checkpoints is what counts."""
    path = tmp_path / "ViT-B-16.pt"
    half = {key: value.half() for key, value in STATE.items()}
    torch.save(half, path)
    monkeypatch.setattr(prompts.clip.clip, "_download", lambda url, root: str(path))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        named = prompts.load_clip("ViT-B/16", dtype=dtype)
        read = prompts.load_clip(str(path), dtype=dtype)
        assert named.dtype == dtype and named.notes == []
        for (name, a), b in zip(named.named_parameters(), read.parameters()):
            assert a.dtype == b.dtype and torch.equal(a, b), name
    assert re.fullmatch(r"ViT-B-16-[0-9a-f]{8}", prompts.clip_identity(str(path)))
    url = f"https://host/{prompts.sha256(path)}/ViT-B-16.pt"
    monkeypatch.setitem(prompts.clip.clip._MODELS, "ViT-B/16", url)
    assert prompts.clip_identity(str(path)) == prompts.clip_identity("ViT-B/16") == "ViT-B/16"


def test_openais_own_torchscript_file_is_taken_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "ViT-B-16.pt"
    inputs = (torch.randn(1, 3, 32, 32), clip.tokenize(["ant"]))
    torch.jit.trace(SMALL, inputs, check_trace=False).save(str(path))
    assert "TorchScript, a program, and none of OpenAI's" in refused(path)
    url = f"https://host/{prompts.sha256(path)}/ViT-B-16.pt"
    monkeypatch.setitem(prompts.clip.clip._MODELS, "ViT-B/16", url)
    loaded = prompts.load_clip(str(path), dtype=torch.float16)
    assert loaded.dtype == torch.float16 and loaded.notes == []
    assert relative(loaded.visual.proj.float(), SMALL.visual.proj) < 1e-3


class Trap:
    def __reduce__(self):
        return print, ("run",)


def without(*keys):
    return {key: value for key, value in STATE.items() if key not in keys}


@pytest.mark.parametrize("content, reason", [
    (b"not a checkpoint", "damaged, or not written by torch.save"),
    (b"", "damaged, or not written by torch.save"),
    (b"\xef\xbb\xbf\n <!DOCTYPE html><html>403 Forbidden</html>", "it is a web page .* again"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "only points to the weights"),
    ([1, 2], "it holds a list, no state dict"),
    (SMALL, "it asks for clip.model.CLIP, which is code and not data; save .* state_dict"),
    ({"model": SMALL}, "it asks for clip.model.CLIP, which is code"),
    ({"state_dict": STATE, "schedule": Trap()}, "it asks for .*print, which is code"),
    ({"a": torch.zeros(1)}, "it has no 'text_projection'"),
    ({"model": {"epoch": 3}}, "it has no 'text_projection'"),
    (without("visual.conv1.weight"), "it has no 'visual.conv1.weight'"),
    (without("visual.ln_pre.bias", "ln_final.bias"), "lacks 2 of .* e.g. ln_final.bias"),
    (STATE | {"visual.\x1b[31mred\n": torch.zeros(1)}, "1 tensors that no CLIP has, e.g. visual"),
    (STATE | {"ln_final.bias": torch.zeros(3)}, r"its ln_final.bias is \(3,\), not \(64,\)"),
    (STATE | {"text_projection": torch.zeros(3)}, "do not have the shapes of a CLIP's"),
    (STATE | {"ln_final.weight": torch.tensor(1.0)}, "do not have the shapes of a CLIP's"),
    (STATE | {"visual.conv1.weight": torch.zeros(64, 192)}, "do not have the shapes of a CLIP's"),
    (STATE | {"token_embedding.weight": torch.zeros(9, 64)}, "another vocabulary than CLIP's"),
    ({"text_model.embeddings.token_embedding.weight": torch.zeros(1)},
     "it has no 'text_projection.weight'"),
])
def test_files_that_are_no_clip_are_named_for_what_they_are(tmp_path, content, reason, capsys):
    path = tmp_path / "ViT-B-16.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    assert re.search(reason, refused(path))
    assert capsys.readouterr().out == ""


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "clip.pt"
    torch.save(STATE, path)
    content = path.read_bytes()
    path.write_bytes(content[:len(content) // 2])
    assert refused(path) == "damaged, or not written by torch.save"
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1                             # one bit of one number
    path.write_bytes(flipped)
    assert refused(path) == "damaged, or not written by torch.save"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "a zip of something else")
    assert refused(path) == "damaged, or not written by torch.save"
    torch.jit.script(torch.nn.Linear(1, 1)).save(str(path))
    assert "TorchScript" in refused(path)


def test_unknown_names_devices_and_places_are_named(tmp_path, monkeypatch):
    for name in ("ViT-B/61", str(tmp_path / "none.pt"), str(tmp_path)):
        with pytest.raises(FileNotFoundError, match="neither a file nor one of toy, .*ViT-B/16"):
            prompts.load_clip(name)
    for device in ("cuda:77", "tpu"):
        with pytest.raises(ValueError, match=f"device {device} cannot be used here"):
            prompts.load_clip("toy", device=device)

    def offline(*args, **kwargs):
        raise OSError("no route")
    monkeypatch.setattr(prompts.clip, "load", offline)
    with pytest.raises(FileNotFoundError, match=r"\(no route\).*ViT-B-16.pt.*SHA-256 5806e77c"):
        prompts.load_clip("ViT-B/16")


def test_words_that_the_toy_clip_does_not_know_are_small_noise():
    table = prompts.load_clip("toy").token_embedding.weight
    assert len(table) == len(TOKENIZER.encoder)
    assert table.median().item() == pytest.approx(0, abs=1e-3)
    assert table.abs().median().item() == pytest.approx(0.02 * 0.6745, rel=0.02)
    assert torch.equal(table, prompts.load_clip("toy").token_embedding.weight)
