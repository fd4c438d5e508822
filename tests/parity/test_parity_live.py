"""jmeta's language models against transformers in PyTorch, live: ``make parity``."""

import jax
import jax.numpy as jnp
import numpy as np
import parity_cases as parity
import pytest

from jmeta.models import attention, masked_lm, peft, pretrained

torch = pytest.importorskip("torch", reason="needs PyTorch: make parity installs it")

LIMITS = {"scores": 1e-9, "loss": 1e-9, "grad": 1e-9, "hvp": 1e-8}


@pytest.mark.parametrize("case", parity.CASES, ids=lambda case: case.name)
def test_scores_loss_gradients_and_hessian_vector_products(x64, case, tmp_path):
    parity.write_weights(tmp_path, case, parity.torch_shapes(case))
    ours, theirs = parity.run(tmp_path, case), parity.run_torch(tmp_path, case)
    assert set(ours) == set(theirs)
    worst = {kind: parity.largest_difference(ours, theirs, kind) for kind in LIMITS}
    print(case.name, worst)
    assert all(worst[kind] <= limit for kind, limit in LIMITS.items()), worst


@pytest.mark.parametrize("case", parity.CASES, ids=lambda case: case.name)
def test_transformers_loads_what_we_write(x64, case, tmp_path):
    """No key missing or unexpected, the same weights, and so the same outputs up to rounding."""
    import transformers

    parity.write_weights(tmp_path, case, parity.torch_shapes(case))
    before = parity.run_torch(tmp_path, case)
    model = pretrained.from_pretrained(tmp_path / "weights")
    pretrained.to_pretrained(tmp_path / "again" / "weights", model.config, model.params)
    after = parity.run_torch(tmp_path / "again", case)
    read = getattr(transformers, case.torch_class).from_pretrained
    old, new = (
        read(folder / "weights", dtype=torch.float64).state_dict()
        for folder in (tmp_path, tmp_path / "again")
    )
    assert old.keys() == new.keys()
    assert all((tensor == new[key]).all() for key, tensor in old.items())
    # Where tensors happen to lie in memory decides how PyTorch adds up.
    for name in before:
        np.testing.assert_allclose(before[name], after[name], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("model", parity.SETTINGS)
def test_what_transformers_saves_is_read_whole_and_in_shards(x64, model, tmp_path):
    """Of a classifier and of a body, pooler included, which then goes back without a gap."""
    import transformers

    for name in (
        parity.CLASSES[model] + parity.SUFFIX["classify"],
        parity.CLASSES[model] + "Model",
    ):
        cls = getattr(transformers, name)
        made = cls(transformers.AutoConfig.for_model(**parity.SETTINGS[model])).double()
        made.save_pretrained(tmp_path / name / "whole")
        made.save_pretrained(tmp_path / name / "shards", max_shard_size="4KB")
        assert len(list((tmp_path / name / "shards").glob("*.safetensors"))) > 1
        whole, shards = (
            pretrained.from_pretrained(tmp_path / name / kind) for kind in ("whole", "shards")
        )
        assert whole.unused == shards.unused == ()
        jax.tree.map(np.testing.assert_array_equal, whole.params, shards.params)
        again = pretrained.to_pretrained(tmp_path / name / "again", whole.config, whole.params)
        loaded, report = cls.from_pretrained(
            again, dtype=torch.float64, output_loading_info=True
        )  # fmt: skip
        assert not report["missing_keys"], report
        assert not report["unexpected_keys"], report
        for key, tensor in made.state_dict().items():
            assert (loaded.state_dict()[key] == tensor).all(), key


@pytest.mark.parametrize("case", parity.PEFT, ids=lambda case: case.name)
def test_adapters_both_ways(x64, case, tmp_path):
    """PEFT's adapter here, and what we write of it in PEFT: the same scores everywhere."""
    library = pytest.importorskip("peft", reason="needs PEFT: make parity installs it")
    import transformers

    parity.write_weights(tmp_path, case, parity.torch_shapes(case))
    theirs = parity.run_peft(tmp_path, case)
    ours = {"scores": parity.run_adapted(tmp_path, tmp_path / "adapter", case)}
    assert parity.largest_difference(ours, theirs, "scores") <= 1e-9
    config = pretrained.from_pretrained(tmp_path / "weights").config
    read = peft.read(tmp_path / "adapter", config)
    peft.write(tmp_path / "again", config, read.factors, read.scale, head=read.head)
    cls = getattr(transformers, case.torch_class)
    base = cls.from_pretrained(tmp_path / "weights", dtype=torch.float64)
    model = library.PeftModel.from_pretrained(
        base, tmp_path / "again", autocast_adapter_dtype=False
    )  # fmt: skip
    again = {"scores": parity.peft_scores(model.eval(), case)}
    assert parity.largest_difference(again, theirs, "scores") <= 1e-12


def test_minilm_round_trip(tmp_path):
    import transformers

    folder = parity.minilm()
    if folder is None:
        pytest.skip("needs the MiniLM package: make parity installs it")
    model = pretrained.from_pretrained(folder)
    pretrained.to_pretrained(tmp_path, model.config, model.params, model.settings)
    _, report = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(list(parity.SENTENCES), padding=True, return_tensors="pt")
    with torch.no_grad():
        old, new = (
            transformers.AutoModel.from_pretrained(f)(**encoded).last_hidden_state
            for f in (folder, tmp_path)
        )
    assert (old == new).all()
    mask = encoded["attention_mask"][..., None]
    theirs = torch.nn.functional.normalize((old * mask).sum(1) / mask.sum(1)).numpy()
    arrays = {"tokens": encoded["input_ids"].numpy(), "mask": encoded["attention_mask"].numpy()}
    worst = np.abs(parity.embed_minilm(folder, arrays) - theirs).max()
    print("minilm", worst)
    assert worst <= 2e-5


def test_attention_equals_that_of_torch(x64):
    rng = np.random.default_rng(0)
    x, mask = rng.standard_normal((2, 5, 8)), np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    shape = masked_lm.config(vocab=11, width=8, layers=1, heads=2, max_len=6, ff=12)
    layer = masked_lm.init(shape, jax.random.key(0))["blocks"]["attn"]
    weights = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape[1:])), layer)
    ours = attention.attend(
        shape, weights, jnp.asarray(x), attention.visible(False, jnp.asarray(mask), 5)
    )
    theirs = torch.nn.MultiheadAttention(8, shape.heads, batch_first=True, dtype=torch.float64)
    names = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    qkv, out = ({k: np.array(v) for k, v in weights[name].items()} for name in ("qkv", "out"))
    copied = (qkv["kernel"].T, qkv["bias"], out["kernel"].T, out["bias"])
    copies = zip(names, map(torch.tensor, copied), strict=True)
    theirs.load_state_dict(dict(copies))
    with torch.no_grad():
        rows = torch.tensor(x)
        expected, _ = theirs(rows, rows, rows, key_padding_mask=torch.tensor(mask == 0))
    present = mask == 1
    np.testing.assert_allclose(np.asarray(ours)[present], expected.numpy()[present], rtol=1e-10)
