# SPDX-License-Identifier: Apache-2.0
"""2:4 checkpoints on sparse kernels: the vLLM plugin and the linear layer under it."""
