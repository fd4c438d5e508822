"""The probe names the leaves that an optimizer would poison, and passes those it would not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from jmeta.core import optim, optim_probe

PARAMS = {"embed": jnp.ones((3, 2)), "dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
ALL = {"embed", "dense.kernel", "dense.bias"}


@pytest.fixture
def reports(monkeypatch):
    """What ``check`` is told by ``probe``: one run of it serves the tests of both."""
    found = []

    def recorded(*args, **options):
        found.append((options, optim.probe(*args, **options)))
        return found[-1][1]

    monkeypatch.setattr(optim_probe, "probe", recorded)
    return found


@pytest.mark.parametrize(
    ("optimizer", "entries", "whole", "advice"),
    [
        (optax.adam(0.1), ALL, ALL, r"eps_root=1e-16"),
        (optax.amsgrad(0.1), ALL, ALL, "use amsgrad"),
        (optax.adafactor(0.1), ALL, ALL, "use adafactor"),
        (contrib.muon(0.1), {"dense.bias"}, ALL, "use muon"),
        (optax.lars(0.1), set(), ALL, "use lars"),
        (optax.rmsprop(0.1, eps_in_sqrt=False), ALL, ALL, "eps_in_sqrt=True"),
        (
            optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
            set(),
            ALL,
            "clip_by_global_norm",
        ),
        (
            optax.partition(
                {"a": optax.adam(0.1), "s": optax.sgd(0.1)},
                {"embed": "s", "dense": {"kernel": "a", "bias": "s"}},
            ),
            {"dense.kernel"},
            {"dense.kernel"},
            "eps_root=1e-16",
        ),
    ],
)
def test_the_poisoned_leaves_are_named(optimizer, entries, whole, advice, reports):
    with pytest.raises(ValueError, match=advice) as error:
        optim.check(optimizer, PARAMS)
    ((_, report),) = reports
    assert {leaf.path for leaf in report.bad if leaf.case == "entries"} == entries
    assert {leaf.path for leaf in report.bad if leaf.case == "whole leaf"} == whole
    assert all(name in str(error.value) for name in entries | whole)


@pytest.mark.parametrize(
    "make",
    [
        optax.sgd, optim.adam, optim.nadamw, optim.amsgrad, optim.radam, optim.lamb, optim.lars,
        optim.adafactor, optim.muon, optim.adam_stopped, optim.clip_by_global_norm,
    ],
)  # fmt: skip
def test_the_safe_ones_pass(make, reports):
    assert optim.check(make(0.1), PARAMS, steps=3) is None
    ((options, report),) = reports
    assert options["steps"] == 3
    assert report.ok


def test_the_size_is_the_derivative_at_zero():
    # One step of Adam at g = 0 has derivative lr / (sqrt(eps_root) + eps).
    report = optim.probe(optim.adam(0.1, eps=1e-6, eps_root=1e-10), PARAMS, steps=1)
    sizes = [leaf.size for leaf in report.leaves if leaf.case == "whole leaf"]
    np.testing.assert_allclose(sizes, 0.1 / (1e-5 + 1e-6), rtol=1e-3)


def test_finite_but_huge_is_named_by_the_bound():
    assert optim.probe(optim.adam(0.1), PARAMS).ok
    report = optim.probe(optim.adam(0.1), PARAMS, bound=1e4)
    assert {leaf.path for leaf in report.bad} == ALL
    assert "finite but large" in report.advice
    assert optim.probe(optim.adam_stopped(0.1), PARAMS, bound=1e4).ok


def test_it_runs_under_strict_promotion_and_float64(x64):
    params = jax.tree.map(lambda x: x.astype(jnp.float64), PARAMS)
    assert not optim.probe(optax.adam(0.1), params).ok
    assert optim.probe(optim.adam(0.1), params).ok


def test_what_cannot_be_differentiated_is_refused():
    with pytest.raises(ValueError, match=r"ids \(int32\)"):
        optim.probe(optax.sgd(0.1), {"ids": jnp.arange(3)})
    with pytest.raises(ValueError, match="at least 1"):
        optim.probe(optax.sgd(0.1), PARAMS, steps=0)
