# SPDX-License-Identifier: Apache-2.0
"""Choose which linears stay dense, where a budget says how much a run may lose."""
