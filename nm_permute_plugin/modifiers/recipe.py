# SPDX-License-Identifier: Apache-2.0
"""
Recipes and the modifiers in them: what llm-compressor would drop in silence, and what other
modifiers may not do.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any

from llmcompressor.core import active_session
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.factory import ModifierFactory
from llmcompressor.recipe import Recipe
from pydantic import ValidationError

from nm_permute_plugin._files import read_yaml
from nm_permute_plugin._near_names import did_you_mean
from nm_permute_plugin.pruning.settings.errors import one_line, with_remedies

OURS = "LearnablePermutationModifier"


def read_recipe(path: Path) -> str:
    """
    The text of a recipe that llm-compressor parses completely.

    :raises ValueError: if it is no YAML mapping, if llm-compressor would leave out a
        modifier that stands in it, or if it has no ``LearnablePermutationModifier``
    """
    text, document = read_yaml(path, "recipe")
    if not isinstance(document, dict):
        raise ValueError(f"recipe {path} holds no stages; see recipes/ for examples")
    _refuse_bad_bodies(document, path)
    _refuse_unknown_modifiers(document, path)
    written = _named_modifiers(document)
    try:
        parsed = [type(m).__name__ for m in Recipe.create_instance(text).modifiers]
    except ValidationError as error:
        name = error.title
        theirs = _known_modifiers().get(name)
        if theirs is not None and name != OURS:  # ours says by itself what to write
            error = with_remedies(error, theirs)
        raise ValueError(f"recipe {path}: {name}: {one_line(error)}") from error
    dropped = sorted(Counter(written) - Counter(parsed))
    if dropped:
        raise ValueError(
            f"recipe {path}: llm-compressor would leave out {', '.join(dropped)} without "
            "a word. Put modifiers under '<name>_stage:' and '<group>_modifiers:'."
        )
    if OURS not in parsed:
        raise ValueError(
            f"recipe {path} holds no {OURS} (it holds {', '.join(parsed) or 'nothing'}); "
            "use `llmcompressor.oneshot` for other recipes"
        )
    return text


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


def _named_modifiers(node: object) -> list[str]:
    """Every key of the document that is a modifier's name."""
    if isinstance(node, list):
        return [name for item in node for name in _named_modifiers(item)]
    if not isinstance(node, dict):
        return []
    own = [key for key in node if re.fullmatch(r"[A-Z]\w*Modifier", str(key))]
    return own + [name for value in node.values() for name in _named_modifiers(value)]


def _refuse_bad_bodies(node: object, path: Path) -> None:
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        if not str(key).endswith("Modifier"):
            _refuse_bad_bodies(value, path)
        elif value is None:
            raise ValueError(
                f"recipe {path}: {key} has an empty body, which llm-compressor cannot "
                "read; give it at least one field"
            )
        elif not isinstance(value, dict):
            raise ValueError(
                f"recipe {path}: {key} takes fields, 'method: search' for example, got "
                f"{value!r}"
            )


def _refuse_unknown_modifiers(document: dict[str, Any], path: Path) -> None:
    """Offer near names for a modifier that llm-compressor would not find."""
    groups = [
        group
        for stage in document.values()
        if isinstance(stage, dict)
        for name, group in stage.items()
        if str(name).endswith("_modifiers") and isinstance(group, dict)
    ]
    known = _known_modifiers()
    for name in (name for group in groups for name in group):
        if name not in known:
            near = did_you_mean(str(name), known)
            raise ValueError(
                f"recipe {path}: there is no modifier {name}"
                f"{near or '; there are ' + ', '.join(sorted(known))}"
            )


def _known_modifiers() -> dict[str, type[Modifier]]:
    """The modifiers that a recipe may name, by their names."""
    if not ModifierFactory._loaded:  # as llm-compressor does when it reads a recipe
        ModifierFactory.refresh()
    return {
        **ModifierFactory._main_registry,
        **ModifierFactory._experimental_registry,
        **ModifierFactory._registered_registry,
    }
