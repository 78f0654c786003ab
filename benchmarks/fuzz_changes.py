# SPDX-License-Identifier: Apache-2.0
"""How `fuzz.py` changes files: what disks, networks, editors and enemies do to them."""

import io
import json
import os
import pickle
import shutil
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from fuzz_forgery import write_header

TRAP = "nm_permute_fuzz_trap"
"""A module that leaves a mark when it is imported."""

DEEP = "[" * 50_000 + "]" * 50_000
HOLE = 256 << 20
STRINGS = [
    "",
    "\x00",
    "../../../../etc/passwd",
    "/dev/zero",
    "re:((.|\\w)+)+\\d\\d$",
    "re:(",
    "x" * 100_000,
    "\ud800",
    f"{TRAP}.Class",
    "F64",
    "I64",
    "2:1000000000",
    "sparse-bitmask",
    "dense",
    "cuda",
    "meta",
]
NUMBERS: list[Any] = [
    -1,
    0,
    1,
    2**31,
    2**62,
    2**64,
    10**400,
    float("nan"),
    float("inf"),
    1e308,
    0.5,
    True,
    None,
]
ENUM = {"__enum__": True, "fqn": f"{TRAP}:Class", "name": "x"}
CODE = {
    "auto_map": {k: f"{TRAP}.Class" for k in ("AutoConfig", "AutoModelForCausalLM")}
}


def change(folder: Path, files: Sequence[Path], rng: Random, mark: Path) -> str:
    """
    Change a folder at random.

    :param files: that may be changed
    :param mark: appears when code of a changed file is run
    :return: what was done, in words, and the name of the file
    """
    done = []
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
        there = [file for file in files if file.is_file() and not file.is_symlink()]
        if not there:
            break
        file = rng.choice(there)
        fitting = [_bytes, _bytes, _place]
        if file.suffix == ".json":
            fitting += [_json] * 4
        elif file.suffix in (".yaml", ".md"):
            fitting += [_yaml] * 4
        elif file.suffix == ".safetensors":
            fitting += [_header] * 4 + [_foreign]
        said = rng.choice(fitting)(file, there, rng, mark)
        done.append(f"{said} ({file.relative_to(folder)})")
    return "; ".join(done)


Change = Callable[[Path, Sequence[Path], Random, Path], str]


def _bytes(file: Path, files: Sequence[Path], rng: Random, mark: Path) -> str:
    content = bytearray(file.read_bytes())
    size = len(content)
    at = rng.randrange(size) if size else 0
    kind = rng.choice(
        ("flip", "flip", "flip", "cut", "zeros", "more", "less", "twice", "utf", "null")
    )
    if kind == "flip" and size:
        for _ in range(rng.choice((1, 1, 1, 3, 20))):
            content[rng.randrange(size)] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[at:]
    elif kind == "zeros":
        content[at : at + 64] = bytes(len(content[at : at + 64]))
    elif kind == "more":
        content[at:at] = rng.randbytes(rng.choice((1, 8, 4096)))
    elif kind == "less":
        del content[at : at + rng.choice((1, 8, 4096))]
    elif kind == "twice":
        content += content[at:]
    elif kind == "utf":
        content = bytearray(b"\xff\xfe" + bytes(content))
    else:
        content[at:at] = b"\x00\xff\xc3\x28"
    file.write_bytes(content)
    return f"bytes: {kind} at {at} of {size}"


def _place(file: Path, files: Sequence[Path], rng: Random, mark: Path) -> str:
    """What should be a file is not one, or another."""
    kind = rng.choice(
        (
            "gone",
            "empty",
            "folder",
            "pipe",
            "loop",
            "zero",
            "urandom",
            "hole",
            "dangling",
        )
        + ("swap", "other", "random", "wide", "socket")
    )
    if kind in ("swap", "other"):
        other = rng.choice(files)
        old = file.read_bytes()
        file.write_bytes(other.read_bytes())
        if kind == "swap":
            other.write_bytes(old)
        return f"{kind} with {other.name}"
    size = file.stat().st_size
    file.unlink()
    if kind == "empty":
        file.touch()
    elif kind == "folder":
        file.mkdir()
        (file / "config.json").write_text("{}")
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "socket":
        os.mknod(file, 0o140600)
    elif kind == "loop":
        file.symlink_to(file.name)
    elif kind in ("zero", "urandom"):
        file.symlink_to(f"/dev/{kind}")
    elif kind == "dangling":
        file.symlink_to("nowhere")
    elif kind == "hole":
        with file.open("wb") as hole:
            hole.truncate(HOLE)
    elif kind == "random":
        file.write_bytes(rng.randbytes(size))
    elif kind == "wide":
        file.write_bytes(b"[" + b"[]," * (1 << 20) + b"[]]")
    return kind


def _foreign(file: Path, files: Sequence[Path], rng: Random, mark: Path) -> str:
    """A file of another kind, which may be made to run code or to fill the memory."""
    kind = rng.choice(("pickle", "torch", "zip bomb", "gzip", "bin beside"))
    code = pickle.dumps(_Code(mark))
    if kind == "pickle":
        file.write_bytes(code)
    elif kind == "gzip":
        file.write_bytes(zlib.compress(bytes(64 << 20)))
    else:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            data = bytes(64 << 20) if kind == "zip bomb" else code
            archive.writestr("archive/data.pkl", data)
            archive.writestr("archive/version", "3\n")
        path = file
        if kind == "bin beside":
            file.unlink()
            named = "adapter_model" if "adapter" in file.name else "pytorch_model"
            path = file.with_name(f"{named}.bin")
        path.write_bytes(stream.getvalue())
    return kind


class _Code:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def _json(file: Path, files: Sequence[Path], rng: Random, mark: Path) -> str:
    try:
        content = json.loads(file.read_text())
    except (ValueError, RecursionError, OSError):
        return _bytes(file, files, rng, mark)
    text, said = _edited(content, rng)
    file.write_text(text, errors="surrogatepass")
    return f"json: {said}"


def _header(file: Path, files: Sequence[Path], rng: Random, mark: Path) -> str:
    """Edit the header of a safetensors file, or a tensor's bytes."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    try:
        header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    except (ValueError, RecursionError):
        return _bytes(file, files, rng, mark)
    entries = [name for name in header if name != "__metadata__"]
    kind = rng.choice(("edit", "edit", "length", "layout", "layout", "values", "names"))
    if not entries or kind == "edit":
        text, said = _edited(header, rng)
        write_header(file, text.encode(errors="surrogatepass"), data)
        return f"header: {said}"
    if kind == "length":
        said = str(rng.choice((0, 7, length - 1, length + 1, 1 << 40, (1 << 64) - 1)))
        file.write_bytes(int(said).to_bytes(8, "little") + content[8:])
        return f"header: length {said}"
    name = rng.choice(entries)
    entry = header[name]
    start, end = entry["data_offsets"]
    if kind == "values":
        part = np.frombuffer(bytearray(data[start:end]), np.uint8).copy()
        part[:] = rng.choice((0, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        data = data[:start] + part.tobytes() + data[end:]
    elif kind == "names":
        other = rng.choice(entries)
        header[name], header[other] = header[other], entry
    else:
        shape = entry["shape"]
        entry["shape"], entry["data_offsets"], entry["dtype"] = rng.choice(
            (
                ([*shape, 1 << 62], [start, end], entry["dtype"]),
                ([-n for n in shape], [start, end], entry["dtype"]),
                (shape[::-1], [start, end], entry["dtype"]),
                ([1, *shape], [start, end], entry["dtype"]),
                (shape, [end, start], entry["dtype"]),
                (shape, [0, end - start], entry["dtype"]),
                (shape, [start + (1 << 50), end + (1 << 50)], entry["dtype"]),
                (shape, [start, end], rng.choice(("F16", "I16", "U8", "F4", "C64"))),
                ([0, 1 << 62], [start, start], entry["dtype"]),
                ([], [start, end], entry["dtype"]),
            )
        )
    write_header(file, json.dumps(header).encode(), data)
    return f"header: {kind} of {name}"


def _edited(content: Any, rng: Random) -> tuple[str, str]:
    """Replace, remove, double or rename a random node of a JSON document."""
    nodes = list(_nodes(content))
    if not nodes:
        return DEEP, "deep"
    holder, key = rng.choice(nodes)
    kind = rng.choice(
        ("number", "number", "string", "string", "remove", "deep", "wide", "rename")
        + ("other", "double", "enum", "code", "long")
    )
    if kind == "number":
        holder[key] = rng.choice(NUMBERS)
    elif kind == "string":
        holder[key] = rng.choice(STRINGS)
    elif kind == "remove":
        del holder[key]
    elif kind == "rename" and isinstance(holder, dict):
        holder[rng.choice(STRINGS)] = holder.pop(key)
    elif kind == "other":
        other, place = rng.choice(nodes)
        holder[key], other[place] = other[place], holder[key]
    elif kind == "enum":
        value = holder[key]
        holder[key] = json.dumps(ENUM) if isinstance(value, str) else ENUM
    elif kind == "code" and isinstance(content, dict):
        content |= CODE
    elif kind == "long":
        holder[key] = list(range(2000))
    else:
        holder[key] = "@"
    try:
        text = json.dumps(content)
    except (ValueError, RecursionError):  # a value that holds itself now
        return DEEP, f"{kind} at {key!r}"
    if kind == "deep":
        text = text.replace('"@"', DEEP, 1)
    elif kind == "wide":
        text = text.replace('"@"', "[" + "{}," * 200_000 + "0]", 1)
    elif kind == "double" and isinstance(holder, dict):
        text = text.replace('"@"', f'1, {json.dumps(key)}: "@"', 1)
    return text, f"{kind} at {str(key)[:60]!r}"


def _nodes(value: Any, depth: int = 0) -> Any:
    if depth > 40:
        return
    keys = list(value) if isinstance(value, dict) else []
    keys = list(range(len(value))) if isinstance(value, list) else keys
    for key in keys:
        yield value, key
        yield from _nodes(value[key], depth + 1)


def _yaml(file: Path, files: Sequence[Path], rng: Random, mark: Path) -> str:
    text = file.read_text(errors="replace")
    lines = text.splitlines() or [""]
    at = rng.randrange(len(lines))
    kind = rng.choice(
        ("value", "value", "value", "drop", "twice", "indent", "laughs", "merge", "tag")
        + ("deep", "anchor", "dates", "swap")
    )
    name, colon, _ = lines[at].partition(":")
    if kind == "value" and colon:
        given = rng.choice((*map(json.dumps, STRINGS[:9] + STRINGS[11:]), *_SCALARS))
        lines[at] = f"{name}: {given}"
    elif kind == "drop":
        del lines[at]
    elif kind == "twice":
        lines.insert(at, lines[at])
    elif kind == "indent":
        lines[at] = f" {lines[at]}"
    elif kind == "laughs":
        lines = [*_laughs("[{0}]", "*a{0}", rng), *lines]
    elif kind == "merge":
        lines = [*_laughs("{{k{1}: 1, <<: [{0}]}}", "*a{0}", rng), *lines]
    elif kind == "tag":
        given = f"!!python/object/apply:os.mkdir ['{mark}']"
        lines[at] = f"{name}: {given}" if colon else given
    elif kind == "deep":
        lines[at] = f"{name}: {'[' * 3000}{']' * 3000}"
    elif kind == "anchor":
        lines[at] = f"{name}: &a [*a]"
    elif kind == "dates":
        lines[at] = f"{name}: 2026-99-99"
    else:
        other = rng.randrange(len(lines))
        lines[at], lines[other] = lines[other], lines[at]
    file.write_text("\n".join(lines) + "\n", errors="surrogatepass")
    return f"yaml: {kind} at line {at + 1}"


_SCALARS = (
    *("-1", "0", "1e400", ".nan", ".inf", "99999999999999999999", "{}", "[]", "null"),
    *("2:4", "0x7fffffffffffffff", "!!binary aGVsbG8=", "1" * 5000, "true", "[1, {}]"),
    *("1000000000000", "0.5", "[swaps, swaps]", "{steps: 1e18}", "!!set {a, b}"),
)


def _laughs(form: str, reference: str, rng: Random) -> list[str]:
    """Nine levels of nine references each: small as a file, huge as a tree."""
    levels = rng.choice((4, 9, 20))
    lines = [f"a0: &a0 {form.format('1' if 'k{' not in form else '{}', 0)}"]
    for level in range(1, levels):
        inside = ", ".join([reference.format(level - 1)] * 9)
        lines.append(f"a{level}: &a{level} {form.format(inside, level)}")
    return lines


def copy(folder: Path, to: Path) -> None:
    """Copy a subject, to be changed."""
    shutil.copytree(folder, to, symlinks=True)
