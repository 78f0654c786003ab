# SPDX-License-Identifier: Apache-2.0
"""
What pruning does to a tiny float32 model, method by method, as hashes: prints JSON.

``test_golden.py`` runs it in a process whose settings make CPUs of every kind round alike.
Hashes are those of permutations and masks; recovered weights are summed, because a
recovery in another order of additions is as good. ``dense`` counts the forward passes of
the dense model.
"""

import hashlib
import json
import sys
from collections.abc import Mapping
from copy import deepcopy
from functools import cache

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from nm_permute_plugin.pruning.data import split_text
from nm_permute_plugin.pruning.pipeline import permute_and_prune
from nm_permute_plugin.pruning.settings import Settings
from nm_permute_plugin.specs.architectures import LLAMA
from nm_permute_plugin.specs.spec import resolve

VOCABULARY = 64
MULTIPLIERS = {"steps": 12, "multipliers": {"rate": 0.1}}
SWAPS = {"steps": 12, "stages": "swaps", "swaps": {"block_size": 16}}
PUBLISHED = {"rate": 0.3, "weight_decay": 0.01}


def cases() -> dict[str, dict[str, object]]:
    """Every method by its name."""
    learned = {
        "search": {"rounds": 3},
        "learn": MULTIPLIERS,
        "validation": {"every": 3},
    }
    unsearched = learned | {"search": {"rounds": 0}}
    some_rows = {**SWAPS, "swaps": {"block_size": 16, "row_limit": 40}}
    both = {**MULTIPLIERS, **SWAPS, "stages": ["swaps", "multipliers"], "steps": [6, 6]}
    soft = {"blocks_per_space": 2, "start_logit": 0.1} | PUBLISHED
    straight = {"block_size": 16} | PUBLISHED
    parts = {"micro_batch_size": 2, "gradient_checkpointing": True}
    loss = {"divergence": 0.5, "cross_entropy": 0.2, "hidden": 0.01, "cosine": 0.1}
    identity = {"method": "identity"}
    return {
        "identity": identity,
        "magnitude": identity | {"score": "magnitude"},
        "ria": identity | {"score": "ria"},
        "search": {"search": {"rounds": 3}, "method": "search"},
        "learned": learned,
        "learned_4of8": learned | {"mask_structure": "4:8"},
        "learned_micro_batches": learned | {"memory": parts},
        "learned_hidden_loss": learned | {"loss": loss},
        "swaps": learned | {"learn": SWAPS},
        "swaps_of_some_rows": learned | {"learn": some_rows},
        "swaps_then_multipliers": learned | {"learn": both},
        "soft": unsearched
        | {"learn": {"steps": 12, "stages": "soft", "published": soft}},
        "straight_through": learned
        | {"learn": {"steps": 12, "stages": "straight_through", "published": straight}},
        "layer_wise": learned | {"objective": "layer_wise"},
        "layer_wise_swaps": unsearched | {"objective": "layer_wise", "learn": SWAPS},
        "recover": learned
        | {
            "recover": {
                "stages": ["rescale", "blocks", "end_to_end"],
                "blocks": {"epochs": 2, "rate": 0.03},
                "end_to_end": {"steps": 9, "rate": 0.01},
            }
        },
    }


def main(names: list[str]) -> None:
    """Run the named cases, or all of them."""
    torch.set_num_threads(1)
    weights = {name: p.detach() for name, p in trained().named_parameters()}
    found: dict[str, object] = {"trained": digest(weights)}
    found |= {name: run(case) for name, case in cases().items() if name in names}
    print(json.dumps(found))


def run(case: dict[str, object]) -> dict[str, object]:
    """One case: what became of a model of its own."""
    settings = Settings.model_validate(case)
    model = deepcopy(trained())
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]
    resolved = resolve(model, LLAMA, settings.pattern, linears, head_dim=8)
    data = split_text(list(chains(30, seed=4)), 4, 0.2, seed=0)
    count = count_dense_passes(model, linears[0])
    record = permute_and_prune(model, resolved, linears, data, settings)
    weights = {name: model.get_submodule(name).weight.detach() for name in linears}
    return {
        "perms": digest(record.perms),
        "masks": digest({name: weight != 0 for name, weight in weights.items()}),
        "weights": float(
            sum(weight.double().abs().sum() for weight in weights.values())
        ),
        "dense": count["dense"],
    }


def count_dense_passes(model: nn.Module, masked: str) -> dict[str, int]:
    """Counts forward passes in which a linear is not masked, from now on."""
    count = {"dense": 0}
    forward = model.forward

    def counted(*args: object, **kwargs: object) -> object:
        count["dense"] += "forward" not in model.get_submodule(masked).__dict__
        return forward(*args, **kwargs)

    model.forward = counted
    return count


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of the tensors' values and names."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


@cache
def trained() -> LlamaForCausalLM:
    """A model of two layers with grouped queries that has learned ``chains``."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=64,
            tie_word_embeddings=False,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(100):
        rows = chains(16, seed=100 + step)
        model(rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def chains(count: int, seed: int) -> Tensor:
    """Rows of 24 tokens, nine of ten of which follow from the one before."""
    follows = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(VOCABULARY, (count, 24), generator=generator)
    jumps = torch.rand(rows.shape, generator=generator) < 0.1
    for i in range(1, rows.shape[1]):
        rows[:, i] = torch.where(jumps[:, i], rows[:, i], follows[rows[:, i - 1]])
    return rows


if __name__ == "__main__":
    main(sys.argv[1:] or list(cases()))
