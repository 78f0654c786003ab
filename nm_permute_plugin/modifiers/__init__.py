# SPDX-License-Identifier: Apache-2.0
"""Modifiers for llm-compressor recipes. Importing this package registers them."""

from llmcompressor.modifiers.factory import ModifierFactory

from nm_permute_plugin.modifiers.permutation import LearnablePermutationModifier

ModifierFactory.register("LearnablePermutationModifier", LearnablePermutationModifier)

__all__ = ["LearnablePermutationModifier"]
