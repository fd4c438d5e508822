"""The cost table: FLOPs counted by hand, errors of float32 gradients, Markdown."""

import collections
import itertools

import jax
import jax.numpy as jnp
import optax
import pytest

import jmeta
from jmeta import cost
from jmeta.testing import quadratic


def counted(function, *arguments):
    return cost.flops(jax.make_jaxpr(function)(*arguments))


def test_flops_of_what_can_be_counted_by_hand():
    a, b = jnp.ones((3, 4)), jnp.ones((4, 5))
    assert counted(jnp.dot, a, b) == 2 * 3 * 4 * 5
    assert counted(jax.jit(jnp.dot), a, b) == 120
    assert counted(jax.vmap(jnp.dot), jnp.ones((7, 3, 4)), jnp.ones((7, 4, 5))) == 7 * 120
    loop = lambda a: jax.lax.scan(lambda c, _: (c @ a, None), a, length=6)[0]  # noqa: E731
    assert counted(loop, jnp.ones((4, 4))) == 6 * 2 * 4**3
    branch = lambda a, b: jax.lax.cond(True, lambda: a @ b, lambda: jnp.ones((3, 5)))  # noqa: E731
    assert counted(branch, a, b) == 120
    image, kernel = jnp.ones((2, 3, 8, 8)), jnp.ones((5, 3, 3, 3))
    convolve = lambda x, k: jax.lax.conv(x, k, (1, 1), "VALID")  # noqa: E731
    assert counted(convolve, image, kernel) == 2 * (2 * 5 * 6 * 6) * (3 * 3 * 3)
    assert counted(jax.checkpoint(jnp.dot), a, b) == 120
    assert counted(lambda a: a + 1, a) == 0


def test_a_table_reports_errors_against_float64():
    q = quadratic()
    reference = cost.exact_reference(q.problem, 4, q.meta, q.episode)
    rows = cost.table(q.problem, 4, q.meta, q.episode, repeats=1, reference=reference)
    errors = {row.name: row.error for row in rows}
    for name in ("mixed_mode", "mixed_mode nested", "unrolled", "unrolled step"):
        assert errors[name] < 1e-5
    assert errors["first_order"] > 1e-2
    text = cost.markdown(rows).splitlines()
    assert len(text) == 2 + len(rows)
    assert text[2].startswith("| first_order |")
    with pytest.raises(ValueError, match="'nobody' is not among the estimators: first_order"):
        cost.markdown(rows, "nobody")


def test_a_table_leaves_reptile_out_where_it_is_undefined():
    def loss(fast, meta, batch, key):
        return jnp.sum((fast["head"] * meta["body"]) ** 2), {}

    problem = jmeta.Problem(
        loss, loss, lambda m: optax.sgd(0.1), init=lambda m, key: {"head": m["head"]}
    )
    meta = {"head": jnp.ones(2), "body": jnp.ones(2)}
    rows = cost.table(problem, 1, meta, jmeta.Episode(0.0, 0.0), repeats=0)
    assert "reptile" not in [row.name for row in rows]
    assert "mixed_mode" in [row.name for row in rows]


def test_flops_leave_out_what_no_output_needs():
    w = jnp.ones((4, 4))

    def loop(w):
        def body(x, _):
            return w @ x, w.T @ x  # the second is stacked, and read by nobody

        return jax.lax.scan(body, w, length=3)[0]

    assert cost.flops(jax.make_jaxpr(loop)(w)) == 3 * 2 * 4**3


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 10])
def test_in_turns_everyone_follows_every_other_equally_often(count):
    turns = count if count % 2 == 0 else 2 * count
    after = collections.Counter()
    for number in range(turns):
        order = cost.turn(range(count), number)
        assert sorted(order) == list(range(count))
        after.update(itertools.pairwise(order))
    expected = 1 if count % 2 == 0 else 2
    pairs = itertools.permutations(range(count), 2)
    assert after == dict.fromkeys(pairs, expected)


@pytest.mark.parametrize("count", [2, 3])
def test_programs_run_in_these_turns(count):
    ran = []
    programs = {
        name: cost.Program(lambda meta, name=name: ran.append(name), 0, 0.0, 0.0, 0.0)
        for name in range(count)
    }
    seconds, _ = cost.interleave(programs, dict.fromkeys(programs, (None,)), 4)
    assert [len(values) for values in seconds.values()] == [4] * count
    turns = [ran[count * number : count * (number + 1)] for number in range(5)]
    assert turns == [cost.turn(range(count), number) for number in range(5)]
    assert len({tuple(order) for order in turns}) > 1
