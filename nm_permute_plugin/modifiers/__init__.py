# SPDX-License-Identifier: Apache-2.0
"""
Modifiers for llm-compressor recipes.

Importing this package registers them, and the reader of sparse checkpoints.
"""

from llmcompressor.modifiers.factory import ModifierFactory

from nm_permute_plugin.checkpoint.reader import register_reader
from nm_permute_plugin.modifiers.permutation import LearnablePermutationModifier

ModifierFactory.register("LearnablePermutationModifier", LearnablePermutationModifier)
register_reader()

__all__ = ["LearnablePermutationModifier"]
