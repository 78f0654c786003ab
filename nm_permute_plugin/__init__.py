# SPDX-License-Identifier: Apache-2.0
"""
Orders of channels that make N:M (2:4) pruning lose less.

Importing this package makes ``LearnablePermutationModifier`` known to the recipes of
llm-compressor, and has transformers read sparse checkpoints, without importing either.
"""

from nm_permute_plugin._registration import register_when_imported

register_when_imported()
