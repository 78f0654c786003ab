# SPDX-License-Identifier: Apache-2.0
"""What a layer does to activations before its product."""

import json

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def said(run_engine) -> dict:
    """By dtype, with a scale a token and with one that is given."""
    done = run_engine("quantize.py")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_compiled_int8_is_what_vllms_operator_makes(said: dict) -> None:
    assert said["int8"] == [[0, 0.0], [0, 0.0]]


def test_fp8_has_a_scale_a_token_or_the_one_that_is_given(said: dict) -> None:
    (by_token, one_each), (given, _) = said["fp8"]
    assert one_each == [7, 1]
    # three bits of mantissa: half a step of 1/8 of the largest
    assert 0.01 < by_token < 1 / 16
    assert 0.01 < given < 1 / 16
