# SPDX-License-Identifier: Apache-2.0
"""
``generate.py`` with a stand-in for the kernels, which no CPU has: a dense product.

It takes the way of a layer on a GPU: weight handed over, activations quantized, scales
and bias applied.
"""

import sys
from types import SimpleNamespace

from vllm import _custom_ops as ops

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


def stand_in():
    """Have our linear method take the stand-in for the kernels, as on a GPU."""
    from portable import keep_static_scales

    from nm_permute_plugin.serving import method

    method.SparseLinear = DenseProduct
    method.current_platform = SimpleNamespace(is_cuda=lambda: True)
    keep_static_scales()


if __name__ == "__main__":
    import generate

    stand_in()
    generate.main(sys.argv[1:])
