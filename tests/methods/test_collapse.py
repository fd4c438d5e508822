"""Monitors of a teacher whose collapse is known, and the schedule it is trained with."""

import jax
import numpy as np
import pytest

from jmeta import methods

VOCAB = 8


@pytest.fixture
def batch():
    tokens = np.asarray([[3, 4, 5, 0], [6, 7, 3, 4]])
    return {"tokens": tokens, "mask": (tokens != 0).astype(float)}


def watch(scores, batch):
    return jax.tree.map(np.asarray, watched(scores, batch))


@jax.jit
def watched(scores, batch):
    return methods.monitors(scores, batch, mask_token=1, label_tokens=(2, 5))


def peaked(tokens):
    return 60 * np.eye(VOCAB)[tokens]


def test_a_teacher_that_knows_nothing_has_full_entropy(x64, batch):
    uniform = np.zeros((2, 4, VOCAB))
    found = watch({"inputs": uniform, "labels": uniform}, batch)
    for head in ("inputs", "labels"):
        np.testing.assert_allclose(found[f"{head}_entropy"], np.log(VOCAB), rtol=1e-12)
        for name, share in (("copied", 1), ("masked", 1), ("confidence", 1), ("label_tokens", 2)):
            np.testing.assert_allclose(found[f"{head}_{name}"], share / VOCAB, rtol=1e-12)


def test_one_that_copies_and_one_that_says_the_same_everywhere(x64, batch):
    same = np.full((2, 4), 5)
    found = watch({"inputs": peaked(batch["tokens"]), "labels": peaked(same)}, batch)
    assert abs(found["inputs_copied"] - 1) < 1e-12
    assert abs(found["inputs_entropy"]) < 1e-12
    # Five kinds of token are read at seven positions.
    assert abs(found["inputs_variety"] - 1) < 1e-12
    assert abs(found["labels_variety"] - 1 / 5) < 1e-12
    assert abs(found["labels_label_tokens"] - 1) < 1e-12
    said = methods.has_collapsed(found)
    assert (
        said
        == "labels: the same few tokens are written everywhere; inputs: the text is copied as it is"
    )
    assert methods.has_collapsed(found, variety=0.2, copied=1.01) == ""
    other = peaked((batch["tokens"] + 1) % 8)
    healthy = watch({"inputs": other, "labels": other}, batch)
    assert methods.has_collapsed(healthy) == ""
    # what stands at a pad does not matter
    changed = np.copy(batch["tokens"])
    changed[0, 3] = 6
    other = {"inputs": peaked(changed), "labels": peaked(same)}
    again = watch(other, batch)
    assert all(float(again[name]) == float(found[name]) for name in found)


def test_variety_is_that_of_what_was_read_whatever_the_number_of_positions(x64):
    """As many sequences of Two Moons as a teacher rewrites at an evaluation: 66 kinds of tokens.

    A copier's different tokens are 3 % of the positions.
    """
    kinds = 66
    tokens = np.random.default_rng(0).permutation(np.arange(64 * 34) % kinds).reshape(64, 34)
    many = {"tokens": tokens, "mask": np.ones((64, 34))}
    scores = lambda said: {"inputs": 60 * np.eye(70)[said]}  # noqa: E731
    copier = watch(scores(tokens), many)
    assert float(copier["inputs_variety"]) == 1
    assert methods.has_collapsed(copier) == "inputs: the text is copied as it is"
    # Every token for another, and one kind more than was read: nothing is lacking.
    shifted = np.where(np.arange(34) == 0, 69, (tokens + 1) % kinds)
    assert float(watch(scores(shifted), many)["inputs_variety"]) == 1
    assert methods.has_collapsed(watch(scores(shifted), many)) == ""
    for few, collapsed in ((1, True), (16, True), (17, False)):
        found = watch(scores((tokens + 1) % few), many)
        np.testing.assert_allclose(found["inputs_variety"], few / kinds, rtol=1e-12)
        assert ("the same few tokens" in methods.has_collapsed(found)) == collapsed


def test_the_same_at_each_of_seven_positions_is_a_collapse(batch):
    assert batch["mask"].sum() == 7
    found = watch({"inputs": peaked(np.full((2, 4), 2))}, batch)
    assert methods.has_collapsed(found) == "inputs: the same few tokens are written everywhere"


def test_masks_are_watched_where_they_may_be(x64, batch):
    odds, may = np.log(np.full((2, 4), 3.0)), np.copy(batch["mask"])
    odds[0, 0], may[0, 0] = 50.0, 0
    scores = {"masked": np.stack([np.zeros_like(odds), odds], -1)}
    found = watch(scores, {**batch, "ordinary": may})
    np.testing.assert_allclose(found["mask_rate"], 0.75, rtol=1e-12)
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    np.testing.assert_allclose(found["masked_entropy"], entropy, rtol=1e-12)
    assert methods.has_collapsed({"mask_rate": 0.001}) == "masks: nearly nothing is masked"
    assert methods.has_collapsed({"mask_rate": 0.999}) == "masks: all is masked"


def test_panels_show_the_likeliest_of_distributions(batch):
    ids = {"ids": np.stack([batch["tokens"], np.ones((2, 4), int)], -1)}
    shares, weights = np.zeros((2, 4, 2)), np.zeros((2, 4))
    shares[..., 0], shares[0, 1], weights[0, 1] = 0.6, [0.1, 0.9], 0.9
    pseudo = {"tokens": {**ids, "shares": shares}, "labels": peaked(batch["tokens"])}
    pseudo["weights"] = weights
    said = methods.panels(batch, pseudo, lambda row: " ".join(map(str, row)), examples=1)
    assert said.splitlines() == ["x      3 4 5", "wrote  3 1 5", "labels . 4 ."]


def test_schedule_peaks_where_the_papers_do():
    peaks = ((0.08, 1000, 2.53e-3), (0.04, 10, 0.01265), (0.08, 10_000, 8e-4), (0.04, 100, 4e-3))
    for rate, warmup, peak in peaks:
        schedule = methods.inverse_sqrt(rate, warmup)
        counts = (0, warmup - 1, warmup, 4 * warmup - 1)
        first, highest, after, late = (np.asarray(schedule(count)) for count in counts)
        np.testing.assert_allclose(highest, peak, rtol=1e-3)
        np.testing.assert_allclose(late, highest / 2, rtol=1e-6)
        np.testing.assert_allclose(first, highest / warmup, rtol=1e-6)
        assert after < highest
    ending = methods.inverse_sqrt(1.0, 0, total=100)
    np.testing.assert_allclose(np.asarray(ending(0)), 1.0, atol=1e-7)
    np.testing.assert_allclose(np.asarray(ending(99)), 0.0, atol=1e-7)
    with pytest.raises(ValueError, match="no such schedule"):
        methods.inverse_sqrt(1.0, 100, total=50)
