"""``benchmarks.peers``: what it is held to, what float32 loses, and memory that is seen."""

import contextlib
import json

import numpy as np
import pytest

from benchmarks import peers, peers_jax, peers_problems, peers_worker, readme


def measured(kind, **values):
    """``{"jmeta, fast": (seconds, bytes)}`` as rows."""
    return [
        peers.measured(kind, row, metric, value)
        for row, both in values.items()
        for metric, value in zip(("median seconds", "peak bytes"), both, strict=True)
    ]


def decoder(fast=(1.8, 800), lean=(2.2, 200), **more):
    """The best peer takes 2 seconds, another one 1000 bytes."""
    given = {"torch.autograd": (2.0, 1200), "higher": (2.5, 1000), peers_jax.FAST: fast,
             peers_jax.LEAN: lean, peers_jax.FIRST_ORDER: (0.1, 1), **more}  # fmt: skip
    return measured("decoder", **given)


def test_the_decoder_is_held_to_the_best_peer_of_each_measure():
    assert peers.bars(decoder()) == [
        "decoder: jmeta, fast: time / best peer 0.9 (bar 0.95: holds)",
        "decoder: jmeta, fast: memory / best peer 0.8 (bar 0.9: holds)",
        "decoder: jmeta, lean: time / best peer 1.1 (bar 1.15: holds)",
        "decoder: jmeta, lean: memory / best peer 0.2 (bar 0.25: holds)",
    ]
    slow, large = peers.bars(decoder(fast=(1.92, 950)))[:2]
    assert slow == "decoder: jmeta, fast: time / best peer 0.96 (bar 0.95: MISSED)"
    assert large == "decoder: jmeta, fast: memory / best peer 0.95 (bar 0.9: MISSED)"
    # A peer whose gradient is wrong is none, however fast.
    wrong = [*decoder(torchopt=(0.1, 1)), peers.failed("decoder", "torchopt", "differs")]
    assert peers.bars(wrong) == peers.bars(decoder())


def test_of_the_others_the_fastest_exact_row_is_held_to_the_best_peer():
    rows = measured(
        "sinusoid", **{"jmeta, first order": (0.1, 1), "jmeta, unrolled": (0.9, 1),
                       "jmeta, mixed_mode": (1.1, 1), "torch.func": (10.0, 1)}
    )  # fmt: skip
    assert peers.bars(rows) == ["sinusoid: jmeta, unrolled: time / best peer 0.09 (bar 0.1: holds)"]
    rows = measured("omniglot", **{"jmeta, lean": (1.01, 1), "torch.func": (1.0, 1)})
    assert peers.bars(rows) == ["omniglot: jmeta, lean: time / best peer 1.01 (bar 1: MISSED)"]
    assert peers.bars(rows[:2]) == []  # no peer was measured
    rows = [peers.measured("omniglot", "jmeta, lean", peers.SINGLE, value) for value in (2e-5,)]
    assert peers.bars(rows) == ["omniglot: jmeta, lean: float32 error 2e-05 (bar 1e-05: MISSED)"]


def test_what_the_committed_results_miss():
    rows = json.loads((readme.RESULTS / "peers.json").read_text(encoding="utf-8"))["rows"]
    judged = peers.ratios(rows)
    ratios = [row for row in judged if row["metric"] != peers.SINGLE]
    assert len(ratios) == len(peers.bars(rows)) - (len(judged) - len(ratios)) == 6
    missed = {(r["problem"], r["metric"]) for r in ratios if not r["value"] <= r["bar"]}
    assert missed <= {("sinusoid", "time / best peer"), ("decoder", "time / best peer")}


def test_bars_are_written_where_the_problems_are_whole(tmp_path):
    for size, expected in (("paper", 4), ("smoke", 0)):
        out = tmp_path / size
        out.mkdir()
        peers.write(peers.Config(size=size, out=out), decoder())
        assert (out / "peers.md").read_text().count("(bar ") == expected
        rows = json.loads((out / "results.json").read_text())["rows"]
        assert sum("bar" in row for row in rows) == expected
        assert ("MISSED" in (out / "report.html").read_text()) is False
        assert ("jmeta, lean: memory / best peer" in (out / "report.html").read_text()) == (
            size == "paper"
        )


def test_float32_is_compared_with_the_reference_in_float64(monkeypatch, tmp_path):
    class Fake:
        def ask(self, *, row, file, dtype="float64", **request):
            np.savez(file, w=np.asarray([1.0, 2.0 + (0.25 if dtype == "float32" else 0.0)]))
            return {}

    monkeypatch.setattr(peers, "workers", lambda *a: contextlib.nullcontext([Fake(), Fake()]))
    monkeypatch.setattr(peers, "missing", lambda row: None)
    rows = peers.agreement(tmp_path, "sinusoid")
    single = {r["method"]: r["value"] for r in rows if r["metric"] == peers.SINGLE}
    assert single == dict.fromkeys(set(peers_jax.JMETA) - {peers_jax.FIRST_ORDER}, 0.125)
    assert {r["value"] for r in rows if r["metric"] == "difference"} == {0.0}
    lines = peers.table(rows).splitlines()
    assert lines[0].endswith("| float64 difference | float32 error |")
    assert "| sinusoid | jmeta, fast |  |  |  |  | 0e+00 | 1e-01 |" in lines
    assert "| sinusoid | higher |  |  |  |  | 0e+00 |  |" in lines


@pytest.mark.parametrize(("dtype", "kind"), [("float32", np.float32), (None, np.float64)])
def test_a_worker_computes_in_what_it_is_asked_for(dtype, kind, tmp_path):
    import jax

    made = peers_problems.given("sinusoid", "smoke")
    asked = {} if dtype is None else {"dtype": dtype}
    request = {"do": "gradient", "row": peers_jax.LOOP, "file": str(tmp_path / "g.npz"), **asked}
    try:
        assert peers_worker.answer("jax", made, request, {}) == {}
    finally:
        jax.config.update("jax_enable_x64", False)
    with np.load(tmp_path / "g.npz") as arrays:
        assert {array.dtype for array in arrays.values()} == {np.dtype(kind)}


def test_a_peak_is_what_was_allocated_for_a_while():
    size = 64 * 2**20
    taken = lambda: np.full(size, 1, np.uint8).sum()  # noqa: E731
    assert size <= peers_worker.peak_bytes(taken) + 2**21  # what was free before is taken again
    assert peers_worker.peak_bytes(taken) < 1.5 * size
    assert peers_worker.peak_bytes(lambda: None) < size / 8
