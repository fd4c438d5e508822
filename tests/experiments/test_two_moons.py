"""The Two Moons experiment: its data by hand, its choices, and whole runs of the smoke preset."""

import dataclasses
import json
import shutil
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import _teacher_shared as shared
from experiments import _two_moons_data as data_of
from experiments import _two_moons_methods as methods_of
from experiments import _two_moons_report as page
from experiments import _two_moons_training as training
from experiments import _two_moons_tuning as tuning
from experiments import two_moons
from jmeta.runtime import parameters
from jmeta.runtime.report import markdown_table, read_results, write_results
from jmeta.runtime.statistics import summarise

SMOKE = ["--preset", "smoke"]


@pytest.fixture(scope="module")
def data():
    return data_of.load(20, 1000)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "two_moons"
    two_moons.main([*SMOKE, "--methods", "mlm", "--out", str(out)])
    return out


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"methods": ("mlm,soap",)},
            r"methods soap: choose of mlm, denoising, random",
        ),
        ({"methods": ()}, "no methods"),
        ({"label_counts": (10, 1)}, "1 labelled points cannot hold one of each moon"),
        ({"teacher_labels": 0}, "0 labelled points cannot"),
        ({"label_counts": (10, 10)}, "different numbers"),
        ({"samples": 1000}, r"samples=1000 is no multiple of the 800"),
        ({"evaluations": 0}, "evaluations=0: between 1 and the 800 dispatches"),
        ({"mlm_task": ("mlm",)}, "mlm_task mlm: choose of"),
        ({"mask_bug": True, "methods": ("mlm", "hard")}, "none of these methods has"),
        ({"micro_batches": 1, "batch": 16}, "leave_one_out compares micro-batches"),
        ({"validation_sequences": 120}, "multiple of 50"),
        ({"devices": -1}, "devices are 0 or more"),
        ({"chunk": 0}, "chunk=0: choose more than 0"),
        ({"finetune_rates": ()}, r"finetune_rates=\(\): choose more than 0"),
        ({"among_classes": True}, "is a task of soft: set mlm_task to nothing"),
        ({"largest_gradient": 1.0}, "0 without a teacher of masks or with others"),
        ({"largest_gradient": -1.0, "methods": ("mask-only",)}, "0 or more"),
        ({"largest_gradient": float("nan"), "methods": ("mask-only",)}, "0 or more"),
        ({"largest_gradient": 1.0, "methods": ("mlm",)}, "0 without a teacher of masks"),
        ({"support_steps": -1}, "support_steps=-1: 0 or more"),
        ({"labelled_batch": 6}, "labelled_batch=6: at most half of the 10 labelled points"),
        ({"masked": 1.0}, "masked=1.0: a share between 0 and 1"),
        ({"rate": -0.1}, "rate=-0.1: choose more than 0"),
        ({"dropout": 1.0}, "dropout=1.0: 0 or more, and below 1"),
        *(
            ({"methods": (method,), "mlm_task": (), name: value}, said)
            for method, name, value, said in (
                ("mlm", "inner_steps", 4, "the methods mlm reads it.* one that does .soft, "),
                ("denoising", "support_steps", 10, "none of the methods denoising reads it"),
                ("mlm", "inner_rate", 0.5, "inner_rate=0.5: none"),
                ("mlm", "among_classes", True, "among_classes=True: none"),
                ("mlm", "teacher_labels", 40, "teacher_labels=40: none"),
                ("mlm", "restart_every", 10, "restart_every=10: none"),
                ("mlm", "population", 2, "population=2: none"),
                ("hard", "soft_gradient", "first_order", "soft_gradient=first_order: none"),
                ("hard", "soft_weight", 1.0, "soft_weight=1.0: none"),
                ("mask-only", "input_weight", 2.0, "one that does .input-only soft, replacements"),
                ("soft", "hard_weight", 1.0, "one that does .hard, input-only hard"),
                ("soft", "coefficient", "cosine", "coefficient=cosine: none"),
                ("soft", "baseline", "none", "baseline=none: none"),
                ("soft", "weighting", "mean", "weighting=mean: none"),
            )
        ),
        ({"masked": 0.3}, "a share that input-only soft, soft, hard, input-only hard does not"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        two_moons.Config(**fields)


def test_without_a_teacher_as_many_sequences_are_read_whatever_a_teacher_unrolls(data, tmp_path):
    config = dataclasses.replace(
        two_moons.PRESETS["smoke"], methods=("mlm", "soft"), inner_steps=2, evaluations=1
    )
    for name, steps in (("mlm", 8), ("soft", 4)):
        method = methods_of.build(config, data, name)
        history = training.pretrain(config, data, name, method, tmp_path / name).history
        assert [(row["step"], row["samples"]) for row in history] == [(steps, config.samples)]


def test_methods_come_with_commas_or_spaces_in_one_order():
    assert two_moons.Config(methods=("soft,mlm",)).methods == ("mlm", "soft")
    assert two_moons.Config(methods=("soft", "input-only hard")).methods == (
        "soft", "input-only hard",
    )  # fmt: skip
    paper = two_moons.PRESETS["paper"]
    assert (paper.seeds, paper.methods) == (5, methods_of.METHODS)
    assert paper.samples // paper.sequences_of("soft") == 40_000


def test_a_session_that_uses_jax_already_keeps_its_devices(monkeypatch, capsys):
    devices = jax.devices()  # first: what follows must not decide how many there are
    monkeypatch.delenv("XLA_FLAGS")
    with pytest.raises(SystemExit) as ended:
        two_moons.main(["--help"])
    assert ended.value.code == 0
    assert "--soft-weight" in capsys.readouterr().out
    assert jax.devices() == devices


@pytest.mark.parametrize(
    ("most", "slices"), [(0, [(0, 1), (1, 2), (2, 3)]), (2, [(0, 1), (1, 3)]), (1, [(0, 3)])]
)
def test_seeds_are_spread_over_as_many_devices_as_are_asked_for(most, slices):
    states = {"x": jnp.arange(6.0).reshape(3, 2)}
    parts = training._apart(states, most)
    assert [(part.seeds.start, part.seeds.stop) for part in parts] == slices
    assert [part.device for part in parts] == jax.local_devices()[: len(slices)]
    for part in parts:
        assert part.states["x"].tolist() == states["x"][part.seeds].tolist()
        assert part.states["x"].devices() == {part.device}


def test_of_several_processes_each_trains_on_one_device():
    devices = [types.SimpleNamespace(process_index=i, id=n) for n, i in enumerate((1, 0, 0, 1))]
    assert [device.id for device in training._first_of_each(devices)] == [1, 0]


def test_accuracy_and_loss_of_margins_by_hand():
    margins = np.zeros((2, 1, 64, 64))
    margins[0, 0, 3, 4], margins[0, 0, 5, 6], margins[1, 0, 3, 4] = 2.0, 1.0, -1.0
    points = data_of.Labelled(np.array([[3, 4], [5, 6]]), np.array([1, 0]))
    right, loss = tuning.judged(margins, [points])
    np.testing.assert_array_equal(right, [[0.5], [0.5]])
    expected = [np.log1p(np.exp(-2)) + np.log1p(np.e), np.log1p(np.e) + np.log(2)]
    np.testing.assert_allclose(loss[:, 0], np.array(expected) / 2)


def test_checkpoint_and_rate_are_chosen_on_validation_points_alone(data):
    config = dataclasses.replace(two_moons.PRESETS["smoke"], seeds=1)
    at = data_of.labelled(10, 0, fresh=False, validation=True)
    side = np.where(at.labels == 1, 1.0, -1.0)
    margins = np.zeros((2, 2, 1, 64, 64))
    for place, scale in (((0, 0), 1.0), ((0, 1), np.nan), ((1, 0), 3.0), ((1, 1), 2.0)):
        margins[(*place, 0, at.cells[:, 0], at.cells[:, 1])] = scale * side
    flat = jnp.asarray(margins.reshape(2, 2, 1, 4096))
    found = tuning.fine_tune(config, data, lambda students, batches: flat, [{}, {}], 10)
    assert (found.checkpoint, found.rate) == ("best", 0.01)  # all right, the least loss
    assert found.validation.tolist() == [1.0]
    expected = (margins[1, 0, 0][tuple(data.test.cells.T)] > 0) == (data.test.labels == 1)
    assert found.test.tolist() == [expected.mean()]
    # Each candidate with what it would have given, of which the luckiest is no better than chosen.
    at = {(each["checkpoint"], each["rate"]): each for each in found.candidates}
    assert set(at) == {(c, r) for c in ("latest", "best") for r in config.finetune_rates}
    assert at["best", 0.01]["accuracy"] == found.test.tolist()
    assert [each["validation"] for each in at.values()] == [1.0, 0.0, 1.0, 1.0]
    at["latest", 0.04]["accuracy"] = [0.999]
    assert tuning.luckiest(found) == [0.999]


def test_students_that_a_device_trained_need_no_program_of_their_own(data):
    config = dataclasses.replace(two_moons.PRESETS["smoke"], seeds=1)
    given = []

    def program(students, batches):
        given.extend(jax.tree.leaves((students, batches)))
        return np.zeros((2, 2, 1, 4096))

    bound = jax.device_put(jnp.zeros((1, 3)), jax.devices()[1])
    tuning.fine_tune(config, data, program, [bound, bound], 10)
    # Arrays that are bound to no device: all calls are of one kind.
    assert {type(leaf) for leaf in given} == {np.ndarray}


@pytest.mark.slow
def test_a_run_leaves_everything_the_contract_names(run):
    for name in ("config.yaml", "run.json", "metrics.jsonl", "report.html", "accuracy.png",
                 "mlm.svg", "maps.png", "differences.png", "methods/mlm.json"):  # fmt: skip
        assert (run / name).stat().st_size > 0, name
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert [(row["method"], row["samples"]) for row in rows] == [("mlm", 16), ("mlm", 32)]
    results = read_results(run)
    found = {(row["method"], row["seed"], row["labels"]) for row in results["rows"]
             if row["metric"] == "accuracy"}  # fmt: skip
    methods = ("mlm", methods_of.NONE, page.NEIGHBOUR, page.MAJORITY)
    assert found == {(m, seed, n) for m in methods for seed in (0, 1) for n in (2, 10)}
    pairs = {row["method"]: row["baseline"] for row in results["summary"] if "labels" in row}
    assert set(pairs.values()) == {"mlm"}
    beside = {row["method"]: row["published"] for row in results["summary"] if "published" in row}
    assert beside == {"mlm": "0.614 / 0.734"}
    # Every candidate of a method, and the best of them on test points beside the one chosen.
    kept = json.loads((run / "methods" / "mlm.json").read_text())
    best = {
        n: max(np.mean(each["accuracy"]) for each in of) for n, of in kept["candidates"].items()
    }
    bound = {str(row["labels"]): row["mean"] for row in results["summary"]
             if row["metric"] == page.LUCKIEST and row["method"] == "mlm"}  # fmt: skip
    assert bound == pytest.approx(best)


@pytest.mark.slow
def test_methods_join_the_table_and_what_is_there_is_only_read(run, tmp_path):
    out = tmp_path / "two_moons"
    shutil.copytree(run, out)
    joined = json.loads((out / "methods" / "mlm.json").read_text()) | {"method": "hard"}
    joined["rows"] = [row | {"method": "hard"} for row in joined["rows"]]
    (out / "methods" / "hard.json").write_text(json.dumps(joined))
    before = (out / "methods" / "mlm.json").read_bytes()
    two_moons.main([*SMOKE, "--methods", "hard", "mlm", "--out", str(out)])
    assert (out / "methods" / "mlm.json").read_bytes() == before
    summary = read_results(out)["summary"]
    [row] = [
        row
        for row in summary
        if (row["method"], row["metric"], row.get("labels")) == ("hard", "accuracy", 10)
    ]
    assert row["paired_difference"] == 0
    with pytest.raises(SystemExit, match="made with other settings"):
        two_moons.main([*SMOKE, "--rate", "0.5", "--out", str(out)])


@pytest.mark.slow
def test_an_interrupted_method_goes_on_and_ends_with_the_same_numbers(run, tmp_path, monkeypatch):
    out, save = tmp_path / "two_moons", training.checkpoint.save

    def killed(manager, *args, **kwargs):
        save(manager, *args, **kwargs)
        training.checkpoint.wait(manager)
        raise KeyboardInterrupt

    arguments = [*SMOKE, "--methods", "mlm", "--out", str(out)]
    monkeypatch.setattr(training.checkpoint, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        two_moons.main(arguments)
    monkeypatch.undo()
    with pytest.raises(SystemExit, match="add --resume"):
        two_moons.main(arguments)
    other = tmp_path / "other devices"
    shutil.copytree(out, other)
    two_moons.main([*arguments, "--resume"])
    assert read_results(out) == read_results(run)

    # Seeds mapped together or apart are rounded apart.
    two_moons.main([*arguments[:-1], str(other), "--resume", "--devices", "1"])
    last = [json.loads((each / "methods" / "mlm.json").read_text())["history"][-1]
            for each in (other, run)]  # fmt: skip
    numbers = [key for key in last[0] if key != "seconds"]
    assert {k: last[0][k] for k in numbers} == pytest.approx(
        {k: last[1][k] for k in numbers}, rel=1e-4
    )


@pytest.mark.slow
def test_a_killed_method_with_state_goes_on_bit_for_bit(data, tmp_path, monkeypatch):
    """The state of baseline, restarts and population is restored with student and teacher.

    Killed at the third of four evaluations, when its rows were written and its checkpoint not.
    """
    smoke = dataclasses.replace(
        two_moons.PRESETS["smoke"], methods=("input-only hard",), baseline="moving_average",
        restart_every=3, population=2, evaluations=4, seeds=1, dropout=0.0,
        support_steps=0, coefficient="loss_difference",
    )  # fmt: skip
    method = methods_of.build(smoke, data, "input-only hard")
    whole, cut, save = tmp_path / "whole", tmp_path / "cut", training.checkpoint.save

    def copied(manager, step, *args, **kwargs):
        if step == 6:
            training.checkpoint.wait(manager)
            shutil.copytree(whole, cut)
        save(manager, step, *args, **kwargs)

    programs = training._programs(smoke, data, method)
    monkeypatch.setattr(training, "_programs", lambda *_: programs)
    monkeypatch.setattr(training.checkpoint, "save", copied)
    uninterrupted = training.pretrain(smoke, data, "input-only hard", method, whole)
    monkeypatch.setattr(training.checkpoint, "save", save)
    rows = lambda folder, name: [  # noqa: E731
        json.loads(line) for line in (folder / name).read_text().splitlines()
    ]
    assert [row["step"] for row in rows(cut, "panels.jsonl")] == [2, 4, 6]
    resume = dataclasses.replace(smoke, resume=True)
    resumed = training.pretrain(resume, data, "input-only hard", method, cut)

    for part in ("latest", "best", "meta"):
        pair = (jax.tree.leaves(getattr(each, part)) for each in (uninterrupted, resumed))
        for one, other in zip(*pair, strict=True):
            np.testing.assert_array_equal(one, other)
    kept = [parameters.load_params(each / "teachers.safetensors")[0] for each in (whole, cut)]
    jax.tree.map(np.testing.assert_array_equal, *kept)
    jax.tree.map(np.testing.assert_array_equal, kept[0]["latest"], resumed.meta)
    timed = [[{**row, "seconds": 0} for row in each.history] for each in (uninterrupted, resumed)]
    assert timed[0] == timed[1]
    assert [row["step"] for row in rows(cut, "metrics.jsonl")] == [2, 4, 6, 8]
    assert [row["step"] for row in rows(cut, "panels.jsonl")] == [2, 4, 6, 8]
    assert rows(cut, "panels.jsonl") == rows(whole, "panels.jsonl")
    assert rows(cut, "panels.jsonl")[-1]["panel"] == resumed.panel == uninterrupted.panel
    assert "wrote" in resumed.panel
    # The coefficients' mean has moved, and so has the teacher.
    assert all(row["baseline_seed0"] != 0 for row in resumed.history[1:])

    # A checkpoint of before panels were kept is gone on from, too.
    restore = training.checkpoint.restore

    def without_panels(manager, template):
        found = restore(manager, template)
        return found._replace(extra={k: v for k, v in found.extra.items() if k != "panels"})

    monkeypatch.setattr(training.checkpoint, "restore", without_panels)
    assert training.pretrain(resume, data, "input-only hard", method, whole).panel == resumed.panel


def test_the_teacher_of_the_best_student_is_kept(data, tmp_path, monkeypatch):
    smoke = dataclasses.replace(two_moons.PRESETS["smoke"], methods=("mask-only",), evaluations=4)
    method = methods_of.build(smoke, data, "mask-only")
    metas, save = [], training.checkpoint.save
    monkeypatch.setattr(
        training.checkpoint, "save", lambda manager, step, tree, **more: (
            metas.append(jax.tree.map(np.asarray, tree.states.meta)),
            save(manager, step, tree, **more),
        ),
    )  # fmt: skip
    found = training.pretrain(smoke, data, "mask-only", method, tmp_path)
    kept, told = parameters.load_params(tmp_path / "teachers.safetensors")
    assert told == {"seeds": [0, 1], "method": "mask-only"}
    for seed in (0, 1):
        losses = [row[f"mlm_loss_seed{seed}"] for row in found.history]
        for name, at in (("best", int(np.argmin(losses))), ("latest", 3)):
            pairs = zip(jax.tree.leaves(kept[name]), jax.tree.leaves(metas[at]), strict=True)
            assert all((one[seed] == other[seed]).all() for one, other in pairs), name


def test_a_label_outside_the_vocabulary_ends_the_experiment_before_anything_compiles(
    data, tmp_path, monkeypatch
):
    config = dataclasses.replace(two_moons.PRESETS["smoke"], out=tmp_path, methods=("soft",))
    sound = methods_of.build(config, data, "soft")

    def chunk(seed, number):
        episode = sound.chunk(seed, number)
        episode.query.query["labels"][0, 0, 0, 1, 0] = data.words.size
        return episode

    monkeypatch.setattr(methods_of, "build", lambda *_: sound._replace(chunk=chunk))
    for name in ("fine_tuner", "pretrain"):
        monkeypatch.setattr(two_moons, name, lambda *_, name=name: pytest.fail(f"{name} was made"))
    place = r"\[0, 0, 1, 0\] of the labelled query"
    with pytest.raises(SystemExit, match=rf"^soft: the label at {place} is {data.words.size}: the"):
        two_moons.train(config, data)
    assert list(tmp_path.iterdir()) == []


def test_a_method_that_diverges_is_left_out_and_the_others_go_on(data, tmp_path, monkeypatch):
    asked = []

    def diverge(config, data, name, method, folder):
        asked.append(name)
        raise training.Diverged(f"{name} at outer step 50")

    monkeypatch.setattr(two_moons, "pretrain", diverge)
    config = dataclasses.replace(two_moons.PRESETS["smoke"], out=tmp_path)
    lost = two_moons.train(config, data)[1]
    assert asked == ["mlm", "mask-only"]
    assert lost == ["mlm at outer step 50", "mask-only at outer step 50"]
    assert not (tmp_path / "methods").exists()
    with pytest.raises(SystemExit, match="Left out:\nmlm at outer step 50\nmask-only"):
        two_moons.left_out(lost)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_a_method_and_is_told(data, tmp_path):
    smoke = dataclasses.replace(two_moons.PRESETS["smoke"], rate=1e30, methods=("mlm",))
    method = methods_of.build(smoke, data, "mlm")
    with pytest.raises(training.Diverged, match=r"mlm: .* not finite at outer step"):
        training.pretrain(smoke, data, "mlm", method, tmp_path)


def watched_of(name):
    """What the log says of a method's teacher."""
    if name in shared.MASKS:
        return ["mask_rate", "masked_entropy", "meta_norm"]
    heads = ("inputs",) if name == shared.REPLACEMENTS else ("inputs", "labels")
    of_heads = ("entropy", "confidence", "variety", "copied", "masked", "label_tokens")
    named = [f"{head}_{what}" for head in heads for what in of_heads]
    return [*named, "meta_norm", "auxiliary_norm", "cosine"]


@pytest.mark.slow
def test_every_method_runs_and_seeds_are_what_each_is_alone(tmp_path):
    both, alone = tmp_path / "both", tmp_path / "alone"
    two_moons.main([*SMOKE, "--methods", *methods_of.METHODS, "--out", str(both)])
    summary = read_results(both)["summary"]
    accuracy = [row for row in summary if row["metric"] == "accuracy" and row["labels"] == 10]
    assert {row["method"] for row in accuracy} == {
        *methods_of.METHODS, methods_of.NONE, page.NEIGHBOUR, page.MAJORITY,
    }  # fmt: skip
    teachers = [name for name in methods_of.METHODS if name not in shared.CORRUPTIONS]
    for name in teachers:
        file = both / "methods" / f"{name.replace(' ', '-')}.json"
        history = json.loads(file.read_text())["history"]
        assert len(history) == 2
        for row in history:  # monitors at every evaluation, of every seed
            watched = [row[f"{key}_seed{seed}"] for key in watched_of(name) for seed in (0, 1)]
            assert np.isfinite(watched).all()
    two_moons.main([*SMOKE, "--seeds", "1", "--first-seed", "1", "--methods", "mlm",
                    "input-only soft", "--out", str(alone)])  # fmt: skip
    for name in ("mlm", "input-only-soft"):
        rows = [json.loads((out / "methods" / f"{name}.json").read_text())["history"][-1]
                for out in (both, alone)]  # fmt: skip
        for key in ("loss_seed1", "mlm_loss_seed1"):
            assert rows[0][key] == pytest.approx(rows[1][key], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("soft", {"mask_bug": True}),
        ("input-only soft", {"soft_gradient": "first_order"}),
        ("input-only soft", {"inner_steps": 2, "chunk": 1}),
        ("input-only soft", {"restart_every": 1}),
        ("input-only soft", {"population": 2}),
        ("mask-only", {"mlm_task": ("mask-only",)}),
        ("mask-only", {"masked": 0.5}),
        ("mask-only", {"largest_gradient": 1e-3}),
        ("replacements", {"masked": 0.5}),
        ("input-only hard", {"coefficient": "cosine"}),
        ("input-only hard", {"weighting": "mean"}),
        ("input-only hard", {"baseline": "none"}),
        ("input-only hard", {"hard_weight": 1.0}),
        ("soft", {"soft_weight": 1.0}),
        ("input-only soft", {"input_weight": 50.0}),
        ("mask-only", {"among_classes": True}),
        ("mask-only", {"support_steps": 2}),
        ("mask-only", {"inner_rate": 0.5}),
        ("mask-only", {"teacher_labels": 4}),
        ("mask-only", {"labelled_batch": 1}),
        ("mask-only", {"fresh_labels": True}),
    ],
)
def test_every_option_of_a_teacher_changes_what_it_learns(data, tmp_path, name, changed):
    smoke = dataclasses.replace(two_moons.PRESETS["smoke"], methods=(name,), samples=64)

    def meta(config, folder):
        method = methods_of.build(config, data, name)
        return training.pretrain(config, data, name, method, tmp_path / folder).meta

    default = meta(smoke, "default")
    other = meta(dataclasses.replace(smoke, **changed), "other")
    pairs = zip(jax.tree.leaves(default), jax.tree.leaves(other), strict=True)
    assert max(float(abs(a - b).max()) for a, b in pairs) > 1e-6


def test_a_teacher_that_is_never_small_stays_where_it_began_and_that_is_said(data, tmp_path):
    smoke = dataclasses.replace(
        two_moons.PRESETS["smoke"], methods=("mask-budget",), largest_gradient=1e-9
    )
    method = methods_of.build(smoke, data, "mask-budget")
    found = training.pretrain(smoke, data, "mask-budget", method, tmp_path / "never")
    began = training._begin(smoke, method).states.meta
    jax.tree.map(np.testing.assert_array_equal, found.meta, began)
    row = found.history[-1]
    assert [row["skipped_seed0"], row["skipped_seed1"]] == [1.0, 1.0]
    assert row["meta_norm_seed0"] == pytest.approx(1e-9)  # the most that is counted
    assert row["loss_seed0"] > 0


def test_a_collapse_is_told_of_each_seed_by_its_last_evaluation():
    row = {"step": 4, "loss_seed0": 1.0, "inputs_copied_seed1": 0.2}
    healthy = row | {"inputs_variety_seed0": 1.0, "inputs_variety_seed1": 0.5}
    constant = row | {"inputs_variety_seed0": 1.0, "inputs_variety_seed1": 1 / 66}
    copier = row | {"inputs_copied_seed0": 1.0}
    # As rows were written when different tokens were counted as a share of all positions.
    earlier = row | {"inputs_distinct_seed0": 66 / 2176, "inputs_distinct_seed1": 66 / 2176}
    found = {
        "soft": {"history": [healthy, constant]},
        "hard": {"history": [constant, healthy]},
        "input-only soft": {"history": [copier]},
        "input-only hard": {"history": [earlier]},
        "mask-only": {"history": [{"step": 4, "mask_rate_seed0": 0.15, "mask_rate_seed1": 0.0}]},
        methods_of.NONE: {"history": []},
    }
    assert page.collapses(found, [0, 1]) == [
        "The teacher of soft, seed 1, has collapsed: inputs: the same few tokens are written "
        "everywhere.",
        "The teacher of input-only soft, seed 0, has collapsed: inputs: the text is copied as it "
        "is.",
        "The teacher of mask-only, seed 1, has collapsed: masks: nearly nothing is masked.",
    ]


def test_the_published_numbers_stand_beside_ours_in_every_table(tmp_path):
    means = {("mlm", 10): 0.81, ("input-only soft", 20): 0.58, ("input-only soft", 160): 0.87,
             (page.NEIGHBOUR, 10): 0.999}  # fmt: skip
    rows = [
        {"method": method, "seed": seed, "metric": "accuracy", "value": mean, "labels": n}
        for (method, n), mean in means.items()
        for seed in (0, 1)
    ]
    rows += [{**row, "metric": "validation accuracy"} for row in rows[:2]]
    summary = [page._beside(row) for row in summarise(rows, baseline="mlm")]
    found = {(row["method"], row["labels"], row["metric"]): row["published"]
             for row in summary if "published" in row}  # fmt: skip
    assert found == {("mlm", 10, "accuracy"): "0.614 / 0.734",
                     ("input-only soft", 160, "accuracy"): "0.940"}  # fmt: skip
    write_results(tmp_path, rows, summary)
    shown = markdown_table(read_results(tmp_path)["summary"])
    assert "| method | labels | published | mean ± 95 % | n |" in shown
    assert "| mlm | 10 | 0.614 / 0.734 | 0.810 ± 0" in shown
    assert f"| {page.NEIGHBOUR} | 10 |  | 0.999 ± 0" in shown
    # Beside the documentation's table, in per cent.
    documented = (Path(__file__).parents[2] / "docs" / "teacher.md").read_text(encoding="utf-8")
    for method, line in (
        ("hard", "| *published*: hard |"), ("soft", "| *published*: soft |"),
        ("input-only soft", "| *published*: input-only soft |"),
    ):  # fmt: skip
        [row] = [each for each in documented.splitlines() if each.startswith(line)]
        cells = [f"{100 * float(share):.1f}" if (share := page.PUBLISHED[method].get(n)) else ""
                 for n in (10, 20, 40, 80, 160)]  # fmt: skip
        assert [cell.strip() for cell in row.split("|")[2:-1]] == cells
    both = [page.PUBLISHED["mlm"][n].split(" / ") for n in (10, 20, 40, 80, 160)]
    for line, shares in zip(
        ("last checkpoint", "least loss"), zip(*both, strict=True), strict=True
    ):
        cells = " | ".join(f"{100 * float(share):.1f}" for share in shares)
        assert f"| *published*: MLM, {line} | {cells} |" in documented


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (0.9, "better than all of them with 10, 20"),
        (0.999, "with 10 labelled"),
        (1.0, "Some network"),
    ],
)
def test_what_needs_no_network_is_said(network, said):
    summary = [
        {"metric": "accuracy", "method": method, "labels": n, "mean": mean}
        for method, means in (("mlm", (0.9 if network < 1 else 1.0, network)),
                              (page.NEIGHBOUR, (0.99, 0.99)))
        for n, mean in zip((10, 20), means, strict=True)
    ]  # fmt: skip
    assert said in page.without_a_network(summary)
