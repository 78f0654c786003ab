# SPDX-License-Identifier: Apache-2.0
"""How `fuzz.py` forges checksums, so that what was changed is believed."""

import hashlib
import json
import zlib
from pathlib import Path

CHECKSUMS = "nm_permute/checksums.json"
CRC = "nm_permute.crc32"


def forge(folder: Path) -> bool:
    """Make all checksums of a folder anew, as somebody would who wants to be believed."""
    tried = False
    for file in sorted(folder.rglob("*.safetensors")):
        if file.is_file() and not file.is_symlink():
            tried = _forge_crc(file) or tried
    sums = [folder / CHECKSUMS, *folder.rglob("sums.json")]
    for path in (path for path in sums if path.is_file() and not path.is_symlink()):
        base = folder if path.name == "checksums.json" else path.parent
        try:
            content = json.loads(path.read_text())
            for name in content["files"]:
                file = base / name
                if file.is_file() and file.resolve().is_relative_to(base.resolve()):
                    digest = hashlib.sha256(file.read_bytes()).hexdigest()
                    content["files"][name] = digest
            path.write_text(json.dumps(content))
            tried = True
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
    return tried


def _forge_crc(file: Path) -> bool:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
        sums = json.loads(header["__metadata__"][CRC])
        data = content[8 + length :]
        for name, entry in header.items():
            if name in sums and isinstance(entry, dict):
                start, end = entry["data_offsets"]
                shape = tuple(entry["shape"])
                seed = zlib.crc32(f"{name} {entry['dtype']} {shape}".encode())
                sums[name] = f"{zlib.crc32(data[start:end], seed):08x}"
        header["__metadata__"][CRC] = json.dumps(sums)
        write_header(file, json.dumps(header).encode(), data)
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError):
        return False
    return True


def write_header(file: Path, header: bytes, data: bytes) -> None:
    """Write a safetensors file anew."""
    header += b" " * (-len(header) % 8)
    file.write_bytes(len(header).to_bytes(8, "little") + header + data)
