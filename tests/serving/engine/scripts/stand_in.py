# SPDX-License-Identifier: Apache-2.0
"""
``generate.py`` with a stand-in for the kernels, which no CPU has: a dense product.

It takes the way of a layer on a GPU: weight handed over, activations quantized, scales
and bias applied.
"""

import sys
from types import SimpleNamespace

import torch
from vllm import _custom_ops as ops

from nm_permute_plugin.serving.kernel_table import Bucket, Choice, KernelTable
from nm_permute_plugin.serving.kernels.experts import PackedExperts
from nm_permute_plugin.serving.kernels.scaling import scaled


class DenseProduct:
    """What ``SparseLinear`` promises, of a weight that stays dense."""

    signature = "stand-in"

    def __init__(self, weight):
        self.weight = weight.clone()
        if weight.dtype.itemsize > 1:  # by the routine that serves the dense layer
            self.handler = ops.create_onednn_mm(self.weight.T, 32)

    @classmethod
    def prepare(cls, weight, mode, is_checked):
        groups = weight.view(len(weight), -1, 4)
        assert int((groups != 0).sum(-1).max()) == 2, "the weight is not 2:4"
        assert mode == "auto"
        return cls(weight)

    def refill(self, other):
        self.weight.copy_(other.weight)
        self.handler = getattr(other, "handler", None)

    def __call__(self, x):
        if x.dtype.itemsize > 1:
            return ops.onednn_mm(self.handler, x, None)
        # a kernel rounds its sums: other words
        return x.float() @ self.weight.float().T

    def scaled_mm(self, x_q, scale_x, scale_w, bias, out_dtype):
        assert x_q.dtype == self.weight.dtype
        assert scale_w.shape in ((len(self.weight), 1), (1, 1))
        return scaled(self(x_q), scale_x, scale_w, bias, out_dtype)


class DenseExperts(PackedExperts):
    """Experts too small to be packed."""

    @property
    def dense_shape(self):
        return tuple(self.packed.shape)


def pack_experts(weights):
    """Take the weights of all experts as they are."""
    dense = torch.stack(list(weights))
    assert int((dense.view(-1, 4) != 0).sum(-1).max()) == 2, "an expert is not 2:4"
    return DenseExperts(dense, dense.dtype)


def dense_experts(up, down):
    """Expand the weights of all experts, as a GPU does for many tokens."""
    return up.packed, down.packed


def fused_experts(x, up, down, weights, ids, **where):
    """Multiply tokens one by one by the weights of their experts."""
    out = torch.zeros(x.shape, dtype=torch.float32)
    places = where.get("expert_map")
    for token in range(len(x)):
        for weight, expert in zip(weights[token], ids[token].tolist(), strict=True):
            place = expert if places is None else int(places[expert])
            if place >= 0:
                gate, value = (up[place].float() @ x[token].float()).chunk(2)
                inner = torch.nn.functional.silu(gate) * value
                out[token] += weight * (down[place].float() @ inner)
    return out.to(x.dtype)


def run_experts(x, up, down, weights, ids, settings, expert_map):
    """What our kernel computes of packed experts."""
    assert settings == (1,)
    both = dense_experts(up, down)
    return fused_experts(x, *both, weights, ids, expert_map=expert_map)


def table_of(up, down, top_k, dense):
    """A table in which our kernel decodes, and vLLM's multiplies prompts."""
    ours, theirs = Choice("experts", (1,), 1.0), Choice("dense", (), 1.0)
    return KernelTable(len(up.packed), [Bucket(1, ours, []), Bucket(8192, theirs, [])])


def stand_in():
    """Have our methods take the stand-ins for the kernels, as on a GPU."""
    from portable import keep_static_scales

    from nm_permute_plugin.serving import expert_loading, experts, method

    method.SparseLinear = DenseProduct
    card = SimpleNamespace(is_cuda=lambda: True, is_cpu=lambda: False)
    method.current_platform = card
    experts.current_platform = card
    experts.unsupported = lambda shape, like: None
    expert_loading.pack_experts = pack_experts
    experts.table_of = table_of
    experts.run = run_experts
    experts.dense_weights = dense_experts
    experts.fused_experts = fused_experts
    keep_static_scales()


if __name__ == "__main__":
    import generate

    stand_in()
    generate.main(sys.argv[1:])
