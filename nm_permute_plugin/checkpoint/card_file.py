# SPDX-License-Identifier: Apache-2.0
"""The file of a checkpoint's card: its marks, what stands between them, a foreign one."""

import shutil
from pathlib import Path

from loguru import logger

from nm_permute_plugin._files import open_file, write_text

CARD = "README.md"
MARK = "<!-- written by nm-permute-plugin -->"
EVALUATION = ("<!-- evaluation -->", "<!-- end of evaluation -->")


def read_evaluation(folder: Path) -> str:
    """
    Reads the tables of results in a checkpoint's card, as Markdown; "" before the first.

    :raises ValueError: if the folder has no card of ours
    """
    return block(folder, EVALUATION)[0].strip()


def write_evaluation(folder: Path, tables: str) -> None:
    """
    Puts tables of results into a checkpoint's card, in place of those that it has.

    :param tables: Markdown
    :raises ValueError: if the folder has no card of ours
    """
    _, text = block(folder, EVALUATION)
    replace(folder, text, EVALUATION, f"\n\n{tables}\n\n")


def is_ours(folder: Path) -> bool:
    """Tells whether a folder has a README.md that was written here."""
    try:
        with open_file(folder / CARD) as file:
            return MARK.encode() in file.read()
    except OSError:
        return False


def keep_foreign_card(folder: Path, fresh: Path) -> None:
    """
    Copies a README.md that we did not write out of a folder, under a name that is free.

    :param fresh: the directory that takes the folder's place, with a card of its own
    """
    path = folder / CARD
    if not path.exists() or is_ours(folder) or not (fresh / CARD).exists():
        return
    number, kept = 2, "README.old.md"
    while (folder / kept).exists():
        number, kept = number + 1, f"README.old{number}.md"
    shutil.copy2(path, fresh / kept)
    logger.warning(f"{path} was not written by nm-permute-plugin; it is {kept} now")


def block(folder: Path, marks: tuple[str, str]) -> tuple[str, str]:
    """Reads what stands between two marks of the card, and the whole card."""
    path = folder / CARD
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    begin, end = text.find(marks[0]), text.find(marks[1])
    if not 0 <= begin < end:
        raise ValueError(
            f"{path} has no place for this, between {marks[0]!r} and {marks[1]!r}; it "
            "was not written by nm-permute-plugin, or changed since"
        )
    return text[begin + len(marks[0]) : end], text


def replace(folder: Path, text: str, marks: tuple[str, str], new: str) -> None:
    """Puts a text between two marks of the card, given as it is."""
    before, after = text.split(marks[0], 1)[0], text.split(marks[1], 1)[1]
    card = f"{before}{marks[0]}{new}{marks[1]}{after}"
    write_text(folder / CARD, card)
