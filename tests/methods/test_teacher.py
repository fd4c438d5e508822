"""Soft teachers against loops by hand, central differences and closed forms, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick_numbers import differences, flat, relative_error, softmax
from teacher_world import (
    BOTH,
    VOCAB,
    at,
    episodes,
    estimated,
    labelled,
    loss,
    masked_pair,
    rows,
    scored,
    start,
    student,
    teacher,
    teacher_params,
    text,
)

from jmeta import Episode, Steps, methods, mixed_mode_grad, optim, reverse_grad
from jmeta.methods import relaxations

pytestmark = pytest.mark.usefixtures("x64")


# The same estimator where the same is asked for, so that it is compiled once.
soft_teacher = functools.cache(methods.soft_teacher)


def floats(tree):
    return jax.tree.map(lambda x: np.asarray(x, float), tree)


@functools.cache
def adamw():
    return optim.adamw(0.05, 0.9, 0.98, 1e-6, weight_decay=0.01)


def odds(meta, batch, key):
    return meta["odds"][batch["tokens"]]


def soft_batch(meta, batch, kind):
    """What each kind of teacher writes, by hand."""
    tokens, mask = batch["tokens"], batch["mask"]
    if kind == "masks":
        p = jax.nn.sigmoid(meta["odds"][tokens])
        mixed = (1 - p)[..., None] * jax.nn.one_hot(tokens, VOCAB, dtype=p.dtype)
        mixed = mixed + p[..., None] * jax.nn.one_hot(jnp.ones_like(tokens), VOCAB, dtype=p.dtype)
        return {"tokens": mixed, "mask": mask, "labels": tokens, "weights": p * mask}
    p = jax.tree.map(lambda s: jax.nn.softmax(s[tokens], axis=-1), meta)
    labels = p["labels"] if kind == "both" else tokens
    return {"tokens": p["inputs"], "mask": mask, "labels": labels, "weights": mask}


KINDS = {
    "both": BOTH,
    "inputs": methods.inputs_only(teacher),
    "masks": methods.masks_only(odds, mask_token=1),
}


def by_hand(meta, data, kind, optimizer, steps=1):
    """The mean query loss over micro-batches, by loops."""

    def one(episode):
        params, state = start(), optimizer.init(start())
        for t in range(steps):
            batch = at(episode.support.batches, t) if steps > 1 else episode.support
            pseudo = soft_batch(meta, batch, kind)
            slope = jax.grad(lambda p, b=pseudo: loss(p, b, None)[0])(params)
            updates, state = optimizer.update(slope, state, params)
            params = optax.apply_updates(params, updates)
        return scored(params, episode)

    return jnp.mean(jax.vmap(one)(data))


def params_of(kind):
    return {"odds": np.linspace(-1.0, 1.0, VOCAB)} if kind == "masks" else teacher_params()


@pytest.mark.parametrize(
    ("kind", "steps"),
    [("both", 1), ("inputs", 2), pytest.param("masks", 1, marks=pytest.mark.slow)],
)
def test_soft_gradient_is_that_of_the_loop_and_of_central_differences(kind, steps):
    lead = (2, steps, 2) if steps > 1 else (2, 2)
    unlabelled = text(*lead)
    data = episodes(unlabelled=Steps(unlabelled) if steps > 1 else unlabelled)
    meta, optimizer = params_of(kind), adamw() if kind == "both" else optax.sgd(0.3)
    exact, mixed = (
        estimated(soft_teacher(student(optimizer), KINDS[kind], steps=steps, grad=grad), meta, data)
        for grad in (reverse_grad, mixed_mode_grad)
    )
    assert relative_error(mixed[0], exact[0]) < 1e-10
    value = jax.jit(lambda m: by_hand(m, data, kind, optimizer, steps))
    # A slope of 1e-5 of a value near one: a wider step than usual, for what rounding leaves; at
    # 1e-4 the third derivative shows.
    assert relative_error(exact[0], differences(value, meta, step=5e-5)) < 1e-6
    assert abs(float(exact[2].loss - value(meta))) < 1e-12
    if kind == "inputs":  # the labels are the text itself: that head learns nothing
        assert (np.asarray(exact[0]["labels"]) == 0).all()
        assert np.abs(np.asarray(exact[0]["inputs"])).max() > 1e-6


def test_gradient_of_a_soft_label_has_its_closed_form():
    """-eta d/dy <v, grad CE(y)>, with v the slope of the score at the student after its step."""
    task, words = episodes(micro=1, tasks=1), at(text(1, 2), 0)
    p = {name: softmax(table[words["tokens"]]) for name, table in teacher_params().items()}
    single, pseudo = at(task, 0), {"tokens": p["inputs"], "labels": p["labels"]}
    pseudo |= {"mask": words["mask"], "weights": words["mask"]}

    def after(y):
        batch = {**pseudo, "labels": y}
        slope = jax.grad(lambda p: loss(p, batch, None)[0])(start())
        return jax.tree.map(lambda p, g: p - 0.3 * g, start(), slope)

    def closed(y):
        v = jax.grad(scored)(after(y), single)

        def product(y):
            slope = jax.grad(lambda p: loss(p, {**pseudo, "labels": y}, None)[0])(start())
            return sum(
                jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (v, slope)), strict=True)
            )

        return -0.3 * jax.grad(product)(y)

    whole = methods.Rewriting(
        lambda meta, batch, key: {"y": meta[0]},
        lambda made, batch: {**at(pseudo, slice(None)), "labels": made["y"]},
        lambda batch: batch["mask"],
    )
    mg = soft_teacher(student(), whole, relax=relaxations.unevaluated)
    grads, _, _ = estimated(mg, pseudo["labels"][None], task)
    assert relative_error(grads[0], jax.jit(closed)(pseudo["labels"])) < 1e-12


def test_a_peaked_teacher_is_the_hard_path_exactly():
    tokens = {name: text(1, 2, seed=s)["tokens"] for name, s in (("inputs", 5), ("labels", 6))}
    data = episodes(micro=1)

    def peaked(meta, batch, key):
        return jax.tree.map(lambda t: meta * jax.nn.one_hot(t[0], VOCAB, dtype=meta.dtype), tokens)

    mg = soft_teacher(student(), methods.inputs_and_labels(peaked))
    _, state, info = estimated(mg, np.asarray(60.0), data)  # 1 + exp(-60) is 1
    hard = {"tokens": tokens["inputs"][0], "mask": np.ones((2, 2))}
    hard |= {"labels": tokens["labels"][0], "weights": hard["mask"]}

    @jax.jit
    def expected(hard):
        slope = jax.grad(lambda p: loss(p, hard, None)[0])(start())
        params = jax.tree.map(lambda p, g: p - 0.3 * g, start(), slope)
        return params, scored(params, at(data, 0))

    params, value = expected(hard)
    assert abs(float(info.loss - value)) < 1e-14
    assert relative_error(state.student.fast, params) < 1e-14


def test_the_student_follows_the_mean_gradient_and_lives_on():
    data, meta, optimizer = episodes(), teacher_params(), adamw()
    mg = soft_teacher(student(optimizer), BOTH, steps=1, grad=mixed_mode_grad)
    found = estimated(mg, meta, data)

    @jax.jit
    def expected(meta):
        pseudo = soft_batch(meta, data.support, "both")
        mean = lambda p: jnp.mean(jax.vmap(lambda b: loss(p, b, None)[0])(pseudo))  # noqa: E731
        updates, state = optimizer.update(jax.grad(mean)(start()), optimizer.init(start()), start())
        return optax.apply_updates(start(), updates), state

    got = (found[1].student.fast, found[1].student.opt_state)
    assert relative_error(floats(got), floats(expected(meta))) < 1e-12
    assert int(found[1].student.step) == 1
    # a few micro-batches at a time: the same gradient, student and numbers
    again = estimated(soft_teacher(student(optimizer), BOTH, microbatch=1), meta, data)
    assert relative_error(again[0], found[0]) < 1e-12
    assert relative_error(floats(again[1].student), floats(found[1].student)) < 1e-12


def test_first_order_leaves_out_the_hessians_of_the_student():
    data, meta = episodes(micro=1, tasks=1), teacher_params()
    mg = soft_teacher(student(), BOTH, grad=methods.direct_grad)
    grads, _, _ = estimated(mg, meta, data)
    single = at(data, 0)
    task = at(single.query, 0)

    def after(meta):
        batch = soft_batch(meta, single.support, "both")
        slope = jax.grad(lambda p: loss(p, batch, None)[0])(start())
        return jax.tree.map(lambda p, g: p - 0.3 * g, start(), slope)

    def adapted(params):
        slope = jax.grad(lambda p: loss(p, task.support, None)[0])(params)
        return jax.tree.map(lambda p, g: p - 0.2 * g, params, slope)

    @jax.jit
    def expected(meta):
        v = jax.grad(lambda p: loss(p, task.query, None)[0])(adapted(after(meta)))
        return jax.vjp(after, meta)[1](v)[0]

    assert relative_error(grads, expected(meta)) < 1e-12


def test_auxiliary_losses_are_added_weighted_and_compared():
    data, meta = episodes(unlabelled=masked_pair(text(2, 2))), teacher_params()
    auxiliary = methods.mlm_auxiliary(methods.two_head_loss(teacher))
    both = soft_teacher(student(), BOTH, auxiliary=auxiliary, meta_weight=3.0)
    grads, _, info = estimated(both, meta, data)
    # The same texts, whose corruptions only the auxiliary loss reads.
    alone, _, _ = estimated(soft_teacher(student(), BOTH), meta, episodes())
    mean = lambda m: jnp.mean(jax.vmap(lambda e: auxiliary(m, e, None)[0])(data))  # noqa: E731
    helped = jax.jit(jax.grad(mean))(meta)
    alone, helped = jax.tree.map(np.asarray, (alone, helped))
    total = jax.tree.map(lambda a, b: 3 * a + b, alone, helped)
    assert relative_error(grads, total) < 1e-12
    a, b = flat(alone), flat(helped)
    cosine = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
    assert abs(float(info.diagnostics["cosine"]) - cosine) < 1e-12


def test_a_teacher_that_answers_right_has_no_auxiliary_loss():
    batch = masked_pair(text(3))
    pair, found = batch["masked"], []
    hidden = pair["weights"] > 0

    def right(meta, read, key):
        found.append(np.asarray(read["tokens"]))
        labels = batch["tokens"]
        if len(found) == 2:  # a corruption is answered where something is hidden, and only there
            labels = np.where(hidden, labels, (labels + 1) % VOCAB)
        answers = {"inputs": pair["tokens"], "labels": labels}
        return jax.tree.map(lambda t: 60 * jax.nn.one_hot(t, VOCAB, dtype=float), answers)

    auxiliary = methods.mlm_auxiliary(methods.two_head_loss(right))
    value, parts = auxiliary(None, Episode(batch), None)
    assert float(value) < 1e-12
    assert set(parts) == {"written", "answered"}
    np.testing.assert_array_equal(found[0], batch["tokens"])  # reads the text, then its corruption
    np.testing.assert_array_equal(found[1], pair["tokens"])
    with pytest.raises(ValueError, match="its entry 'masked' is missing"):
        auxiliary(None, Episode(text(3)), None)


def padded(tree):
    def pad(path, leaf):
        fill = 2 if path[-1].key in ("tokens", "labels") else 0
        return np.pad(leaf, [(0, 0)] * (leaf.ndim - 1) + [(0, 2)], constant_values=fill)

    return jax.tree_util.tree_map_with_path(pad, tree)


@pytest.mark.parametrize("kind", ["both", "masks"])
def test_pads_change_nothing(kind):
    mg, meta = soft_teacher(student(), KINDS[kind]), params_of(kind)
    plain, more = (estimated(mg, meta, data) for data in (episodes(), padded(episodes())))
    assert relative_error(more[0], plain[0]) < 1e-12
    assert abs(float(more[2].loss - plain[2].loss)) < 1e-12


def test_labels_that_do_not_count_are_no_class():
    """MLM as a labelled task: only the label's own weight decides, never the mask of the input."""
    data, meta = episodes(), teacher_params()
    few = jax.tree.map(np.copy, data.query)
    for batch in few:
        batch["weights"][..., 1] = 0
        batch["labels"][..., 1] = 0  # [PAD], as in an MLM example
    other = jax.tree.map(np.copy, few)
    for batch in other:
        batch["labels"][..., 1] = 2
    # the bug: every token counts, so that most of the target says [PAD]
    bug = Episode(*({**batch, "weights": batch["mask"]} for batch in few))
    mg = soft_teacher(student(), BOTH)
    right, same, wrong = (estimated(mg, meta, data._replace(query=q)) for q in (few, other, bug))
    assert relative_error(same[0], right[0]) < 1e-14
    assert relative_error(wrong[0], right[0]) > 0.1
    # with the bug the labels of what is not asked for are learned
    bug = Episode(*({**batch, "weights": batch["mask"]} for batch in other))
    assert relative_error(estimated(mg, meta, data._replace(query=bug))[0], wrong[0]) > 0.1


def test_relaxations_and_forbidden_words():
    scores, key = np.asarray([[0.3, -1.0, 2.0]]), jax.random.key(0)
    hard = relaxations.gumbel_softmax(0.5, hard=True)
    p = softmax(scores[0])

    @jax.jit
    def slopes(scores):
        through = jax.jacobian(lambda s: relaxations.straight_through(s, key)[0])(scores)
        return through, jax.jacobian(lambda s: jax.nn.softmax(s[0]))(scores)

    through, soft = slopes(scores)
    assert relative_error(through, soft) < 1e-15
    many = np.repeat(scores, 20_000, axis=0)
    for drawn in jax.jit(lambda s: (relaxations.straight_through(s, key), hard(s, key)))(many):
        drawn = np.asarray(drawn)
        assert np.abs(drawn.max(-1) - 1).max() < 1e-12
        np.testing.assert_allclose(drawn.mean(0), p, atol=4 * 0.5 / 20_000**0.5)
    cold, chosen = (
        jax.jit(relaxations.gumbel_softmax(*heat, **options))(scores, key)
        for heat, options in (((1e-3,), {}), ((), {"hard": True}))
    )
    np.testing.assert_allclose(cold, chosen, atol=1e-6)
    with pytest.raises(ValueError, match="must be positive"):
        relaxations.gumbel_softmax(0.0)
    with pytest.raises(ValueError, match=r"needs a jax\.random\.key"):
        relaxations.straight_through(scores, None)
    with pytest.raises(ValueError, match="vocabulary of 3"):
        methods.without(teacher, [3])(teacher_params(), text(1), None)


def test_students_restart_and_take_turns():
    data, meta, key = episodes(micro=1, tasks=1), teacher_params(), jax.random.key(0)
    mg = methods.restarting(soft_teacher(student(), BOTH), every=2)
    step = jax.jit(mg.estimate)
    state, steps = mg.init(meta, key), []
    for _ in range(5):
        _, state, _ = step(meta, state, data, key)
        steps.append(int(state[0].student.step))
    assert steps == [1, 2, 1, 2, 1]

    many = methods.population(soft_teacher(student(), BOTH), size=3)
    state, step = jax.jit(many.init)(meta, key), jax.jit(many.estimate)
    for i in range(6):
        before = np.asarray(state.student.step)
        _, state, _ = step(meta, state, data, jax.random.key(i))
        assert sorted(np.asarray(state.student.step) - before) == [0, 0, 1]
    assert (np.asarray(state.student.step) > 0).sum() > 1
    with pytest.raises(ValueError, match="draws its students"):
        many.init(meta, None)


def test_mistakes_in_the_data_are_named():
    data = episodes()
    mg, meta = soft_teacher(student(), BOTH), teacher_params()
    check = lambda data: methods.check_teacher(data, vocabulary=VOCAB, positions=2)  # noqa: E731
    check(data)
    query = data.query

    def changed(**entries):
        return data._replace(query=query._replace(support={**query.support, **entries}))

    with pytest.raises(ValueError, match="needs the same leading axis of micro-batches"):
        mg.estimate(meta, mg.init(meta, None), data._replace(support=text(3, 2)), None)
    with pytest.raises(TypeError, match="its query is a dict"):
        mg.estimate(meta, mg.init(meta, None), Episode(data.support, labelled(2, 1, 2)), None)
    with pytest.raises(TypeError, match="its query is missing"):
        check(Episode(data.support))
    none = {k: v for k, v in query.support.items() if k != "labels"}
    with pytest.raises(ValueError, match="the labelled support has no labels"):
        check(data._replace(query=query._replace(support=none)))
    weights = np.copy(query.support["weights"])
    weights[1, 0] = 0
    with pytest.raises(ValueError, match=r"task \[1, 0\].*has no label that counts"):
        check(changed(weights=weights))
    labels = np.copy(query.support["labels"])
    labels[0, 1, 1, 0] = 7
    with pytest.raises(ValueError, match=r"label at \[0, 1, 1, 0\] .* is 7: the vocabulary has 3"):
        check(changed(labels=labels))
    with pytest.raises(ValueError, match="texts of 3 tokens, and the models take 2"):
        check(data._replace(support=text(2, 2, time=3)))


def test_rows_of_the_tiny_student_agree():
    table, tokens = start()["embed"], text(4)["tokens"]
    found = jax.jit(rows)
    np.testing.assert_array_equal(found(table, np.eye(VOCAB)[tokens]), found(table, tokens))
