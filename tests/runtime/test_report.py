"""Results, tables, figures and pages, read back by other parsers than the writers."""

import base64
import dataclasses
import io
import itertools
import json
import math
import re
import subprocess
import sys
import warnings
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.__main__ import listing
from jmeta.files import write_atomically
from jmeta.runtime import config, figures, html, report, statistics
from jmeta.runtime.drawing import PALETTE, spread

ROOT = Path(__file__).resolve().parents[2]
SVG = "{http://www.w3.org/2000/svg}"


def results(seeds=(0, 1, 2)):
    rows = [
        {"method": m, "seed": s, "metric": "accuracy", "value": v + 0.01 * s * (m != "transfer")}
        | {"shots": 5, "steps": k}
        for m, v in (("maml", 0.6), ("a|b <c>", 0.5), ("transfer", 0.55))
        for s in seeds
        for k in (1, 5)
    ]
    rows += [{"method": "maml", "seed": s, "metric": "seconds", "value": 81.0} for s in seeds]
    return rows, statistics.summarise(rows, baseline="transfer")


def test_results_read_back_with_numpy_scalars_and_diverged_values(tmp_path):
    rows, summary = results()
    rows[0]["value"] = np.float32(0.5)
    rows[1]["value"] = math.nan
    rows.append({"method": "x", "seed": np.int64(3), "metric": "m", "values": np.array([0.25, 1])})
    path = report.write_results(tmp_path / "run", rows, summary)
    assert path == tmp_path / "run" / "results.json"
    content = json.loads(path.read_text(), parse_constant=pytest.fail)  # strict JSON: no NaN
    assert list(content) == ["rows", "summary"]
    assert content["rows"][0]["value"] == 0.5
    assert content["rows"][1]["value"] is None
    assert content["rows"][2:-1] == rows[2:-1]
    assert content["rows"][-1] == {
        "method": "x", "seed": 3, "metric": "m", "values": [0.25, 1.0], "value": 0.625,
    }  # fmt: skip
    assert content["summary"] == summary
    assert report.read_results(tmp_path / "run") == report.read_results(path) == content
    named = report.write_results(tmp_path / "omniglot-5way.json", [], [])
    assert named.name == "omniglot-5way.json"
    assert report.read_results(named) == {"rows": [], "summary": []}


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("rows", {"value": "high"}, r'rows[1]: "value" must be a number or null, got \'high\''),
        ("rows", {"seed": 1.5}, 'rows[1]: "seed" must be a whole number'),
        ("rows", {"seed": None}, 'rows[1]: "seed" must be a whole number'),
        ("rows", {"method": ""}, 'rows[1]: "method" must be text'),
        ("rows", {"metric": ...}, 'rows[1]: "metric" is missing'),
        ("rows", {"values": [1, "x"]}, 'rows[1]: "values" must be a list of numbers'),
        ("rows", {"model": object}, 'rows[1]: "model" is a type, which JSON cannot hold'),
        ("summary", {"ci95": ...}, 'summary[1]: "ci95" is missing'),
        ("summary", {"ci95": -0.1}, 'summary[1]: "ci95" must be a half width >= 0, got -0.1'),
        ("summary", {"n": 0}, 'summary[1]: "n" must be a whole number >= 1'),
        ("summary", {"baseline": 3}, 'summary[1]: "baseline" must be text or null'),
        ("summary", {"mean": True}, 'summary[1]: "mean" must be a number or null'),
    ],
)
def test_schema_errors_name_the_row_and_the_key(part, change, said, tmp_path):
    rows, summary = results()
    changed = {"rows": rows, "summary": summary}[part]
    changed[1] = {k: v for k, v in (changed[1] | change).items() if v is not ...}
    with pytest.raises(ValueError, match=re.escape(said.replace("\\'", "'"))):
        report.write_results(tmp_path, rows, summary)
    assert list(tmp_path.iterdir()) == []


def test_reading_names_the_file(tmp_path):
    for text, said in (
        ('{"rows": []}', "exactly"),
        ('{"rows": {}, "summary": []}', '"rows" must be a list'),
        ("{", "Expecting"),
    ):
        file = tmp_path / "results.json"
        file.write_text(text)
        with pytest.raises(ValueError, match=f"results.json: .*{said}"):
            report.read_results(tmp_path)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    file = write_atomically(tmp_path / "a.txt", "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(file, "new")
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("mean", "half_width", "text"),
    [
        (0.56249, 0.01234, "0.562 ± 0.012"),
        (0.5, 0.0996, "0.500 ± 0.100"),
        (0.5, 0.00123, "0.5000 ± 0.0012"),
        (81.234, 3.21, "81.2 ± 3.2"),
        (123456.7, 2345.6, "123500 ± 2300"),
        (0.5, None, "0.500"),
        (2.6e9, None, "2600000000"),
        (1.23e-11, 4.5e-12, "1.2e-11 ± 4.5e-12"),
        (0.25, 0.0, "0.250 ± 0.000"),
        (0.0, 0.0, "0 ± 0"),
        (None, None, "–"),
    ],
)
def test_numbers_are_rounded_to_what_the_interval_supports(mean, half_width, text):
    assert report.format_interval(mean, half_width) == text


def test_markdown_has_settings_counts_intervals_and_differences():
    _, summary = results()
    text = report.markdown_table(summary)
    accuracy, seconds = text.split("**seconds**")
    lines = [line for line in accuracy.splitlines() if line.startswith("|")]
    assert accuracy.startswith("**accuracy (shots 5)**")
    assert lines[0] == "| method | steps | mean ± 95 % | n | difference to transfer ± 95 % |"
    # 4.3027 * 0.01 / sqrt(3) = 0.0248 around 0.61, and the same around a difference of 0.06.
    assert lines[2] == "| maml | 1 | 0.610 ± 0.025 | 3 seeds | +0.060 ± 0.025 |"
    assert lines[4] == r"| a\|b <c> | 1 | 0.510 ± 0.025 | 3 seeds | -0.040 ± 0.025 |"
    assert lines[6] == "| transfer | 1 | 0.550 ± 0.000 | 3 seeds | (baseline) |"
    assert "difference" not in seconds


def test_the_screen_table_shows_every_number():
    from rich.console import Console

    _, summary = results(seeds=(0,))
    written = io.StringIO()
    report.print_table(summary, Console(file=written, width=100))
    text = written.getvalue()
    for part in ("accuracy (shots 5)", "seconds", "a|b <c>", "0.600", "1 seed", "+0.0500"):
        assert part in text


def texts(path):
    """Words of an SVG with their places in points, found by an XML parser."""
    found = []
    for element in ET.parse(path).iter(f"{SVG}text"):
        place = re.search(r"translate\(([-\d.]+) ([-\d.]+)\)", element.get("transform", ""))
        x = float(place[1]) if place else float(element.get("x", "nan"))
        y = float(place[2]) if place else float(element.get("y", "nan"))
        found.append(("".join(element.itertext()).strip(), x, y))
    return found


def curves():
    steps = np.array([0, 1, 5, 10])
    ends = {"maml": 0.62, "fomaml": 0.619, "reptile": 0.618, "anil": 0.6, "none": 0.3}
    found = {m: (steps, 0.2 + (e - 0.2) * steps / 10, np.full(4, 0.01)) for m, e in ends.items()}
    return found | {"prototypes": ([0], [0.62], [0.01]), "majority": ([0], [0.2], None)}


def test_adaptation_curves_label_every_line_without_overlap(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        png, svg = figures.adaptation_curves(tmp_path / "curve.png", curves(), "accuracy", 0.2)
    assert (png.name, svg.name) == ("curve.png", "curve.svg")
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    words = texts(svg)
    places = {word: (x, y) for word, x, y in words}
    labels = [places[name] for name in (*curves(), "chance")]
    assert len({round(x, 3) for x, _ in labels}) == 1  # one column, right of the data
    heights = sorted(y for _, y in labels)
    assert min(np.diff(heights)) > 9  # the font size
    assert places["maml"][1] < places["anil"][1] < places["none"][1] < places["chance"][1]
    assert {"0", "1", "5", "10", "accuracy"} <= {word for word, _, _ in words}
    bands = ET.parse(svg).findall(f".//{SVG}g[@id]")
    assert sum("FillBetween" in band.get("id", "") for band in bands) == 5


@pytest.mark.parametrize("draw", [figures.adaptation_curves, figures.learning_curves])
def test_an_interval_is_cut_where_the_metric_ends(tmp_path, draw):
    wide = {"three seeds": ([10, 160], [0.5, 0.9], [1.7, 0.4])}

    def ticks(name, **limits):
        _, svg = draw(tmp_path / name, wide, ylabel="accuracy", **limits)
        words = [word.replace("\N{MINUS SIGN}", "-") for word, _, _ in texts(svg)]
        return [float(word) for word in words if "." in word]

    assert min(ticks("free")) < 0 < 1 < max(ticks("free"))
    inside = ticks("cut", limits=(0.0, 1.0))
    assert (min(inside), max(inside)) == (0, 1)


def test_figures_are_the_same_bytes_each_time_and_undated(tmp_path):
    _, summary = results()
    draw = {
        "learn": lambda path: figures.learning_curves(
            path, {"a": (range(3), [3.0, 2.0, 1.0], None)}, log_y=True
        ),
        "adapt": lambda path: figures.adaptation_curves(path, curves(), "accuracy"),
        "forest": lambda path: figures.forest(path, summary, "accuracy"),
    }
    for name, function in draw.items():
        first, second = function(tmp_path / name), function(tmp_path / f"{name}2")
        for a, b in zip(first, second, strict=True):
            assert a.read_bytes() == b.read_bytes()
        svg = first[1].read_text()
        assert "<dc:date>" not in svg
        assert ET.fromstring(svg).tag == f"{SVG}svg"


def test_cost_figure_shows_medians_of_ratios_to_the_reference(tmp_path):
    costs = {"first_order": (2.0, 50e6), "mixed_mode": (6.0, 170e6), "unrolled": (9.0, 2550e6)}
    rows = [
        {"method": m, "seed": s, "metric": k, "value": v * noise}
        for m, both in costs.items()
        for k, v in zip(("seconds", "temp_bytes"), both, strict=True)
        for s, noise in enumerate((1.0, 1.0, 40.0))
    ]
    rows += [{"method": "implicit", "seed": 0, "metric": "temp_bytes", "value": 75e6}]
    words = [word for word, _, _ in texts(figures.cost_figure(tmp_path / "cost", rows)[1])]
    for ratio in ("3×", "4.5×", "3.4×", "51×", "1.5×", "not measured", "× first_order"):
        assert ratio in words
    assert "30" in words  # the decades of memory, which spans more than 30
    assert words.index("time per step") != words.index("temporary memory")
    alone = [row for row in rows if row["metric"] == "temp_bytes"]
    words = [word for word, _, _ in texts(figures.cost_figure(tmp_path / "alone", alone)[1])]
    assert "3.4×" in words
    assert "time per step" not in words
    with pytest.raises(ValueError, match="for the reference 'firstorder'"):
        figures.cost_figure(tmp_path / "x", rows, reference="firstorder")
    with pytest.raises(ValueError, match=r"differ in 'T': \['None', '8'\]"):
        figures.cost_figure(tmp_path / "x", [*rows, rows[0] | {"T": 8}])
    with pytest.raises(ValueError, match="no row has a metric"):
        figures.cost_figure(tmp_path / "x", [])


def test_forest_marks_what_excludes_zero(tmp_path):
    base = {"metric": "accuracy", "mean": 0.5, "ci95": 0.1, "n": 9, "baseline": "transfer"}
    summary = [
        base | {"method": "better", "paired_difference": 0.1, "paired_ci95": 0.05},
        base | {"method": "same", "paired_difference": 0.01, "paired_ci95": 0.05},
        base | {"method": "transfer", "paired_difference": None, "paired_ci95": None},
    ]
    _, svg = figures.forest(tmp_path / "forest", summary)
    words = [word for word, _, _ in texts(svg)]
    assert "accuracy: paired difference to transfer" in words
    assert {"better", "same"} <= set(words)
    assert "transfer" not in words
    assert PALETTE[0].lower() in svg.read_text()
    with pytest.raises(ValueError, match="choose one metric"):
        figures.forest(tmp_path / "x", results()[1])
    with pytest.raises(ValueError, match="no paired difference"):
        figures.forest(tmp_path / "x", summary[2:])


def test_a_curve_of_unequal_lengths_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"'maml': .*shapes \[\(2,\), \(3,\), None\]"):
        figures.learning_curves(tmp_path / "x", {"maml": ([0, 1], [1.0, 2.0, 3.0], None)})


@given(st.lists(st.floats(-1, 1), max_size=12), st.floats(0.01, 0.3))
def test_spread_keeps_order_distance_and_the_centre(values, gap):
    places = spread(values, gap)
    ranked = [places[i] for i in sorted(range(len(values)), key=lambda i: values[i])]
    assert all(b - a >= gap - 1e-9 for a, b in itertools.pairwise(ranked))
    assert sum(places) == pytest.approx(sum(values), abs=1e-9)


@dataclasses.dataclass(frozen=True)
class Inner:
    lr: float = 0.125


@dataclasses.dataclass(frozen=True)
class Config(config.RunConfig):
    inner: Inner = Inner()
    note: str = "<script>alert('x')</script>"


def test_the_page_is_whole_escaped_and_alone(tmp_path):
    chosen = config.parse(Config, ["--out", str(tmp_path), "--inner.lr", "0.25"])
    config.dump(chosen, tmp_path)
    _, summary = results()
    pair = figures.adaptation_curves(tmp_path / "adapt", curves(), "accuracy")
    path = report.write_report(
        tmp_path,
        'Few <shots> & "more"',
        "First\x00 paragraph.\n\nSecond <b>one</b>.",
        chosen,
        summary,
        {"Curves & <bands>": pair, "As PNG": pair[0]},
        ["A note with <i>tags</i>."],
    )
    text = path.read_text()
    page = ET.fromstring(text)  # well-formed: an XML parser takes it
    assert page.findtext("head/title") == 'Few <shots> & "more"'
    paragraphs = ["".join(p.itertext()) for p in page.iter("p")]
    for wanted in ("Second <b>one</b>.", "A note with <i>tags</i>.", "First\ufffd paragraph."):
        assert wanted in paragraphs
    assert not list(page.iter("script")) + list(page.iter("link")) + list(page.iter("a"))
    assert "http" not in re.sub(r"data:[^\"]*", "", text)
    sources = [image.get("src", "") for image in page.iter("img")]
    assert [source.partition(";")[0] for source in sources] == ["data:image/svg+xml",
                                                               "data:image/png"]  # fmt: skip
    assert [base64.b64decode(s.partition("base64,")[2]) for s in sources] == [
        pair[1].read_bytes(),
        pair[0].read_bytes(),
    ]
    cells = [[c.text for c in row] for row in page.findall(".//tbody/tr")]
    assert ["maml", "1", "0.610 ± 0.025", "3 seeds", "+0.060 ± 0.025"] in cells
    assert len(cells) == len(summary)
    terms = {dt.text: dd.text for dt, dd in zip(page.iter("dt"), page.iter("dd"), strict=True)}
    assert terms["inner.lr"] == "0.25"
    assert terms["note"] == "<script>alert('x')</script>"
    assert terms["python"] == sys.version.split()[0]
    assert "out" not in terms
    assert (page.findtext(".//pre/code") or "").startswith("python -m ")
    assert str(tmp_path) not in text
    for rule in ("prefers-color-scheme: dark", "@media print"):
        assert rule in text


def test_a_page_without_a_run_record_or_figures(tmp_path):
    path = report.write_report(tmp_path, "t", "", {"lr": 0.1}, results()[1])
    page = ET.fromstring(path.read_text())
    assert [h.text for h in page.iter("h2")] == ["Results", "How to repeat it"]
    with pytest.raises(ValueError, match=r"an \.svg or \.png file, got \['a.pdf'\]"):
        html.figure("c", "a.pdf")


def test_experiments_are_listed_without_running_them(tmp_path):
    (tmp_path / "b.py").write_text('"""Second one.\n\nMore.\n"""\nraise SystemExit("was run")\n')
    (tmp_path / "longer.py").write_text('"""Third."""\nimport no_such_package\n')
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "_private.py").write_text('"""No."""\n')
    (tmp_path / "__init__.py").write_text('"""No."""\n')
    assert listing(tmp_path).splitlines() == ["  a", "  b       Second one.", "  longer  Third."]


def test_listing_and_reporting_load_nothing_heavy():
    code = "import runpy, sys; runpy.run_module('experiments', run_name='__main__')"
    heavy = "('jax', 'numpy', 'jmeta', 'matplotlib', 'tyro')"
    check = f"; print('loaded', sorted(set(sys.modules) & set({heavy})))"
    done = subprocess.run(
        [sys.executable, "-c", code + check], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "loaded []", done.stderr
    assert done.stdout.startswith("python -m experiments.NAME --preset P --seeds N --out DIR")
    code = (
        "import sys, jmeta; before = set(sys.modules)\n"
        "from jmeta.runtime import config, figures, html, report, statistics\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new & {'matplotlib', 'rich', 'scipy', 'tyro', 'yaml'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(("rows", "folded"), [(40, False), (41, True)])
def test_a_long_table_is_folded_under_its_caption(rows, folded):
    drawn = html.table("by <domain>", ["method", "mean"], [["maml", "1"]] * rows)
    assert drawn.count("<tr>") == rows + 1
    assert ("<summary>by &lt;domain&gt;: 41 rows</summary>" in drawn) is folded
    ET.fromstring(drawn)
