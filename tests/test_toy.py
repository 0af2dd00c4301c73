"""The toy world: what is claimed of its pictures, its sentences and its CLIP."""

import collections
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


@pytest.fixture(scope="module")
def dataset():
    return data.load_dataset("toy")


@pytest.fixture(scope="module")
def known_tokens():
    """The token ids that the toy CLIP has learnt; the others are noise."""
    with np.load(prompts.TOY_CLIP) as file:
        return set(file["token_ids"].tolist())


def test_base_and_novel_classes_share_no_word_and_are_told_apart_by_other_ones():
    base, novel = make_toy.CLASSES[:24], make_toy.CLASSES[24:]
    assert len(set(base)) == len(set(novel)) == 24
    assert not set(" ".join(base).split()) & set(" ".join(novel).split())
    # Surface and shape are enough for base classes; of novel ones each four differ in colour alone.
    counts = [collections.Counter(tuple(name.split()[1:]) for name in names)
              for names in (base, novel)]
    assert set(counts[0].values()) == {1} and set(counts[1].values()) == {4}


@pytest.mark.parametrize("k, names, n_rivals", [(1, make_toy.CLASSES[:24], 12),
                                                (0, make_toy.CLASSES[24:], 16)])
def test_what_careless_captions_mix_up_are_pairs_of_rivals(k, names, n_rivals):
    """Surfaces among base classes of one shape, colours among novel ones of one shape."""
    words = make_toy.WORDS[k]
    mates = {word: words[mate] for word, mate in zip(words, make_toy.look_alikes(k).tolist())}
    assert all(mates[mates[word]] == word for word in words)
    told_apart = {(name.split()[k], name.split()[2]) for name in names}
    assert all((mates[word], shape) in told_apart for word, shape in told_apart)
    assert sum(mates[word] != word for word, _ in told_apart) == n_rivals


def test_the_split_holds_every_class_and_every_picture_once(dataset):
    assert dataset.class_names == make_toy.CLASSES
    parts = {"train": dataset.train, "val": dataset.val, "test": dataset.test}
    for part, items in parts.items():
        counts = collections.Counter(item.label for item in items)
        assert counts == dict.fromkeys(range(48), make_toy.IMAGES[part])
    named = [pathlib.Path(item.source) for items in parts.values() for item in items]
    shipped = [path for path in pathlib.Path(dataset.folder).rglob("*") if path.is_file()]
    split = pathlib.Path(dataset.folder) / "split_toy.json"
    assert sorted([*named, split]) == sorted(shipped)


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_the_shipped_pictures_are_those_that_the_script_draws(dataset, part):
    for item in getattr(dataset, part)[::191]:
        index = int(pathlib.Path(item.source).stem.split("_")[1])
        shipped = np.asarray(data.load_image(item.source), np.float32)
        name = dataset.class_names[item.label]
        own = np.asarray(make_toy.draw(name, part, index), np.float32)
        other = np.asarray(make_toy.draw(name, part, index + 1), np.float32)
        off = np.abs(shipped - own).mean()                          # JPEG's doing
        assert off < 16 and off < 0.5 * np.abs(shipped - other).mean()


def test_the_shipped_descriptions_tell_the_whole_thing_in_words_that_the_toy_clip_knows(
        known_tokens):
    shipped = json.loads(pathlib.Path(data.default_descriptions("toy")).read_text())
    assert shipped == make_toy.describe() and list(shipped) == make_toy.CLASSES
    careless_or_careful = {*make_toy.CAREFUL_WORDS, "photo", "picture", "image"}
    for name, sentences in shipped.items():
        meanings = [table[word][0] for table, word in zip(make_toy.TABLES, name.split())]
        assert len(set(sentences)) == len(sentences) >= 10
        for sentence in sentences:
            assert name in sentence and all(meaning in sentence for meaning in meanings)
            assert set(TOKENIZER.encode(sentence)) <= known_tokens
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", sentence, re.IGNORECASE)
            assert not set(re.findall(r"\w+", sentence)) & careless_or_careful


def test_the_toy_clip_knows_the_words_of_the_papers_ablations(known_tokens):
    words = "a photo of with at in on by color shape size texture"
    assert set(TOKENIZER.encode(words)) <= known_tokens


def test_training_shows_no_class_and_careless_captions_mix_up_look_alikes_alone():
    _, captions, shown, said, told, careless = make_toy.draw_pairs(400, seed=6)
    names = {" ".join(listed[i] for listed, i in zip(make_toy.WORDS, words))
             for words in np.concatenate([shown, said])}
    assert not names & set(make_toy.CLASSES)
    assert not any(name in caption for caption in captions for name in make_toy.CLASSES)

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
        model, known = make_toy.train(steps=2, text_steps=2, n_pairs=32, batch=8, seed=3)
        make_toy.save(model, known, tmp_path / name)
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b, \
            np.load(prompts.TOY_CLIP) as shipped:
        assert set(a.files) == set(b.files) == set(shipped.files)
        for key in a.files:
            assert np.array_equal(a[key], b[key]) and a[key].shape == shipped[key].shape
        assert np.array_equal(a["token_ids"], shipped["token_ids"])


def test_descriptions_and_stage_1_know_more_than_a_photo_of_a_and_leave_headroom(dataset):
    """On validation images, base classes and novel ones, each among their own."""
    clip_model = prompts.load_clip("toy")
    f_img, labels = make_toy.image_features(clip_model, dataset.val)
    readings = make_toy.readings(clip_model, make_toy.stage1_anchor())
    accuracy = {name: make_toy.accuracies(f_img, labels, f_text)
                for name, f_text in readings.items()}
    for side in range(2):
        photo = accuracy["a photo of a"][side]
        assert 30 < photo and photo + 5 < accuracy["descriptions"][side] < 95
        assert photo + 5 < accuracy["anchor learnt"][side] < 95
        assert accuracy["anchor unlearnt"][side] < accuracy["anchor learnt"][side]
