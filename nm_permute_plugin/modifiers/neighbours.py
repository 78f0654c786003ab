# SPDX-License-Identifier: Apache-2.0
"""The other modifiers of the recipe: what they may not do, and what they promise."""

from llmcompressor.core import active_session
from llmcompressor.modifiers import Modifier


def refuse_shared_pass(modifier: Modifier) -> None:
    """
    Refuse to share a calibration pass: statistics would be from before the fold.

    :raises ValueError: if the running pipeline calibrates other modifiers too
    """
    sharing = [
        type(other).__name__
        for other in active_session().lifecycle.recipe.modifiers
        if other is not modifier
    ]
    if sharing:
        raise ValueError(
            f"{', '.join(sharing)} would share one calibration pass with "
            f"{type(modifier).__name__} and use input norms from before the channels "
            "moved. Call oneshot with pipeline='independent' (its default)."
        )


def is_pruned_later(modifier: Modifier, mask_structure: str) -> bool:
    """
    Whether a modifier further down the recipe prunes.

    :raises ValueError: if it prunes another pattern than the order is made for
    """
    modifiers = active_session().lifecycle.recipe.modifiers
    places = [i for i, other in enumerate(modifiers) if other is modifier]
    later = modifiers[places[0] + 1 :] if places else []
    pruners = [other for other in later if hasattr(other, "mask_structure")]
    for other in pruners:
        if other.mask_structure != mask_structure:
            raise ValueError(
                f"the order is made for mask_structure {mask_structure!r}, and "
                f"{type(other).__name__} prunes {other.mask_structure!r}; give both the "
                "same"
            )
    return bool(pruners)
