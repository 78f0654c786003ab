# SPDX-License-Identifier: Apache-2.0
"""YAML in which a key that stands twice is an error: the first would be ignored."""

from typing import Any

import yaml


class UniqueKeys(yaml.SafeLoader):
    """Is the loader of such documents."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge" or not isinstance(key.value, str):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)
