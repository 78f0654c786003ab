# SPDX-License-Identifier: Apache-2.0
"""The kernels that multiply by a 2:4 weight, all behind the interface of ``kernel.py``."""
