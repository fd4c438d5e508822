"""A run that is stopped, killed or damaged, and resumed: the numbers of one that was not."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading

import jax
import numpy as np
import optax
import pytest
from least_squares import MG, OUTER, START, batches, bits, distance, episode, estimate, untimed

from jmeta.runtime import checkpoint, metrics
from jmeta.runtime.fit import fit, from_function
from jmeta.runtime.train import meta_trainer, stages


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


def test_a_run_is_not_overwritten(tmp_path):
    fit(MG, OUTER, START, batches(), steps=3, out=tmp_path, progress=False)
    with pytest.raises(FileExistsError, match=r"holds a run up to step 3: pass resume=True"):
        fit(MG, OUTER, START, batches(), steps=3, out=tmp_path, progress=False)


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
    import least_squares as t
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


def test_killed_at_a_random_step_and_resumed_equals_uninterrupted(tmp_path):
    whole = finished(launch(str(tmp_path / "whole")))
    # The save at step 10 waits for that of step 5: from step 12 on there is one to resume from.
    out, kills = str(tmp_path / "killed"), np.random.default_rng().integers(12, 39, 1)
    for step in kills:
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
