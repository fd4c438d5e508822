"""Checkpoints: what is read is what was written, in one copy, and every difference has a name."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_folder import BERT, GPT2, change, rewrite, same, tensors
from random_params import random_params

from jmeta.models import bert, gpt2, names, pretrained
from jmeta.models.pretrained import from_pretrained, to_pretrained


@pytest.fixture
def folder(tmp_path):
    return to_pretrained(tmp_path / "bert", BERT, random_params(bert, BERT))


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("head", [None, "masked_lm", "classify", "spans"])
def test_encoders_come_back_as_they_were(tmp_path, kind, head):
    types = {"bert": 2, "roberta": 1, "distilbert": 0}[kind]
    config = BERT._replace(kind=kind, head=head, types=types, pad_id=1, dropout=0.25)
    config = config if head == "classify" else config._replace(labels=2)
    params = random_params(bert, config)
    model = from_pretrained(to_pretrained(tmp_path, config, params))
    assert model.config == config
    assert model.drawn == model.unused == ()
    same(model.params, params)


@pytest.mark.parametrize("head", [None, "causal_lm", "classify", "spans"])
def test_decoders_come_back_as_they_were(tmp_path, head):
    config = GPT2._replace(head=head, pad_id=3)
    params = random_params(gpt2, config)
    model = from_pretrained(to_pretrained(tmp_path, config, params))
    assert model.config == config
    same(model.params, params)
    assert pretrained.model(model.config) is gpt2


def test_kernels_are_transposed_and_stacked(folder):
    params, stored = from_pretrained(folder).params, tensors(folder)
    for i in range(2):
        np.testing.assert_array_equal(
            np.asarray(params["blocks"]["mlp"]["up"]["kernel"])[i],
            stored[f"bert.encoder.layer.{i}.intermediate.dense.weight"].T,
        )
    assert stored["classifier.weight"].shape == (3, 8)


def test_shards_old_names_and_buffers(folder):
    arrays = tensors(folder)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for name, value in arrays.items()
    }
    old["bert.embeddings.position_ids"] = np.arange(6)[None]
    expected = from_pretrained(folder).params
    half = len(old) // 2
    shards = {
        f"model-0000{i + 1}-of-00002.safetensors": dict(list(old.items())[cut])
        for i, cut in enumerate([slice(None, half), slice(half, None)])
    }
    for name, part in shards.items():
        rewrite(folder, part, name)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {n: file for file, part in shards.items() for n in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    same(from_pretrained(folder).params, expected)
    # What is written beside the shards is what is read again, as in transformers.
    other = random_params(bert, BERT, seed=1)
    to_pretrained(folder, BERT, other)
    same(from_pretrained(folder).params, other)
    (folder / "model.safetensors").unlink()
    file = next(iter(shards))
    rewrite(folder, dict(list(shards[file].items())[1:]), file)
    missing = next(iter(shards[file]))
    with pytest.raises(ValueError, match=f"{missing}.*has no such"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ([1], "holds no JSON object"),
        ("{", "truncated or no JSON"),
        ({}, "has no weight_map"),
        ({"weight_map": [1]}, "has no weight_map"),
        ({"weight_map": {"a": 3}}, "puts the tensor 'a' into 3, outside"),
        ({"weight_map": {"a": "../other/a.safetensors"}}, "'../other/a.safetensors', outside"),
        ({"weight_map": {"a": "/other/a.safetensors"}}, "'/other/a.safetensors', outside"),
        ({"weight_map": {"a": "b.safetensors"}}, "holds no b.safetensors"),
    ],
)
def test_an_index_that_leads_nowhere_or_outside_is_refused(folder, index, words):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    text = index if isinstance(index, str) else json.dumps(index)
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        from_pretrained(folder)


def test_layers_stored_in_several_dtypes_keep_the_widest(folder):
    arrays = tensors(folder)
    expected = from_pretrained(folder).params
    name = "bert.encoder.layer.{}.intermediate.dense.weight"
    low = {name.format(0): arrays[name.format(0)].astype(np.float16)}
    rewrite(folder, arrays | low)
    kernel = from_pretrained(folder).params["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.dtype == jnp.float32
    wide = np.asarray(expected["blocks"]["mlp"]["up"]["kernel"])
    np.testing.assert_array_equal(np.asarray(kernel)[1], wide[1])
    low[name.format(1)] = arrays[name.format(1)].astype(jnp.bfloat16)
    rewrite(folder, arrays | low)
    kernel = from_pretrained(folder).params["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.dtype == jnp.float32  # neither of the two holds the other
    np.testing.assert_array_equal(np.asarray(kernel)[0], low[name.format(0)].T.astype(np.float32))


def test_a_cache_that_holds_the_tokeniser_alone_is_filled(folder, tmp_path, monkeypatch):
    import huggingface_hub

    snapshot, calls = tmp_path / "snapshot", []
    snapshot.mkdir()
    (snapshot / "config.json").write_bytes((folder / "config.json").read_bytes())

    def download(name, *, allow_patterns, local_files_only=False):
        calls.append(local_files_only)
        if not local_files_only:
            (snapshot / "model.safetensors").symlink_to(folder / "model.safetensors")
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    same(from_pretrained("some/model").params, from_pretrained(folder).params)
    assert calls == [True, False]
    from_pretrained("some/model")
    assert calls == [True, False, True]  # what is there needs no network


def test_another_head_takes_the_body_and_says_what_it_left(folder):
    body = from_pretrained(folder, head="none")
    assert body.config.head is None
    assert set(body.params) == {"embed", "blocks", "pooler"}
    assert set(body.unused) == {"classifier.weight", "classifier.bias"}
    with pytest.raises(ValueError, match=r"no head 'spans'.*key="):
        from_pretrained(folder, head="spans")
    spans = from_pretrained(folder, head="spans", key=jax.random.key(0))
    assert set(spans.drawn) == {"head.out.kernel", "head.out.bias"}
    assert set(spans.unused) == {
        *(f"bert.pooler.dense.{k}" for k in ("weight", "bias")),
        *(f"classifier.{k}" for k in ("weight", "bias")),
    }
    same(spans.params["blocks"], body.params["blocks"])


def test_a_body_gets_a_classifier_and_keeps_its_pooler(folder, tmp_path):
    body = from_pretrained(folder, head="none")
    saved = to_pretrained(tmp_path / "body", body.config, body.params)
    assert "pooler.dense.weight" in tensors(saved)
    model = from_pretrained(saved, head="classify", labels=5, key=jax.random.key(0))
    assert set(model.drawn) == {"head.out.kernel", "head.out.bias"}
    assert model.params["head"]["out"]["kernel"].shape == (8, 5)
    same(model.params["head"]["dense"], body.params["pooler"])


def test_roberta_keeps_its_pooler_too(folder, tmp_path):
    config = BERT._replace(kind="roberta", head=None, types=1, pad_id=1)
    params = random_params(bert, config)
    dense = {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}
    model = from_pretrained(to_pretrained(tmp_path, config, {**params, "pooler": dense}))
    same(model.params["pooler"], dense)
    assert model.unused == ()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtype_at_load_and_back(folder, tmp_path, dtype):
    exact, low = from_pretrained(folder).params, from_pretrained(folder, dtype=dtype)
    same(low.params, jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), exact))
    saved = to_pretrained(tmp_path / "low", low.config, low.params, low.settings)
    assert json.loads((saved / "config.json").read_text())["dtype"] == jnp.dtype(dtype).name
    same(from_pretrained(saved).params, low.params)


def test_a_width_of_another_time_is_not_written(folder, tmp_path):
    """Leaves of several dtypes: config.json must not name the narrower one."""
    model = from_pretrained(folder)
    low = {**model.params, "head": jax.tree.map(jnp.bfloat16, model.params["head"])}
    saved = to_pretrained(tmp_path, model.config, low, {**model.settings, "dtype": "bfloat16"})
    assert "dtype" not in json.loads((saved / "config.json").read_text())
    same(from_pretrained(saved).params, low)
    with pytest.raises(TypeError, match="dtype=int32"):
        from_pretrained(folder, dtype=jnp.int32)


def test_a_truncated_file_names_the_tensor_that_is_cut(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    last = list(json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")]))[-1]
    for cut, words in ((-4, f"truncated.*'{last}' of shape"), (100 - len(whole), "header")):
        file.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=words):
            from_pretrained(folder)


def test_missing_misshapen_and_unexpected_tensors_are_named(folder):
    arrays = tensors(folder)
    name = "bert.encoder.layer.1.attention.self.key.weight"
    short = name.removeprefix("bert.")
    rewrite(folder, {n: a for n, a in arrays.items() if n != name})
    with pytest.raises(ValueError, match=f"no tensor '{short}' of shape .8, 8."):
        from_pretrained(folder)
    rewrite(folder, arrays | {name: np.zeros((9, 8), np.float32)})
    with pytest.raises(ValueError, match=f"'{name}' has shape .9, 8., but config.json .*8, 8."):
        from_pretrained(folder)
    rewrite(folder, arrays | {"bert.encoder.relative": np.zeros((9, 8), np.float32)})
    with pytest.raises(ValueError, match=r"'bert.encoder.relative' of shape .9, 8. is not part"):
        from_pretrained(folder)
    rewrite(folder, arrays | {name: np.zeros((8, 8), np.int8)})
    with pytest.raises(ValueError, match=r"int8.*not quantised"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_hidden_layers": 1}, "layer.1.*not part of a bert with 1 layers"),
        ({"num_hidden_layers": 3}, "no tensor 'encoder.layer.2"),
        ({"hidden_size": 16}, "'bert.embeddings.word_embeddings.weight' has shape .13, 8."),
        ({"id2label": {"0": "a", "1": "b"}}, "'classifier.weight' has shape .3, 8.*2, 8"),
        ({"model_type": "t5"}, "model_type='t5'; jmeta has 'bert'"),
        ({"architectures": ["BertForTokenClassification"]}, "BertForTokenClassification.*head="),
        ({"is_decoder": True}, "is_decoder=True"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"hidden_act": "relu"}, "activation 'relu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": "8"}, "hidden_size='8', which is no number above 0"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers=-1"),
        ({"num_labels": "3"}, "num_labels='3'"),
        (
            {"model_type": "roberta", "architectures": ["RobertaModel"], "pad_token_id": None},
            "no pad_token_id",
        ),
    ],
)
def test_a_config_that_does_not_fit_is_refused(folder, settings, words):
    change(folder, **settings)
    with pytest.raises(ValueError, match=words):
        from_pretrained(folder)


def test_labels_that_the_checkpoint_has_not_are_said_to_be_asked_for(folder):
    with pytest.raises(ValueError, match=r"'classifier.weight' has shape .3, 8., but labels=5 me"):
        from_pretrained(folder, labels=5, key=jax.random.key(0))
    with pytest.raises(ValueError, match="labels=0"):
        from_pretrained(folder, labels=0)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json holds no JSON object"):
        from_pretrained(folder)


def test_segments_are_where_transformers_has_them(tmp_path):
    with pytest.raises(ValueError, match="DistilBERT has no segment embedding: types=2"):
        bert.init(BERT._replace(kind="distilbert"), jax.random.key(0))
    config = BERT._replace(types=0)
    with pytest.raises(ValueError, match="bert has a segment embedding; the config has types=0"):
        to_pretrained(tmp_path, config, random_params(bert, config))


def test_pickles_are_refused_with_advice(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*any code.*save_pretrained"):
        from_pretrained(folder)


def test_offline_one_sentence_says_what_to_do(tmp_path):
    for name in ("somebody/some-model", str(tmp_path / "nowhere"), "./nowhere"):
        with pytest.raises(FileNotFoundError) as caught:
            from_pretrained(name)
        message = str(caught.value)
        assert "give the path of a folder that holds config.json and" in message
        assert "\n" not in message
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        from_pretrained(tmp_path)


def test_writing_is_atomic_and_checked(folder, monkeypatch):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    params = random_params(bert, BERT, seed=1)

    def broken(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", broken)
        with pytest.raises(OSError, match="disk full"):
            to_pretrained(folder, BERT, params)
    assert before == {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(ValueError, match=r"attn.key.bias' has shape \(2, 8\).*means \(2, 4\)"):
        to_pretrained(folder, BERT._replace(width=4), {**params, "embed": _narrow(params)})
    with pytest.raises(ValueError, match=r"'embed.ln.bias'.*missing"):
        to_pretrained(folder, BERT, {**params, "embed": {**params["embed"], "ln": {}}})
    extra = {**params, "blocks": {**params["blocks"], "a": jnp.zeros(2)}}
    with pytest.raises(ValueError, match="no such leaf"):
        to_pretrained(folder, BERT, extra)


def _narrow(params):
    return jax.tree.map(lambda leaf: np.asarray(leaf)[..., :4], params["embed"])


def test_settings_survive(folder, tmp_path):
    named = {"0": "low", "1": "middle", "2": "high"}
    change(folder, id2label=named, label2id={v: int(k) for k, v in named.items()}, extra=7)
    model = from_pretrained(folder)
    saved = to_pretrained(tmp_path / "again", model.config, model.params, model.settings)
    written = json.loads((saved / "config.json").read_text())
    assert written["id2label"] == named
    assert written["extra"] == 7
    other = model.config._replace(labels=2)
    head = random_params(bert, other)["head"]
    saved = to_pretrained(tmp_path / "b", other, {**model.params, "head": head}, model.settings)
    assert from_pretrained(saved).config.labels == 2


def test_every_head_of_every_model_has_its_names_once():
    for config in (BERT, BERT._replace(kind="roberta"), BERT._replace(kind="distilbert"), GPT2):
        for head in (None, "masked_lm", "causal_lm", "classify", "spans"):
            listed = [names.full_name(config, t) for t in names.tensors(config._replace(head=head))]
            assert len(listed) == len(set(listed))
