# SPDX-License-Identifier: Apache-2.0
"""A spec with one wrong word never passes: it is refused, or the outputs change."""

import re
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from zoo import ZOO, tiny

from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.specs.architectures import head_dim_of, spec_of
from nm_permute_plugin.specs.exactness import (
    fold_checked,
    outputs_of,
    random_batch,
    random_perms,
)
from nm_permute_plugin.specs.fold import fold, invert_all
from nm_permute_plugin.specs.grammar import Lines
from nm_permute_plugin.specs.spec import Spec, resolve

MUTATED = (
    "llama-gqa",
    "gemma3-mqa",
    "phi3-gqa",
    "qwen2moe-one-dense-layer",
    "olmo2-gqa",
    "gpt2-three-heads",
    "gpt-neox",
    "falcon-grouped",
    "falcon-alibi",
    "stablelmforsequenceclassification",
    "starcoder2-gqa",
    "cohereforcausallm",
    "opt-350m",
    "bertforsequenceclassification",
    "vit-labels",
    "deit-teacher",
    "dinov2-labels",
    "dinov2-swiglu-three-heads",
    "clip",
    "siglip",
    "siglip-vision",
    "qwen2-vl",
    "qwen2.5-vl",
)
CASES = [case for case in ZOO if case.id in MUTATED]

OTHER_FUSION = str.maketrans("+|", "|+")

# What no forward pass here reads may stand in any order.
UNREAD = {"dinov2.embeddings.mask_token?"}


def mutants(spec: Spec, model: nn.Module) -> Iterator[tuple[str, str]]:
    """
    Every line with one word that no longer moves, with two words swapped, and with fused
    parts one after another that take turns, and the other way round.
    """
    for line, words in spec.items():
        lines = Lines({line: words})
        named = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        if line in UNREAD or not any(lines.of(name) for name in named):
            continue
        parts = words.split()
        for place, word in enumerate(parts):
            if not still(word) and not word.startswith("{"):
                yield line, " ".join([*parts[:place], "_", *parts[place + 1 :]])
        if len(set(parts[:2])) == 2 and not all(map(still, parts[:2])):
            yield line, " ".join([parts[1], parts[0], *parts[2:]])
        if (other := words.translate(OTHER_FUSION)) != words:
            yield line, other


def still(word: str) -> bool:
    return re.fullmatch("_[a-z]*", word) is not None


def passes(model: nn.Module, spec: Spec) -> bool:
    """Whether the spec resolves and its fold leaves the outputs; the fold is undone."""
    head_dim = head_dim_of(model.config)
    try:
        resolved = resolve(model, spec, NMPattern(2, 4), [], head_dim)
    except ValueError:
        return False
    perms = random_perms(resolved)
    batch = random_batch(model)
    try:
        fold_checked(model, resolved, perms, lambda: outputs_of(model, batch), 1e-10)
    except RuntimeError:
        return False  # the fold is undone
    fold(model, resolved, invert_all(perms))
    return True


@pytest.mark.parametrize(("name", "config", "options"), CASES)
def test_no_wrong_word_passes(name: str, config: str, options: dict) -> None:
    model = tiny(name, config, options, torch.float64)
    spec = spec_of(model)
    assert passes(model, spec)
    found = list(mutants(spec, model))
    assert len(found) > len(spec) // 2
    survivors = [
        mutant for mutant in found if passes(model, {**spec, mutant[0]: mutant[1]})
    ]
    assert survivors == []
