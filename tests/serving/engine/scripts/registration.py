# SPDX-License-Identifier: Apache-2.0
"""What registering leaves in vLLM, what it imports, how names map: JSON on stdout."""

import json
import sys

import torch


def main():
    """Register twice, and look."""
    from vllm.model_executor.layers import quantization

    find = quantization.get_quantization_config
    before = find("compressed-tensors").__name__
    by_vllm = set(sys.modules)

    from nm_permute_plugin.serving.plugin import register

    register()
    register()

    from vllm.model_executor.models.utils import WeightsMapper

    from nm_permute_plugin.serving.config import Sparse24Config

    block = {
        "format": "sparse-24-bitmask",
        "sparsity_structure": "2:4",
        "targets": ["Linear", "re:model.*", "model.layers.0.mlp.up_proj"],
        "ignore": ["lm_head"],
    }
    ours = {"quant_method": "compressed-tensors", "sparsity_config": block}
    renamed = Sparse24Config.from_config(ours)
    prefixes = {"model.": "text.model.", "lm_head.": "text.lm_head."}
    renamed.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix=prefixes))
    found = {
        "targets": renamed.sparsity.targets,
        "ignore": renamed.sparsity.ignore,
        "times": quantization.QUANTIZATION_METHODS.count("nm_sparse24"),
        "class": find("nm_sparse24").__name__,
        "stock": [before, find("compressed-tensors").__name__],
        "imported": sorted({"llmcompressor", "scipy"} & (set(sys.modules) - by_vllm)),
        "cuda": torch.cuda.is_initialized(),
    }
    try:
        Sparse24Config.from_config({"quant_method": "compressed-tensors"})
    except ValueError as error:
        found["error"] = str(error)
    try:
        Sparse24Config.override_quantization_method(ours, "fp8")
    except ValueError as error:
        found["quantized"] = str(error)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
