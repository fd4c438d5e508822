"""Publishing a run: what is copied and written, what is refused, and pages that say what is so."""

import json
import re

import pytest

from benchmarks import publish as publishing
from benchmarks.publish import publish
from benchmarks.readme import RESULTS
from jmeta.runtime import report
from jmeta.runtime.statistics import summarise

RESULT_FILES = sorted(
    file
    for file in (*RESULTS.glob("*.json"), *RESULTS.glob("h100/*.json"))
    if not file.name.endswith(".run.json")
)
PAGES = sorted(page for page in RESULTS.glob("*.md") if page.stem != "what_it_buys")


@pytest.mark.parametrize("file", RESULT_FILES, ids=lambda file: file.stem)
def test_committed_results_fit_the_contract_and_say_their_command(file):
    content, beside = json.loads(file.read_text()), file.with_suffix(".run.json")
    made = json.loads(beside.read_text()) if beside.exists() else content
    assert made["command"].startswith("python -m ")
    report.validate(content)


def a_run(folder, *, modified=False):
    """A run directory as an experiment leaves it."""
    rows = [
        {"method": method, "seed": seed, "metric": "accuracy", "value": value + seed / 100}
        for method, value in (("mlm", 0.8), ("soft", 0.5))
        for seed in range(3)
    ]
    report.write_results(folder, rows, summarise(rows, baseline="mlm"))
    versions = {"python": "3.11.7", "jax": "0.10.2", "optax": "0.2.8", "numpy": "2.4.6"}
    made = {
        "command": "python -m experiments.toy --out runs/toy",
        "devices": "2 x cpu",
        "versions": versions | {"git_commit": "abc", "git_modified": modified},
    }
    (folder / "run.json").write_text(json.dumps(made))
    for name in ("curve-a.png", "curve-a.svg"):
        (folder / name).write_bytes(name.encode())
    (folder / "methods").mkdir()
    (folder / "methods" / "mlm.json").write_text("{}")
    (folder / "methods" / "mlm").mkdir()
    return folder


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    return a_run(folder)


def test_numbers_command_figures_and_parts_are_what_the_run_left(run, tmp_path):
    results = tmp_path / "results"
    page = publish(
        run, "toy-small", said="Three seeds.", parts=("methods/*.json",), results=results
    )
    text = page.read_text()
    assert text.startswith(
        "# toy-small\n\n    python -m experiments.toy --out runs/toy\n\nThree seeds.\n\njax 0.10.2,"
    )
    assert "| soft | 0.510 ± 0.025 | 3 seeds | -0.300" in text
    assert text.endswith("\n\n![curve a](toy-small-curve-a.png)\n")
    assert report.read_results(results / "toy-small.json") == report.read_results(run)
    assert (results / "toy-small.run.json").read_text() == (run / "run.json").read_text()
    assert (results / "toy-small-curve-a.svg").read_bytes() == b"curve-a.svg"
    assert [p.name for p in (results / "toy-small").rglob("*.json")] == ["mlm.json"]
    assert (results / "toy-small" / "methods" / "mlm.json").is_file()


def test_what_a_page_says_is_kept_until_something_else_is_said(run, tmp_path):
    said = "Three seeds.\n\nTwo paragraphs."
    publish(run, "toy", said=said, results=tmp_path)
    assert publishing.paragraphs(publish(run, "toy", results=tmp_path)) == said
    assert publishing.paragraphs(publish(run, "toy", said="", results=tmp_path)) == ""


def test_what_cannot_be_made_again_is_refused_and_nothing_is_written(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    a_run(folder, modified=True)
    with pytest.raises(ValueError, match="no commit holds: commit them, and run it again"):
        publish(folder, "toy", results=tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_a_pattern_without_files_is_refused_and_nothing_is_written(run, tmp_path):
    with pytest.raises(ValueError, match=r"matches variants/\*\.json"):
        publish(run, "toy", parts=("methods/*.json", "variants/*.json"), results=tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"results\.json"):
        publish(tmp_path, "toy", results=tmp_path / "to")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_row_of_a_committed_page_is_in_its_results(page):
    tables = report.markdown_table(report.read_results(page.with_suffix(".json"))["summary"])
    known = set(tables.splitlines())
    shown = [
        line
        for block in page.read_text(encoding="utf-8").split("\n\n")
        for line in block.splitlines()
        if line.startswith("| ") and re.search(r" (seed|episode)s? \|", line)
    ]
    assert shown
    assert [line for line in shown if line not in known] == []


def test_a_page_of_another_layout_is_not_overwritten_without_a_word(run, tmp_path):
    (tmp_path / "toy.md").write_text("# toy\n\nwritten by hand\n")
    with pytest.raises(ValueError, match="names no command and versions"):
        publish(run, "toy", results=tmp_path)
    assert not (tmp_path / "toy.json").exists()
