# SPDX-License-Identifier: Apache-2.0
"""
What the format's first implementation makes of files: run by its own interpreter.

That interpreter has torch, transformers 4.57.6 and compressed-tensors 0.14.0.1, and
does not have this package. Usage::

    python oracle.py decompress DIR OUT.safetensors FORMAT
    python oracle.py compress IN.safetensors OUT.safetensors FORMAT
    python oracle.py logits DTYPE [DIR OUT.safetensors]...
    python oracle.py time IN.safetensors
"""

import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def compressor(name):
    """The first implementation's class for a format."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.config import SparsityCompressionConfig

    config = SparsityCompressionConfig.load_from_registry(name)
    return BaseCompressor.load_from_registry(name, config=config)


def decompress(directory, out, name):
    """Every tensor of a checkpoint, weights dense."""
    save_file(dict(compressor(name).decompress(directory)), out)


def compress(source, out, name):
    """Every weight of a file, compressed under the names that a checkpoint has."""
    save_file(compressor(name).compress(load_file(source)), out)


def logits(dtype, *directories_and_outs):
    """The logits of checkpoints for 32 tokens."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import CompressedTensorsConfig

    tokens = torch.arange(32)[None]
    pairs = iter(directories_and_outs)
    for directory, out in zip(pairs, pairs, strict=True):
        options = {}
        if "quantization_config" in json.loads(
            Path(directory, "config.json").read_text()
        ):
            # Sparse weights are always decompressed at loading. Quantized ones that are
            # not take a way of their own, with other roundings: have both take one way.
            options["quantization_config"] = CompressedTensorsConfig(
                run_compressed=False
            )
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=getattr(torch, dtype), **options
        ).eval()
        with torch.no_grad():
            save_file({"logits": model(tokens).logits.contiguous()}, out)


def timings(source):
    """Seconds to compress and decompress each weight of a file, best of three."""
    from compressed_tensors.compressors.sparse_compressors import (
        sparse_24_bitmask as old,
    )

    torch.set_num_threads(1)
    found = {}
    for name, weight in load_file(source).items():
        best = [float("inf"), float("inf")]
        for _ in range(3):
            started = time.perf_counter()
            values, bitmask = old.sparse24_bitmask_compress(weight)
            middle = time.perf_counter()
            old.sparse24_bitmask_decompress(values, bitmask, weight.shape)
            ended = time.perf_counter()
            best = [min(best[0], middle - started), min(best[1], ended - middle)]
        found[name] = best
    print(json.dumps(found))


if __name__ == "__main__":
    commands = {
        "decompress": decompress,
        "compress": compress,
        "logits": logits,
        "time": timings,
    }
    commands[sys.argv[1]](*sys.argv[2:])
