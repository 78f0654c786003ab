# SPDX-License-Identifier: Apache-2.0
"""Small things that the tests of several folders share; imported by name."""

import json
from pathlib import Path

import pytest
from einops import rearrange
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

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


def draw_no_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have saves of this process leave no page on the run."""
    for place in ("finish", "writer"):
        name = f"nm_permute_plugin.checkpoint.{place}.make_page_if_possible"
        monkeypatch.setattr(name, lambda folder: None)


def same_groups(first: Permutation, second: Permutation, m: int) -> bool:
    """
    Whether two permutations put the same channels into common groups of ``m``.

    The order of groups, and the order inside a group, change no N:M mask.
    """
    return _groups(first, m) == _groups(second, m)


def _groups(perm: Permutation, m: int) -> set[frozenset[int]]:
    return {frozenset(group) for group in rearrange(perm, "(g m) -> g m", m=m).tolist()}


def begin_texts_with(folder: Path, word: str, last: str | None = None) -> None:
    """Have the tokenizer of a tiny checkpoint put a word before every text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = [x for x in (word, last) if x is not None]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=" ".join([word, "$A", *words[1:]]),
        special_tokens=[(x, tokenizer.convert_tokens_to_ids(x)) for x in words],
    )
    if last is not None:
        tokenizer.cls_token, tokenizer.sep_token = word, last
    tokenizer.save_pretrained(folder)


def give_template(folder: Path, template: str) -> None:
    """Give the tokenizer of a tiny checkpoint a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


TURNS = (
    "{% for message in messages %}{% if message.role == 'user' %}w10 {% else %}w11 "
    "{% endif %}{{ message.content }} {% endfor %}"
)
"""A chat template: a word for whose turn it is, then what is said."""
