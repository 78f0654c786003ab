# SPDX-License-Identifier: Apache-2.0
"""vLLM serves 2:4 checkpoints: the only package that knows vLLM."""
