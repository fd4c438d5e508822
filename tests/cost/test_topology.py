"""Names of machines, sizes of memory, and what a compiler says when a program does not fit."""

import os

import jax
import pytest

from jmeta.cost import TopologyError, topology


@pytest.mark.parametrize(
    ("message", "figures"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (104.97G) exceeds available HBM (15.75G).",
            (104.97, 15.75),
        ),
        (
            "RESOURCE_EXHAUSTED: Compilation failure: Ran out of memory in memory space hbm. Used "
            "24.15G of 15.75G hbm. Exceeded hbm capacity by 8.40G.",
            (24.15, 15.75),
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (12.03T) exceeds available HBM (30.75G).",
            (12.03 * 1024, 30.75),
        ),
    ],
)
def test_figures_of_a_program_that_does_not_fit(message, figures):
    assert topology.exhausted(message) == tuple(int(f * 2**30) for f in figures)


@pytest.mark.parametrize(
    "message",
    ["", "RESOURCE_EXHAUSTED: Out of vmem", "INTERNAL: (1.0G) exceeds available HBM (2.0G)"],
)
def test_another_error_is_not_taken_for_one(message):
    assert topology.exhausted(message) is None


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("16GiB", 16 * 2**30), ("16g", 16 * 2**30), (" 16 GB ", 16e9), ("512MiB", 2**29),
        ("1.5 T", 1.5 * 2**40), (2**30, 2**30), ("1073741824", 2**30), ("7b", 7), (1e9, 1e9),
    ],
)  # fmt: skip
def test_sizes_of_memory(text, size):
    assert topology.memory_bytes(text) == size


@pytest.mark.parametrize("text", ["", "lots", "16 parsecs", "-3GB", "0", "GB", "1e", "nan", "inf"])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match="is no size of memory; write bytes or a unit"):
        topology.memory_bytes(text)


@pytest.mark.parametrize(
    "name",
    ["", "v5e", "v5p-128", "v5e:0x", "v5e:2", "v5e:2x2x2x2", "v5e:2x4; rm", "cpu", "V5E:2x2"],
)
def test_names_that_are_no_topology(name):
    with pytest.raises(TopologyError, match="is no topology; write GENERATION:SHAPE"):
        topology.check_topology(name)


def test_an_unknown_generation():
    with pytest.raises(TopologyError, match="names the generation 'v9'; known are v4, v5e"):
        topology.check_topology("v9:2x2")


def test_without_libtpu_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TopologyError, match=r"not installed: pip install -e '\.\[tpu\]'"):
        topology.require_libtpu()


def test_a_tpu_is_not_compiled_for_inside_a_process_that_goes_on(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(TopologyError, match=r"inside this process; use jmeta\.cost\.plan"):
        topology.devices("v5e:2x2", env={})


def test_the_devices_here_share_the_memory_of_the_machine():
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert topology.usable_bytes(jax.devices()[0]) == whole // len(jax.devices())
