"""Meta Pseudo Labels: a teacher labels examples, and learns from the student's labelled loss."""

from __future__ import annotations

from typing import Any

from jmeta.core.types import Array, Episode, Key, MetaGradient, PyTree
from jmeta.methods.baselines import Baseline, moving_average
from jmeta.methods.coefficients import Coefficient
from jmeta.methods.maml import TaskLoss
from jmeta.methods.rewriting import Network, class_labels
from jmeta.methods.students import Student
from jmeta.methods.teacher import Auxiliary
from jmeta.methods.teacher_hard import hard_teacher


def meta_pseudo_labels(
    student: Student,
    teacher: Network,
    *,
    coefficient: Coefficient = "loss_difference",
    baseline: Baseline | None = None,
    **options: Any,
) -> MetaGradient:
    r"""Meta Pseudo Labels: no support step, one drawn class for each unlabelled example.

    .. math:: \hat g = h \, \nabla_\phi \sum_b -\log T_\phi(\hat y_b \mid x_b), \qquad
        h = L(\theta_0) - L(\theta_1) - b \approx
        \eta \left\langle \nabla L(\theta_1), \nabla L_{pseudo}(\theta_0) \right\rangle

    ``coefficient="exact"`` gives each example the coefficient of its own gradient in place of one
    for all; ``"first_order"`` is then the same, as there is no support step. The released code
    multiplies :math:`h` by the cross-entropy of the teacher to its own distribution,
    :math:`CE(\mathrm{sg}[p], p)`, whose gradient is zero whatever :math:`h`; here labels are drawn.

    Args:
        student: what is pre-trained, on batches with ``labels`` ``[examples]`` and ``weights``;
            ``support_steps`` must be 0.
        teacher: ``(meta, batch, key) -> [examples, classes]`` scores.
        coefficient: as in ``hard_teacher``.
        baseline: ``moving_average(0.01)`` if None.
        **options: of ``hard_teacher``; ``auxiliary=labelled_auxiliary(loss)`` adds the teacher's
            own loss on the labelled data.

    Returns:
        A ``MetaGradient`` for meta = the teacher's parameters. Its episodes are
        ``Episode(unlabelled [N, examples, ...], Episode(None, labelled [N, 1, examples, ...]))``.

    Raises:
        ValueError: the student takes support steps.

    Example:
        >>> import optax
        >>> student = Student(None, lambda key: 0.0, optax.sgd(0.1), support_steps=0)
        >>> mg = meta_pseudo_labels(student, lambda meta, batch, key: batch["x"] @ meta)
        >>> mg.init(None, None).baseline  # of a moving average
        (Array(0., dtype=float32), Array(0., dtype=float32))

    Source: Pham et al., "Meta Pseudo Labels" (2021), equations 10-12.
    """
    if student.support_steps:
        raise ValueError(
            f"Meta Pseudo Labels scores the student as it is, but it has support_steps="
            f"{student.support_steps}; set 0, or use hard_teacher"
        )
    chosen = moving_average(0.01) if baseline is None else baseline
    return hard_teacher(
        student, class_labels(teacher), coefficient=coefficient, baseline=chosen, **options
    )


def labelled_auxiliary(loss: TaskLoss) -> Auxiliary:
    """The teacher's own loss on the labelled query of an episode, as an auxiliary loss.

    Args:
        loss: ``(meta, batch, key) -> (loss, aux)`` of a batch ``[tasks, examples, ...]``.

    Returns:
        ``(meta, episode, key) -> (loss, aux)``.

    Example:
        >>> auxiliary = labelled_auxiliary(lambda meta, batch, key: (meta * batch, {}))
        >>> auxiliary(2.0, Episode(None, Episode(None, 3.0)), None)[0]
        6.0
    """

    def auxiliary(meta: PyTree, episode: Episode, key: Key) -> tuple[Array, PyTree]:
        return loss(meta, episode.query.query, key)

    return auxiliary
