"""Writes golden.npz: what transformers in PyTorch computes on the cases of parity_cases.py.

Run it where PyTorch and the MiniLM package are installed (``make parity`` installs both).
"""

import pathlib
import sys
import tempfile

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import parity_cases as parity

SECOND = {"masked_lm", "causal_lm"}  # the heads whose Hessian-vector products are kept


def minilm_arrays() -> dict[str, np.ndarray]:
    import torch
    import transformers

    folder = parity.minilm()
    if folder is None:
        sys.exit("the MiniLM package is not installed: run make parity")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(list(parity.SENTENCES), padding=True, return_tensors="pt")
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        states = model(**encoded).last_hidden_state
    mask = encoded["attention_mask"][..., None]
    vectors = (states * mask).sum(1) / mask.sum(1)
    vectors = torch.nn.functional.normalize(vectors)
    return {
        "minilm/tokens": encoded["input_ids"].numpy().astype(np.int16),
        "minilm/mask": encoded["attention_mask"].numpy().astype(np.int16),
        "minilm/vectors": vectors.numpy(),
    }


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    arrays = minilm_arrays()
    for case in parity.CASES:
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            parity.write_weights(folder, case, parity.torch_shapes(case))
            arrays |= parity.packed(case, parity.run_torch(folder, case), case.head in SECOND)
            if case in parity.PEFT:
                found = parity.run_peft(folder, case)
                arrays |= {f"peft-{case.name}/{name}": value for name, value in found.items()}
    np.savez_compressed(parity.GOLDEN, **arrays)
    print(f"{parity.GOLDEN.name}: {len(arrays)} arrays, {parity.GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    main()
