# SPDX-License-Identifier: Apache-2.0
"""Items of HellaSwag from a local file, prepared as lm-eval's own task prepares them."""

import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

LINES = 6
"""Of an item: its context, the number of the right ending, and four endings."""

VARIABLE = "HELLASWAG_FILE"
"""The environment variable that names the file where ``--metadata file=...`` does not."""


@dataclass(frozen=True)
class Item:
    """
    A context with four endings.

    :param query: the context
    :param choices: the endings
    :param gold: which of them is right, from 0 on
    """

    query: str
    choices: list[str]
    gold: int


def load(file: str | None = None, **metadata: object) -> dict[str, list[dict]]:
    """
    The data set of the task, as lm-eval calls it.

    :param file: the path; the environment's ``HELLASWAG_FILE`` if absent
    :raises ValueError: without a file, and as ``read_items``
    """
    from datasets import Dataset

    path = file or os.environ.get(VARIABLE)
    if not path:
        raise ValueError(
            "the task hellaswag_file reads a local file: give --metadata file=PATH, or set "
            f"{VARIABLE}=PATH"
        )
    items = [asdict(item) for item in read_items(Path(path))]
    return {"validation": Dataset.from_list(items)}


def read_items(path: Path) -> list[Item]:
    """
    All items of a file with six lines each.

    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if it holds something else, naming the line
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; give HellaSwag's items as a file"
        )
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    if len(lines) % LINES:
        raise ValueError(
            f"{path} has {len(lines)} lines, and an item has {LINES}: its context, the "
            "number of the right ending, and four endings"
        )
    items = []
    for first in range(0, len(lines), LINES):
        context, label, *endings = lines[first : first + LINES]
        if label.strip() not in {"0", "1", "2", "3"}:
            raise ValueError(
                f"{path} line {first + 2} is {label[:40]!r}, but must be the number of the "
                "right ending, 0 to 3"
            )
        items.append(
            Item(
                preprocess(capitalized(context)),
                [preprocess(ending) for ending in endings],
                int(label),
            )
        )
    return items


def preprocess(text: str) -> str:
    """
    Clean a text as lm-eval's HellaSwag does: brackets are left from WikiHow.

    >>> preprocess(" How to boil [title] Take  water [step] and wait. ")
    'How to boil. Take water and wait.'
    """
    text = text.strip().replace(" [title]", ". ")
    return re.sub("\\[.*?\\]", "", text).replace("  ", " ")


def capitalized(context: str) -> str:
    """
    Begin the last, unfinished sentence with a capital, as lm-eval's HellaSwag does.

    >>> capitalized("Canoeing: Two women sit. the man in Rome")
    'Canoeing: Two women sit. The man in rome'
    >>> capitalized("Canoeing: two women sit.")
    'Canoeing: two women sit.'
    """
    found = re.fullmatch(r"(.*[.!?][\"']? +)([a-z][^.!?]*)", context)
    return context if found is None else found[1] + found[2].capitalize()
