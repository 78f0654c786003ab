# SPDX-License-Identifier: Apache-2.0
"""
The parameters that vLLM's stock methods are given: run by the interpreter with vLLM.

What they make of them differs from platform to platform, and is left out.

Usage, one model after the other in one process::

    python load.py (DIR OUT.safetensors)...

Where a model cannot be loaded, ``OUT.safetensors.error`` takes the message.
"""

import sys
import tempfile
import traceback

import torch
from safetensors.torch import save_file


def load(directory, out):
    """Load a model by the engine's own loader, and save its parameters."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization.compressed_tensors import (
        compressed_tensors,
    )
    from vllm.model_executor.model_loader import get_model

    torch.accelerator.empty_cache = lambda: None  # as vLLM's own worker does on a CPU
    for stock in (
        UnquantizedLinearMethod,
        compressed_tensors.CompressedTensorsLinearMethod,
    ):
        stock.process_weights_after_loading = lambda self, layer: None
    config = EngineArgs(model=directory, enforce_eager=True).create_engine_config()
    with set_current_vllm_config(config):
        method = "file://" + tempfile.mktemp()
        init_distributed_environment(1, 0, method, 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        model = get_model(vllm_config=config)
    parameters = {
        name: parameter.detach().clone().contiguous()
        for name, parameter in model.named_parameters()
    }
    methods = {
        name: type(module.quant_method).__name__
        for name, module in model.named_modules()
        if getattr(module, "quant_method", None) is not None
    }
    save_file(parameters, out, methods)


if __name__ == "__main__":
    words = iter(sys.argv[1:])
    for directory, out in zip(words, words, strict=True):
        try:
            load(directory, out)
        except Exception as error:
            traceback.print_exc()
            with open(f"{out}.error", "w") as file:
                file.write(str(error))
