# SPDX-License-Identifier: Apache-2.0
"""Read a permutation spec that a person wrote into a YAML file."""

from collections.abc import Mapping
from pathlib import Path

from nm_permute_plugin._files import read_yaml


def read_spec(file: Path) -> Mapping[str, str]:
    """
    Read a spec from a YAML file.

    :raises ValueError: if it is no mapping of lines to words
    :raises FileNotFoundError: if it does not exist
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"spec file {file} does not exist (looked for from {Path.cwd()})"
        )
    _, content = read_yaml(file, "spec")
    if not isinstance(content, dict) or not content:
        raise ValueError(
            f"{file} holds no spec; write a line a parameter, for example "
            "'model.layers.{i}.mlp.down_proj.weight: residual hidden.{i}'"
        )
    for line, words in content.items():
        if not isinstance(line, str) or not isinstance(words, str):
            raise ValueError(f"{file}: {line!r}: {words!r} is no line of a spec")
    return content
