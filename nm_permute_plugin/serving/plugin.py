# SPDX-License-Identifier: Apache-2.0
"""The door through which vLLM comes in: its entry point ``vllm.general_plugins``."""

import logging

NAME = "nm_sparse24"
"""The name of our quantization method in vLLM."""


def register() -> None:
    """
    Make the quantization method ``nm_sparse24`` known to vLLM.

    vLLM calls it in each of its processes, in some of them twice. It touches no device.

    :raises ImportError: without vLLM
    """
    from vllm.model_executor.layers.quantization import (
        QUANTIZATION_METHODS,
        register_quantization_config,
    )

    if NAME not in QUANTIZATION_METHODS:
        from nm_permute_plugin.serving.config import Sparse24Config

        register_quantization_config(NAME)(Sparse24Config)
        # vLLM shows what is logged below its own name: put our lines there.
        logging.getLogger(__package__).parent = logging.getLogger("vllm")
