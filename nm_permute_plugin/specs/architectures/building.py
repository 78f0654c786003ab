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
    """
    Give the lines of an attention whose projections are apart.

    The rows of queries and keys never move: rotary embeddings tie them in pairs.

    :param query_key: the names of both, as in ``{q,k}_proj``
    :param bias: ``?`` where the biases may be absent
    """
    return {
        **linear(query_key, "_ residual", bias),
        **linear(value, "value.{i} residual", bias),
        **linear(output, "residual value.{i}:heads", bias),
    }


def mlp(up: str, down: str, bias: str = "") -> Spec:
    """
    Give the lines of an MLP, gated or not.

    :param up: what writes the hidden channels, as in ``{gate,up}_proj``
    :param bias: ``?`` where the biases may be absent
    """
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


def renamed(spec: Spec, old: str, new: str) -> Spec:
    """
    Give the same lines with another space in the place of one and of those below it.

    >>> renamed({"a.weight": "hidden.{i} residual"}, "hidden", "hidden.vision")
    {'a.weight': 'hidden.vision.{i} residual'}
    """
    found = re.compile(rf"(?<![\w.]){re.escape(old)}(?!\w)")
    return {line: found.sub(new, words) for line, words in spec.items()}


def of_tower(name: str, spec: Spec) -> Spec:
    """
    Give the same lines with spaces of a tower's own, in a model of several towers.

    >>> of_tower("text", {"up.weight": "hidden.{i} residual"})
    {'up.weight': 'hidden.text.{i} residual.text'}
    """
    for family in FAMILIES:
        spec = renamed(spec, family, f"{family}.{name}")
    return spec


def output_fixed(spec: Spec) -> Spec:
    """
    Give the lines of a model without a head, whose hidden states are what it is used
    for: another order of the residual stream would show in them, so that it never moves.

    >>> output_fixed({"up.weight": "hidden.{i} residual"})
    {'up.weight': 'hidden.{i} _output'}
    """
    return renamed(spec, "residual", "_output")
