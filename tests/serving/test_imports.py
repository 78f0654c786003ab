# SPDX-License-Identifier: Apache-2.0
"""Serving stands alone: all that it imports of this package, however far down."""

import re

import grimp
import pytest

ALLOWED = [
    r"nm_permute_plugin\.(_files|_unique_keys)",
    r"nm_permute_plugin\.maths(\..+)?",
    r"nm_permute_plugin\.checkpoint",
    r"nm_permute_plugin\.checkpoint\.(config|codec|codec_triton|layout24)",
]
"""A checkpoint's config and codec, and what these two need, are all of ``checkpoint``."""


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    """Who imports whom in this package, late imports too."""
    return grimp.build_graph("nm_permute_plugin", cache_dir=None)


def reached(graph: grimp.ImportGraph) -> set[str]:
    """What serving imports, directly or through others, but for itself."""
    found = graph.find_upstream_modules("nm_permute_plugin.serving", as_package=True)
    return {name for name in found if name != "nm_permute_plugin"}


def outside(names: set[str]) -> set[str]:
    """Those that serving may not import."""
    return {
        name for name in names if not any(re.fullmatch(one, name) for one in ALLOWED)
    }


def test_serving_imports_what_is_allowed_alone(graph: grimp.ImportGraph) -> None:
    assert outside(reached(graph)) == set()
    assert "nm_permute_plugin.checkpoint.codec" in reached(graph)


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("serving.linear", "checkpoint.writer"),
        ("serving.kernels.packing", "pruning.search"),
        ("checkpoint.codec", "checkpoint.shards"),
    ],
)
def test_an_import_of_anything_else_is_found(
    graph: grimp.ImportGraph, importer: str, imported: str
) -> None:
    names = [f"nm_permute_plugin.{name}" for name in (importer, imported)]
    graph.add_import(importer=names[0], imported=names[1])
    try:
        assert names[1] in outside(reached(graph))
    finally:
        graph.remove_import(importer=names[0], imported=names[1])
