# SPDX-License-Identifier: Apache-2.0
"""The command ``nm-permute``: run by the interpreter that has vLLM."""

from nm_permute_plugin.cli.app import app

if __name__ == "__main__":
    app()
