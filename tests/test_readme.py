"""The README and docs/ say what is: their code runs word for word, what they name exists."""

import importlib.util
import pathlib
import re

import jax
import pytest

from benchmarks import readme

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if "_build" not in page.parts]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def sections(page: pathlib.Path) -> list[tuple[str, list[tuple[str, str]]]]:
    """(Heading, [(language, code), ...]) of each `## ` section: one namespace each."""
    parts = re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [
        (part.partition("\n")[0].strip("# "), [(m[1], m[2]) for m in FENCE.finditer(part)])
        for part in parts
    ]


# A hundred steps of meta-training, whose accuracies the page states.
LONG = {"quickstart: MAML on text"}
RUNNABLE = [
    pytest.param(
        blocks,
        id=(name := f"{page.stem}: {heading}"),
        marks=[pytest.mark.slow] if name in LONG else [],
    )
    for page in PAGES
    for heading, blocks in sections(page)
    if any(language == "python" for language, _ in blocks)
]


def run(blocks, capsys) -> dict:
    """Run a section's python blocks; a ```text block is what the block before it prints."""
    names: dict = {"__name__": "__main__"}
    printed = ""
    # As users run it: without the strictness of these tests.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for language, code in blocks:
            if language == "python":
                exec(compile(code, "<documentation>", "exec"), names)
                printed = capsys.readouterr().out
            elif language == "text":
                assert printed.strip() == code.strip()
    return names | {"printed": printed}


@pytest.mark.parametrize("blocks", RUNNABLE)
def test_code_runs_word_for_word(blocks, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(blocks, capsys)


def test_twelve_lines_learn_whom_to_trust(capsys):
    blocks = dict(sections(README))["Twelve lines"]
    code = blocks[0][1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    trust = jax.nn.sigmoid(run(blocks, capsys)["result"].meta)
    assert trust[:8].max() < 0.5 < trust[8:].min()
    assert trust[:8].mean() < 0.15


def test_the_readme_holds_what_the_committed_results_say():
    text = README.read_text(encoding="utf-8")
    assert text == readme.fill(text, readme.places()), "run: python -m benchmarks.readme"


def test_commands_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        code = "\n".join(re.findall(r"`([^`\n]+)`", text) + [m[2] for m in FENCE.finditer(text)])
        for target in re.findall(r"(?:^|\s)make (\w+)", code, re.MULTILINE):
            assert target in targets, f"{page.name}: make {target}"
        for module in re.findall(r"python3? -m ([\w.]+)", code):
            if module not in ("experiments.NAME", "venv", "pip"):
                spec = importlib.util.find_spec(module)
                assert spec is not None, f"{page.name}: python -m {module}"


def test_presets_and_sources_named_exist():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name, preset in re.findall(r"experiments\.(\w+) --preset (\w+)", text):
            source = (ROOT / "experiments" / f"{name}.py").read_text(encoding="utf-8")
            assert f'"{preset}"' in source, f"{page.name}: {name} --preset {preset}"


def test_links_and_figures_resolve():
    for page in PAGES:
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if not link.startswith(("http://", "https://", "#")):
                assert (page.parent / link.partition("#")[0]).exists(), f"{page.name}: {link}"


def rows(method: str, **values: float) -> list[dict]:
    settings = {"model": "lm", "steps": 8, "n": 5, "over": "repeats", "ci95": None}
    empty = {"baseline": None, "paired_difference": None, "paired_ci95": None}
    return [
        {"method": method, "metric": metric, "mean": value, **settings, **empty}
        for metric, value in values.items()
    ]


def test_cost_table_is_in_multiples_of_first_order():
    summary = rows("first_order", **{"seconds": 2.0, "seconds x": 1.0, "error": 0.5})
    summary += rows("mixed_mode", **{"seconds": 5.0, "seconds x": 2.5, "error": 1e-7})
    summary += [
        row | {"steps": 16, "mean": 99.0} for row in rows("mixed_mode", **{"seconds x": 1.0})
    ]
    timed = [{"metric": "seconds", "seed": seed, "values": [1.0] * 5} for seed in range(3)]
    result = {"summary": summary, "rows": timed, "command": "python -m x", "devices": "1 cpu"}
    assert readme.cost_table(result) == (
        "| estimator | time | error |\n"
        "| --- | --: | --: |\n"
        "| first_order | 1.00 | 5e-01 |\n"
        "| mixed_mode | 2.50 | 1e-07 |\n"
        "\n"
        "Medians of 5 interleaved runs, mean of 3 processes; 1 cpu; `python -m x`."
    )


def test_a_place_is_filled_once_and_kept_without_results():
    text = "a <!-- one:begin -->old<!-- one:end --> b <!-- two:begin -->x<!-- two:end -->"
    filled = readme.fill(text, {"one": r"new \1", "two": None})
    assert filled.startswith("a <!-- one:begin -->\nnew \\1\n<!-- one:end -->")
    assert filled.endswith("<!-- two:begin -->x<!-- two:end -->")
    assert readme.fill(filled, {"one": r"new \1", "two": None}) == filled
    with pytest.raises(ValueError, match="three"):
        readme.fill(text, {"three": "x"})
