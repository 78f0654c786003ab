# SPDX-License-Identifier: Apache-2.0
"""Serves 2:4 checkpoints on sparse kernels: a vLLM plugin and the linear layer below it."""
