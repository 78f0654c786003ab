# SPDX-License-Identifier: Apache-2.0
"""What our methods say to layers that they cannot hold, as JSON on stdout."""

import json
import tempfile
from types import SimpleNamespace

import torch


def said_of_experts(targets, quantized=False, name="some.layer"):
    """Ask for the method of three experts that a stand-in for vLLM's layer has."""
    from nm_permute_plugin.checkpoint.config import SparsityConfig
    from nm_permute_plugin.serving.experts import experts_method
    from nm_permute_plugin.serving.vllm_names import UnquantizedFusedMoEMethod

    class Quantized:
        """A method of quantized experts."""

    names = {
        f"ckpt_{part}_proj_name": f"{part}_proj" for part in ("gate", "up", "down")
    }
    layer = SimpleNamespace(moe_config=SimpleNamespace(num_logical_experts=3), **names)
    kind = Quantized if quantized else UnquantizedFusedMoEMethod
    stock = kind.__new__(kind)
    sparsity = SparsityConfig(targets=targets, ignore=("re:.*[.]ignored[.]",))
    try:
        found = experts_method(layer, name, stock, sparsity, "auto", None)
    except NotImplementedError as error:
        return str(error)
    return "vLLM's own" if found is stock else "ours"


def cut_experts():
    """Cut experts of 24 inner channels for two devices."""
    from nm_permute_plugin.serving.expert_loading import must_be_cuttable

    must_be_cuttable("some.layer", 12, 1)
    must_be_cuttable("some.layer", 16, 2)
    try:
        must_be_cuttable("some.layer", 12, 2)
    except ValueError as error:
        return str(error)


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
            "cut experts": cut_experts(),
            "dense experts": said_of_experts(("self_attn.q_proj",)),
            "one sparse expert": said_of_experts(("re:.*[.]1[.]",)),
            "experts of a draft": said_of_experts(
                ("re:some[.]layer[.]1[.]",), name="draft_model.some.layer"
            ),
            "quantized experts": said_of_experts(("Linear",), quantized=True),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
