"""Path globs, and trees that are taken apart and put together again."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jmeta
from jmeta.core.tree import matches, merge, names, partition, require_inexact, select


class Pair(NamedTuple):
    first: Any
    second: Any


@pytest.mark.parametrize(
    ("glob", "name", "expected"),
    [
        ("head", "head", True),
        ("head", "head.w", False),
        ("head.**", "head", True),  # ** stands for no part at all, too
        ("head.**", "head.w", True),
        ("head.**", "head.a.b.w", True),
        ("head.**", "header.w", False),
        ("**", "a.b", True),
        ("**.w", "w", True),
        ("**.w", "a.b.w", True),
        ("**.w", "a.b.ww", False),
        ("a.**.w", "a.w", True),
        ("a.**.w", "a.b.c.w", True),
        ("a.**.w", "b.a.w", False),
        ("*.w", "a.w", True),
        ("*.w", "a.b.w", False),  # * never crosses a dot
        ("*.w", "w", False),
        ("blocks.*.mlp.**", "blocks.0.mlp.up.kernel", True),
        ("blocks.*.mlp.**", "blocks.mlp.up", False),
        ("ln*.scale", "ln1.scale", True),
        ("ln?.scale", "ln1.scale", True),
        ("ln?.scale", "ln.scale", False),
        ("ln?.scale", "ln10.scale", False),
        ("l[1].w", "l[1].w", True),  # brackets and other characters stand for themselves
        ("l[1].w", "l1.w", False),
        ("a+.w", "aa.w", False),
        ("**", ".", True),  # a tree that is one leaf
        (".", ".", True),
        ("*", ".", False),
    ],
)
def test_globs(glob, name, expected):
    assert matches(name, glob) is expected


leaves = st.integers(-5, 5).map(float)
trees = st.recursive(
    leaves,
    lambda children: (
        st.dictionaries(st.sampled_from(["a", "b", "w", "blocks"]), children, max_size=3)
        | st.lists(children, max_size=3)
        | st.tuples(children, children)
        | st.builds(Pair, children, children)
    ),
    max_leaves=12,
)
globs = st.lists(
    st.sampled_from(["a", "b", "w", "*", "**", "?", "blocks", "0", "1", "first"]),
    min_size=1,
    max_size=4,
).map(".".join)


@given(trees, globs)
@settings(max_examples=150, deadline=None)
def test_partition_and_merge_are_inverse_on_any_tree(tree, glob):
    chosen = [name for name in names(tree) if matches(name, glob)]
    if not chosen:
        with pytest.raises(ValueError, match="matches no leaf"):
            partition(tree, glob)
        return
    picked, rest = partition(tree, glob)
    assert names(picked) == chosen
    assert len(jax.tree.leaves(rest)) == len(jax.tree.leaves(tree)) - len(chosen)
    for parts in ((picked, rest), (rest, picked)):
        whole = merge(*parts)
        assert whole == tree
        assert jax.tree.structure(whole) == jax.tree.structure(tree)


@given(trees, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_a_tree_in_three_parts_is_merged_from_all_of_them(tree, random):
    where = {name: random.randrange(3) for name in names(tree)}
    parts = [select(tree, lambda name, i=i: where[name] == i)[0] for i in range(3)]
    assert merge(*parts) == tree


def test_several_globs_select_their_union():
    tree = {"a": 1.0, "b": 2.0, "c": 3.0}
    picked, rest = partition(tree, "a", "c")
    assert picked == {"a": 1.0, "b": None, "c": 3.0}
    assert rest == {"a": None, "b": 2.0, "c": None}


def test_a_glob_that_matches_nothing_names_the_closest_paths():
    tree = {"encoder": {"head": {"kernel": 1.0}}, "decoder": {"bias": 2.0}}
    with pytest.raises(ValueError, match=r"'head\.\*\*' matches no leaf.*'encoder\.head\.kernel'"):
        partition(tree, "head.**")
    with pytest.raises(ValueError, match="the tree is empty"):
        partition({}, "head.**")
    with pytest.raises(ValueError, match="'hed' matches no leaf"):  # though the other glob matches
        partition(tree, "decoder.**", "hed")


def test_merge_refuses_a_place_held_twice_and_names_it():
    with pytest.raises(ValueError, match=r"'a\.w' is held by 2 of the trees"):
        merge({"a": {"w": 1.0, "b": None}}, {"a": {"w": 2.0, "b": 3.0}})


def test_partition_works_inside_jit_and_keeps_gradients_apart():
    params = {"body": {"w": jnp.ones(2)}, "head": {"w": jnp.full(2, 3.0)}}

    @jax.jit
    def slope(params):
        head, body = partition(params, "head.**")
        return jax.grad(lambda h: jnp.sum(merge(h, body)["head"]["w"] * body["body"]["w"]))(head)

    assert jax.tree.leaves(slope(params))[0].tolist() == [1.0, 1.0]
    assert slope(params)["body"] == {"w": None}


@pytest.mark.parametrize(
    ("leaf", "dtype"),
    [
        (jnp.arange(3), "int32"),
        (3, "int32"),
        (jnp.ones(2, bool), "bool"),
        (jax.random.key(0), "key<fry>"),
    ],
)
def test_a_leaf_without_a_gradient_is_named(leaf, dtype):
    with pytest.raises(TypeError, match=rf"'a\.step' of meta has dtype {dtype}.*partition"):
        require_inexact({"a": {"step": leaf, "w": jnp.ones(2)}})


def test_every_estimator_refuses_integer_meta_leaves_by_name():
    def loss(fast, meta, batch, key):
        return jnp.sum(fast["w"] ** 2), {}

    problem = jmeta.Problem(loss, loss, lambda meta: optax.sgd(0.1))
    meta = {"w": jnp.ones(2), "counts": {"seen": jnp.zeros(2, jnp.int32)}}
    makers = (
        jmeta.unrolled,
        jmeta.first_order,
        jmeta.mixed_mode,
        jmeta.reptile,
        jmeta.implicit,
        jmeta.forward,
        jmeta.evolution,
        lambda p, s: jmeta.truncated(p, s, window=1),
    )
    for make in makers:
        mg = make(problem, 1)
        with pytest.raises(TypeError, match=r"'counts\.seen' of meta has dtype int32"):
            mg.init(meta, jax.random.key(0))
        with pytest.raises(TypeError, match=r"'counts\.seen' of meta has dtype int32"):
            mg.estimate(meta, (), jmeta.Episode(0.0, 0.0), jax.random.key(0))
