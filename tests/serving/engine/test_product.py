# SPDX-License-Identifier: Apache-2.0
"""What a layer does to activations before its product."""

import json

import pytest

pytestmark = pytest.mark.slow


def test_compiled_int8_is_what_vllms_operator_makes(run_engine) -> None:
    done = run_engine("quantize.py")
    assert done.returncode == 0, done.stderr[-3000:]
    by_token, given = json.loads(done.stdout.splitlines()[-1])
    assert by_token == [0, 0.0]
    assert given == [0, 0.0]
