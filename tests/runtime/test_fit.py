"""The run around the trainer: resuming bit for bit, stopping cleanly, saying what went wrong."""

import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
import warnings
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jmeta.core.types import Info, MetaGradient
from jmeta.runtime import checkpoint, metrics
from jmeta.runtime.fit import (
    NonFiniteError,
    RecompilationWarning,
    fit,
    from_function,
)
from jmeta.runtime.nonfinite import load_dump
from jmeta.runtime.train import advance, meta_trainer, stages

OUTER = optax.adam(0.05)
START = {"w": np.array([2.0, -1.0, 0.5], np.float32), "b": np.float32(1.0)}
TIMES = ("seconds", "steps_per_second", "data_wait")


def estimate(meta, state, episode, key):
    """Least squares with noise from the step's key; ``state`` counts the calls."""

    def loss(meta):
        noise = 0.1 * jax.random.normal(key, episode["y"].shape)
        return jnp.mean((episode["x"] @ meta["w"] + meta["b"] - episode["y"] - noise) ** 2)

    value, grads = jax.value_and_grad(loss)(meta)
    info = Info(value, jnp.stack([value, value / 2]), {"error": value}, optax.tree.norm(grads))
    return grads, state + 1, info


MG = MetaGradient(init=lambda meta, key: jnp.int32(0), estimate=estimate)


def episode(step, rows=8):
    rng = np.random.default_rng(step)
    x = rng.normal(size=(rows, 3)).astype(np.float32)
    return {"x": x, "y": x.sum(axis=1)}


def batches():
    return from_function(episode)


def bits(tree):
    leaves = jax.tree.leaves(tree)
    plain = [
        jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        for leaf in leaves
    ]
    return [np.asarray(leaf).tobytes() for leaf in plain]


def untimed(rows):
    return [{key: row[key] for key in row if key not in TIMES} for row in rows]


def distance(meta):
    return {"distance": jnp.linalg.norm(meta["w"] - 1.0), "zero": 0.0}


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


def test_without_tensorboardx_there_is_one_note(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.warns(UserWarning, match=r"jmeta: tensorboardX is not installed.*pip install"):
        fit(MG, OUTER, START, batches(), steps=1, out=tmp_path, progress=False)
    assert len(metrics.read_log(tmp_path / "metrics.jsonl")) == 1


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    options = {"evaluate": distance, "evaluate_every": 5, "log_every": 2, "progress": False}
    options |= {"key": 7, "best": "min:distance", "checkpoint_every": 4}
    whole = fit(MG, OUTER, START, batches(), steps=17, out=tmp_path / "whole", **options)
    fit(MG, OUTER, START, batches(), steps=8, out=tmp_path / "parts", **options)
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:  # rows of a lost continuation
        file.write('{"step": 9, "loss": 1.0}\n{"step": 10, "lo')
    parts = fit(
        MG, OUTER, START, batches(), steps=17, out=tmp_path / "parts", resume=True, **options
    )
    assert bits(parts.state) == bits(whole.state)
    rows = [row for row in untimed(parts.history) if row["step"] != 8]
    assert rows == [row for row in untimed(whole.history) if row["step"] != 8]
    assert untimed(metrics.read_log(tmp_path / "parts" / "metrics.jsonl")) == untimed(parts.history)
    again = fit(
        MG, OUTER, START, batches(), steps=17, out=tmp_path / "parts", resume=True, **options
    )
    assert bits(again.state) == bits(whole.state)
    assert again.history == parts.history


def test_a_damaged_newest_checkpoint_costs_only_time(tmp_path):
    options = {"steps": 9, "checkpoint_every": 3, "progress": False, "log_every": 1}
    whole = fit(MG, OUTER, START, batches(), out=tmp_path, **options)
    for path in (tmp_path / "checkpoints" / "9").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.warns(UserWarning, match="step 9 .* damaged"):
        again = fit(MG, OUTER, START, batches(), out=tmp_path, resume=True, **options)
    assert bits(again.state) == bits(whole.state)
    assert untimed(again.history) == untimed(whole.history)


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


def test_stages_resume_in_the_middle_of_a_stage(tmp_path):
    def halved(meta, state, episode, key):
        grads, state, info = estimate(meta, state, episode, key)
        return jax.tree.map(lambda grad: grad / 2, grads), state, info

    both = stages([(0, MG), (5, MG._replace(estimate=halved))])
    outer, options = optax.sgd(0.05), {"progress": False, "key": 1}
    whole = fit(both, outer, START, batches(), steps=11, **options)
    fit(both, outer, START, batches(), steps=7, out=tmp_path, **options)
    parts = fit(both, outer, START, batches(), steps=11, out=tmp_path, resume=True, **options)
    assert bits(parts.state) == bits(whole.state)
    init, step = meta_trainer(both, outer)
    state = init(START, jax.random.key(1))
    for number in range(11):
        state, _ = step(state, episode(number))
    np.testing.assert_allclose(whole.meta["w"], state.meta["w"], rtol=1e-6)


def test_episodes_on_a_mesh_train_and_resume_bit_for_bit(tmp_path):
    mesh = jax.make_mesh((8,), ("row",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("row"))

    def sharded():
        return from_function(lambda step: jax.device_put(episode(step, 16), rows))

    whole = fit(MG, OUTER, START, sharded(), steps=6, progress=False)
    fit(MG, OUTER, START, sharded(), steps=3, out=tmp_path, progress=False)
    parts = fit(MG, OUTER, START, sharded(), steps=6, out=tmp_path, resume=True, progress=False)
    assert bits(parts.state) == bits(whole.state)
    assert len(parts.meta["w"].sharding.device_set) == 8
    single = from_function(lambda step: episode(step, 16))
    alone = fit(MG, OUTER, START, single, steps=6, progress=False)
    np.testing.assert_allclose(alone.meta["w"], parts.meta["w"], rtol=1e-5)


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


def test_a_run_is_not_overwritten(tmp_path):
    fit(MG, OUTER, START, batches(), steps=3, out=tmp_path, progress=False)
    with pytest.raises(FileExistsError, match=r"holds a run up to step 3: pass resume=True"):
        fit(MG, OUTER, START, batches(), steps=3, out=tmp_path, progress=False)


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


# --- signals and kills --------------------------------------------------------------------------


def test_a_signal_ends_the_run_after_its_step_and_puts_the_handlers_back(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def stop(step, state, info):
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    options = {"progress": False, "key": 2, "out": tmp_path}
    result = fit(MG, OUTER, START, batches(), steps=10, on_step=stop, **options)
    assert result.interrupted
    assert int(result.state.step) == 4
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    parts = fit(MG, OUTER, START, batches(), steps=10, resume=True, **options)
    assert not parts.interrupted
    assert bits(parts.state) == bits(
        fit(MG, OUTER, START, batches(), steps=10, key=2, progress=False).state
    )


def test_a_second_interrupt_acts_at_once():
    # A shell starts a job in the background with SIGINT ignored, and its children inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def stop(step, state, info):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    try:
        with pytest.raises(KeyboardInterrupt):
            fit(MG, OUTER, START, batches(), steps=10, on_step=stop, progress=False)
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_can_train():
    results = []
    thread = threading.Thread(
        target=lambda: results.append(fit(MG, OUTER, START, batches(), steps=3, progress=False))
    )
    thread.start()
    thread.join(60)
    assert int(results[0].state.step) == 3


PROGRAM = """
    import sys, time
    sys.path.insert(0, sys.argv[1])
    import numpy as np
    import jax
    import test_fit as t
    from jmeta.runtime.fit import fit
    def tell(step, state, info):
        print(step, flush=True)
        time.sleep(0.01)
    result = fit(t.MG, t.OUTER, t.START, t.batches(), steps=40, key=11, out=sys.argv[2],
                 checkpoint_every=5, log_every=2, evaluate=t.distance, evaluate_every=7,
                 best="min:distance", resume=True, progress=False, on_step=tell)
    print("interrupted" if result.interrupted else "complete", flush=True)
    print(b"".join(t.bits(result.state)).hex(), flush=True)
"""


def launch(out):
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": os.getcwd()}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(pathlib.Path(__file__).parent), out],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def finished(process):
    lines = process.communicate(timeout=120)[0].split()
    assert process.returncode == 0
    return lines


def test_killed_at_random_steps_and_resumed_equals_uninterrupted(tmp_path):
    whole = finished(launch(str(tmp_path / "whole")))
    # The save at step 10 waits for that of step 5: from step 12 on there is one to resume from.
    out, kills = str(tmp_path / "killed"), np.random.default_rng().integers(12, 39, 2)
    for step in np.sort(kills):
        process = launch(out)
        try:
            for line in process.stdout:
                if int(line) >= step:
                    break
        finally:
            process.kill()
            process.communicate(timeout=60)
    lines = finished(launch(out))
    assert lines[0] == "complete" or int(lines[0]) > 5, f"killed at {kills}, and began anew"
    assert lines[-2] == whole[-2] == "complete"
    assert lines[-1] == whole[-1], f"killed at {kills}"
    one, other = (
        metrics.read_log(tmp_path / name / "metrics.jsonl") for name in ("whole", "killed")
    )
    assert untimed(one) == untimed(other)
    assert [row["step"] for row in one] == sorted({row["step"] for row in one})


def test_sigterm_saves_and_exits_with_zero(tmp_path):
    process = launch(str(tmp_path))
    for line in process.stdout:
        if int(line) == 10:
            process.send_signal(signal.SIGTERM)
            break
    lines = finished(process)
    assert lines[-2] == "interrupted"
    last = int(lines[-3]) if len(lines) > 2 else 10
    assert 10 <= last < 40
    with checkpoint.open_checkpoints(tmp_path / "checkpoints") as manager:
        found = checkpoint.restore(manager, meta_trainer(MG, OUTER).init(START, jax.random.key(0)))
    assert found.step == int(found.tree.step) == found.extra["position"] == last
    assert b"".join(bits(found.tree)).hex() == lines[-1]


def test_the_gradients_beside_the_step_are_those_it_applied():
    state = meta_trainer(MG, optax.sgd(0.5)).init(START, jax.random.key(0))
    after, _, grads = advance(MG, optax.sgd(0.5), state, episode(0))
    np.testing.assert_allclose(after.meta["w"], state.meta["w"] - 0.5 * grads["w"], rtol=1e-6)


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
