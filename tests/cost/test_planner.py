"""Plans: the real sharded step, compiled for the devices here and for a TPU that is not there."""

import functools
import importlib.util
import json

import jax
import jax.numpy as jnp
import optax
import pytest

import jmeta
from jmeta import cost
from jmeta.cost import Candidate, Setting, planner, programs
from jmeta.cost.__main__ import main, mesh_of, option_of
from jmeta.cost.rows import row_from
from jmeta.cost.shapes import MODELS, setting

WIDTH = 64


def linear(batch: int = 32, width: int = WIDTH) -> Setting:
    """A least-squares problem whose only weights are ``[width, width]``."""

    def loss(fast, meta, batch, key):
        x, y = batch
        return jnp.mean((jnp.tanh(x @ fast["w"]) - y) ** 2), {}

    array = jax.ShapeDtypeStruct((batch, width), jnp.float32)
    problem = jmeta.Problem(loss, loss, lambda meta: optax.sgd(0.1))
    meta = {"w": jax.ShapeDtypeStruct((width, width), jnp.float32)}
    return Setting(problem, meta, jmeta.Episode((array, array), (array, array)))


def row_of(estimator, mesh=None, *, given=None, **options):
    candidate = Candidate(estimator, mesh or {"tasks": -1}, **options)
    return programs.compile_row(given or linear(), candidate, steps=3)


@functools.cache
def data_parallel(estimator, tasks, microbatch):
    """A row that several tests read."""
    return row_of(estimator, tasks=tasks, microbatch=microbatch)


@pytest.mark.parametrize(("tasks", "microbatch"), [(8, None), (16, 1)])
@pytest.mark.parametrize("estimator", ["first_order", "mixed_mode nested", "unrolled"])
def test_data_parallel_reduces_the_gradient_once_outside_all_loops(estimator, tasks, microbatch):
    row = data_parallel(estimator, tasks, microbatch)
    gradient = WIDTH * WIDTH * 4
    _, sent, looped = row.traffic["all-reduce"]
    # One ring of the gradient over 8 devices; XLA may send the metrics along with it.
    assert 2 * 7 / 8 * gradient <= sent <= 2 * 7 / 8 * (gradient + 64)
    assert looped == 0
    assert set(row.traffic) <= {"all-reduce", "scalars all-reduce"}


def test_memory_of_the_state_is_split_over_fsdp():
    given = linear()._replace(rules=(("w", jax.P("fsdp")),))
    whole, split = row_of("mixed_mode"), row_of("mixed_mode", {"tasks": 1, "fsdp": 8}, given=given)
    state = 3 * WIDTH * WIDTH * 4  # weights and both moments of Adam
    assert whole.argument_bytes - split.argument_bytes == pytest.approx(state * 7 / 8, rel=0.01)
    assert "all-gather" in split.traffic


def test_flops_per_device_are_of_its_own_tasks():
    one, two = data_parallel("first_order", 8, None), data_parallel("first_order", 16, 1)
    # Four losses and gradients of three inner steps and the query, two matmuls each, and x fixed.
    forward = 2 * 32 * WIDTH * WIDTH
    assert one.flops == 4 * 2 * forward
    assert two.flops == 2 * one.flops


def test_a_plan_orders_memory_as_theory_does():
    given, names = linear(batch=2048), ("unrolled", "mixed_mode")
    rows = cost.plan(given.problem, given.meta, given.episode, steps=8, names=names)
    # Reverse mode keeps the activations of every step, 512 KiB, mixed mode the weights, 16 KiB.
    assert rows[0].temp_bytes - rows[1].temp_bytes > 4 * 2048 * WIDTH * 4


def test_a_plan_within_too_little_memory():
    given = linear()
    least = 3 * WIDTH * WIDTH * 4  # the weights and Adam's moments alone
    tight = cost.plan(given.problem, given.meta, given.episode, steps=3, names=["mixed_mode"],
                      memory=least)  # fmt: skip
    assert not tight[0].fits
    assert tight[0].note.startswith("does not fit: needs ")
    assert "Nothing fits: split the weights" in cost.plan_markdown(tight)


def test_the_choice_is_exact_then_cheap_then_quiet():
    def row(estimator, flops, sent, fits=True):
        traffic = {"all-reduce": [1, sent, 0.0]}
        return cost.Row(Candidate(estimator, {}), "local", 1, 1, 1, 2, fits, flops, traffic, 0.0)

    rough = row("first_order", 1.0, 1.0)
    dear = row("unrolled", 3.0, 1.0)
    loud, quiet = row("mixed_mode", 2.0, 9.0), row("mixed_mode nested", 2.1, 1.0)
    assert cost.choose([rough, dear, loud, quiet]) is quiet
    assert cost.choose([rough, dear._replace(fits=False)]) is rough
    assert cost.choose([dear._replace(fits=False)]) is None
    # What waits for the host comes after an exact one of more FLOPs, and before none.
    sent_away = row("mixed_mode offload", 1.5, 1.0)._replace(host_bytes=1)
    assert cost.choose([rough, sent_away, dear]) is dear
    assert cost.choose([rough, sent_away, dear._replace(fits=False)]) is sent_away
    lines = cost.plan_markdown([dear, sent_away]).splitlines()
    assert "| temp | host | TFLOP |" in lines[0]
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert "Choose mixed_mode nested on one" in cost.plan_markdown([rough, loud, quiet])


def test_a_program_that_does_not_fit_is_a_row(monkeypatch):
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (20.00G) exceeds available HBM (15.75G)."
    )

    def refuse(*args, **kwargs):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    row = row_of("mixed_mode")
    assert (row.fits, row.bytes) == (False, 20 * 2**30)
    assert row.note.startswith("does not fit: needs 20.0 GiB of ")
    assert "≥ 20.00" in cost.plan_markdown([row])
    message = "INTERNAL: the compiler has a fault of its own"
    with pytest.raises(jax.errors.JaxRuntimeError, match="a fault of its own"):
        row_of("mixed_mode")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ["magic"]}, "no estimator 'magic' to plan for; known are mixed_mode"),
        ({"outer": "lion"}, "no outer optimizer 'lion' to plan with; known are adam"),
        ({"meshes": [{"pipeline": 2}]}, "axes tasks, fsdp and tensor, not pipeline"),
        ({"meshes": [{"tasks": 3}]}, "needs 3 devices, and there are 8"),
        ({"tasks": 12}, "12 tasks cannot be split evenly over the tasks=8 x fsdp=1 devices"),
        ({"tasks": 0}, "tasks is 0; it must be positive"),
        ({"steps": -1}, "steps is -1; it cannot be negative"),
        ({"tasks": 32, "microbatch": 3}, "microbatch=3 does not divide"),
        ({"memory": "plenty"}, "'plenty' is no size of memory"),
        ({"topology": "v5p-128"}, "'v5p-128' is no topology"),
        ({"topology": "v5e:2x4"}, "functions cannot travel: give the problem as 'module:function'"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(change, message):
    given = linear()
    with pytest.raises(ValueError, match=message):
        cost.plan(given.problem, given.meta, given.episode, **({"steps": 3} | change))


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("jmeta.cost.shapes.setting", "is no reference; write module:function"),
        ("nowhere:at_all", "cannot be imported: No module named 'nowhere'"),
        ("jmeta.cost.shapes:nothing", "cannot be imported: .*no attribute 'nothing'"),
        ("json:loads", "takes 1 positional argument|missing 1 required positional"),
        ("jmeta.cost.hlo:Collective", "required positional|must return"),
    ],
)
def test_references_that_lead_nowhere(reference, message):
    with pytest.raises((TypeError, ValueError), match=message):
        cost.plan(reference, steps=3)


def test_a_reference_must_return_a_setting():
    with pytest.raises(ValueError, match="returned dict; it must return"):
        cost.plan("jmeta.cost.topology:environment", steps=3)
    with pytest.raises(ValueError, match="needs the shapes of its meta"):
        cost.plan(linear().problem, steps=3)


def test_a_child_that_dies_is_a_row_and_one_that_refuses_an_error(monkeypatch):
    candidate = Candidate("mixed_mode", {"tasks": 1})
    monkeypatch.setattr(planner, "CHILD", ("-c", "raise SystemExit('no luck')"))
    row = planner.in_a_child("a:b", candidate, steps=1, topology="v5e:2x2")
    assert not row.fits
    assert row.note == "the compiler's process ended with 1: no luck"
    assert "Nothing was compiled." in cost.plan_markdown([row])
    refuse = "import sys; open(sys.argv[2], 'w').write('{\"refused\": \"because\"}')"
    monkeypatch.setattr(planner, "CHILD", ("-c", refuse))
    with pytest.raises(ValueError, match="because"):
        planner.in_a_child("a:b", candidate, steps=1, topology="v5e:2x2")


@pytest.mark.parametrize("model", MODELS)
def test_named_models_have_the_published_number_of_weights(model):
    published = {"gpt2-124m": 124e6, "gpt2-355m": 355e6, "gpt2-774m": 774e6,
                 "bert-base": 110e6, "bert-large": 340e6}  # fmt: skip
    weights = sum(leaf.size for leaf in jax.tree.leaves(setting(model, tokens=64).meta))
    if model in published:
        assert weights == pytest.approx(published[model], rel=0.025)


def test_named_models_refuse_what_they_cannot_hold():
    with pytest.raises(ValueError, match="no model 'gpt5'; known are gpt2-124m"):
        setting("gpt5")
    with pytest.raises(ValueError, match="bert-base has 512 positions; 513 tokens do not fit"):
        setting("bert-base", tokens=513)


@pytest.mark.slow
def test_an_encoder_compiles_on_a_mesh_with_tensor_parallel_weights():
    given = setting("bert-base", layers=1, tokens=8, sequences=2)
    fewer = {"tasks": 1, "fsdp": 4, "tensor": 2}
    row = programs.compile_row(given, Candidate("mixed_mode", fewer, 4), steps=5)
    assert row.traffic["all-reduce"][2] > 0  # the tensor axis speaks inside the loops


def test_the_command_prints_a_table_and_writes_rows(capsys, tmp_path):
    file = tmp_path / "rows.json"
    done = main(
        ["--problem", "jmeta.cost.shapes:setting", "--option", "model=tiny", "--option",
         "tokens=16", "--option", "layers=1", "--steps", "5", "--estimator", "first_order",
         "--json", str(file)]
    )  # fmt: skip
    assert done == 0
    assert "Choose first_order on tasks=all" in capsys.readouterr().out
    rows = [row_from(each) for each in json.loads(file.read_text())]
    assert rows[0].candidate.options == {"model": "tiny", "tokens": 16, "layers": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what to plan for: --model NAME or --problem MODULE:FUNCTION"),
        (["--model", "tiny", "--topology", "v9:1x1"], "names the generation 'v9'"),
        (["--model", "tiny", "--mesh", "tasks"], "'tasks' is no mesh; write tasks=4,fsdp=-1"),
        (["--problem", "a:b", "--tokens", "9"], "--tokens: these are of --model; what --problem's"),
        (["--model", "tiny", "--option", "layers"], "'layers' is no option; write NAME=VALUE"),
        (["--model", "tiny", "--option", "depth=1"], "unexpected keyword argument 'depth'"),
        (["--model", "tiny", "--tokens", "999"], "tiny has 64 positions; 999 tokens do not fit"),
        (["--model", "tiny", "--tokens", "0"], "tokens is 0; it must be positive"),
        (["--model", "tiny", "--option", "layers=0"], "layers is 0; it must be positive"),
        (["--model", "tiny", "--weights", "int8"], "weights is 'int8'; it must be one of float32"),
        (["--model", "tiny", "--mesh", "fsdp=2,fsdp=4"], "'fsdp=2,fsdp=4' names fsdp twice"),
        (
            ["--model", "tiny", "--estimator", "first_order", "--estimator", "nope"],
            "no estimator 'nope' to plan for",
        ),
    ],
)
def test_the_command_refuses_in_one_sentence(arguments, message, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.strip().splitlines()) == 1


def test_meshes_and_options_of_the_command():
    assert mesh_of("fsdp=4") == {"tasks": -1, "fsdp": 4}
    assert mesh_of("fsdp=-1,tensor=2") == {"fsdp": -1, "tensor": 2}
    assert option_of("memory=[1, 2]") == ("memory", [1, 2])


@pytest.fixture
def libtpu():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("the tpu extra is not installed: pip install -e '.[tpu]'")


def test_the_real_tpu_compiler_without_a_tpu(libtpu):
    rows = cost.plan(
        "jmeta.cost.shapes:setting", steps=2, topology="v5e:2x2", names=["mixed_mode"],
        tasks=8, microbatch=1,
        options={"model": "tiny", "sequences": 2, "tokens": 16, "steps": 2, "layers": 1},
    )  # fmt: skip
    meta = setting("tiny", layers=1, tokens=16).meta
    gradient = sum(4 * leaf.size for leaf in jax.tree.leaves(meta))
    assert rows[0].fits
    assert rows[0].usable_bytes == int(15.75 * 2**30)
    assert rows[0].traffic["all-reduce"][2] == 0
    sent = sum(values[1] for values in rows[0].traffic.values())
    assert sent == pytest.approx(2 * 3 / 4 * gradient, rel=0.01)


def test_the_real_tpu_compiler_puts_the_trajectory_on_the_host(libtpu):
    steps, weights = 12, 4 * 2048**2
    here, there = cost.plan(
        f"{__name__}:linear", steps=steps, topology="v5e:2x2", options={"width": 2048},
        names=["mixed_mode", "mixed_mode offload"],
    )  # fmt: skip
    assert here.host_bytes == 0
    assert there.host_bytes == pytest.approx(steps * weights, rel=0.05)
    # Some of the others are in the memory of the cores, which is not counted.
    assert there.temp_bytes <= 2 * weights < here.temp_bytes
    assert there.flops == here.flops
    assert cost.choose([there, here]) == here  # which need not wait for the host, and fits
    assert cost.choose([there, here._replace(fits=False)]) == there


def test_the_real_tpu_compiler_says_what_does_not_fit(libtpu):
    options = {"model": "gpt2-124m", "layers": 1, "block_remat": "none", "sequences": 512}
    rows = cost.plan(
        "jmeta.cost.shapes:setting", steps=5, topology="v5e:2x2", names=["unrolled"],
        options=options,
    )  # fmt: skip
    assert not rows[0].fits
    assert rows[0].bytes > rows[0].usable_bytes
    assert rows[0].note.startswith("does not fit: needs ")


def test_the_real_tpu_compiler_refuses_a_shape_that_is_not_built(libtpu):
    with pytest.raises(ValueError, match="the TPU compiler refuses the topology v5e:3x3"):
        cost.plan("jmeta.cost.shapes:setting", steps=1, topology="v5e:3x3", names=["mixed_mode"],
                  options={"model": "tiny", "tokens": 16})  # fmt: skip


def test_the_axes_of_a_mesh_follow_those_of_the_torus(libtpu):
    with pytest.raises(ValueError, match="logical mesh"):
        cost.plan("jmeta.cost.shapes:setting", steps=1, topology="v5p:4x4x4",
                  names=["mixed_mode"], meshes=[{"tasks": 8, "fsdp": 8}],
                  options={"model": "tiny", "tokens": 16})  # fmt: skip
