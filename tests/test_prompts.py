"""The shared-context text encoder, templates and baselines, against plain twins (tests/reference.py) in float64."""

import pathlib
import re

import clip
import pytest
import torch
import torch.nn.functional as F

import prompts
from prompts import AttributeTemplate, PlainTemplate, build_learner
from reference import (NAMES, SOS, TOKENIZER, encode_77, encode_image_prompted, relative, tiny_clip, unit)

MODEL = tiny_clip(dtype=torch.float64)
SETTINGS = {"soft_tokens": 3, "arrangement": "adaptive", "tau": 1.0, "test_position": "argmax", "feature_at": "eot",
            "depth": 3, "w_cat": 0.7, "attributes": ["playfulness", "shape"], "prompt": "a photo of a {}."}
BASELINES, TEMPLATES = ("coop", "cocoop", "maple", "dept"), ("plain", "atprompt", "anchoropt")
# W that moves the anchor (column 4) to the front, repeats it, repeats V2 and drops V3; for N = 2 it repeats Anc_2 too
ORDERS = {1: [3, 1, 1, 3], 2: [4, 1, 3, 4, 0]}


def learner(baseline="coop", template="anchoropt", n_anchor=1, seed=0, model=MODEL, names=NAMES, **changed):
    torch.manual_seed(seed)
    made = build_learner(SETTINGS | {"baseline": baseline, "template": template} | changed, model, names,
                         torch.randn(n_anchor, 128)).double()
    for parameter in made.parameters():                 # far from the tiny start, so that every term shows
        parameter.data += 0.3 * torch.randn_like(parameter)
    return made


def set_order(made, order):
    made.template.position_matrix.logits.data = 9 * torch.eye(len(order), dtype=torch.float64)[order]
    return made.eval()


# ------------------------------------------------------------------------------------------------ the encoder

@pytest.mark.parametrize("n_context", [0, 1, 3, 9])
@pytest.mark.parametrize("class_chunk", [0, 2])
def test_context_encoder_equals_77_position_encoder(n_context, class_chunk):
    torch.manual_seed(n_context)
    context = torch.randn(n_context, 128, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(len(NAMES), 64, dtype=torch.float64)
    suffix, eot = prompts.class_suffix(MODEL, [name + "." for name in NAMES])
    fast = prompts.encode_text(MODEL, torch.cat([MODEL.token_embedding.weight[SOS][None], context]), suffix, eot,
                               class_chunk=class_chunk)
    slow = encode_77(MODEL, context, NAMES)
    assert relative(fast, slow) < 1e-12
    if n_context:
        gradients = [torch.autograd.grad((f * weights).sum(), context)[0] for f in (fast, slow)]
        assert relative(*gradients) < 1e-12


def test_context_encoder_equals_clips_encode_text_in_float32():
    model, names = tiny_clip(), NAMES
    suffix, eot = prompts.class_suffix(model, [name + "." for name in names])
    of = prompts.embed(model, [SOS] + TOKENIZER.encode("a photo of a"))
    fast = prompts.encode_text(model, of, suffix, eot)
    with torch.no_grad():
        slow = model.encode_text(clip.tokenize([f"a photo of a {name}." for name in names]))
    assert relative(fast, slow) < 1e-5


def test_contexts_of_their_own_equal_one_call_per_context():
    contexts = torch.randn(3, 4, 128, dtype=torch.float64)
    suffix, eot = prompts.class_suffix(MODEL, [name + "." for name in NAMES])
    together = prompts.encode_text(MODEL, contexts, suffix, eot)
    assert together.shape == (3, 5, 64)
    for context, features in zip(contexts, together):
        assert relative(features, prompts.encode_text(MODEL, context, suffix, eot)) < 1e-12


def test_on_a_cpu_passes_without_gradient_are_split_and_change_nothing():
    contexts, images = torch.randn(130, 4, 128, dtype=torch.float64), torch.randn(20, 3, 32, 32, dtype=torch.float64)
    suffix, eot = prompts.class_suffix(MODEL, [name + "." for name in NAMES])
    tokens, sizes = list(torch.randn(2, 3, 128, dtype=torch.float64)), []
    hooks = [tower.register_forward_hook(lambda module, args, out: sizes.append(len(args[0])))
             for tower in (MODEL.visual.conv1, MODEL.transformer.resblocks[0].mlp.c_fc)]

    def both():
        sizes.clear()
        return prompts.encode_image(MODEL, images, tokens), prompts.encode_text(MODEL, contexts, suffix, eot), len(sizes)
    try:
        u, v, passes = both()                                        # 1 of images, 1 of contexts, 1 of suffixes
        with torch.no_grad():
            u_split, v_split, split_passes = both()                  # 8 + 8 + 4 images; 1; 3 + 2 classes of 130 contexts
    finally:
        [hook.remove() for hook in hooks]
    assert (passes, split_passes) == (3, 6) and sizes[:3] == [8, 8, 4]
    assert relative(u_split, u) < 1e-12 and relative(v_split, v) < 1e-12


def test_sentences_are_encoded_as_clip_encodes_them():
    model = tiny_clip()
    sentences = ["An ant is small, black, and has six legs.", "It is.", "word " * 75, "What?"]
    with torch.no_grad():
        assert relative(prompts.encode_sentences(model, sentences, 2), model.encode_text(clip.tokenize(sentences))) < 1e-5
    with pytest.raises(ValueError, match="too long for CLIP's 77 tokens"):
        prompts.encode_sentences(model, ["word " * 76])


def test_image_tower_without_prompts_is_clips_own():
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert relative(prompts.encode_image(MODEL, images), MODEL.encode_image(images)) < 1e-12


def test_clip_logits_is_eq1():
    u, v = unit(torch.randn(2, 8, dtype=torch.float64)), unit(torch.randn(3, 8, dtype=torch.float64))
    tau = 0.01
    q = prompts.clip_logits(u, v, 1 / tau).softmax(-1)
    for i in range(2):
        weights = [torch.exp(sum(u[i, k] * v[j, k] for k in range(8)) / tau) for j in range(3)]
        torch.testing.assert_close(q[i], torch.stack(weights) / sum(weights))
    own = torch.stack([v, v.flip(0)])                                         # an image's own prompts
    torch.testing.assert_close(prompts.clip_logits(u, own, 10.)[1], 10 * (u[1] @ v.flip(0).T))


# -------------------------------------------------------------------------------------------------- templates

def test_plain_template_is_eq2_and_starts_at_words_where_told():
    torch.manual_seed(0)
    template = PlainTemplate(MODEL, 3)
    context, W = template()
    assert torch.equal(context, template.soft_tokens) and W is None
    assert template.soft_tokens.std().item() == pytest.approx(0.02, rel=0.15)
    started = PlainTemplate(MODEL, 2, "a photo of a").soft_tokens.double()
    assert torch.allclose(started, MODEL.token_embedding.weight[TOKENIZER.encode("a photo")], atol=1e-6)
    assert PlainTemplate(MODEL, 5, "a photo of a").soft_tokens.std().item() < 0.03          # more than the words: random


def test_attribute_template_is_eq3_token_by_token():
    words = ["playfulness", "shape"]
    template = AttributeTemplate(MODEL, 2, words).double()
    shift = torch.randn(3, 128, dtype=torch.float64)
    for image, context in enumerate([template()[0], *template(shift)[0]]):
        expected = []
        for V_a, word in zip(template.attribute_soft_tokens, words):
            expected += [*V_a, *MODEL.token_embedding.weight[TOKENIZER.encode(word)]]
        expected += [V if image == 0 else V + shift[image - 1] for V in template.soft_tokens]   # only these are shifted
        assert len(TOKENIZER.encode("playfulness")) == 2 and len(expected) == template.length == 2 + 2 + 2 + 1 + 2
        assert torch.allclose(context, torch.stack(expected), atol=1e-7)
    with pytest.raises(ValueError, match="--attributes"):
        AttributeTemplate(MODEL, 2, ["shape", " "])
    with pytest.raises(ValueError, match="--attributes"):
        AttributeTemplate(MODEL, 2, [])


@pytest.mark.parametrize("n_anchor", [1, 2])
def test_anchor_template_is_eqs_8_and_9(n_anchor):
    made = set_order(learner(n_anchor=n_anchor), ORDERS[n_anchor])
    t_v = [*made.template.soft_tokens, *made.template.anchor_tokens]                       # Eq. 8
    context, W = made.template()
    assert torch.equal(context, torch.stack([t_v[j] for j in ORDERS[n_anchor]]))           # Eq. 9
    shift = torch.randn(2, 128, dtype=torch.float64)
    shifted = torch.stack([t_v[j] + (shift[1] if j < 3 else 0) for j in ORDERS[n_anchor]])  # the anchor is not shifted
    assert torch.allclose(made.template(shift)[0][1], shifted)
    assert relative(made.text_features(), encode_77(MODEL, context, NAMES)) < 1e-12


@pytest.mark.parametrize("arrangement, order", [("before", [3, 4, 0, 1, 2]), ("middle", [0, 3, 4, 1, 2])])
def test_fixed_arrangements_of_table_8(arrangement, order):
    made = learner(n_anchor=2, arrangement=arrangement)
    t_v = torch.cat([made.template.soft_tokens, made.template.anchor_tokens])
    assert relative(made.text_features(), encode_77(MODEL, t_v[order], NAMES)) < 1e-12
    assert not any("position" in name for name, _ in made.named_parameters())


@pytest.mark.parametrize("baseline", ["coop", "maple"])
def test_after_class_puts_the_anchor_between_name_and_full_stop(baseline):
    made = learner(baseline, n_anchor=2, arrangement="after-class")

    def replace_all(layer, hidden):                                  # the soft tokens in front, as in plain MaPLe
        return made.deep_tokens[layer - 1] if layer else hidden
    slow = encode_77(MODEL, made.template.soft_tokens, NAMES, inside=made.template.anchor_tokens,
                     deep=replace_all if baseline == "maple" else None)
    assert relative(made.text_features(), slow) < 1e-12


# -------------------------------------------------------------------------------------------------- baselines

FEATURES = torch.randn(3, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
IMAGES = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
SCALE = MODEL.logit_scale.exp()


@pytest.mark.parametrize("baseline", ["coop", "dept"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_itm_logits_equal_the_conventional_step_values_and_gradients(baseline, template):
    made = learner(baseline, template)
    torch.manual_seed(5)
    fast = made.logits(FEATURES, made.text_features())
    torch.manual_seed(5)                                                            # the same Gumbel noise
    slow = SCALE * unit(FEATURES) @ unit(encode_77(MODEL, made.template()[0], NAMES)).T
    assert relative(fast, slow) < 1e-10
    check_gradients(made, fast, slow)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("template", TEMPLATES)
def test_class_chunk_changes_no_logit_and_no_gradient(baseline, template):
    logits = []
    for class_chunk in (2, 0):
        made = learner(baseline, template, class_chunk=class_chunk)
        torch.manual_seed(5)
        logits.append((made, made(FEATURES, IMAGES)))
    (chunked, fast), (whole, slow) = logits
    assert relative(fast, slow) < 1e-10
    g_fast, g_slow = (torch.autograd.grad(out.square().sum(), list(made.parameters()), allow_unused=True) for made, out in logits)
    for (name, _), a, b in zip(chunked.named_parameters(), g_fast, g_slow):
        assert (a is None) == (b is None) and (a is None or relative(a, b) < 1e-9), name


def check_gradients(made, fast, slow):
    loss = [F.cross_entropy(logits, torch.tensor([1, 0, 4])) for logits in (fast, slow)]
    g_fast, g_slow = (torch.autograd.grad(each, list(made.parameters()), allow_unused=True) for each in loss)
    assert any(g is not None for g in g_slow)
    for a, b in zip(g_fast, g_slow):
        assert (a is None) == (b is None) and (a is None or relative(a, b) < 1e-9)


@pytest.mark.parametrize("template", TEMPLATES)
def test_cocoops_batched_logits_equal_a_loop_over_images(template):
    made = learner("cocoop", template)
    torch.manual_seed(5)
    fast, rows = made(FEATURES), []
    for f in FEATURES:
        hidden = F.relu(made.meta_net[0].weight @ unit(f) + made.meta_net[0].bias)          # pi(u), d -> d / 16 -> d_t
        pi = made.meta_net[2].weight @ hidden + made.meta_net[2].bias
        assert hidden.shape == (4,)
        torch.manual_seed(5)                                                      # one W for all images of the batch
        context = made.template(pi[None])[0][0]
        rows.append(SCALE * unit(encode_77(MODEL, context, NAMES)) @ unit(f))
    slow = torch.stack(rows)
    assert relative(fast, slow) < 1e-10
    check_gradients(made, fast, slow)
    assert made.meta_net[0].weight.requires_grad and made.template.soft_tokens.requires_grad


def deep_rule(made, template, order=None):
    """Fig. 3 written out token by token: what stands at each context position before block `layer`."""
    V = [made.template.soft_tokens, *made.deep_tokens]
    M = len(V[0])

    def rule(layer, hidden):
        if layer == 0 or layer >= len(V):
            return hidden
        out = []
        for i in range(len(hidden)):
            if template == "plain":
                out.append(V[layer][i])
            elif template == "atprompt":
                out.append(V[layer][i - (len(hidden) - M)] if i >= len(hidden) - M else hidden[i])
            else:
                out.append(V[layer][order[i]] if order[i] < M else hidden[i])
        return torch.stack(out)
    return rule


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("template, n_anchor", [("plain", 1), ("atprompt", 1), ("anchoropt", 1), ("anchoropt", 2)])
def test_maples_deep_rule_token_by_token_on_both_towers(template, n_anchor, depth):
    made = learner("maple", template, n_anchor, depth=depth)
    order = ORDERS[n_anchor] if template == "anchoropt" else None
    if order:
        set_order(made, order)
    context = made.template()[0]
    text = encode_77(MODEL, context, NAMES, deep=deep_rule(made, template, order))
    V = [made.template.soft_tokens, *made.deep_tokens]
    assert len(V) == depth
    tokens = [(linear.weight @ V_l.T + linear.bias[:, None]).T for linear, V_l in zip(made.to_visual, V)]
    visual = encode_image_prompted(MODEL, IMAGES, tokens)
    assert relative(made.text_features(), text) < 1e-11 and relative(made.image_features(None, IMAGES), visual) < 1e-11
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
    v, total = made.text_features(), 0.0
    logits, rows = made.head_logits(FEATURES, v, labels)
    for k in range(3):                                                 # 2B rows: text of the labels, then images
        for feature, scale, bias in ((v[labels[k]], made.scale_text, made.bias_text),
                                     (FEATURES[k], made.scale_image, made.bias_image)):
            row = made.head.weight @ (feature * scale + bias) + made.head.bias
            total = total - row.log_softmax(-1)[labels[k]] / 6
    torch.testing.assert_close(F.cross_entropy(logits, rows), total)
    set_order(made, ORDERS[1])
    itm = made.logits(FEATURES, made.text_features())
    head = (FEATURES * made.scale_image + made.bias_image) @ made.head.weight.T + made.head.bias
    torch.testing.assert_close(made(FEATURES), 0.3 * itm + 0.7 * head)             # base classes
    novel = made.set_classes(NAMES[::-1])(FEATURES)                                # others: ITM alone
    torch.testing.assert_close(novel, itm.flip(-1))


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("template", TEMPLATES)
def test_set_classes_gives_the_logits_of_a_learner_built_on_those_classes(baseline, template):
    novel = ["saint bernard", "ant", "x-ray (old)"]
    moved, built = learner(baseline, template).eval(), learner(baseline, template).eval()
    other = learner(baseline, template, seed=9, names=novel).eval()
    shared = {k: v for k, v in built.state_dict().items() if not k.startswith("head.")}       # C_base rows
    other.load_state_dict(shared, strict=False)
    moved.set_classes(novel)
    if baseline == "dept":
        other.base_class_names = []                                                   # its ITM head
    torch.testing.assert_close(moved(FEATURES, IMAGES), other(FEATURES, IMAGES), rtol=1e-10, atol=1e-10)


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
        assert relative(got, encode_77(MODEL, context, NAMES, read_back=n_anchor, deep=deep)) < 1e-11
    at_eot = set_order(learner(baseline, n_anchor=n_anchor), order)
    assert relative(features, at_eot.text_features(FEATURES)) > 1e-2


def test_zero_shot_is_clips_own_prediction():
    model, images = tiny_clip(), torch.randn(2, 3, 32, 32)
    made = build_learner({"baseline": "clip", "template": "plain", "prompt": "a photo of a {}, a type of pet."}, model, NAMES)
    with torch.no_grad():
        expected, _ = model(images, clip.tokenize([f"a photo of a {name}, a type of pet." for name in NAMES]))
        torch.testing.assert_close(made(model.encode_image(images)), expected, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------- loading and bad input

def test_load_clip_reads_a_state_dict_in_any_precision(tmp_path):
    model = tiny_clip()
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    images = torch.randn(2, 3, 32, 32)
    loaded = prompts.load_clip(str(tmp_path / "clip.pt"))
    assert loaded.dtype == torch.float32 and not any(p.requires_grad for p in loaded.parameters())
    assert relative(loaded.encode_image(images), model.encode_image(images)) < 0.01           # CLIP rounds to float16
    for dtype in (torch.float16, torch.bfloat16):
        half = prompts.load_clip(str(tmp_path / "clip.pt"), dtype=dtype)
        made = build_learner(SETTINGS | {"baseline": "coop", "template": "anchoropt"}, half, NAMES, torch.randn(1, 128))
        assert half.dtype == dtype and made.text_features().dtype == dtype
        assert all(p.dtype == torch.float32 for p in made.parameters())


def test_openais_clip_by_name_is_in_the_precision_asked_for_and_known_by_its_file(tmp_path, monkeypatch):
    """`clip.load` on a CPU turns everything to float32; the rule of its own checkpoints is what counts."""
    path = tmp_path / "ViT-B-16.pt"
    torch.save(tiny_clip().half().state_dict(), path)
    monkeypatch.setattr(prompts.clip.clip, "_download", lambda url, root: str(path))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        named, read = prompts.load_clip("ViT-B/16", dtype=dtype), prompts.load_clip(str(path), dtype=dtype)
        assert named.dtype == dtype
        for (name, a), b in zip(named.named_parameters(), read.parameters()):
            assert a.dtype == b.dtype and torch.equal(a, b), name
    assert re.fullmatch(r"ViT-B-16-[0-9a-f]{8}", prompts.clip_identity(str(path)))          # nobody's file
    url = f"https://host/{prompts.sha256(path)}/ViT-B-16.pt"
    monkeypatch.setitem(prompts.clip.clip._MODELS, "ViT-B/16", url)
    assert prompts.clip_identity(str(path)) == prompts.clip_identity("ViT-B/16") == "ViT-B/16"


def test_openais_own_torchscript_file_is_taken_and_no_other(tmp_path, monkeypatch):
    path, model = tmp_path / "ViT-B-16.pt", tiny_clip()
    torch.jit.trace(model, (torch.randn(1, 3, 32, 32), clip.tokenize(["ant"])), check_trace=False).save(str(path))
    with pytest.raises(ValueError, match=f"none of OpenAI's .SHA-256 {prompts.sha256(path)}"):
        prompts.load_clip(str(path))
    monkeypatch.setitem(prompts.clip.clip._MODELS, "ViT-B/16", f"https://host/{prompts.sha256(path)}/ViT-B-16.pt")
    loaded = prompts.load_clip(str(path), dtype=torch.float16)
    assert loaded.dtype == torch.float16
    assert relative(loaded.visual.proj.float(), model.visual.proj) < 1e-3


def test_a_step_finds_its_index_tensors_on_the_device():
    made = learner("coop")
    made.text_features()
    misses = prompts._places.cache_info().misses
    made.text_features()
    assert prompts._places.cache_info().misses == misses


def test_load_clip_says_what_is_wrong(tmp_path):
    for name, match in [("ViT-B/61", "ViT-B/16"), (str(tmp_path / "none.pt"), "neither a file")]:
        with pytest.raises(FileNotFoundError, match=match):
            prompts.load_clip(name)
    (tmp_path / "text.pt").write_text("not a checkpoint")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("text.pt", "other.pt", "list.pt"):
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / name)) + " is not the state dict of a CLIP"):
            prompts.load_clip(str(tmp_path / name))
    torch.jit.script(torch.nn.Linear(1, 1)).save(str(tmp_path / "script.pt"))
    with pytest.raises(ValueError, match="none of OpenAI's"):
        prompts.load_clip(str(tmp_path / "script.pt"))


def test_weights_that_cannot_be_had_are_named_with_their_place_and_checksum(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route")
    monkeypatch.setattr(prompts.clip, "load", offline)
    with pytest.raises(FileNotFoundError, match=r"ViT-B-16.pt.*SHA-256 5806e77c.*--clip"):
        prompts.load_clip("ViT-B/16")


def test_long_class_names_are_named():
    long = "very " * 72 + "long"
    with pytest.raises(ValueError, match="very very") as error:
        learner(names=["ant", long])
    assert "'ant'" not in str(error.value)
    fits = " ".join(["ant"] * (77 - 1 - 4 - 2))                         # [SOS] + K + name + "." + [EOT] = 77
    assert learner(names=[fits])(FEATURES).shape == (3, 1)
    with pytest.raises(ValueError):
        learner(names=[fits + " ant"])
    with pytest.raises(ValueError, match="no tokens"):
        learner(names=["ant", " "])


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="--depth 4: this CLIP has 3 blocks"):
        learner("maple", depth=4)
    with pytest.raises(ValueError, match="unknown baseline"):
        learner("coopp")
    with pytest.raises(ValueError, match="width 128"):
        build_learner(SETTINGS | {"baseline": "coop", "template": "anchoropt"}, MODEL, NAMES, torch.zeros(1, 512))


def test_prompts_reads_in_one_sitting():
    assert len(pathlib.Path(prompts.__file__).read_text().splitlines()) <= 600
