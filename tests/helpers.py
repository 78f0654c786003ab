# SPDX-License-Identifier: Apache-2.0
"""Small things that the tests of several folders share; imported by name."""

import json

from einops import rearrange

from nm_permute_plugin.maths.permutation import Permutation


def modifier(group: str, kind: str, **fields: object) -> str:
    """
    A group of a recipe's stage, with one modifier.

    >>> print(modifier("sparsity", "WandaPruningModifier", sparsity=0.5), end="")
      sparsity_modifiers:
        WandaPruningModifier: {"sparsity": 0.5}
    """
    return f"  {group}_modifiers:\n    {kind}: {json.dumps(fields)}\n"


def ours(**fields: object) -> str:
    """A recipe with our modifier; groups may follow."""
    kind = "LearnablePermutationModifier"
    return "prune_stage:\n" + modifier("permutation", kind, **fields)


def wanda(**fields: object) -> str:
    """
    llm-compressor's own pruning, 2:4.

    To it the head is called "lm_head." with a dot at the end: "lm_head" would not keep it
    dense, and nothing would say so.
    """
    given = {"sparsity": 0.5, "mask_structure": "2:4", "targets": ["Linear"]}
    ignore = {"ignore": ["re:.*lm_head"]}
    return modifier("sparsity", "WandaPruningModifier", **given | ignore | fields)


def quantize(scheme: str, kind: str = "QuantizationModifier", **fields: object) -> str:
    """llm-compressor's quantization of all linears but the head."""
    given = {"scheme": scheme, "targets": ["Linear"], "ignore": ["lm_head"]}
    return modifier("quantization", kind, **given | fields)


def same_groups(first: Permutation, second: Permutation, m: int) -> bool:
    """
    Whether two permutations put the same channels into common groups of ``m``.

    The order of groups, and the order inside a group, change no N:M mask.
    """
    return _groups(first, m) == _groups(second, m)


def _groups(perm: Permutation, m: int) -> set[frozenset[int]]:
    return {frozenset(group) for group in rearrange(perm, "(g m) -> g m", m=m).tolist()}
