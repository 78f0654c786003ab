# SPDX-License-Identifier: Apache-2.0
"""
Recipes and the modifiers in them: what llm-compressor would drop in silence, and what other
modifiers may not do.
"""

import re
from collections import Counter
from pathlib import Path

import yaml
from llmcompressor.core import active_session
from llmcompressor.modifiers import Modifier
from llmcompressor.recipe import Recipe

OURS = "LearnablePermutationModifier"


def read_recipe(path: Path) -> str:
    """
    The text of a recipe that llm-compressor parses completely.

    :raises ValueError: if it is no YAML mapping, if llm-compressor would leave out a
        modifier that stands in it, or if it has no ``LearnablePermutationModifier``
    """
    text = path.read_text()
    try:
        document = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"recipe {path} is no YAML: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"recipe {path} holds no stages; see recipes/ for examples")
    _refuse_empty_bodies(document, path)
    written = _named_modifiers(document)
    parsed = [type(m).__name__ for m in Recipe.create_instance(text).modifiers]
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


def _refuse_empty_bodies(node: object, path: Path) -> None:
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        if str(key).endswith("Modifier") and value is None:
            raise ValueError(
                f"recipe {path}: {key} has an empty body, which llm-compressor cannot "
                "read; give it at least one field"
            )
        _refuse_empty_bodies(value, path)
