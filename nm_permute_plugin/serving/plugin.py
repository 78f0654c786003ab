# SPDX-License-Identifier: Apache-2.0
"""The entry point ``vllm.general_plugins``, through which vLLM loads this package."""

import logging

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM shows what is under its name


def register() -> None:
    """
    Register the quantization method ``nm_sparse24`` with vLLM.

    vLLM calls this in each of its processes, in some of them twice. It touches no device.

    Where vLLM lacks a name that we use, an error is logged and nothing registered: other
    models are served as ever.
    """
    from nm_permute_plugin.serving.detect import NAME

    try:
        from nm_permute_plugin.serving.vllm_names import (
            QUANTIZATION_METHODS,
            register_quantization_config,
        )
    except ImportError as error:
        logger.error("%s", error)
        return
    if NAME not in QUANTIZATION_METHODS:
        from nm_permute_plugin.serving.config import Sparse24Config

        register_quantization_config(NAME)(Sparse24Config)
        # vLLM shows what is logged below its own name, so our loggers go there.
        logging.getLogger(__package__).parent = logging.getLogger("vllm")
