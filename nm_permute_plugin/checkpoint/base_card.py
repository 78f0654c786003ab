# SPDX-License-Identifier: Apache-2.0
"""Read from a base model's README.md what stays true of a model that is made of it."""

from collections.abc import Mapping
from pathlib import Path

from loguru import logger

_KEPT = ("license", "license_name", "license_link", "language", "base_model")


def base_matter(folder: Path) -> dict[str, object]:
    """
    Reads the front matter of a folder's card, as far as it holds for derived models too.

    :return: license, languages, tags and base model, those that are there
    """
    matter = _front_matter(folder / "README.md")
    kept = {key: matter[key] for key in _KEPT if matter.get(key)}
    tags = matter.get("tags")
    if isinstance(tags, list):
        kept["tags"] = [str(tag) for tag in tags]
    return kept


def _front_matter(path: Path) -> Mapping[str, object]:
    import yaml

    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.lstrip("\ufeff").splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    ends = [i for i, line in enumerate(lines) if i and line.strip() == "---"]
    try:
        # Everything is text to it: to other loaders Norwegian, `no`, is a boolean.
        front = "\n".join(lines[1 : ends[0]]) if ends else ""
        matter = yaml.load(front, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        logger.warning(
            f"{path}: its front matter is no YAML, so that license and language do not "
            f"travel into the new card: {' '.join(str(error).split())}"
        )
        return {}
    return matter if isinstance(matter, dict) else {}
