"""The toy world: what is claimed of its pictures, its CLIP and its descriptions."""

import json
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import data
import make_toy_clip
import prompts
from reference import TOKENIZER

ROOT = pathlib.Path(data.__file__).parent


def test_the_toy_clip_is_small_loads_fast_and_is_a_clip():
    start = time.perf_counter()
    model = prompts.load_clip("toy")
    assert time.perf_counter() - start < 2 and prompts.TOY_CLIP.stat().st_size <= 3_000_000
    assert isinstance(model, prompts.clip.model.CLIP) and model.token_embedding.weight.shape == (49408, 128)


def test_zero_shot_leaves_headroom_and_hm_is_between_60_and_85():
    model = prompts.clip.model.build_model(make_toy_clip.load_toy_state_dict(prompts.TOY_CLIP)).float()
    base, novel, hm = make_toy_clip.evaluate(model, "val")["template"]
    assert 60 < hm < 85 and base < 90 and novel > 50


def test_base_and_novel_classes_share_no_word_and_have_several_tokens():
    base, novel = (labels for labels in data.split_base_novel(data.TOY_CLASSES))
    words = [{word for label in labels for word in data.TOY_CLASSES[label].split()} for labels in (base, novel)]
    assert len(base) >= 20 and len(novel) >= 20 and not words[0] & words[1]
    assert all(len(TOKENIZER.encode(name)) >= 3 for name in data.TOY_CLASSES) and len(set(data.TOY_CLASSES)) == 48


def test_no_caption_of_the_toy_clips_training_names_a_class_of_the_toy_dataset():
    _, _, ids, told = make_toy_clip.draw_pairs(500, seed=5)
    vocabulary = [list(data.TOY_COLOURS), data.TOY_SURFACES, data.TOY_SHAPES]
    drawn = {" ".join(vocabulary[k][i] for k, i in enumerate(row[:3])) for row in ids.tolist()}
    assert not drawn & set(data.TOY_CLASSES)


def test_a_toy_image_is_the_same_in_every_process():
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import data, hashlib; "
            "print(hashlib.sha256(data.draw_toy(data.ToyImage('ivory dotted star', 'test', 3)).tobytes()).hexdigest())")
    outputs = {subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True,
                              env={"PYTHONHASHSEED": seed, "PATH": ""}).stdout for seed in ("1", "2")}
    assert len(outputs) == 1 and len(outputs.pop()) == 65
    images = [np.asarray(data.draw_toy(data.ToyImage("ivory dotted star", "test", i))) for i in range(2)]
    assert images[0].shape == (48, 48, 3) and (images[0] != images[1]).any()


def test_toy_descriptions_are_whole_distinct_and_in_words_that_the_toy_clip_knows():
    sentences = json.loads((ROOT / "assets" / "descriptions" / "toy.json").read_text())
    with np.load(prompts.TOY_CLIP) as file:
        known = set(file["token_ids"].tolist())
    assert list(sentences) == list(data.TOY_CLASSES)
    flat = [sentence for listed in sentences.values() for sentence in listed]
    assert len(set(flat)) == len(flat) and min(map(len, sentences.values())) >= 5
    assert all(set(TOKENIZER.encode(sentence)) <= known for sentence in flat)
    assert make_toy_clip.describe() == sentences


def test_the_script_that_made_the_toy_clip_is_reproducible(tmp_path):
    for name in ("a.npz", "b.npz"):
        make_toy_clip.save_toy_clip(make_toy_clip.train(steps=2, n_pairs=64, batch=16, seed=3), tmp_path / name)
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        assert set(a.files) == set(b.files) and all(np.array_equal(a[key], b[key]) for key in a.files)
    loaded = prompts.clip.model.build_model(make_toy_clip.load_toy_state_dict(tmp_path / "a.npz"))
    assert loaded.visual.input_resolution == 32 and torch.isfinite(loaded.logit_scale)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_toy_splits_hold_every_class_and_share_no_image(split):
    parts = data.toy_dataset()
    labels = [label for _, label in parts[split]]
    assert sorted(set(labels)) == list(range(48)) and len(set(map(labels.count, range(48)))) == 1
    others = {image for name, items in parts.items() if name != split for image, _ in items}
    assert not others & {image for image, _ in parts[split]}
