"""Where time goes on a GPU, read from a trace; and what encode saves, which is never the result."""

import gzip
import json

import jax
import numpy as np
import pytest

from benchmarks import encode_cost, kernels, second_order_cost
from jmeta.models import transformer


def write(path, events):
    with gzip.open(path, "wt", encoding="utf-8") as file:
        json.dump({"traceEvents": events}, file)
    return path


def named(what, pid, name, tid=None):
    event = {"ph": "M", "name": what, "pid": pid, "args": {"name": name}}
    return event if tid is None else event | {"tid": tid}


def test_kernels_are_those_of_the_devices_streams(tmp_path):
    def ran(pid, tid, name, microseconds):
        return {"ph": "X", "pid": pid, "tid": tid, "name": name, "dur": microseconds, "ts": 0}

    events = [
        named("process_name", 1, "/device:GPU:0"),
        named("thread_name", 1, "Stream #20(Compute)", 5),
        named("thread_name", 1, "XLA Modules", 6),
        named("process_name", 2, "/host:CPU"),
        named("thread_name", 2, "Stream of consciousness", 5),
        ran(1, 5, "loop_add_fusion", 30.0),
        ran(1, 5, "nvjet_sm90", 50.0),
        ran(1, 5, "loop_add_fusion", 40.0),
        ran(1, 6, "jit_grads", 500.0),  # the whole program, not a kernel
        ran(2, 5, "python", 500.0),  # the host
    ]
    found = kernels.read_trace(write(tmp_path / "vm.trace.json.gz", events))
    assert [(k.name, k.launches) for k in found] == [("loop_add_fusion", 2), ("nvjet_sm90", 1)]
    np.testing.assert_allclose([k.seconds for k in found], [7e-5, 5e-5])
    rows = kernels.rows_of("mixed_mode", found, shown=1)
    assert [r["kernel"] for r in rows if r["metric"] == "kernel ms"] == ["loop_add_fusion"]
    kinds = {r["kernel"]: r["value"] for r in rows if r["metric"] == "ms of a kind"}
    assert kinds == pytest.approx({"elementwise": 0.07, "matmul": 0.05})


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm80_xmma_gemm_f32f32_f32f32_f32_nn", "matmul"),
        ("nvjet_sm90_tst_128x64_64x8_1x2_h_bz_TNT", "matmul"),
        ("memcpy128", "copy"),
        ("input_transpose_fusion", "copy"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention"),
        ("input_reduce_fusion_13", "elementwise"),
    ],
)
def test_a_kernels_kind_is_in_its_name(name, kind):
    assert kernels.kind(name) == kind


def test_without_a_gpu_it_says_so(tmp_path):
    with pytest.raises(SystemExit, match="on a GPU"):
        kernels.main(["--preset", "smoke", "--out", str(tmp_path)])


def test_a_row_that_is_none_is_refused():
    config = second_order_cost.PRESETS["smoke"]
    with pytest.raises(ValueError, match="no rows named fastest: there are first_order; "):
        second_order_cost.cells(config.__class__(cells=("fastest",), small=True), 2)


def test_the_body_in_encode_has_the_gradient_of_the_body_in_every_step(monkeypatch):
    # The body's weights from one program, not from one for each operation.
    monkeypatch.setattr(transformer, "init", jax.jit(transformer.init, static_argnums=0))
    made = encode_cost.make(encode_cost.PRESETS["smoke"])

    def gradient(name):
        mg = made.ways[name]
        run = jax.jit(lambda m, e: mg.estimate(m, mg.init(m, None), e, None)[0])
        return list(map(np.asarray, jax.tree.leaves(run(made.meta, made.episode))))

    inside = gradient(encode_cost.INSIDE)
    largest = max(np.abs(leaf).max() for leaf in inside)
    for name in (encode_cost.ENCODED, encode_cost.FUSED):
        for got, expected in zip(gradient(name), inside, strict=True):
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * largest)
