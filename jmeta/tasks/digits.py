"""scikit-learn's handwritten digits, 8 x 8 pixels, as a few-shot source: real, and always at hand.

Ten classes are few: split them, so that episodes of the test part show digits never trained on.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from jmeta.tasks.episodes import FewShot, subset


def digits(classes: Iterable[int] = range(10)) -> FewShot:
    """The 1,797 digits of scikit-learn (the test part of the UCI set), or some of the classes.

    Args:
        classes: which digits, in the order of their class ids: ``range(6)`` to train,
            ``range(6, 10)`` to test.

    Returns:
        A source with ``x`` float32 ``[n, 8, 8, 1]`` in [0, 1] (ink is 1).

    Example:
        >>> digits(range(6, 10)).names
        ('6', '7', '8', '9')
    """
    from sklearn.datasets import load_digits

    images, labels = map(np.asarray, load_digits(return_X_y=True))
    x = (images.reshape(-1, 8, 8, 1) / 16).astype(np.float32)
    everything = FewShot(x, labels.astype(np.int64), tuple(str(digit) for digit in range(10)))
    return subset(everything, [str(digit) for digit in classes])
