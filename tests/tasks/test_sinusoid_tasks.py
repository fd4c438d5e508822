import numpy as np
import pytest

from jmeta.tasks.sinusoid import sinusoids


def test_every_task_lies_on_one_wave_in_the_papers_range():
    batch = sinusoids(tasks=200, shots=6, queries=9)(0, 0)
    x = np.concatenate([batch.support["x"], batch.query["x"]], 1)[..., 0].astype(np.float64)
    y = np.concatenate([batch.support["y"], batch.query["y"]], 1)[..., 0].astype(np.float64)
    assert -5 <= x.min() < -4.9
    assert 4.9 < x.max() <= 5
    amplitudes, phases = [], []
    for xs, ys in zip(x, y, strict=True):
        # a sin(x - p) = a cos(p) sin x - a sin(p) cos x: linear in two unknowns
        features = np.stack([np.sin(xs), -np.cos(xs)], 1)
        (c, s), residual = np.linalg.lstsq(features, ys, rcond=None)[:2]
        assert residual.sum() < 1e-9
        amplitudes.append(np.hypot(c, s))
        phases.append(np.arctan2(s, c))
    assert 0.1 <= min(amplitudes) < 0.3
    assert 4.8 < max(amplitudes) <= 5.0001
    assert -1e-4 < min(phases) < 0.1
    assert np.pi - 0.1 < max(phases) < np.pi + 1e-4
    assert abs(np.mean(amplitudes) - 2.55) < 4 * 4.9 / np.sqrt(12 * 200)


def test_a_function_of_seed_step_and_task():
    small, large = sinusoids(tasks=2), sinusoids(tasks=5)
    np.testing.assert_array_equal(small(3, 4).query["y"], large(3, 4).query["y"][:2])
    assert not np.array_equal(small(3, 4).query["y"], small(3, 5).query["y"])
    assert small(3, 4).support["mask"].all()
    with pytest.raises(ValueError, match="tasks=0"):
        sinusoids(tasks=0)
