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
from jmeta.core.types import Steps
from jmeta.models import masked_lm, teacher_lm
from jmeta.runtime.report import markdown_table, read_results, write_results
from jmeta.runtime.statistics import summarise
from jmeta.tasks.text import batch, encode
from jmeta.tasks.two_moons import WHICH_MOON, moon_examples

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
        ({"support_steps": -1}, "support_steps=-1: 0 or more"),
        ({"labelled_batch": 6}, "labelled_batch=6: at most half of the 10 labelled points"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        two_moons.Config(**fields)


def test_methods_come_with_commas_or_spaces_in_one_order():
    assert two_moons.Config(methods=("soft,mlm",)).methods == ("mlm", "soft")
    assert two_moons.Config(methods=("soft", "input-only hard")).methods == (
        "soft", "input-only hard",
    )  # fmt: skip
    paper = two_moons.PRESETS["paper"]
    assert (paper.seeds, paper.outer_steps, paper.methods) == (5, 40_000, methods_of.METHODS)


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


def test_the_networks_have_the_published_size(data):
    shape = methods_of.network(two_moons.PRESETS["paper"], data)
    sizes = [
        sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(
            lambda key, init=init: init(shape._replace(vocab=512), key), jax.random.key(0))))
        for init in (masked_lm.init, teacher_lm.init_teacher)
    ]  # fmt: skip
    assert [round(size, -2) for size in sizes] == [6700, 15500]


@pytest.mark.parametrize(
    ("n", "accuracy"), [(10, 0.999), (20, 0.997), (40, 0.998), (80, 1.0), (160, 0.997)]
)
def test_predictors_without_a_network_are_better_than_what_was_published(data, n, accuracy):
    said = data_of.nearest_neighbour(data_of.labelled(n, 3, fresh=False), data.test.cells)
    assert round((said == data.test.labels).mean(), 3) == accuracy
    assert data_of.majority(data.test) == 0.511
    first, second = (data_of.labelled(n, seed, fresh=True).cells for seed in (0, 1))
    assert not np.array_equal(first, second)


def test_points_and_sequences_in_the_unified_format(data):
    cells, labels = data_of.labelled(40, 0, fresh=False)
    encoded = encode(WHICH_MOON, moon_examples(cells, labels), data.words, positions=34)
    expected = batch(encoded, np.arange(40))
    found = data_of.moon_batch(data, cells, labels, 34)
    for name in ("tokens", "mask", "labels", "weights"):
        np.testing.assert_array_equal(found[name], expected[name])
    assert data.train.shape == (32_000, 34)
    assert (data.train[:, 0] == data.words.cls[1]).all()
    numbers = data.words.tokenizer.decode(data.train[5, 1:-1].tolist()).split()
    assert len(numbers) == 32
    assert {int(number) for number in numbers} <= set(range(64))


def _chunk(data, **changed):
    options = {"inner_steps": 1, "keep": ("masked",), "labelled": 4, "mlm_task": False,
               "mask_bug": False, "among_classes": False}  # fmt: skip
    points = data_of.labelled(10, 0, fresh=False)
    return data_of.teacher_chunk(data, points, 0, 7, (20, 3, 4), **(options | changed)), points


def test_support_and_query_share_no_point_and_come_from_the_labelled_ones(data):
    episode, points = _chunk(data)
    known = {
        (*row["tokens"], *row["labels"])
        for i in range(10)
        for row in [data_of.moon_batch(data, points.cells[i], points.labels[i])]
    }
    parts = [
        [{(*t, *y) for t, y in zip(tokens, labels, strict=True)}
         for tokens, labels in zip(part["tokens"].reshape(60, 4, 4),
                                   part["labels"].reshape(60, 4, 4), strict=True)]
        for part in episode.query
    ]  # fmt: skip
    assert all(support <= known and query <= known for support, query in zip(*parts, strict=True))
    assert not any(support & query for support, query in zip(*parts, strict=True))
    assert set.union(*parts[1]) == known
    again, _ = _chunk(data)
    np.testing.assert_array_equal(again.query.query["tokens"], episode.query.query["tokens"])


def test_what_a_teacher_is_given_is_what_the_settings_say(data):
    config = two_moons.Config(
        methods=("mask-budget",), mlm_task=(), among_classes=True, support_steps=3, chunk=2,
        samples=64, evaluations=1, teacher_labels=40, labelled_batch=20,
    )  # fmt: skip
    built = methods_of.build(config, data, "mask-budget")
    episode = built.chunk(0, 0)
    assert "classes" in episode.query.support
    assert episode.support["tokens"].shape == (2, 4, 4, 34)
    # Halves of the forty points: together they are all of them, each once.
    points = data_of.labelled(40, 0, fresh=False)
    every = sorted(map(tuple, data_of.moon_batch(data, points.cells, points.labels)["tokens"]))
    halves = [part["tokens"].reshape(8, 20, -1) for part in episode.query]
    for both in np.concatenate(halves, axis=1):
        assert sorted(map(tuple, both)) == every
    shape = methods_of.network(config, data)
    assert shared.student(config, shape, None).support_steps == 3
    # Whatever the teacher's body says, so much is masked of what may be.
    rewriting, start = shared.rewriting("mask-budget", data.words, shape)
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf[0, 0]), episode.support)
    meta = jax.tree.map(lambda leaf: 5 * leaf, start(jax.random.key(0)))
    masked = jax.nn.softmax(jax.jit(rewriting.scores)(meta, batch, None)["masked"])[..., 1]
    share = (masked * batch["ordinary"]).sum(-1) / batch["ordinary"].sum(-1)
    np.testing.assert_allclose(share, 0.15, rtol=1e-4)


def test_points_are_scored_among_the_labels_of_their_task_if_asked(data):
    plain, _ = _chunk(data)
    among, _ = _chunk(data, among_classes=True)
    for part, other in zip(among.query, plain.query, strict=True):
        assert set(part) - set(other) == {"classes"}
        assert part["classes"].shape == (20, 3, 1, 2)
        assert (part["classes"] == data_of.label_tokens(data)).all()
        assert set(np.unique(part["labels"])) == set(data_of.label_tokens(data))


def test_mlm_is_a_task_half_of_the_time_and_the_mask_bug_counts_what_has_no_label(data):
    right, _ = _chunk(data, mlm_task=True)
    wrong, _ = _chunk(data, mlm_task=True, mask_bug=True)
    for part, bad in zip(right.query, wrong.query, strict=True):
        is_mlm = part["tokens"][..., 0] == data.words.cls[1]
        assert 0.3 < is_mlm.mean() < 0.7
        assert (is_mlm.all((2, 3)) | ~is_mlm.any((2, 3))).all()  # one task a micro-batch
        np.testing.assert_array_equal(part["weights"] != 0, part["labels"] != data.words.pad)
        np.testing.assert_array_equal(bad["weights"], part["mask"])
        np.testing.assert_array_equal(bad["labels"], part["labels"])
        unlabelled = bad["labels"][is_mlm][bad["weights"][is_mlm] != 0] == data.words.pad
        assert 0.75 < unlabelled.mean() < 0.95
    assert right.query.support["tokens"].shape == (20, 3, 1, 4, 34)


def test_an_epoch_holds_every_sequence_once_and_inner_steps_have_batches_of_their_own(data):
    small = data._replace(train=data.train[:60])
    first = data_of.corrupted(small, 0, 0, (5, 3, 4))
    text = np.where(first["weights"] != 0, first["labels"], first["tokens"]).reshape(60, 34)
    np.testing.assert_array_equal(np.unique(text, axis=0), np.unique(small.train, axis=0))
    several, _ = _chunk(data, inner_steps=2)
    assert isinstance(several.support, Steps)
    assert several.support.batches["tokens"].shape == (20, 3, 2, 4, 34)


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


def test_denoising_reads_what_masked_language_modelling_reads_and_asks_for_all_of_it(data):
    smoke = two_moons.PRESETS["smoke"]
    mlm, all_of_it = (
        methods_of.build(smoke, data, name).chunk(1, 3).query for name in ("mlm", "denoising")
    )
    np.testing.assert_array_equal(mlm["tokens"], all_of_it["tokens"])
    hidden = mlm["weights"] == 1
    np.testing.assert_array_equal(mlm["labels"][hidden], all_of_it["labels"][hidden])
    kept = ~hidden
    np.testing.assert_array_equal(all_of_it["tokens"][kept], all_of_it["labels"][kept])
    assert 0 < hidden.mean() < 0.3
    assert (all_of_it["weights"] == 1).all()


def test_random_tokens_stand_where_masks_would(data):
    smoke = two_moons.PRESETS["smoke"]
    batch = methods_of.build(smoke, data, "random tokens").chunk(1, 3).query
    hidden = batch["weights"] == 1
    original = np.where(hidden, batch["labels"], batch["tokens"])
    assert not (batch["tokens"] == data.words.mask).any()
    # A draw of 288 words or [SEP] is the token itself once in 289.
    assert (batch["tokens"] != original)[hidden].mean() > 0.9
    np.testing.assert_array_equal(batch["tokens"][~hidden], original[~hidden])
    assert 0 < hidden.mean() < 0.3


def test_a_teacher_of_replacements_reads_where_it_may_write_and_what_it_learns_mlm_from(data):
    smoke = two_moons.PRESETS["smoke"]
    method = methods_of.build(smoke, data, shared.REPLACEMENTS)
    episodes = method.chunk(0, 0)
    assert set(episodes.support) == {"tokens", "mask", "ordinary", "masked"}
    read = jax.tree.map(lambda leaf: leaf[0, 0], episodes.support)
    pseudo = method.panel(method.start(jax.random.key(0)), read, jax.random.key(1))
    written, weights = np.asarray(pseudo["tokens"]), np.asarray(pseudo["weights"])
    np.testing.assert_array_equal(weights == 1, written != read["tokens"])
    assert (weights[read["ordinary"] == 0] == 0).all()
    assert 0 < weights.mean() < 0.4


def test_both_heads_of_a_teacher_are_watched_whatever_it_writes(data):
    smoke = two_moons.PRESETS["smoke"]
    read = data_of.unlabelled(data.held_out, data.words)
    read = {k: jnp.asarray(read[k][:3]) for k in ("tokens", "mask", "ordinary")}
    for name in methods_of.METHODS:
        method = methods_of.build(smoke, data, name)
        if name in shared.CORRUPTIONS:
            assert method.panel is None
            continue
        meta = jax.eval_shape(method.start, jax.random.key(0))
        watched = jax.eval_shape(method.monitor, meta, read)
        heads = {key.partition("_")[0] for key in watched}
        assert heads == {shared.REPLACEMENTS: {"inputs"}}.get(
            name, {"masked", "mask"} if name in shared.MASKS else {"inputs", "labels"}
        )
    # By hand: no padding in a sequence, and [PAD] is never written.
    shape = methods_of.network(smoke, data)

    @jax.jit
    def both(key):
        meta = teacher_lm.init_teacher(shape, key)
        monitor = methods_of.build(smoke, data, "input-only soft").monitor
        return monitor(meta, read), teacher_lm.write(shape, meta, read, None)

    found, written = both(jax.random.key(0))
    for head in ("inputs", "labels"):
        scores = np.delete(np.asarray(written[head], np.float64), data.words.pad, -1)
        p = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        np.testing.assert_allclose(found[f"{head}_entropy"], -(p * np.log(p)).sum(-1).mean(), 1e-5)


def test_settings_reach_the_estimator(data, monkeypatch):
    made = []
    for name in ("soft_teacher", "hard_teacher"):
        keep = lambda student, _, name=name, **given: made.append((name, student, given))  # noqa: E731
        monkeypatch.setattr(methods_of.methods, name, keep)
    for name in ("leave_one_out", "moving_average", "no_baseline"):
        monkeypatch.setattr(methods_of.methods, name, lambda *given, name=name: (name, *given))

    def built(name, **changed):
        config = dataclasses.replace(two_moons.PRESETS["smoke"], methods=(name,), **changed)
        methods_of.build(config, data, name)
        return made.pop()

    weights = {"soft_weight": 3.0, "input_weight": 5.0, "hard_weight": 7.0}
    for name, weight in (
        ("soft", 3.0), ("input-only soft", 5.0), ("mask-only", 3.0), ("mask-budget", 3.0),
        (shared.REPLACEMENTS, 5.0), ("hard", 7.0), ("input-only hard", 7.0),
    ):  # fmt: skip
        estimator, student, given = built(name, inner_rate=0.25, support_steps=4, **weights)
        assert estimator == ("hard_teacher" if name in shared.HARD else "soft_teacher")
        assert given["meta_weight"] == weight
        assert student.support_steps == 4
        slope = jnp.asarray([0.5, -2.0])
        moves, _ = student.support_optimizer.update(slope, student.support_optimizer.init(slope))
        np.testing.assert_array_equal(moves, -0.25 * slope)
    for baseline, chosen in (
        ("leave_one_out", ("leave_one_out",)), ("moving_average", ("moving_average", 0.01)),
        ("none", ("no_baseline",)),
    ):  # fmt: skip
        assert built("hard", baseline=baseline)[2]["baseline"] == chosen
    for worth in ("exact", "first_order", "cosine", "loss_difference", "negative_loss"):
        assert built("input-only hard", coefficient=worth)[2]["coefficient"] == worth
    for weighting in ("sum", "mean"):
        assert built("hard", weighting=weighting)[2]["weighting"] == weighting
    assert "grad" not in built("soft")[2]
    first = built("soft", soft_gradient="first_order", inner_steps=2, samples=64)[2]
    assert (first["grad"], first["steps"]) == (methods_of.methods.direct_grad, 2)


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
        [*_, last] = json.loads(file.read_text())["history"]
        shown = "mask_rate" if name in shared.MASKS else "inputs_entropy"
        assert np.isfinite([last[f"{shown}_seed{seed}"] for seed in (0, 1)]).all()
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
        ("input-only hard", {"coefficient": "cosine"}),
        ("input-only hard", {"weighting": "mean"}),
        ("input-only hard", {"baseline": "none"}),
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
