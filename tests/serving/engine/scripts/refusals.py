# SPDX-License-Identifier: Apache-2.0
"""What our linear method says to layers that it cannot hold, as JSON on stdout."""

import json
import tempfile

import torch


def main():
    """Make parameters for one layer after the other."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    from nm_permute_plugin.serving.layer_report import LayerReport
    from nm_permute_plugin.serving.method import Sparse24LinearMethod

    class Weightless(UnquantizedLinearMethod):
        """The method of a packed weight, which is not called ``weight``."""

        def create_weights(self, *words, **more):
            """Nothing."""

    def said(sparse, columns, widths, whole, stock=UnquantizedLinearMethod):
        method = Sparse24LinearMethod(
            stock(), "some.layer", sparse, True, "auto", LayerReport(print, print)
        )
        layer = torch.nn.Module()
        sizes = (columns, widths, whole, sum(widths), torch.bfloat16)
        try:
            method.create_weights(layer, *sizes, weight_loader=print)
        except ValueError as error:
            return str(error)
        return {name: list(p.shape) for name, p in layer.named_parameters()}

    with set_current_vllm_config(VllmConfig()):
        method = "file://" + tempfile.mktemp()
        init_distributed_environment(1, 0, method, 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        found = {
            "whole": said((True,), 12, [16], 12),
            "cut": said((True,), 12, [16], 24),
            "mixed": said((True, False), 16, [8, 8], 16),
            "fewer parts": said((True, False), 16, [8, 8, 8], 16),
            "packed": said((True,), 16, [8], 16, Weightless),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
