# SPDX-License-Identifier: Apache-2.0
"""Plans choose by tokens, and survive on disk or are measured anew."""

import logging
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

from nm_permute_plugin.serving import kernel_table as plans
from nm_permute_plugin.serving import kernels
from nm_permute_plugin.serving.kernel_table import Bucket, Plan, Way
from nm_permute_plugin.serving.tune import choose

OURS = Way("mma_sp", (1, 16, 1, 1, 1), 50.0)
DENSE = Way("dense", (), 88.0)
PLAN = Plan(16, [Bucket(4, OURS, [OURS, DENSE]), Bucket(16, DENSE, [DENSE])])


@pytest.mark.parametrize(
    ("tokens", "way"), [(1, OURS), (4, OURS), (5, DENSE), (16, DENSE), (99, DENSE)]
)
def test_a_bucket_serves_up_to_its_tokens_and_the_last_all_others(
    tokens: int, way: Way
) -> None:
    assert PLAN.way(tokens) == way


def test_forms_are_kept_of_the_chosen_kernels_alone() -> None:
    assert PLAN.kernels == ["dense", "mma_sp"]


def test_the_table_shows_every_time_and_the_choice() -> None:
    head, first, second = PLAN.table().splitlines()
    assert head.split() == ["tokens", "dense", "mma_sp"]
    assert first.split() == ["4", "88.0", "50.0", "mma_sp"]
    assert second.split() == ["16", "88.0", "-", "dense"]


def test_a_plan_comes_back_from_disk(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "plan.json"
    plans.save(PLAN, path)
    assert plans.load(path) == PLAN
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"buckets": [[1]]}', "null"])
def test_a_damaged_plan_is_ignored_with_a_warning(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert plans.load(path) is None
    assert str(path) in caplog.text


def test_a_missing_plan_is_no_matter(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert plans.load(tmp_path / "none.json") is None
    assert not caplog.messages


def test_a_folder_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        plans.save(PLAN, tmp_path / "file" / "plan.json")
    assert "is not kept" in caplog.text


def test_the_cache_folder_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(plans.CACHE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert plans.cache_folder() == tmp_path / "nm-permute"
    monkeypatch.setenv(plans.CACHE, str(tmp_path / "own"))
    assert plans.cache_folder() == tmp_path / "own"


def test_a_change_of_any_kernels_source_is_a_new_plan(tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    source = Path(kernels.__file__).parent
    copytree(source, folder, ignore=ignore_patterns("__pycache__"))
    digests = [plans.digest(source)]
    assert plans.digest(folder) == digests[0]
    for file in sorted(folder.iterdir()):
        file.write_text(file.read_text() + "\n")
        digests.append(plans.digest(folder))
    assert len(set(digests)) == len(digests) == 1 + len(list(folder.iterdir()))


@pytest.mark.parametrize(
    ("sparse", "kernel"), [(50.0, "mma_sp"), (89.0, "mma_sp"), (95.0, "dense")]
)
def test_dense_must_win_by_more_than_noise(sparse: float, kernel: str) -> None:
    assert choose([DENSE, OURS._replace(microseconds=sparse)]).kernel == kernel
