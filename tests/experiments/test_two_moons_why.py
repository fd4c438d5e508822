"""Why a teacher loses on Two Moons: what each variant changes, and the table of what they left."""

import dataclasses
import json

import pytest

from experiments import two_moons, two_moons_why
from jmeta.runtime.report import read_results

SMOKE = ["--preset", "smoke"]


def test_a_variant_differs_from_the_published_setting_in_what_it_says_alone(tmp_path):
    config = two_moons_why.Config(out=tmp_path, seeds=3)
    free = {"out", "seeds", "samples", "evaluations", "label_counts", "methods"}
    four = two_moons_why.setting(config, "four inner steps")
    assert four.samples // four.sequences_of("soft") == 4000
    paper = two_moons.PRESETS["paper"]
    changed = {}
    for name in two_moons_why.VARIANTS:
        given = two_moons_why.setting(config, name)
        steps = given.samples // given.sequences_of(*given.methods)
        assert (given.seeds, steps, given.label_counts) == (3, 4000, (10,))
        fields = [f.name for f in dataclasses.fields(given) if f.name not in free]
        changed[name] = (
            given.methods,
            {k: getattr(given, k) for k in fields if getattr(given, k) != getattr(paper, k)},
        )
    assert changed["soft"] == (("soft",), {})
    assert changed["mask bug"] == (("soft",), {"mask_bug": True})
    assert changed["MLM no task"] == (("soft",), {"mlm_task": ()})
    assert changed["hard as published"] == (
        ("hard",),
        {"coefficient": "cosine", "baseline": "none", "weighting": "mean", "hard_weight": 1.0},
    )
    led = {"input_weight": 100.0}
    judge = {"among_classes": True, "support_steps": 10}
    assert changed["replacements led"] == (("replacements",), led)
    assert changed["replacements both"] == (("replacements",), led | judge)
    assert changed["input-only soft led"] == (("input-only soft",), led)
    assert changed["input-only soft as soft"] == (
        ("input-only soft",), led | {"mlm_task": ("input-only soft",)}
    )  # fmt: skip
    assert changed["input-only hard not led"] == (("input-only hard",), {"hard_weight": 1.0})
    assert changed["MLM 0.3"] == (("mlm",), {"masked": 0.3})
    assert changed["random masks"] == (("random masks",), {})
    folders = {two_moons_why.setting(config, name).out for name in two_moons_why.VARIANTS}
    assert len(folders) == len(changed) == len({str(each) for each in changed.values()})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"variants": ("soap",)}, "soap: choose of mlm, .*, denoising, random tokens, soft"),
        ({"variants": ("",)}, "no variants: choose of mlm, .*, denoising, random tokens"),
        ({"samples": 1000}, "variant 'mlm': samples=1000 is no multiple"),
        ({"label_counts": (1,)}, "cannot hold one of each moon"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        two_moons_why.Config(**fields)


def test_what_variants_left_becomes_one_table_against_soft_and_hard(tmp_path, capsys):
    config = dataclasses.replace(two_moons_why.PRESETS["smoke"], out=tmp_path)
    values = {"MLM 0.3": (0.6, 0.6), "MLM 0.5": (0.9, 0.8),
              "soft": (0.5, 0.7), "mask bug": (0.4, 0.65), "hard": (0.3, 0.4),
              "hard as published": (0.4, 0.4), "mask-budget": (0.5, 0.5),
              "among classes": (0.6, 0.8), "replacements": (0.7, 0.7),
              "replacements led": (0.4, 0.6)}  # fmt: skip
    for name, accuracies in values.items():
        method = two_moons_why.VARIANTS[name].method
        file = two_moons.file_in(two_moons_why.folder_of(config, name), method)
        file.parent.mkdir(parents=True)
        row = {"step": 4, "samples": 64, "seconds": 1.0}
        for seed in (0, 1):
            row |= {f"mlm_accuracy_seed{seed}": 0.1, f"labels_entropy_seed{seed}": 2.0 - seed}
        rows = [
            {"method": method, "seed": seed, "metric": "accuracy", "value": value, "labels": 2}
            for seed, value in enumerate(accuracies)
        ]
        rows.append({"method": method, "seed": 0, "metric": "MLM accuracy", "value": 0.1})
        kept = {"method": method, "rows": rows, "history": [row]}
        file.write_text(json.dumps(kept))
    two_moons_why.write(config)
    results = read_results(tmp_path)
    by = {(row["method"], row["metric"]): row for row in results["summary"]}
    assert by["soft", "accuracy"]["mean"] == pytest.approx(0.6)
    assert by["mask bug", "accuracy"]["baseline"] == "soft"
    assert by["mask bug", "accuracy"]["paired_difference"] == pytest.approx(-0.075)
    assert by["mask bug", "labels entropy"]["mean"] == 1.5
    assert ("soft", "MLM accuracy") not in by  # which the monitors have for every variant
    assert by["soft", "mlm accuracy"]["mean"] == pytest.approx(0.1)
    assert by["hard", "accuracy"]["paired_difference"] == pytest.approx(-0.25)
    assert by["hard as published", "accuracy"]["baseline"] == "hard"
    assert by["hard as published", "accuracy"]["paired_difference"] == pytest.approx(0.05)
    assert by["mask-budget", "accuracy"]["baseline"] == "soft"
    # MLM itself is missing: the first of its group stands in for it.
    assert by["MLM 0.5", "accuracy"]["baseline"] == "MLM 0.3"
    assert by["MLM 0.5", "accuracy"]["paired_difference"] == pytest.approx(0.25)
    assert by["among classes", "accuracy"]["baseline"] == "mask-budget"
    assert by["among classes", "accuracy"]["paired_difference"] == pytest.approx(0.2)
    assert by["replacements led", "accuracy"]["baseline"] == "replacements"
    assert by["replacements led", "accuracy"]["paired_difference"] == pytest.approx(-0.2)
    assert len(by) == len(results["summary"])  # each once
    for name in (
        "differences-soft.png",
        "differences-hard.svg",
        "differences-mask-budget.png",
        "report.html",
        "metrics.jsonl",
    ):
        assert (tmp_path / name).stat().st_size > 0
    page = (tmp_path / "report.html").read_text()
    missing = "mlm, MLM 0.05, MLM 0.7, MLM 0.9, denoising, random tokens, MLM no task, first order"
    assert f"Not in this run: {missing}" in page
    assert "hard as published: four settings differ." in page


def test_a_variant_that_diverges_is_named_at_the_end_and_the_others_go_on(tmp_path, monkeypatch):
    asked = []

    def train(given, data):
        asked.append(given.methods)
        return None, [f"{given.methods[0]} at outer step 50"]

    monkeypatch.setattr(two_moons, "train", train)
    with pytest.raises(SystemExit) as end:
        two_moons_why.main([*SMOKE, "--out", str(tmp_path / "why")])
    assert asked == [("mlm",), ("mask-only",)]
    assert end.value.code == (
        "Left out:\nmlm: mlm at outer step 50\nmask-only: mask-only at outer step 50"
    )


@pytest.mark.slow
def test_variants_join_and_what_is_there_is_only_read(tmp_path):
    out = tmp_path / "why"
    two_moons_why.main([*SMOKE, "--variants", "mlm", "--out", str(out)])
    kept = out / "variants" / "mlm" / "methods" / "mlm.json"
    before = kept.read_bytes()
    two_moons_why.main([*SMOKE, "--out", str(out)])
    assert kept.read_bytes() == before
    found = {row["method"] for row in read_results(out)["rows"] if row["metric"] == "accuracy"}
    assert found == {"mlm", "mask-only"}
    with pytest.raises(SystemExit, match="made with other settings"):
        two_moons_why.main([*SMOKE, "--samples", "128", "--out", str(out)])
