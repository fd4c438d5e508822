"""The run around the trainer: what it logs and keeps, and how it says what went wrong."""

import errno
import json
import math
import os
import sys
import warnings
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from least_squares import MG, OUTER, START, batches, bits, distance, episode, estimate

from jmeta.core.types import Info
from jmeta.runtime import checkpoint, metrics, parallel
from jmeta.runtime.fit import (
    NonFiniteError,
    RecompilationWarning,
    fit,
    from_function,
)
from jmeta.runtime.nonfinite import load_dump
from jmeta.runtime.train import advance, meta_trainer


def test_it_does_what_the_trainer_does():
    result = fit(MG, OUTER, START, batches(), steps=12, key=3, progress=False)
    init, step = meta_trainer(MG, OUTER)
    state = init(START, jax.random.key(3))
    for number in range(12):
        state, info = jax.jit(step)(state, episode(number))
    for a, b in zip(jax.tree.leaves(result.meta), jax.tree.leaves(state.meta), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert int(result.state.estimator_state) == int(result.state.step) == 12
    assert not result.interrupted
    np.testing.assert_allclose(result.history[-1]["loss"], info.loss, rtol=1e-5)


def test_metrics_say_what_happened(tmp_path):
    options = {"evaluate": distance, "evaluate_every": 4, "log_every": 3, "progress": False}
    result = fit(MG, OUTER, START, batches(), steps=10, out=tmp_path, **options)
    rows = metrics.read_log(tmp_path / "metrics.jsonl")
    assert rows == result.history
    assert [row["step"] for row in rows] == [3, 4, 6, 8, 9, 10]
    assert [row["step"] for row in rows if "loss" in row] == [3, 6, 9, 10]
    assert [row["step"] for row in rows if "eval/distance" in row] == [4, 8, 10]
    last = rows[-1]
    assert last["eval/distance"] == pytest.approx(float(distance(result.meta)["distance"]))
    assert last["aux/error"] == last["loss"] == pytest.approx(2 * last["inner_loss/last"])
    assert last["inner_loss/first"] == last["loss"]
    assert last["grad_norm"] > 0
    assert all(a["seconds"] <= b["seconds"] for a, b in pairwise(rows))
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"eval/distance" in events.read_bytes()
    assert b"train/loss" in events.read_bytes()


def test_rows_are_on_disk_before_the_checkpoint_that_follows_them(tmp_path, monkeypatch):
    sync, save, seen = os.fsync, checkpoint.save, []

    def synced(descriptor):
        if os.path.samestat(os.fstat(descriptor), (tmp_path / metrics.FILE).stat()):
            seen.append("rows")
        sync(descriptor)

    def saved(manager, step, *args, **options):
        rows = metrics.read_log(tmp_path / metrics.FILE)
        seen.append((step, rows[-1]["step"]))
        save(manager, step, *args, **options)

    monkeypatch.setattr("os.fsync", synced)
    monkeypatch.setattr(checkpoint, "save", saved)
    options = {"checkpoint_every": 2, "log_every": 1, "out": tmp_path, "progress": False}
    tell = lambda step, state, info: seen.append(f"told {step}")  # noqa: E731
    fit(MG, OUTER, START, batches(), steps=4, on_step=tell, **options)
    assert seen == ["told 1", "told 2", "rows", (2, 2), "told 3", "told 4", "rows", (4, 4)]
    assert [row["step"] for row in metrics.read_log(tmp_path / metrics.FILE)] == [1, 2, 3, 4]


def test_a_disk_that_is_full_for_the_rows_is_said_with_the_file(tmp_path, monkeypatch):
    sync = os.fsync

    def full(descriptor):
        if os.path.samestat(os.fstat(descriptor), (tmp_path / metrics.FILE).stat()):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"metrics\.jsonl could not be written: No space left"):
        fit(MG, OUTER, START, batches(), steps=2, out=tmp_path, progress=False)


def test_without_tensorboardx_there_is_one_note(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.warns(UserWarning, match=r"jmeta: tensorboardX is not installed.*pip install"):
        fit(MG, OUTER, START, batches(), steps=1, out=tmp_path, progress=False)
    assert len(metrics.read_log(tmp_path / "metrics.jsonl")) == 1


def test_the_best_checkpoint_is_kept(tmp_path):
    scores = {2: 0.3, 4: 0.9, 6: 0.5, 8: math.nan, 10: 0.6, 12: 0.2}
    steps_done = []

    def evaluate(meta):
        return {"accuracy": scores[steps_done[-1] + 1]}

    fit(
        MG,
        OUTER,
        START,
        batches(),
        steps=12,
        out=tmp_path,
        evaluate=evaluate,
        evaluate_every=2,
        best="max:accuracy",
        checkpoint_every=3,
        keep=2,
        progress=False,
        on_step=lambda step, state, info: steps_done.append(step),
    )
    with checkpoint.open_checkpoints(tmp_path / "checkpoints") as manager:
        assert sorted(manager.all_steps()) == [4, 9, 12]  # the best, and the last two
    with pytest.raises(ValueError, match=r"evaluate returns \['accuracy'\]"):
        fit(
            MG,
            OUTER,
            START,
            batches(),
            steps=2,
            out=tmp_path / "other",
            evaluate=lambda meta: {"accuracy": 1.0},
            best="min:loss",
            progress=False,
        )


# --- what is not finite -------------------------------------------------------------------------


def poisoned(step):
    data = episode(step)
    return data | {"y": data["y"] * np.float32(np.nan if step == 13 else 1.0)}


def test_a_step_that_is_not_finite_leaves_what_reproduces_it(tmp_path):
    with pytest.raises(NonFiniteError, match=r"outer step 14 .*the loss, the gradient of 'b'") as e:
        fit(
            MG,
            OUTER,
            START,
            from_function(poisoned),
            steps=50,
            key=5,
            out=tmp_path,
            checkpoint_every=6,
            progress=False,
        )
    assert (e.value.step, e.value.folder) == (14, tmp_path / "nan-14")
    healthy = fit(MG, OUTER, START, batches(), steps=13, key=5, progress=False)
    init, step = meta_trainer(MG, OUTER)
    state, data = load_dump(tmp_path / "nan-14", init(START, jax.random.key(0)), episode(0))
    assert bits(state) == bits(healthy.state)  # the state before the step that failed
    np.testing.assert_array_equal(data["x"], poisoned(13)["x"])
    step = jax.jit(step)
    assert math.isnan(step(state, data)[1].loss)
    assert math.isfinite(step(state, episode(13))[1].loss)
    report = json.loads((tmp_path / "nan-14" / "report.json").read_text())
    assert report["step"] == 14
    assert "the meta-parameter 'w' after the update" in report["not_finite"]
    with checkpoint.open_checkpoints(tmp_path / "checkpoints") as manager:
        assert manager.latest_step() == 12  # nothing later than the failure was saved


def test_only_the_offending_leaf_is_named():
    def overflowing(meta, state, episode, key):
        grads, state, info = estimate(meta, state, episode, key)
        return grads | {"w": grads["w"].at[1].set(jnp.inf)}, state, info

    clipped = optax.chain(optax.clip(1.0), optax.sgd(0.1))  # clipping hides it from the update
    with pytest.raises(NonFiniteError, match="give fit an out= folder") as error:
        fit(MG._replace(estimate=overflowing), clipped, START, batches(), steps=3, progress=False)
    assert error.value.leaves == ["the gradient of 'w'"]
    assert error.value.step == 1


def test_bfloat16_states_are_dumped_without_pickle(tmp_path):
    def nan(meta, state, episode, key):
        return meta, state, Info(jnp.float32(jnp.nan), jnp.zeros(0), {}, jnp.float32(0))

    start = {"h": jnp.array([1.5, -2.25], jnp.bfloat16)}
    mg, data = MG._replace(estimate=nan), {"t": jnp.array([0.5], jnp.bfloat16)}
    same = from_function(lambda step: data)
    with pytest.raises(NonFiniteError) as error:
        fit(mg, optax.sgd(0.1), start, same, steps=1, out=tmp_path, progress=False)
    template = meta_trainer(mg, optax.sgd(0.1)).init(start, jax.random.key(1))
    state, found = load_dump(error.value.folder, template, data)
    assert bits(state.meta) == bits(start)
    assert bits(found) == bits(data)
    assert state.meta["h"].dtype == jnp.bfloat16
    for file in error.value.folder.glob("*.npz"):  # as they were named earlier
        with np.load(file) as arrays:
            earlier = {name.replace(".", "/"): arrays[name] for name in arrays.files}
        np.savez(file, **earlier)
    assert "meta/h" in np.load(error.value.folder / "state.npz").files
    state, found = load_dump(error.value.folder, template, data)
    assert bits(state.meta) == bits(start)
    assert bits(found) == bits(data)


def test_a_state_that_changes_its_dtype_is_refused_when_compiled():
    def changing(meta, state, episode, key):
        grads, _, info = estimate(meta, state, episode, key)
        return grads, jnp.float32(0), info

    with pytest.raises(TypeError, match=r"'estimator_state' changes from int32\[\] to float32\[\]"):
        fit(MG._replace(estimate=changing), OUTER, START, batches(), steps=1, progress=False)


# --- warnings and errors ------------------------------------------------------------------------


def test_a_step_that_compiles_again_names_the_leaf_whose_shape_changed():
    ragged = from_function(lambda step: episode(step, rows=8 if step in (0, 1, 3) else 9))
    with pytest.warns(RecompilationWarning) as caught:
        fit(MG, OUTER, START, ragged, steps=5, progress=False)
    (warning,) = [each for each in caught if each.category is RecompilationWarning]
    assert str(warning.message).startswith("jmeta: the outer step compiles again")
    assert "'x' from float32[8, 3] to float32[9, 3]; 'y' from float32[8] to float32[9]" in str(
        warning.message
    )
    assert warning.filename == __file__


def test_a_steady_run_compiles_once_and_warns_of_nothing():
    traced = []

    def counted(*args):
        traced.append(1)
        return estimate(*args)

    with warnings.catch_warnings():
        warnings.simplefilter("error", RecompilationWarning)
        fit(MG._replace(estimate=counted), OUTER, START, batches(), steps=6, progress=False)
    assert len(traced) == 1


@pytest.mark.parametrize("where", ["no mesh", "a mesh", "meta on a mesh"])
def test_a_run_on_one_device_compiles_its_step_once(caplog, where):
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    start = jax.device_put(START, everywhere) if where == "meta on a mesh" else START
    with jax.log_compiles():
        fit(MG, OUTER, start, batches(), steps=4, progress=False,
            mesh=mesh if where == "a mesh" else None)  # fmt: skip
    said = [record.getMessage() for record in caplog.records]
    compiled = [text for text in said if text.startswith("Compiling") and "guarded_step" in text]
    assert len(compiled) == 1, said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"checkpoint_every": 5}, "checkpoint_every needs a folder"),
        ({"resume": True}, "resume needs a folder"),
        ({"evaluate_every": 5}, "evaluate_every needs something to evaluate"),
        ({"best": "max:x", "out": "x"}, "best needs something to evaluate"),
        ({"best": "x", "out": "x", "evaluate": distance}, "max:METRIC"),
        ({"log_every": 0}, "log_every >= 1"),
        ({"steps": -1}, "steps"),
    ],
)
def test_options_that_do_nothing_are_errors(tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words):
        fit(MG, OUTER, START, batches(), **({"steps": 1} | options))


def test_data_that_cannot_be_restored_or_ends_is_an_error():
    with pytest.raises(TypeError, match=r"batches is a generator.*from_function"):
        fit(MG, OUTER, START, (episode(i) for i in range(9)), steps=1)

    def ending(step):
        if step == 2:
            raise StopIteration
        return episode(step)

    with pytest.raises(ValueError, match="batches ended after 2 of 5 outer steps"):
        fit(MG, OUTER, START, from_function(ending), steps=5, progress=False)


def test_lines_where_there_is_no_terminal(capsys):
    fit(MG, OUTER, START, batches(), steps=4, log_every=2)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["2/4", "4/4"]
    assert all(word in lines[0] for word in ("loss", "aux/error", "steps/s", "left"))


def test_a_bar_where_there_is_one():
    from rich.console import Console

    from jmeta.runtime.progress import open_progress

    with open(os.devnull, "w") as nowhere:
        console = Console(file=nowhere, force_terminal=True, width=120, record=True)
        bar = open_progress(20, 5, True, console)
        bar.advance(10)
        bar.report(10, {"step": 10, "loss": 0.25, "steps_per_second": 5.0, "grad_norm": 1.0})
        bar.close()
        text = console.export_text()
    assert "10/20" in text
    assert "loss 0.25  5 steps/s  0:00:02 left" in text


def test_the_gradients_beside_the_step_are_those_it_applied():
    state = meta_trainer(MG, optax.sgd(0.5)).init(START, jax.random.key(0))
    step = jax.jit(lambda state, data: advance(MG, optax.sgd(0.5), state, data))
    after, _, grads = step(state, episode(0))
    expected = np.asarray(state.meta["w"]) - 0.5 * np.asarray(grads["w"])
    np.testing.assert_allclose(after.meta["w"], expected, rtol=1e-6)


def test_the_wait_for_data_is_a_share_of_the_steps_without_evaluations(monkeypatch):
    """A clock that moves only where the data, the steps and the evaluation take their time."""
    from jmeta.runtime import fit as module

    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def passes(seconds, value=None):
        now[0] += seconds
        return value

    found = fit(
        MG, OUTER, START, from_function(lambda step: passes(1.0, episode(step))), steps=4,
        log_every=2, evaluate=lambda meta: passes(5.0, {"loss": 0.0}), evaluate_every=1,
        on_step=lambda *_: passes(3.0), progress=False,
    ).history  # fmt: skip
    shares = [row["data_wait"] for row in found if "data_wait" in row]
    # A row is written before its step's callback: 2 waits and 1 callback, then 2 and 2.
    assert shares == [2 / (2 + 3), 2 / (2 + 6)]
