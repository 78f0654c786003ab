# SPDX-License-Identifier: Apache-2.0
"""
Read sparse checkpoints, save and read them again: run beside any version of the hosts.

``python read_and_save.py FOLDER OUT`` takes the folders ``KIND-dense`` and
``KIND-FORMAT`` in FOLDER, writes into OUT, and prints what it found as JSON.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import nm_permute_plugin  # noqa: F401  # for it registers the reader
from nm_permute_plugin.checkpoint.config import SparseFormat
from nm_permute_plugin.checkpoint.writer import convert

FORMATS: tuple[SparseFormat, ...] = ("sparse-24-bitmask", "sparse-bitmask")
TOKENS = torch.arange(32)[None]


def read(path: Path, dequantize: bool = False) -> Any:
    """The model of a checkpoint, whatever its format."""
    # None would be taken for a config of its own
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    given = options if dequantize else {}
    return AutoModelForCausalLM.from_pretrained(path, **given).eval()


def stored(path: Path) -> dict[str, Tensor]:
    """What the files of a checkpoint hold."""
    files = sorted(path.glob("*.safetensors"))
    return {k: v for file in files for k, v in load_file(file).items()}


def logits(model: Any) -> Tensor:
    """The logits of a model; weights that stayed quantized change by this."""
    with torch.no_grad():
        return model(TOKENS).logits


def differing(left: dict[str, Tensor], right: dict[str, Tensor]) -> list[str]:
    """The names of tensors that are in one of them only, or differ in a bit."""
    return [
        name
        for name in sorted(left.keys() | right.keys())
        if name not in left or name not in right or not same(left[name], right[name])
    ]


def same(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    first, second = (x.detach().contiguous().view(torch.uint8) for x in (left, right))
    return torch.equal(first, second)


def read_as_dense(dense: Path, sparse: Path, dequantize: bool = False) -> list[str]:
    """What differs between models that are read from the two."""
    models = [read(path, dequantize) for path in (dense, sparse)]
    found = differing(*(dict(model.state_dict()) for model in models))
    return found + ([] if same(*map(logits, models)) else ["logits"])


def saved_as_dense(
    dense: Path, sparse: Path, form: SparseFormat, out: Path
) -> dict[str, list[str]]:
    """What differs from the dense checkpoint once a sparse one was read and saved."""
    read(sparse).save_pretrained(out / "saved")
    convert(out / "saved", out / "sparse", form)
    return {
        "saved": differing(stored(out / "saved"), stored(dense)),
        "read again": read_as_dense(dense, out / "saved"),
        "sparse again": differing(stored(out / "sparse"), stored(sparse)),
    }


def main(folder: Path, out: Path) -> None:
    """Print the versions of the hosts and, of each case, what differs."""
    found: dict[str, object] = {}
    for dense in sorted(folder.glob("*-dense")):
        kind = dense.name.removesuffix("-dense")
        for form in FORMATS:
            sparse = folder / f"{kind}-{form}"
            case = f"{kind} {form}"
            found[case] = {"read": read_as_dense(dense, sparse)}
            if "fp8" in kind:
                different = read_as_dense(dense, sparse, dequantize=True)
                found[case] |= {"dequantized": different}
            if kind != "moe-fp8":  # transformers cannot save it, dense or not
                found[case] |= saved_as_dense(dense, sparse, form, out / sparse.name)
    hosts = ("transformers", "compressed-tensors")
    print(json.dumps({"versions": {host: version(host) for host in hosts}, **found}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
