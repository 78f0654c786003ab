# SPDX-License-Identifier: Apache-2.0
"""
Read files that anybody may have made: ordinary ones, of a size that fits them; write them.

Nothing here imports more than Python's own library until it is asked to read YAML.
"""

import errno
import json
import os
import re
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

LARGEST_JSON = 128 << 20
"""Bytes of a JSON file: the largest tokenizers take half of it, indices a tenth."""

LARGEST_YAML = 1 << 20
"""Bytes of a YAML file: recipes and specs take some kilobytes."""

_MEMORY = 64 << 20  # bytes that a document may take beside twice its file
_DEEPEST = 100  # brackets of a YAML document
_MOST_VALUES = 100_000  # of a YAML document, with what its aliases repeat

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_file(path: Path) -> BufferedReader:
    """
    Open a file to read bytes, and never wait for a pipe, or read a device without end.

    :raises OSError: if it cannot be opened, or is no ordinary file
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        said = f"is {_KINDS.get(kind, 'something else')}, and no file"
        raise OSError(errno.EINVAL, said, str(path))
    return os.fdopen(descriptor, "rb")


def read_text(path: Path, most: int) -> str:
    """
    Read a text in UTF-8.

    :param most: bytes
    :raises OSError: if it cannot be read, or is no ordinary file
    :raises ValueError: if it is larger, or no text, naming the file
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ValueError(
                f"{path} has {size:,} bytes, and no such file has more than {most:,}"
            )
        content = file.read(most)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error


def write_text(path: Path, text: str) -> None:
    """
    Write a file as a whole or not at all, in place of an older one.

    :raises OSError: if it cannot be written; the older one is what it was
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> Any:
    """
    Read a JSON file.

    :raises OSError: if it cannot be read, or is no ordinary file
    :raises ValueError: if it is no JSON, naming the file
    """
    text = read_text(path, LARGEST_JSON)
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error


def parse_json(text: str, allowed: int | None = None) -> Any:
    """
    Parse JSON, unless its values would take far more memory than its text.

    :param allowed: bytes of memory; twice the text and 64 MB by default
    :raises ValueError: if it is no JSON
    """
    # what Python takes for each, at least and about
    needed = 64 * text.count("[") + 240 * text.count("{") + 48 * text.count(",")
    if needed > (2 * len(text) if allowed is None else allowed) + _MEMORY:
        raise ValueError(
            f"holds so many values that they would take {needed / 1e6:,.0f} MB"
        )
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is no JSON: {error}") from error


def read_yaml(path: Path, what: str) -> tuple[str, Any]:
    """
    Read a YAML file, in which no name of a mapping stands twice.

    :param what: the file is, for errors: "recipe" for example
    :return: its text, and what it holds
    :raises OSError: if it cannot be read, or is no ordinary file
    :raises ValueError: if it is no YAML, naming the file
    """
    from nm_permute_plugin._unique_keys import UniqueKeys

    text = read_text(path, LARGEST_YAML)
    try:
        return text, parse_yaml(text, UniqueKeys)
    except ValueError as error:
        raise ValueError(f"{what} {path} {error}") from error


def parse_yaml(text: str, kind: Any) -> Any:
    """
    Parse YAML, unless its aliases make far more values of it than it has characters.

    :param kind: a safe loader of PyYAML
    :raises ValueError: if it is no YAML
    """
    import yaml

    loader = None
    try:
        if _depth(text) > _DEEPEST:
            raise ValueError(f"it is nested deeper than {_DEEPEST} brackets")
        loader = kind(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _values(node, {}) > _MOST_VALUES:
            raise ValueError(
                f"its aliases make more than {_MOST_VALUES:,} values of it"
            )
        return loader.construct_document(node)
    # what a date, or a number, that is none causes in YAML's own library
    except (
        yaml.YAMLError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"is no YAML: {said}") from error
    finally:
        if loader is not None:
            loader.dispose()


def _depth(text: str) -> int:
    """Count the most brackets that are open at once; YAML's own parser is slow there."""
    depth = most = 0
    for bracket in re.finditer(r"[\[\]{}]", text):
        depth = max(0, depth + (1 if bracket[0] in "[{" else -1))
        most = max(most, depth)
    return most


def _values(node: Any, known: dict[int, int]) -> int:
    """Count the values of a YAML node, those of aliases as often as they are named."""
    if id(node) not in known:
        known[id(node)] = _MOST_VALUES + 1  # of one that holds itself
        content = node.value if isinstance(node.value, list) else []
        parts = [x for e in content for x in (e if isinstance(e, tuple) else (e,))]
        known[id(node)] = 1 + sum(_values(part, known) for part in parts)
    return known[id(node)]
