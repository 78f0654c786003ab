# SPDX-License-Identifier: Apache-2.0
"""
Pruning with the face of Hugging Face optimum's quantizers.

    from nm_permute_plugin.optimum import NMPruner

    pruner = NMPruner(dataset=texts, mask_structure="2:4", method="learned")
    pruner.prune_model(model, tokenizer)
    pruner.save(model, "OUT")
"""

from nm_permute_plugin._words import install

try:
    import optimum.quantization_base  # noqa: F401  # a folder of that name is no proof
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        "nm_permute_plugin.optimum needs optimum, which is not installed: "
        f"{install('optimum')}"
    ) from None

from nm_permute_plugin.optimum.config import NMConfig
from nm_permute_plugin.optimum.pruner import NMPruner

__all__ = ["NMConfig", "NMPruner"]
