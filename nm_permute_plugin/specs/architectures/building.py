# SPDX-License-Identifier: Apache-2.0
"""What builds specs out of smaller ones."""

import re

from nm_permute_plugin.specs.spec import Spec


def under(prefix: str, spec: Spec) -> Spec:
    """
    The same lines for a module that lies deeper.

    >>> under("model.", {"norm.weight": "residual"})
    {'model.norm.weight': 'residual'}
    """
    return {prefix + line: words for line, words in spec.items()}


def renamed(spec: Spec, old: str, new: str) -> Spec:
    """
    The same lines with another space in the place of one and of those below it.

    >>> renamed({"a.weight": "hidden.{i} residual"}, "hidden", "hidden.vision")
    {'a.weight': 'hidden.vision.{i} residual'}
    """
    found = re.compile(rf"(?<![\w.]){re.escape(old)}(?!\w)")
    return {line: found.sub(new, words) for line, words in spec.items()}


def output_fixed(spec: Spec) -> Spec:
    """
    The lines of a model without a head, whose hidden states are what it is used for:
    another order of the residual stream would show in them, so that it never moves.

    >>> output_fixed({"up.weight": "hidden.{i} residual"})
    {'up.weight': 'hidden.{i} _output'}
    """
    return renamed(spec, "residual", "_output")
