"""The suite of benchmarks: every part runs, one that fails is said; and the scaling laws' page."""

import json
import types

import pytest

from benchmarks import scaling_laws, suite


@pytest.fixture
def ran(monkeypatch):
    """Commands instead of processes: each leaves a table, and the planner fails."""
    commands = []

    def run(command, *, check):
        commands.append(command)
        name = command[2].partition(".")[2]
        folder = suite.Path(command[command.index("--out") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.md").write_text(f"| {name} |\n")
        return types.SimpleNamespace(returncode=3 if name == "auto" else 0)

    monkeypatch.setattr(suite, "subprocess", types.SimpleNamespace(run=run))
    return commands


def test_a_part_that_fails_does_not_stop_the_rest(ran, tmp_path):
    with pytest.raises(SystemExit) as ended:
        suite.main(["--preset", "smoke", "--out", str(tmp_path)])
    assert ended.value.code == 1
    assert [command[2] for command in ran] == [f"benchmarks.{name}" for name in suite.PARTS]
    assert all("--resume" not in command for command in ran)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    status = {row["method"]: row["value"] for row in rows if row["metric"] == "exit status"}
    assert status == dict.fromkeys(suite.PARTS, 0.0) | {"auto": 3.0}
    page = (tmp_path / "suite.md").read_text()
    for name in suite.PARTS:
        assert f"## {name}\n\n| {name} |\n" in page


def test_what_is_resumed_is_every_part_that_keeps_pieces(ran, tmp_path):
    suite.main(["--preset", "smoke", "--out", str(tmp_path), "--parts", "peers",
                "second_order_cost", "--resume"])  # fmt: skip
    assert [("--resume" in command, command[4]) for command in ran] == [
        (True, "smoke"), (False, "smoke"),
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="no benchmark nonsense; known are second_order_cost"):
        suite.main(["--preset", "smoke", "--out", str(tmp_path), "--parts", "nonsense"])


def laws():
    """Rows of exact power laws: time as x, memory as x squared, FLOPs as 100 x the square root."""
    row = {"method": "mixed_mode", "seed": 0, "axis": "tokens"}
    return [
        row | {"metric": metric, "at": x, "value": value}
        for x in (1, 4, 16)
        for metric, value in (
            ("median seconds", float(x)), ("temp_bytes", x**2), ("flops", 100 * x**0.5),
            ("median seconds, floor", x / 2), ("flops, floor", 80 * x**0.5),
        )
    ]  # fmt: skip


def test_exponents_and_distances_to_the_floor_are_in_the_table():
    head, _, *lines = scaling_laws.table(laws()).splitlines()
    assert head.split(" | ")[2:5] == ["time", "memory", "FLOPs"]
    [line] = [line for line in lines if line.startswith("| tokens | mixed_mode |")]
    cells = [cell.strip() for cell in line.strip("|").split("|")[2:]]
    assert [float(cell.partition(" ")[0]) for cell in cells[:3]] == pytest.approx([1, 2, 0.5])
    assert cells[3:] == ["2.00", "", "1.25"]
    assert len(lines) == len(scaling_laws.METHODS)


def test_the_figure_shows_methods_and_the_floor(tmp_path):
    paths = scaling_laws.figure(laws(), tmp_path / "scaling_laws")
    assert [path.suffix for path in paths] == [".png", ".svg"]
    text = paths[1].read_text(encoding="utf-8")
    for label in ("mixed_mode", "floor of mixed_mode", "tokens", "seconds", "temporary MiB"):
        assert label in text
    with_floor = text
    without = [row for row in laws() if "floor" not in row["metric"]]
    text = scaling_laws.figure(without, tmp_path / "other")[1].read_text(encoding="utf-8")
    assert "floor of mixed_mode" in with_floor
    assert "floor of mixed_mode" not in text


@pytest.mark.parametrize(("steps", "nested"), [(1, 0), (2, 1), (9, 4), (64, 14), (128, 22)])
def test_the_floor_of_memory_is_the_trajectory(steps, nested):
    # Nested: the first weights of all blocks but the caller's own, and those within one block.
    made = scaling_laws.Point(None, None, None, 1.0, 1000, 250)
    for tasks in (1, 3):
        size = scaling_laws.Size(steps=steps, tasks=tasks)
        found = {
            name: scaling_laws.floor(name, "temp_bytes", size, made)
            for name in scaling_laws.METHODS
        }
        assert found == {
            "first_order": None, "unrolled": None,
            "mixed_mode": 1000 * tasks * (steps - 1) or None,
            "mixed_mode nested": 1000 * tasks * nested or None,
        }  # fmt: skip
