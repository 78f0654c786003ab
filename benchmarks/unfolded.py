# SPDX-License-Identifier: Apache-2.0
"""Permutations that cannot be folded: one for the input channels of every linear alone."""

from collections.abc import Iterable

from torch import nn

from nm_permute_plugin.specs.conv1d import weight_of
from nm_permute_plugin.specs.spec import Consumer, ResolvedSpec, Space


def own_spaces(model: nn.Module, linears: Iterable[str]) -> ResolvedSpec:
    """
    A spec in which every linear has a space of its own, whose channels may go anywhere.

    That is how permutations are published: at run time each of them needs a gather. The
    spec names no parameter, so that a fold by it moves nothing, and masks that are N:M
    under the permutations come out with the channels in their old places.

    :param linears: module names
    """
    spaces = {}
    for name in linears:
        width = weight_of(model.get_submodule(name)).shape[1]
        # The family must be one that the settings choose; which of them is all the same.
        space = Space(f"hidden.{name}", width, width, (Consumer(name),))
        spaces[space.name] = space
    return ResolvedSpec((), spaces)
