# SPDX-License-Identifier: Apache-2.0
"""The N:M pattern is read from text, printed back, and nonsense is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nm_permute_plugin.maths.pattern import NMPattern


@given(st.integers(1, 30), st.integers(1, 30))
def test_a_pattern_reads_back_what_it_prints(n: int, more: int) -> None:
    pattern = NMPattern(n, n + more)
    assert NMPattern.parse(str(pattern)) == pattern


@pytest.mark.parametrize("text", ["3:2", "2:0", "0:4", "4:4"])
def test_an_impossible_share_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text} is no sparsity pattern.*0 < N < M"):
        NMPattern.parse(text)


@pytest.mark.parametrize(
    "text", ["x", "", "2", "2:", ":4", "2:4:8", "2:x", "-2:4", "2.0:4", " 2:4", "2of4"]
)
def test_text_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not of the form 'N:M'"):
        NMPattern.parse(text)


def test_the_constructor_refuses_what_the_parser_refuses() -> None:
    with pytest.raises(ValueError, match="4:2"):
        NMPattern(4, 2)


@pytest.mark.parametrize(
    ("text", "density"), [("2:4", 0.5), ("4:8", 0.5), ("1:4", 0.25)]
)
def test_density_is_the_share_that_stays(text: str, density: float) -> None:
    assert NMPattern.parse(text).density == density
