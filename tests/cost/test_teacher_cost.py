"""``benchmarks.teacher_cost``: which rows there are, and what they are held to."""

import pytest

from benchmarks import teacher_cost


def rows_of(ratios):
    return [
        {"method": name, "seed": 0, "metric": metric, "value": value}
        for name, ratio in ratios.items()
        for metric, value in (("seconds x", ratio), ("flops x", 9.0))
    ]


@pytest.mark.parametrize("mode", ["", ", mixed mode"])
def test_a_step_is_held_to_its_bar_in_either_mode(mode):
    kept = {f"soft{mode}": 7.5, f"soft, auxiliary{mode}": 10.0, f"input-only{mode}": 6.8}
    smoke = teacher_cost.PRESETS["smoke"]
    lines = teacher_cost.bars(smoke, rows_of(kept))
    assert len(lines) == 3
    assert all(line.endswith("holds); 9.00 x its FLOPs") for line in lines)
    for name, ratio in kept.items():
        lines = teacher_cost.bars(smoke, rows_of(kept | {name: ratio + 0.01}))
        [missed] = [line for line in lines if "MISSED" in line]
        assert missed.startswith(f"{name}: {ratio + 0.01:.2f} x")


def test_every_step_that_is_held_to_a_bar_is_timed():
    timed = set(teacher_cost.cells(teacher_cost.PRESETS["smoke"]))
    assert timed == {teacher_cost.MLM} | {
        f"{name}{mode}" for name in teacher_cost.BARS for mode in ("", ", mixed mode")
    }
