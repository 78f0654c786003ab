# SPDX-License-Identifier: Apache-2.0
"""
The fields of a recipe: those of ``Settings``, and where the flat fields of before went.
"""

from typing import Any

from pydantic import ConfigDict, model_validator

from nm_permute_plugin.pruning.settings import Settings

MOVED = {
    "steps": "learn: {steps: ...}",
    "order_share": "learn: {stages: [swaps, multipliers], steps: [..., ...]}",
    "score_multipliers": "learn: {stages: [multipliers]}, or [swaps] without them",
    "relaxation": "learn: {stages: [swaps]}, [soft] or [straight_through]",
    "multiplier_rows": "learn: {multipliers: {rows: ...}}",
    "multiplier_rate": "learn: {multipliers: {rate: ...}}",
    "swaps": "learn: {swaps: {share: ...}}",
    "row_limit": "learn: {swaps: {row_limit: ...}}",
    "block_size": "learn: {swaps: {block_size: ...}}, or published",
    "groups": "learn: {published: {blocks_per_space: ...}}, or swaps",
    "learning_rate": "learn: {published: {rate: ...}}",
    "weight_decay": "learn: {published: {weight_decay: ...}}",
    "temperature_start": "learn: {published: {temperature: [start, end]}}",
    "temperature_end": "learn: {published: {temperature: [start, end]}}",
    "start_logit": "learn: {published: {start_logit: ...}}",
    "sinkhorn_iterations": "learn: {published: {sinkhorn_iterations: ...}}",
    "search_rounds": "search: {rounds: ...}",
    "divergence_weight": "loss: {divergence: ...}",
    "cross_entropy_weight": "loss: {cross_entropy: ...}",
    "hidden_weight": "loss: {hidden: ...}",
    "cosine_weight": "loss: {cosine: ...}",
    "held_back": "validation: {share: ...}",
    "evaluate_every": "validation: {every: ...}",
    "micro_batch_size": "memory: {micro_batch_size: ...}",
    "gradient_checkpointing": "memory: {gradient_checkpointing: ...}",
    "recover_window": "recover: {stages: [blocks], blocks: {window: ...}}",
    "recover_epochs": "recover: {stages: [blocks], blocks: {epochs: ...}}",
    "recover_blocks_rate": "recover: {stages: [blocks], blocks: {rate: ...}}",
    "recover_steps": "recover: {stages: [end_to_end], end_to_end: {steps: ...}}",
    "recover_end_to_end_rate": "recover: {stages: [end_to_end], end_to_end: {rate: ...}}",
}
"""The flat fields of recipes before 0.2, and where each stands now."""


class PermutationFields(Settings):
    """The settings as fields of a modifier, whose own state changes while it runs."""

    model_config = ConfigDict(frozen=False)

    def settings(self) -> Settings:
        """The settings alone."""
        fields = {name: getattr(self, name) for name in Settings.model_fields}
        return Settings.model_validate(fields)

    @model_validator(mode="before")
    @classmethod
    def _tell_where_fields_moved(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for name, place in MOVED.items():
            if name in value:
                raise ValueError(f"the field {name} has moved: write {place}")
        if value.get("recover") == "none":
            raise ValueError("recover: none is the default: leave `recover` out")
        return value
