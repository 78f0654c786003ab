# SPDX-License-Identifier: Apache-2.0
"""
Let torchvision be imported where its compiled operators cannot be loaded.

The build on PyPI needs CUDA. Without it, importing the package stops at two operators that
are not there; they are declared here, and nothing that reads images calls them.
"""

import sys


class Declare:
    """Finds nothing; declares the operators when torchvision is asked for."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.library.define(
                    f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )
            sys.torchvision_operators = self  # kept: they go when the library goes
        return None


sys.meta_path.insert(0, Declare())
