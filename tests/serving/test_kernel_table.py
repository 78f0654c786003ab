# SPDX-License-Identifier: Apache-2.0
"""Kernel tables choose by tokens, and survive on disk or are measured anew."""

import logging
import os
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

from nm_permute_plugin.serving import kernel_table, kernels
from nm_permute_plugin.serving.kernel_table import Bucket, Choice, KernelTable
from nm_permute_plugin.serving.tune import choose

OURS = Choice("mma_sp", (1, 16, 1, 1, 1), 50.0)
DENSE = Choice("dense", (), 88.0)
OTHER = Choice("cusparselt", (0, 1, -1), 90.0)
BUCKETS = [Bucket(4, OURS, [OURS, DENSE, OTHER]), Bucket(16, DENSE, [DENSE])]
TABLE = KernelTable(16, BUCKETS)


@pytest.mark.parametrize(
    ("tokens", "choice"), [(1, OURS), (4, OURS), (5, DENSE), (16, DENSE), (99, DENSE)]
)
def test_a_bucket_serves_up_to_its_tokens_and_the_last_all_others(
    tokens: int, choice: Choice
) -> None:
    assert TABLE.choice(tokens) == choice


def test_weights_are_packed_for_the_chosen_kernels_alone() -> None:
    assert TABLE.kernels == ["dense", "mma_sp"]


def test_the_text_shows_every_time_and_the_choice() -> None:
    head, first, second = TABLE.as_text().splitlines()
    assert head.split() == ["tokens", "cusparselt", "dense", "mma_sp"]
    assert first.split() == ["4", "90.0", "88.0", "50.0", "mma_sp"]
    assert second.split() == ["16", "-", "88.0", "-", "dense"]


def test_a_table_comes_back_from_disk(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "table.json"
    kernel_table.save(TABLE, path)
    assert kernel_table.load(path, 16, KERNELS) == TABLE
    assert list(path.parent.iterdir()) == [path]


KERNELS = ["dense", "cusparselt", "mma_sp"]
ROW = '["mma_sp", [1, 16], 2.5]'
DAMAGED = {
    "empty": "",
    "cut": "{",
    "a list": "[]",
    "no keys": "{}",
    "null": "null",
    "a bucket without a choice": '{"buckets": [[1]]}',
    "no buckets": '{"out_features": 16, "buckets": []}',
    "unordered": f'{{"out_features": 1, "buckets": [[8, {ROW}, []], [4, {ROW}, []]]}}',
    "infinite": f'{{"out_features": Infinity, "buckets": [[8, {ROW}, []]]}}',
    "settings of another kind": '{"out_features": 1, "buckets": [[8, ["a", 1, 2], []]]}',
    "a setting beyond all": '{"out_features": 1, "buckets": [[8, ["a", [9e9], 2], []]]}',
    "a size beyond all": '{"out_features": 1, "buckets": [[8, ["a", [99999], 2], []]]}',
    "no time": '{"out_features": 1, "buckets": [[8, ["a", [1], NaN], []]]}',
    "a plan of old": '{"out_features": 1, "plan": {"4": ["mma_sp", [1, 16], 2.5]}}',
    "nested deeply": "[" * 100_000,
    "nested deeply and whole": "[" * 100_000 + "]" * 100_000,
}


def test_a_pipe_or_a_device_is_no_table(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        assert kernel_table.load(path, 16, KERNELS) is None
        assert str(path) in caplog.text


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_table_is_ignored_with_a_warning(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert kernel_table.load(path, 16, KERNELS) is None
    assert str(path) in caplog.text


@pytest.mark.parametrize(
    ("rows", "allowed"), [(32, KERNELS), (16, ["dense", "cusparselt"])]
)
def test_a_table_of_another_weight_is_ignored_with_a_warning(
    rows: int, allowed: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "table.json"
    kernel_table.save(TABLE, path)
    with caplog.at_level(logging.WARNING):
        assert kernel_table.load(path, rows, allowed) is None
    assert "it is for 16 rows, ['dense', 'mma_sp']" in caplog.text


def test_bytes_that_are_no_text_are_ignored_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(b"\xff\xfe\x00")
    with caplog.at_level(logging.WARNING):
        assert kernel_table.load(path, 16, KERNELS) is None
    assert str(path) in caplog.text


def test_a_missing_table_is_no_matter(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert kernel_table.load(tmp_path / "none.json", 16, KERNELS) is None
    assert not caplog.messages


def test_a_folder_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        kernel_table.save(TABLE, tmp_path / "file" / "table.json")
    assert "could not keep" in caplog.text


def test_a_change_of_any_kernels_source_is_a_new_table(tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    source = Path(kernels.__file__).parent
    copytree(source, folder, ignore=ignore_patterns("__pycache__"))
    digests = [kernel_table.source_digest(source)]
    assert kernel_table.source_digest(folder) == digests[0]
    for file in sorted(folder.iterdir()):
        file.write_text(file.read_text() + "\n")
        digests.append(kernel_table.source_digest(folder))
    assert len(set(digests)) == len(digests) == 1 + len(list(folder.iterdir()))


@pytest.mark.parametrize(
    ("sparse", "kernel"), [(50.0, "mma_sp"), (89.0, "mma_sp"), (95.0, "dense")]
)
def test_dense_must_win_by_more_than_noise(sparse: float, kernel: str) -> None:
    assert choose([DENSE, OURS._replace(microseconds=sparse)]).kernel == kernel
