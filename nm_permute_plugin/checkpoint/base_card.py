# SPDX-License-Identifier: Apache-2.0
"""Read from a base model's README.md what stays true of a model that is made of it."""

from collections.abc import Mapping
from pathlib import Path

from loguru import logger

from nm_permute_plugin._files import LARGEST_YAML, open_file, parse_yaml

_KEPT = ("license", "license_name", "license_link", "language", "base_model")


def base_matter(folder: Path) -> dict[str, object]:
    """
    Reads the front matter of a folder's card, as far as it holds for derived models too.

    :return: license, languages, tags and base model, those that are there
    """
    matter = _front_matter(folder / "README.md")
    kept = {key: matter[key] for key in (*_KEPT, "tags") if matter.get(key)}
    return {key: value for key, value in kept.items() if _is_plain(value)}


def _is_plain(value: object) -> bool:
    """Tells a word, or a list of words, from what has no place in a card."""
    words = value if isinstance(value, list) else [value]
    return all(isinstance(word, str) for word in words)


def _front_matter(path: Path) -> Mapping[str, object]:
    import yaml

    if not path.is_file():
        return {}
    with open_file(path) as file:
        text = file.read(LARGEST_YAML).decode(errors="replace")
    lines = text.lstrip("\ufeff").splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    ends = [i for i, line in enumerate(lines) if i and line.strip() == "---"]
    try:
        # Everything is text to it: to other loaders Norwegian, `no`, is a boolean.
        front = "\n".join(lines[1 : ends[0]]) if ends else ""
        matter = parse_yaml(front, yaml.BaseLoader)
    except ValueError as error:
        logger.warning(
            f"{path}: its front matter {error}, so that license and language do not "
            "travel into the new card"
        )
        return {}
    return matter if isinstance(matter, dict) else {}
