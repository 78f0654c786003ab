# SPDX-License-Identifier: Apache-2.0
"""Run ``nm-permute`` as ``python -m nm_permute_plugin``, or by ``torchrun -m``."""

from nm_permute_plugin.cli.app import app

if __name__ == "__main__":
    app(prog_name="nm-permute")
