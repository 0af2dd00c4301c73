"""The toy world: what is claimed of its pictures, its sentences and its CLIP."""

import collections
import contextlib
import io
import json
import pathlib
import re

import numpy as np
import pytest
import torch

import data
import make_toy
import prompts
from reference import TOKENIZER

pytestmark = pytest.mark.xdist_group("toy")        # one process learns the fixtures' anchor


@pytest.fixture(scope="module")
def dataset():
    return data.load_dataset("toy")


@pytest.fixture(scope="module")
def clip_model():
    return prompts.load_clip("toy")


@pytest.fixture(scope="module")
def stage1_run():
    """What stage1.py prints and learns with the toy world's settings."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        anchor_tokens = make_toy.stage1_anchor()
    return printed.getvalue(), anchor_tokens


@pytest.fixture(scope="module")
def validation(dataset, clip_model, stage1_run):
    """name of a text feature -> (base, novel) accuracy in percent on the validation images."""
    f_img, labels = make_toy.image_features(clip_model, dataset.val)
    readings = make_toy.readings(clip_model, stage1_run[1])
    return {name: make_toy.accuracies(f_img, labels, f_text) for name, f_text in readings.items()}


# ---------------------------------------------------------------------- classes and pictures

def test_base_and_novel_classes_share_no_word(dataset):
    base, novel = data.split_base_novel(dataset.class_names)
    words = [{word for label in side for word in dataset.class_names[label].split()}
             for side in (base, novel)]
    assert len(base) == len(novel) == 24
    assert len(set(dataset.class_names)) == 48
    assert not words[0] & words[1]


def test_shape_and_surface_tell_base_classes_apart_and_colour_alone_novel_look_alikes(dataset):
    base, novel = dataset.class_names[:24], dataset.class_names[24:]
    assert len({tuple(name.split()[1:]) for name in base}) == 24
    assert set(collections.Counter(tuple(name.split()[1:]) for name in novel).values()) == {4}


def test_what_careless_captions_mix_up_are_rivals():
    """Surfaces among base classes of one shape, colours among novel ones of one shape."""
    base, novel = make_toy.CLASSES[:24], make_toy.CLASSES[24:]
    rivals = 0
    for k, names in ((1, base), (0, novel)):
        mates = make_toy.look_alikes(k).tolist()
        told_apart = {(name.split()[k], name.split()[2]) for name in names}
        for word, shape in told_apart:
            mate = make_toy.WORDS[k][mates[make_toy.WORDS[k].index(word)]]
            assert (mate, shape) in told_apart
            rivals += mate != word
    assert rivals == 12 + 16


def test_look_alikes_come_in_pairs():
    for k in range(3):
        mates = make_toy.look_alikes(k)
        assert torch.equal(mates[mates], torch.arange(len(mates)))


def test_the_split_holds_every_class_and_shares_no_image(dataset):
    parts = {"train": dataset.train, "val": dataset.val, "test": dataset.test}
    for part, items in parts.items():
        counts = collections.Counter(item.label for item in items)
        assert counts == dict.fromkeys(range(48), make_toy.IMAGES[part])
    sources = [item.source for items in parts.values() for item in items]
    assert len(set(sources)) == len(sources)
    assert dataset.class_names == make_toy.CLASSES


def test_no_picture_is_shipped_that_the_split_does_not_name(dataset):
    named = {pathlib.Path(item.source) for item in dataset.train + dataset.val + dataset.test}
    shipped = {path for path in pathlib.Path(dataset.folder).rglob("*") if path.is_file()}
    assert shipped - named == {pathlib.Path(dataset.folder) / "split_toy.json"}


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_the_shipped_pictures_are_those_that_the_script_draws(dataset, part):
    for item in getattr(dataset, part)[::191]:
        path = pathlib.Path(item.source)
        index = int(path.stem.split("_")[1])
        shipped = np.asarray(data.load_image(item.source), np.float32)
        name = dataset.class_names[item.label]
        own = np.asarray(make_toy.draw(name, part, index), np.float32)
        other = np.asarray(make_toy.draw(name, part, index + 1), np.float32)
        assert shipped.shape == (48, 48, 3)
        assert np.abs(shipped - own).mean() < 16
        assert np.abs(shipped - own).mean() < 0.5 * np.abs(shipped - other).mean()


# ---------------------------------------------------------------------- sentences

def test_the_shipped_descriptions_are_those_that_the_script_writes():
    shipped = json.loads(pathlib.Path(data.default_descriptions("toy")).read_text())
    assert shipped == make_toy.describe()
    assert list(shipped) == make_toy.CLASSES


def test_every_description_tells_the_whole_thing_in_words_that_the_toy_clip_knows():
    with np.load(prompts.TOY_CLIP) as file:
        known = set(file["token_ids"].tolist())
    sentences = make_toy.describe()
    for name, listed in sentences.items():
        meanings = [table[word][0] for table, word in zip(make_toy.TABLES, name.split())]
        assert len(set(listed)) == len(listed) >= 10
        for sentence in listed:
            assert name in sentence
            assert all(meaning in sentence for meaning in meanings)
            assert set(TOKENIZER.encode(sentence)) <= known
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", sentence, re.IGNORECASE)


def test_descriptions_hold_neither_careful_words_nor_the_photo_of_careless_captions():
    words = {word for sentence in make_toy.DESCRIPTIONS for word in re.findall(r"\w+", sentence)}
    assert not words & {*make_toy.CAREFUL_WORDS, "photo", "picture", "image"}


def test_the_toy_clip_knows_the_words_of_the_papers_ablations():
    with np.load(prompts.TOY_CLIP) as file:
        known = set(file["token_ids"].tolist())
    assert set(TOKENIZER.encode("a photo of with at in on by color shape size texture")) <= known


# ---------------------------------------------------------------------- the CLIP

def test_the_toy_clip_is_small_and_is_a_clip(clip_model):
    assert prompts.TOY_CLIP.stat().st_size <= 3_000_000
    assert isinstance(clip_model, prompts.clip.model.CLIP)
    assert clip_model.token_embedding.weight.shape == (49408, 128)


def test_neither_captions_nor_pictures_of_its_training_are_of_a_class():
    _, captions, shown, said, _, _ = make_toy.draw_pairs(400, seed=5)
    for words in np.concatenate([shown, said]):
        name = " ".join(listed[i] for listed, i in zip(make_toy.WORDS, words))
        assert name not in make_toy.CLASSES
    assert not any(name in caption for caption in captions for name in make_toy.CLASSES)


def test_careless_captions_mix_up_look_alikes_and_no_other_caption_is_wrong():
    _, _, shown, said, told, careless = make_toy.draw_pairs(400, seed=6)
    wrong = shown != said
    assert not wrong[~careless].any() and not wrong[:, 2:].any()
    for k in range(2):
        mates = make_toy.look_alikes(k).numpy()
        assert (wrong[:, k] <= (said[:, k] == mates[shown[:, k]])).all()
        mixed_up = careless & (mates[shown[:, k]] != shown[:, k])
        assert 0.3 < wrong[mixed_up, k].mean() < 0.7
    fit = make_toy.fits(*(torch.from_numpy(x) for x in (shown, said, told, careless)))
    assert (fit.diagonal() > 0).all() and (fit <= 1).all()


def test_the_script_that_trains_the_toy_clip_is_reproducible(tmp_path):
    for name in ("a.npz", "b.npz"):
        model, known = make_toy.train(steps=2, text_steps=2, n_pairs=64, batch=16, seed=3)
        make_toy.save(model, known, tmp_path / name)
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        assert set(a.files) == set(b.files)
        assert all(np.array_equal(a[key], b[key]) for key in a.files)
        with np.load(prompts.TOY_CLIP) as shipped:
            assert set(shipped.files) == set(a.files)
            assert all(a[key].shape == shipped[key].shape for key in a.files)
            assert np.array_equal(a["token_ids"], shipped["token_ids"])


# ---------------------------------------------------------------------- the stages have work to do

def test_zero_shot_leaves_headroom(validation):
    for name in ("a photo of a", "descriptions", "anchor learnt"):
        assert all(30 < accuracy < 95 for accuracy in validation[name])


def test_descriptions_know_more_than_a_photo_of_a(validation):
    for photo, described in zip(validation["a photo of a"], validation["descriptions"]):
        assert described > photo + 5


def test_stage_1_does_its_work_on_base_and_on_novel_classes(validation):
    for photo, learnt in zip(validation["a photo of a"], validation["anchor learnt"]):
        assert learnt > photo + 5


def test_stage_1_brings_anchor_prompts_and_descriptions_together(stage1_run):
    before, after = map(float, re.search(r"cosine .* (\S+) -> (\S+)\n", stage1_run[0]).groups())
    assert after > before + 0.05
