# SPDX-License-Identifier: Apache-2.0
"""The ways to multiply by a 2:4 weight, all behind one interface."""
