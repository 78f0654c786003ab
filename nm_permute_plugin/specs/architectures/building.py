# SPDX-License-Identifier: Apache-2.0
"""What builds specs out of smaller ones."""

import re

from nm_permute_plugin.specs.grammar import FAMILIES
from nm_permute_plugin.specs.spec import Spec


def linear(name: str, words: str, bias: str = "") -> Spec:
    """
    Give the lines of a linear's weight and of its bias, which moves with the outputs.

    :param name: the module's; it ends in ``?`` where the module may be absent
    :param words: the weight's, [out, in]
    :param bias: ``?`` where the bias alone may be absent

    >>> linear("fc1", "hidden.{i} residual", bias="?")
    {'fc1.weight': 'hidden.{i} residual', 'fc1.bias?': 'hidden.{i}'}
    """
    module = name.removesuffix("?")
    absent = name[len(module) :]
    return {
        f"{module}.weight{absent}": words,
        f"{module}.bias{absent or bias}": words.split()[0],
    }


def attention(query_key: str, value: str, output: str, bias: str = "") -> Spec:
    """Give the lines of an attention; the rows of queries and keys never move."""
    return {
        **linear(query_key, "_ residual", bias),
        **linear(value, "value.{i} residual", bias),
        **linear(output, "residual value.{i}:heads", bias),
    }


def mlp(up: str, down: str, bias: str = "") -> Spec:
    """Give the lines of an MLP; ``up`` is all that writes its hidden channels."""
    return {
        **linear(up, "hidden.{i} residual", bias),
        **linear(down, "residual hidden.{i}", bias),
    }


def under(prefix: str, spec: Spec) -> Spec:
    """
    Give the same lines for a module that lies deeper.

    >>> under("model.", {"norm.weight": "residual"})
    {'model.norm.weight': 'residual'}
    """
    return {prefix + line: words for line, words in spec.items()}


def of_tower(name: str, spec: Spec) -> Spec:
    """
    Give the same lines with spaces of a tower's own, in a model of several towers.

    >>> of_tower("text", {"up.weight": "hidden.{i} residual"})
    {'up.weight': 'hidden.text.{i} residual.text'}
    """
    return _renamed(spec, "|".join(FAMILIES), rf"\g<0>.{name}")


def output_fixed(spec: Spec) -> Spec:
    """
    Give the lines of a model without a head, whose hidden states are what it is used
    for: another order of the residual stream would show in them, so that it never moves.

    >>> output_fixed({"up.weight": "hidden.{i} residual"})
    {'up.weight': 'hidden.{i} _output'}
    """
    return _renamed(spec, "residual", "_output")


def _renamed(spec: Spec, family: str, new: str) -> Spec:
    found = re.compile(rf"(?<![\w.])({family})(?!\w)")
    return {line: found.sub(new, words) for line, words in spec.items()}
