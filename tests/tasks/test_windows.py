from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from jmeta.tasks.windows import pair_windows, shares, windows

lengths, rooms, strides = st.integers(0, 60), st.integers(1, 20), st.integers(1, 30)


@given(lengths, rooms, strides)
def test_windows_cover_every_token_and_fit(length, room, stride):
    found = windows(length, room, stride)
    assert set().union(*(range(a, b) for a, b in found)) == set(range(length))
    assert all(b - a <= room for a, b in found)
    # Nothing is cut that fits, and no window lies inside the one before it.
    assert (len(found) == 1) == (length <= room)
    assert all(before[1] < after[1] for before, after in pairwise(found))
    starts = [a for a, _ in found]
    assert {b - a for a, b in pairwise(starts)} <= {min(stride, room)}


@given(lengths, lengths, st.integers(2, 20), strides)
def test_pairs_of_windows_cover_both_texts_and_fit(first, second, room, stride):
    found = pair_windows(first, second, room, stride)
    covered = [set().union(*(range(*side) for side in sides)) for sides in zip(*found, strict=True)]
    assert covered == [set(range(first)), set(range(second))]
    assert all((b - a) + (d - c) <= room for (a, b), (c, d) in found)
    assert len(set(found)) == len(found)
    assert (len(found) == 1) == (first + second <= room)


def test_shares_are_those_of_the_tokenizers_library():
    tokenizer = Tokenizer(models.WordLevel({"w": 0}, unk_token="w"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    for room in (2, 3, 7, 8):
        tokenizer.enable_truncation(room, strategy="longest_first")
        for first in range(12):
            for second in range(12):
                pair = tokenizer.encode("w " * first, "w " * second).sequence_ids
                assert shares(first, second, room) == (pair.count(0), pair.count(1))


def test_golden_windows():
    assert windows(0, 4, 2) == [(0, 0)]
    assert windows(9, 4, 3) == [(0, 4), (3, 7), (6, 9)]
    assert windows(9, 4, 100) == [(0, 4), (4, 8), (8, 9)]  # a longer stride would leave gaps
    assert pair_windows(5, 5, 4, 2) == [
        ((a, min(a + 2, 5)), (b, min(b + 2, 5))) for a in (0, 2, 4) for b in (0, 2, 4)
    ]


@pytest.mark.parametrize("bad", [(-1, 4, 2), (3, 0, 2), (3, 4, 0)])
def test_impossible_windows_are_errors(bad):
    with pytest.raises(ValueError, match="room for a token and a positive stride"):
        windows(*bad)
    with pytest.raises(ValueError, match="room for two tokens, not 1"):
        pair_windows(3, 3, 1, 1)
