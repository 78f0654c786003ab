# SPDX-License-Identifier: Apache-2.0
"""The report of a run: pages and pictures from its record, and from nothing else."""
