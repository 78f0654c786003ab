# SPDX-License-Identifier: Apache-2.0
"""The kernel tables that serving keeps tell what a sparse linear saves."""

import os

import pytest
from kernel_tables import keep

from nm_permute_plugin.pruning.budget.fused import FusedLinears
from nm_permute_plugin.pruning.budget.times import measured_times

QKV = FusedLinears(("attn.q_proj", "attn.k_proj"), (96, 64), 96 * 64)
DOWN = FusedLinears(("mlp.down_proj",), (64, 128), 64 * 128)
EXPERTS = FusedLinears(("mlp.experts.0.up_proj",), None, 64)


def test_a_product_takes_the_time_of_the_bucket_that_serves_it(tmp_path):
    keep(tmp_path, "96x64", dense=8.0, sparse=5.0)
    keep(tmp_path, "64x128", dense=6.0, sparse=7.0)
    times = measured_times(tmp_path, [QKV, DOWN, QKV], "bfloat16", tokens=1)
    assert times == [(8.0, 5.0), (6.0, 6.0), (8.0, 5.0)]  # dense where that is faster
    assert measured_times(tmp_path, [QKV], "bfloat16", 2) == [(16.0, 10.0)]
    assert measured_times(tmp_path, [QKV], "bfloat16", 999) == [(16.0, 10.0)]


def test_of_several_tables_the_newest_is_read(tmp_path):
    old = keep(tmp_path, "96x64", dense=8.0, sparse=1.0, digest="f" * 16)
    keep(tmp_path, "96x64", dense=8.0, sparse=5.0)
    os.utime(old, (1, 1))
    assert measured_times(tmp_path, [QKV], "bfloat16", 1) == [(8.0, 5.0)]


def test_every_shape_without_a_table_is_named(tmp_path):
    keep(tmp_path, "96x64", dense=8.0, sparse=5.0, dtype="float8-e4m3fn")
    with pytest.raises(ValueError, match="64 x 128, 96 x 64, routed experts in bfloat"):
        measured_times(tmp_path, [QKV, DOWN, EXPERTS], "bfloat16", 1)
    assert measured_times(tmp_path, [QKV], "float8-e4m3fn", 1) == [(8.0, 5.0)]


def test_a_table_without_the_dense_time_does_not_count(tmp_path):
    path = keep(tmp_path, "96x64", dense=8.0, sparse=5.0)
    path.write_text('{"buckets": [[1, ["mma_sp", [], 5.0], [["mma_sp", [], 5.0]]]]}')
    with pytest.raises(ValueError, match="no table that times 96 x 64"):
        measured_times(tmp_path, [QKV], "bfloat16", 1)


@pytest.mark.parametrize("text", ["{", "[]", '{"buckets": []}', '{"buckets": [[1]]}'])
def test_a_damaged_table_is_named(tmp_path, text):
    path = keep(tmp_path, "96x64", dense=8.0, sparse=5.0)
    path.write_text(text)
    with pytest.raises(ValueError, match=path.name):
        measured_times(tmp_path, [QKV], "bfloat16", 1)


def test_a_missing_folder_is_told_with_the_usual_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="~/.cache/nm-permute"):
        measured_times(tmp_path / "none", [QKV], "bfloat16", 1)
