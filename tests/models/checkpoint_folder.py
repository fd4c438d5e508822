"""A small checkpoint on disk, read and changed by the tests of reading and writing."""

import json

import jax
import numpy as np

from jmeta.models import bert, gpt2, tensorfile

BERT = bert.BertConfig(
    vocab=13, width=8, layers=2, heads=2, max_len=6, ff=10, head="classify", labels=3
)
GPT2 = gpt2.GPT2Config(vocab=13, width=8, layers=2, heads=2, max_len=6, ff=10, head="causal_lm")


def tensors(folder):
    found = tensorfile.contents([folder / "model.safetensors"])
    return {name: tensorfile.read(stored) for name, stored in found.items()}


def rewrite(folder, arrays, name="model.safetensors"):
    lazy = {
        n: tensorfile.Lazy(a.shape, str(a.dtype), lambda a=a: a) for n, a in arrays.items()
    }  # fmt: skip
    tensorfile.write(folder / name, lazy)


def change(folder, **settings):
    file = folder / "config.json"
    kept = json.loads(file.read_text()) | settings
    file.write_text(json.dumps(kept))


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
