# SPDX-License-Identifier: Apache-2.0
"""Modifiers for llm-compressor recipes. Importing this package registers them."""

from llmcompressor.modifiers.factory import ModifierFactory

from nm_permute_plugin.modifiers.gptq import keep_zeros
from nm_permute_plugin.modifiers.later import keep_promises
from nm_permute_plugin.modifiers.permutation import LearnablePermutationModifier

ModifierFactory.register("LearnablePermutationModifier", LearnablePermutationModifier)
keep_promises()
keep_zeros()

__all__ = ["LearnablePermutationModifier"]
