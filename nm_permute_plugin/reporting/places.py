# SPDX-License-Identifier: Apache-2.0
"""Where a linear stands in its model, by its name."""

import re

_LAYER = re.compile(r"(?P<stack>.*?)\.(?P<layer>\d+)\.(?P<kind>.+)")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def place_of(name: str) -> tuple[int | None, str]:
    """
    The number of a linear's layer, and its kind: the rest of its name.

    >>> place_of("model.layers.3.mlp.experts.5.up_proj"), place_of("projector.linear")
    ((3, 'mlp.experts.*.up_proj'), (None, 'projector.linear'))
    """
    found = _LAYER.fullmatch(name)
    if found is None:
        return None, name
    return int(found["layer"]), _NUMBER.sub("*", found["kind"])
