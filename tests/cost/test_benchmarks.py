"""The benchmarks of cost: arrays that all frameworks share, fits against closed forms, tables."""

import contextlib
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import (
    auto,
    cost_page,
    objective_bandit,
    peers,
    peers_jax,
    peers_problems,
    readme,
    scaling_laws,
    second_order_cost,
    what_it_buys,
)
from benchmarks import second_order_bars as judged
from benchmarks.pieces import piece
from experiments._shared import record
from jmeta.core.types import Episode
from jmeta.methods import learned_start
from jmeta.runtime import config as configuration


def test_the_page_holds_the_committed_results():
    text = cost_page.PAGE.read_text(encoding="utf-8")
    assert text == readme.fill(text, cost_page.places()), "run: python -m benchmarks.cost_page"


@pytest.mark.parametrize("kind", ["sinusoid", "omniglot", "decoder"])
def test_a_problem_goes_to_another_process_and_back(kind, tmp_path):
    made = peers_problems.given(kind, "smoke")
    peers_problems.save(made, tmp_path / "problem.npz")
    again = peers_problems.load(tmp_path / "problem.npz")
    assert again._replace(params={}, support={}, query={}) == made._replace(
        params={}, support={}, query={}
    )
    for part in ("params", "support", "query"):
        for name, array in getattr(made, part).items():
            np.testing.assert_array_equal(getattr(again, part)[name], array)
            assert array.dtype in (np.float32, np.int32)


@pytest.mark.parametrize(
    "kind",
    [
        "sinusoid",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("omniglot", "decoder")),
    ],
)
def test_the_rows_in_jax_agree_in_float64(x64, kind):
    made = peers_problems.given(kind, "smoke")._replace(steps=3)  # some rows write each out
    found = {row: peers_jax.flat(peers_jax.build(made, row, "float64")()) for row in peers_jax.ROWS}
    reference = found.pop(peers.REFERENCE)
    first = found.pop(peers_jax.FIRST_ORDER)
    for grads in found.values():
        for name, expected in reference.items():
            np.testing.assert_allclose(grads[name], expected, rtol=1e-9, atol=1e-11)
    assert max(np.abs(first[n] - g).max() for n, g in reference.items()) > 1e-3


def test_a_peer_that_cannot_run_says_why():
    rows = [
        peers.measured("sinusoid", "jmeta, mixed_mode", "median seconds", 0.001),
        peers.measured("sinusoid", "torch.autograd", "median seconds", 0.004),
        peers.measured("sinusoid", "torch.func", "median seconds", 0.002),
        peers.measured("sinusoid", "torch.autograd", "peak bytes", 2**20),
        peers.measured("sinusoid", "jmeta, mixed_mode", "peak bytes", 2**18),
        peers.failed("sinusoid", "higher", "no such file"),
    ]
    lines = peers.table(rows).splitlines()
    assert "| sinusoid | jmeta, mixed_mode | 1 | 0.50 | 0.25 | 0.25 |  |" in lines
    assert "| sinusoid | higher | no such file | | | | |" in lines


def test_a_wrong_gradient_is_no_peer(monkeypatch, tmp_path):
    class Fake:
        def ask(self, *, row, file, **request):
            np.savez(file, w=np.asarray([1.0, 2.0 + 0.1 * (row == "torch.func")]))
            return {}

    monkeypatch.setattr(peers, "workers", lambda *a: contextlib.nullcontext([Fake(), Fake()]))
    monkeypatch.setattr(peers, "missing", lambda row: None)
    rows = peers.agreement(tmp_path, "sinusoid")
    refused = [row["method"] for row in rows if row["metric"].startswith("cannot run")]
    assert refused == ["torch.func"]
    nothing = lambda self, *, row, file, **r: (  # noqa: E731
        np.savez(file, w=np.asarray([1.0, np.nan if row == "higher" else 2.0])) or {}
    )
    with monkeypatch.context() as other:
        other.setattr(Fake, "ask", nothing)
        rows = peers.agreement(tmp_path, "sinusoid")
    assert [r["method"] for r in rows if r["metric"].startswith("cannot run")] == ["higher"]
    monkeypatch.setattr(peers_jax, "FIRST_ORDER", "none")
    monkeypatch.setattr(
        Fake, "ask", lambda self, *, row, file, **r: np.savez(file, w=[float(len(row))]) or {}
    )
    with pytest.raises(RuntimeError, match="its float64 gradient differs"):
        peers.agreement(tmp_path, "sinusoid")


def test_a_worker_that_fails_is_named_with_its_reason(monkeypatch, tmp_path):
    class Fake:
        def ask(self, *, do, row):
            return {"error": "out of memory"} if row == "higher" else {"seconds": 1.0, "peak": 5}

    monkeypatch.setattr(peers, "workers", lambda p, *f: contextlib.nullcontext([Fake() for _ in f]))
    monkeypatch.setattr(peers, "missing", lambda row: None)
    monkeypatch.setattr(peers, "PAUSE", 0.0)
    rows = peers.timing(tmp_path, "sinusoid", 2, 1.0)
    assert {r["method"] for r in rows if r["metric"] == "median seconds"} == {
        row for _, row in peers.runnable() if row != "higher"
    }
    rows += peers.memory(tmp_path, "sinusoid", "torch", "higher")
    why = [r for r in rows if r["method"] == "higher"]
    assert [r["metric"] for r in why] == ["cannot run: out of memory"] * 2
    assert "| sinusoid | higher | out of memory | | | | |" in peers.table(rows)
    # A whole run says it once, and goes on.
    monkeypatch.setattr(peers, "agreement", lambda problem, kind: [])
    config = peers.Config(problems=("sinusoid",), size="smoke", repeats=1, out=tmp_path)
    peers.write(config, peers.run(config))
    assert (tmp_path / "peers.md").read_text().count("out of memory") == 1


def test_a_worker_that_fails_after_some_turns_keeps_their_median_and_says_so(monkeypatch, tmp_path):
    asked = []

    class Fake:
        def ask(self, *, do, row):
            asked.append(row)
            lost = row == "higher" and asked.count(row) == 3  # the first turn warms up
            return {"error": "out of memory"} if lost else {"seconds": 1.0}

    monkeypatch.setattr(peers, "workers", lambda p, *f: contextlib.nullcontext([Fake() for _ in f]))
    monkeypatch.setattr(peers, "missing", lambda row: None)
    monkeypatch.setattr(peers, "PAUSE", 0.0)
    rows = [r for r in peers.timing(tmp_path, "sinusoid", 4, 1.0) if r["method"] == "higher"]
    assert {row["metric"] for row in rows} == {
        "ended after 1 turns: out of memory", "seconds", "median seconds"
    }  # fmt: skip
    assert asked.count("higher") == 3  # and is not asked again


def test_what_would_have_no_effect_is_refused():
    for changes, message in (
        ({"seeds": 3}, "does not depend on a seed"),
        ({"resume": True}, "one piece"),
        ({"model": "mlp", "width": 8}, "width: of the decoder, and this is model=mlp"),
        ({"model": "mlp", "small": True}, "small: of the decoder"),
        ({"model": "conv", "growth": True}, "growth: of the decoder's memory"),
    ):
        with pytest.raises(ValueError, match=message):
            second_order_cost.Config(**changes)
    assert second_order_cost.Config(model="conv", small=True).small
    assert peers.Config(resume=True).resume
    with pytest.raises(ValueError, match="resume: this benchmark is one piece"):
        objective_bandit.Config(resume=True)


def test_pieces_of_other_settings_are_not_joined(tmp_path):
    out = ["--out", str(tmp_path), "--axes", "tokens"]
    given = configuration.parse(scaling_laws.PRESETS, ["--preset", "smoke", *out])
    record(given, "axes")
    piece(tmp_path, "tokens", lambda: [{"value": 1.0}], wanted=True, resume=False)
    record(dataclasses.replace(given, axes=("tasks",)), "axes")
    with pytest.raises(SystemExit, match="other settings"):
        record(dataclasses.replace(given, repeats=given.repeats + 1), "axes")


def test_an_exponent_is_that_of_the_power_law():
    x = np.asarray([1, 2, 4, 8.0])
    exact = scaling_laws.exponent(x, 3 * x**1.5)
    assert exact.mean == pytest.approx(1.5)
    assert exact.half_width == pytest.approx(0, abs=1e-6)
    noise = np.exp(0.1 * np.asarray([1, -1, 1, -1]))
    import scipy.stats

    fitted = scipy.stats.linregress(np.log(x), np.log(3 * x**1.5 * noise))
    mean, half, _ = scaling_laws.exponent(x, 3 * x**1.5 * noise)
    assert mean == pytest.approx(fitted.slope)
    assert half == pytest.approx(scipy.stats.t.ppf(0.975, 2) * fitted.stderr)


@pytest.mark.slow
def test_flops_are_near_the_floor_of_a_matmul_network():
    size = scaling_laws.Size(steps=4, width=32, tokens=16)
    made = scaling_laws.point(size)
    for method, build in scaling_laws.METHODS.items():
        program = jax.make_jaxpr(
            lambda m, build=build: build(made.problem, size.steps).estimate(
                m, (), made.episode, None
            )[0]
        )(made.meta)
        bound = scaling_laws.floor(method, "flops", size, made)
        assert 0.7 < scaling_laws.cost.flops(program) / bound < 1.5, method


def test_the_least_time_is_that_of_the_machine_at_its_best():
    rows = [
        {"method": "matmul", "seed": 0, "metric": "flop/s", "value": rate, "axis": axis}
        for axis, rate in (("tasks", 50.0), ("tokens", 100.0))  # slower while others were at work
    ] + [
        {
            "method": "unrolled",
            "seed": 0,
            "metric": metric,
            "value": value,
            "axis": "tasks",
            "at": 1,
        }
        for metric, value in (("flops, floor", 300.0), ("median seconds", 4.0))
    ]
    rows.append(rows[2] | {"at": 2})  # compiled alone
    [least] = scaling_laws.time_floors(rows)
    assert (least["metric"], least["value"], least["at"]) == ("median seconds, floor", 3.0, 1)
    assert [scaling_laws.short(n) for n in (128, 34816, 1655808)] == ["128", "35k", "1.7M"]


def test_equal_time_is_by_the_seconds_of_a_step():
    rows = [
        {"method": m, "seed": 0, "metric": "seconds of an outer step", "value": s}
        for m, s in (("exact", 0.02), ("first order", 0.01))
    ] + [
        {"method": m, "seed": s, "metric": "mse", "value": n / 100 + s, "outer_steps": n}
        for m, last in (("exact", 200), ("first order", 600))
        for n in range(100, last + 1, 100)
        for s in (0, 1)
    ]
    found = what_it_buys.at_equal_time(rows)
    first = [r for r in found if r["method"] == "first order" and r["seed"] == 0]
    assert [(r["seconds"], r["value"]) for r in first] == [(2.0, 2.0), (4.0, 4.0)]
    lines = what_it_buys.table([*rows]).splitlines()
    assert lines[2].startswith("| 2 | ")
    # An exact step of four of first order's: its second look comes after first order's last.
    slow = [r | {"value": 0.04} if r["method"] == "exact" and "seconds" in r["metric"] else r
            for r in rows]  # fmt: skip
    assert {r["seconds"] for r in what_it_buys.at_equal_time(slow)} == {4.0}


def test_fast_weights_are_compared_with_first_order_that_trained_as_long(tmp_path):
    assert what_it_buys.fwl_rows(tmp_path) == []
    equal_steps = {what_it_buys.FWL: (40.0, 43.0, 41.0), what_it_buys.FWL_FIRST: (45.0, 47.0, 47.0)}
    equal_time = {what_it_buys.FWL_FIRST: (44.0, 46.0, 44.0)}
    names = what_it_buys.FWL_RUNS.values()
    runs = dict(zip(names, (equal_steps, equal_time), strict=True))
    for name, methods in runs.items():
        rows = [
            {"method": method, "seed": seed, "metric": "perplexity", "value": value}
            for method, values in methods.items()
            for seed, value in reversed(list(enumerate(values)))  # in whatever order they stand
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": rows}))
    *_, at_equal_steps, at_equal_time = what_it_buys.fwl_rows(tmp_path)
    assert at_equal_steps.endswith("| -5.0 ± 2.5 |")
    assert at_equal_time.endswith("| -3.3 ± 1.4 |")
    assert "| 41.3 ± 3.8 |" in at_equal_time


def test_text_is_compared_with_first_order_that_trained_as_long(tmp_path):
    assert what_it_buys.text_rows(tmp_path) == []
    # Episode by episode, over two of them.
    first = {"as many": ([0.8, 0.6], 200.0, 20.0), "as long": ([0.85, 0.75], 280.0, 90.0)}
    for name, longer in what_it_buys.TEXT_RUNS.items():
        for run, which in ((name, "as many"), (longer, "as long")):
            methods = {"maml": ([0.9, 0.8], 440.0, 30.0), "fomaml": first[which]}
            if which == "as long":  # of another training, which nobody reads
                methods["maml"] = ([0.1, 0.1], 616.0, 42.0)
            rows = []
            for method, (values, work, seconds) in methods.items():
                rows += [
                    {"method": method, "metric": "accuracy", "values": values},
                    {"method": method, "metric": "gradient evaluations", "value": work},
                    {"method": method, "metric": "training CPU seconds", "value": seconds},
                ]
            (tmp_path / f"{run}.json").write_text(json.dumps({"rows": rows}))
    *_, steps, time = what_it_buys.text_rows(tmp_path)
    assert ", first order: as many steps | 0.8500 | 0.7000 | +0.15 ± 0.64 | 1.50 |" in steps
    assert ", first order: 1.4 x the steps | 0.8500 | 0.8000 |" in time
    assert time.endswith("| +0.0500 ± 0.0000 |  |")


def test_a_planner_that_misses_is_said_to():
    row = {"method": auto.AUTO, "seed": 0, "problem": "decoder", "chosen": "a", "best by hand": "b"}
    values = {"time / best by hand": 1.02, "bytes / asked": 0.5, "asked bytes": 2**30,
              "seconds to choose": 3.0, "error": 1e-7}  # fmt: skip
    good = [row | {"metric": metric, "value": value} for metric, value in values.items()]
    cost, error = auto.bars(good)
    assert cost.endswith("(holds)")
    assert error == "decoder: float32 error 1e-07 (bar 1e-05: holds)"
    slow = [r | {"value": 1.2} if "best" in r["metric"] else r for r in good]
    assert auto.bars(slow)[0].endswith("(MISSED)")
    assert "| decoder | 1.0 GiB | a | 512.0 MiB | b | 1.02 | 3 s | 1e-07 |  |" in auto.table(good)


def test_an_inexact_choice_is_said_to_be_beside_what_rounding_does():
    row = {"method": auto.AUTO, "seed": 0, "problem": "decoder", "chosen": "a", "best by hand": "b"}
    values = {"time / best by hand": 1.02, "bytes / asked": 0.5, "asked bytes": 2**30,
              "seconds to choose": 3.0, "error": 2e-5}  # fmt: skip
    rows = [row | {"metric": metric, "value": value} for metric, value in values.items()]
    moved = {"method": judged.AT_ROUNDED, "seed": 0, "problem": "decoder", "metric": "error"}
    rows.append(moved | {"value": 3e-5})
    assert auto.bars(rows)[1] == (
        "decoder: float32 error 2e-05, rounding its inputs alone 3e-05 (bar 1e-05: MISSED)"
    )
    assert auto.table(rows).endswith("| 2e-05 | 3e-05 |")


def test_rounding_moves_the_gradient_of_a_stiff_problem_alone():
    def moved(rate):  # ten steps on the quadratic x**2 / 2: x (1 - rate)**10 of a rounded start
        def loss(params, batch, key):
            return 0.5 * jnp.sum(params**2) + 0.1 * jnp.sum(jnp.cos(3 * params)), {}

        problem = learned_start(loss, optax.sgd(rate))
        case = auto.Case(problem, 10, jnp.linspace(0.5, 1, 8), Episode(jnp.zeros(1), jnp.zeros(1)),
                         None, "1GiB")  # fmt: skip
        [row] = auto.rounding("x", case)
        return row["value"]

    assert moved(0.01) < 1e-6
    assert moved(3.0) > 1e-5


def test_the_planner_has_a_figure_of_what_it_chose(tmp_path):
    shared = {"method": auto.AUTO, "seed": 0, "chosen": "a", "best by hand": "b"}
    rows = [
        shared | {"problem": problem, "metric": metric, "value": value}
        for problem, time in (("decoder", 1.02), ("weights", 0.97))
        for metric, value in (("time / best by hand", time), ("bytes / asked", 0.5))
    ]
    png, svg = auto.figure([*rows, rows[0] | {"method": "b", "value": 77.0}], tmp_path / "auto")
    text = svg.read_text(encoding="utf-8")
    for label in ("decoder", "weights", "1.02×", "0.97×", "0.5×", auto.ONE):
        assert label in text
    assert "77×" not in text
    assert png.stat().st_size > 1000


def test_decoders_are_picked_by_hand_from_outside_the_planners_variants():
    others = auto.from_arrays("decoder", "smoke", 2, "1GiB", None).others
    assert list(others) == [auto.LONG_KEPT, auto.BLOCKS]
    assert auto.from_arrays("sinusoid", "smoke", 2, "1GiB", 2).others == {}


def test_a_piece_is_measured_once(tmp_path):
    made = []

    def make():
        made.append(1)
        return [{"value": float(len(made))}]

    def ask(**how):
        return piece(tmp_path, "part", make, **how)

    assert ask(wanted=False, resume=False) == []
    assert ask(wanted=True, resume=True) == [{"value": 1.0}]
    assert ask(wanted=True, resume=True) == [{"value": 1.0}]
    assert ask(wanted=False, resume=False) == [{"value": 1.0}]
    assert ask(wanted=True, resume=False) == [{"value": 2.0}]
    assert json.loads((tmp_path / "pieces" / "part.json").read_text()) == [{"value": 2.0}]
