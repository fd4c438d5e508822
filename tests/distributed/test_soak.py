"""A few random kills; ``benchmarks/kill_soak.py`` has fifty."""

import numpy as np
import pytest

from benchmarks.kill_soak import soak


@pytest.mark.slow
def test_kills_at_random_moments_cost_only_time(tmp_path):
    found = soak(tmp_path, kills=5, steps=150, rng=np.random.default_rng())
    assert found["completed_checkpoints_lost"] == 0, found
    assert found["examples_repeated"] == found["examples_skipped"] == 0, found
    assert found["same_examples_in_the_same_order"], found
    assert found["steps_that_saw_two_batches"] == 0, found
    assert found["final_state_equal_bit_for_bit"], found
