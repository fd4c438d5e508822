"""docs/cost.md and what fills it: a result needs a place, and is not copied before it has one."""

import json

import pytest

from benchmarks import cost_page, readme
from benchmarks import second_order_bars as judged


@pytest.fixture
def run(tmp_path):
    """A run directory of ``benchmarks.scaling_laws``, as it leaves it."""
    folder = tmp_path / "runs" / "scaling_laws"
    folder.mkdir(parents=True)
    row = {"method": "first_order", "seed": 0, "axis": "tasks", "metric": "flops"}
    rows = [row | {"at": n, "value": 10.0 * n} for n in (1, 4)]
    (folder / "results.json").write_text(json.dumps({"rows": rows, "summary": []}))
    made = {"preset": "quick", "command": "python -m somewhere", "devices": "1 x cpu"}
    (folder / "run.json").write_text(json.dumps(made))
    (folder / "scaling_laws.png").write_bytes(b"picture")
    return folder.parent


def test_a_result_without_a_place_is_not_copied(run, tmp_path):
    page = tmp_path / "cost.md"
    page.write_text("# Cost\n\n<!-- peers:begin --><!-- peers:end -->\n")
    with pytest.raises(ValueError, match=r"<!-- scaling_laws:begin -->.*<!-- scaling_laws:end -->"):
        cost_page.publish(run, tmp_path / "results", page)
    assert not (tmp_path / "results").exists()


def test_a_result_is_published_into_an_empty_place(run, tmp_path, monkeypatch, capsys):
    page, results = tmp_path / "cost.md", tmp_path / "results"
    page.write_text("a\n<!-- scaling_laws:begin -->\n<!-- scaling_laws:end -->\nb\n")
    assert cost_page.publish(run, results, page) == ["scaling_laws"]
    assert sorted(p.name for p in results.iterdir()) == [
        "scaling_laws.json", "scaling_laws.png", "scaling_laws.run.json",
    ]  # fmt: skip
    # The page is filled from what was copied; of the others there is no result, and no place.
    monkeypatch.setattr(cost_page, "PAGE", page)
    monkeypatch.setattr(cost_page, "places", lambda made=cost_page.places: made(results))
    cost_page.main([])
    lines = page.read_text().splitlines()
    assert "| tasks | first_order |  |  | 1.000 |  |  |  |" in lines
    assert "1 x cpu; `python -m benchmarks.scaling_laws --preset quick`." in lines
    assert any(line.endswith("](../benchmarks/results/scaling_laws.png)") for line in lines)
    # And with the place gone, the error is a sentence of the page's name.
    page.write_text("nothing\n")
    with pytest.raises(SystemExit, match=r"cost\.md: the page needs the place <!-- scaling_laws:b"):
        cost_page.main([])


def test_the_page_has_a_place_for_every_result_that_may_come():
    text = cost_page.PAGE.read_text(encoding="utf-8")
    every = dict.fromkeys([*cost_page.TABLES, cost_page.NETWORKS, cost_page.BARS])
    assert readme.fill(text, every) == text
    assert readme.fill(text, cost_page.places()) == text  # and says what is committed


def test_bars_that_are_missed_come_first_and_in_bold(tmp_path):
    for model, error in (("mlp", 1e-7), ("conv", 1e-3)):
        rows = [{"method": "unrolled", "seed": 0, "metric": "error", "model": model, "steps": steps,
                 "value": value} for steps, value in ((1, 1e-8), (5, error))]  # fmt: skip
        file = tmp_path / f"second_order_cost-{model}.json"
        file.write_text(json.dumps({"rows": rows, "summary": []}))
    blocks = cost_page.held_to(tmp_path).split("\n\n")
    assert [block.partition("`:")[0] for block in blocks[::2]] == [
        "`second_order_cost-mlp", "`second_order_cost-conv"
    ]  # fmt: skip
    mlp, conv = (block.splitlines() for block in blocks[1::2])
    assert [line.startswith("- **") for line in mlp] == [False, False]
    assert [line.startswith("- **conv, 5 inner") for line in conv] == [True, False]
    assert conv[0].endswith("MISSED)**")


def test_small_networks_are_shown_in_multiples_of_first_order():
    rows = [
        {"method": method, "seed": seed, "metric": metric, "value": value + 0.2 * seed, "steps": 5}
        for method, time in (("mixed_mode", 2.0), ("mixed_mode nested", 3.0), ("unrolled", 1.5),
                             ("unrolled step", 2.5), ("reptile", 9.0))
        for seed in range(3)
        for metric, value in (("seconds x", time), ("temp_bytes x", 2 * time), ("error", 1.0))
    ]  # fmt: skip
    [name, *_] = judged.NETWORKS
    last = judged.networks({name: rows}).splitlines()[-1]
    assert (
        last
        == "| 1-40-40-1 on ten points | 5 | 2.2, 4.2 | 3.2, 6.2 | 1.7, 3.2 | 2.7, 5.2 | 1e+00 |"
    )
