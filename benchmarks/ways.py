# SPDX-License-Identifier: Apache-2.0
"""The methods that the benchmark compares, each by its name and settings."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from nm_permute_plugin.pruning.settings import RecoverStage

Fields = Mapping[str, object]
"""Some of the settings, nested as in a recipe."""

SPARSEGPT = "sparsegpt"
RECOVERIES: dict[str, tuple[RecoverStage, ...]] = {
    "rescale": ("rescale",),
    "blocks": ("blocks",),
    "end_to_end": ("end_to_end",),
    "recover": ("blocks", "end_to_end"),
}

AMD: Fields = {
    "search": {"rounds": 0},
    "learn": {
        "stages": "soft",
        "published": {
            "blocks_per_space": 4,
            "rate": 0.1,
            "weight_decay": 0.01,
            "start_logit": 0.1,
        },
    },
    "loss": {"divergence": 0.0, "cross_entropy": 1.0, "hidden": 1e-5},
}
"""https://arxiv.org/abs/2601.22980: soft places, annealed, hard at the end. It gives no
start and no temperatures, and its rate is for many more steps. Here places start nearly
uniform and learn fast enough to leave home: at 0.01 from 1.0 none does."""

PERMLLM: Fields = {
    "search": {"rounds": 0},
    "learn": {
        "stages": "straight_through",
        "published": {
            "block_size": 64,
            "rate": 0.01,
            "weight_decay": 0.1,
            "sinkhorn_iterations": 5,
        },
    },
    "loss": {"divergence": 0.0, "cosine": 1.0},
}
"""https://arxiv.org/abs/2510.10136: hard places with the soft ones' gradient. A published
step of 1e-3 moves a logit by 8e-3, because its logits are parameters times 8. Its
temperature falls linearly over the same range, ours geometrically."""


@dataclass(frozen=True)
class Way:
    """
    How a method finds its masks.

    :param settings: where they differ from the package's defaults
    :param folded: false gives every linear a permutation of its own, and folds nothing
    """

    settings: Fields = field(default_factory=dict)
    folded: bool = True


WAYS = {
    "magnitude": Way({"method": "identity", "score": "magnitude"}),
    "wanda": Way({"method": "identity"}),
    "ria": Way({"method": "identity", "score": "ria"}),
    "search": Way({"method": "search"}),
    "search-free": Way({"method": "search"}, folded=False),
    "learned": Way(),
    "learned-order": Way({"learn": {"stages": "swaps"}}),
    "multipliers": Way({"search": {"rounds": 0}}),
    "layer-wise": Way({"objective": "layer_wise"}),
    "learned-free": Way(folded=False),
    "amd": Way(AMD),
    "amd-free": Way(AMD, folded=False),
    "permllm": Way(PERMLLM),
    "permllm-free": Way(PERMLLM, folded=False),
    # A multiplier for every weight chooses the mask of every group freely.
    "free-mask": Way(
        {"search": {"rounds": 0}, "learn": {"multipliers": {"rows": 1}}}, folded=False
    ),
}
"""Every method that leaves the kept weights as they are, by its name. ``learned-order``
learns permutations alone, ``multipliers`` those of the scores alone, with the channels as
they are: what permutations are worth."""

METHODS = [
    *WAYS,
    *(
        f"{way}+{stages}"
        for way in ("wanda", "search", "learned")
        for stages in RECOVERIES
    ),
    SPARSEGPT,
    f"search+{SPARSEGPT}",
    f"learned+{SPARSEGPT}",
]
DEFAULT = ["magnitude", "wanda", "ria", "search", "learned"]
