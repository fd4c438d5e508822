"""``fit`` around jmeta's own estimators and loader: MAML on linear tasks, resumed and annealed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmeta
from jmeta.data.loader import episode_loader
from jmeta.runtime.fit import fit


def sample(seed, step):
    """Four tasks y = a x with a around 3: an initialisation worth learning."""
    rng = np.random.default_rng([seed, step])
    slopes = 3 + 0.1 * rng.normal(size=(4, 1, 1))
    x = rng.normal(size=(4, 10, 1))
    batch = {"x": x.astype(np.float32), "y": (slopes * x).astype(np.float32)}
    return jmeta.Episode(
        jax.tree.map(lambda leaf: leaf[:, :5], batch), jax.tree.map(lambda leaf: leaf[:, 5:], batch)
    )


def loss(fast, meta, batch, key):
    del meta
    error = jnp.mean((batch["x"] * fast["slope"] - batch["y"]) ** 2)
    return error, {"error": error}


PROBLEM = jmeta.Problem(loss, loss, lambda meta: optax.sgd(0.1))
START = {"slope": jnp.float32(0.0)}


@pytest.mark.parametrize("estimator", [jmeta.unrolled, jmeta.mixed_mode, jmeta.first_order])
def test_maml_learns_the_common_slope_and_resumes_bit_for_bit(tmp_path, estimator):
    mg = jmeta.over_tasks(estimator(PROBLEM, 2))
    outer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.2))

    def run(steps, **options):
        loader = episode_loader(sample, seed=1)
        try:
            return fit(mg, outer, START, loader, steps=steps, key=4, progress=False, **options)
        finally:
            loader.close()

    whole = run(60)
    np.testing.assert_allclose(whole.meta["slope"], 3.0, atol=0.15)
    assert whole.history[-1]["aux/error"] < 0.1 < whole.history[0]["aux/error"]
    assert whole.history[-1]["inner_loss/first"] > whole.history[-1]["inner_loss/last"]
    run(23, out=tmp_path)
    parts = run(60, out=tmp_path, resume=True)
    assert parts.meta["slope"].tobytes() == whole.meta["slope"].tobytes()


def test_derivative_order_annealing_goes_from_first_order_to_exact():
    first = jmeta.over_tasks(jmeta.first_order(PROBLEM, 2))
    exact = jmeta.over_tasks(jmeta.unrolled(PROBLEM, 2))
    annealed = jmeta.stages([(0, first), (3, exact)])
    batches = episode_loader(sample, seed=0, threads=0)
    result = fit(annealed, optax.sgd(0.1), START, batches, steps=5, progress=False)
    batches.close()
    meta = START
    for step in range(5):
        mg = first if step < 3 else exact
        grads, _, _ = mg.estimate(meta, (), sample(0, step), jax.random.key(0))
        meta = jax.tree.map(lambda leaf, grad: leaf - 0.1 * grad, meta, grads)
    np.testing.assert_allclose(result.meta["slope"], meta["slope"], rtol=1e-5)
