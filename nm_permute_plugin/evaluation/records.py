# SPDX-License-Identifier: Apache-2.0
"""What a record of a data set holds: a text, or a conversation in one of two forms."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

COLUMNS = ("messages", "conversations", "text")
"""Columns that are looked for, the first that a record has, where none was named."""

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_response": "tool",
    "observation": "tool",
}
"""ShareGPT's names of those who speak, as chat templates know them."""


@dataclass(frozen=True)
class Document:
    """
    One record: a line of a JSONL file, or a row of a table.

    :param where: the file and the number of the line, from 1 on, or of the row, from 0 on
    :param content: a text, or a conversation: messages with ``role`` and ``content``
    :param tools: what the conversation may call, as chat templates take it
    """

    where: str
    content: str | list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


def document_of(where: str, record: Any, column: str | None = None) -> Document:
    """
    Read a record; a text that is null is an empty one.

    :param where: for messages of errors
    :param column: the column that holds text or a conversation; one of ``COLUMNS`` if None
    :raises ValueError: if there is no such column, or it holds something else
    """
    known = isinstance(record, Mapping)
    there = [name for name in COLUMNS if known and name in record]
    filled = [name for name in there if record[name] is not None]
    name = column or next(iter(filled + there), "")
    if not known or name not in record:
        found = ", ".join(map(str, record)) if known else type(record).__name__
        wanted = column or "messages, conversations or text"
        raise ValueError(
            f"{where} holds {found or 'nothing'}, but no {wanted}; name the column of prune"
            "'s --dataset by --text-column, or give a JSON object a line: "
            '{"messages": [{"role": ..., "content": ...}]} or {"text": ...}'
        )
    value = record[name]
    if value is None:
        return Document(where, "")
    if isinstance(value, str) and (column is not None or name == "text"):
        return Document(where, value)
    if column is None and name == "text":
        raise ValueError(f"{where}: text is a {type(value).__name__}, not a string")
    if not isinstance(value, list):
        kinds = "neither a string nor" if column else "no"
        raise ValueError(
            f"{where}: {name} is a {type(value).__name__}, {kinds} list of messages"
        )
    return Document(where, _messages(where, name, value), record.get("tools") or None)


def _messages(where: str, name: str, value: list[Any]) -> list[dict[str, Any]]:
    if not value:
        raise ValueError(f"{where}: {name} is an empty list of messages")
    if all(isinstance(turn, Mapping) and "role" in turn for turn in value):
        # Tables fill what a message does not have with null; a template asks for it.
        return [
            {key: x for key, x in turn.items() if x is not None or key == "content"}
            for turn in value
        ]
    if not all(isinstance(x, Mapping) and {"from", "value"} <= {*x} for x in value):
        raise ValueError(
            f"{where}: every one of {name} needs a role, as in "
            '{"role": "user", "content": "Hello"}, or from and value'
        )
    return [
        {
            "role": ROLES.get(str(turn["from"]), str(turn["from"])),
            "content": turn["value"],
        }
        for turn in value
    ]
