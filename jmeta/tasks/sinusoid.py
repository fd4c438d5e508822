"""Few-shot regression of sine waves: the toy of the MAML paper.

Each task is a wave of its own amplitude and phase, seen at a few points.
"""

from __future__ import annotations

import numpy as np

from jmeta.core.types import Episode
from jmeta.tasks.episodes import Sample, task_generator


def sinusoids(*, tasks: int, shots: int = 10, queries: int = 10) -> Sample:
    r"""Sine waves with random amplitude and phase, as a function of (seed, step).

    .. math::
        y = a \sin(x - \phi), \quad a \sim U[0.1, 5], \; \phi \sim U[0, \pi], \; x \sim U[-5, 5]

    Args:
        tasks: waves per batch.
        shots: support points of each.
        queries: query points of each.

    Returns:
        ``(seed, step) -> Episode`` of numpy batches ``{"x", "y", "mask"}``: ``x`` and ``y``
        float32 ``[tasks, points, 1]``, ``mask`` float32 ``[tasks, points]``, all ones.

    Example:
        >>> sinusoids(tasks=4, shots=5)(0, 0).support["x"].shape
        (4, 5, 1)

    Reference:
        Finn, Abbeel and Levine 2017, "Model-Agnostic Meta-Learning", section 5.1.
    """
    if tasks < 1 or shots < 0 or queries < 0:
        raise ValueError(f"tasks={tasks}, shots={shots}, queries={queries}: none may be negative")
    points = shots + queries

    def sample(seed: int, step: int) -> Episode:
        uniform = np.stack(
            [task_generator(seed, step, task).random(2 + points) for task in range(tasks)]
        )
        amplitude, phase = 0.1 + 4.9 * uniform[:, :1], np.pi * uniform[:, 1:2]
        x = 10 * uniform[:, 2:] - 5
        y = amplitude * np.sin(x - phase)

        def batch(part: slice) -> dict[str, np.ndarray]:
            inputs = x[:, part, None].astype(np.float32)
            targets = y[:, part, None].astype(np.float32)
            return {"x": inputs, "y": targets, "mask": np.ones(inputs.shape[:2], np.float32)}

        return Episode(support=batch(slice(0, shots)), query=batch(slice(shots, None)))

    return sample
