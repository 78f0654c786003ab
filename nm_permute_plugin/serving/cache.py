# SPDX-License-Identifier: Apache-2.0
"""The folder of what a server measured and compiled, for the next one."""

import logging
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from nm_permute_plugin._files import open_file

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM shows what is under its name

FOLDER = "NM_PERMUTE_CACHE"
"""This environment variable names the folder."""

_PART = ".tmp"
_ABANDONED = 3600.0  # seconds: to write a file takes a moment
_LARGEST = 1 << 24  # bytes of machine code: a kernel takes some kilobytes
_DIGEST = 32  # bytes of SHA-256 at the start of a file of machine code
_OTHERS_WRITE = 0o022


def folder() -> Path:
    """
    Return ``NM_PERMUTE_CACHE``, or ``nm-permute`` in the user's cache folder.

    A user without a home, as containers have, gets one among the temporary files.
    """
    if chosen := os.environ.get(FOLDER):
        return Path(chosen)
    if home := os.environ.get("XDG_CACHE_HOME"):
        return Path(home) / "nm-permute"
    try:
        return Path.home() / ".cache" / "nm-permute"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"nm-permute-{os.getuid()}"


def keep(path: Path, content: bytes, what: str) -> None:
    """
    Write a file as a whole or not at all; a failure is only warned of.

    :param what: names the content in the warning
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_abandoned(path.parent)
        with tempfile.NamedTemporaryFile(
            dir=path.parent, suffix=_PART, delete=False
        ) as file:
            try:
                file.write(content)
                file.flush()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        logger.warning("could not keep the %s in %s: %s", what, path, error)


def machine_code(name: str, make: Callable[[], bytes]) -> bytes:
    """
    Return what was compiled before under a name, or compile it now and keep it.

    A file that is damaged, or that another user wrote or may write, is not believed.

    :param name: of the file; it depends on all that the machine code depends on
    """
    path = folder() / name
    with suppress(OSError), open_file(path) as file:
        found = os.fstat(file.fileno())
        is_ours = found.st_uid in (os.getuid(), 0) and not found.st_mode & _OTHERS_WRITE
        content = file.read(_LARGEST) if is_ours else b""
        if sha256(content[_DIGEST:]).digest() == content[:_DIGEST]:
            return content[_DIGEST:]
    code = make()
    keep(path, sha256(code).digest() + code, "machine code")
    return code


def _clear_abandoned(folder: Path) -> None:
    """Remove what servers that were killed while they wrote have left."""
    for part in folder.glob(f"*{_PART}"):
        with suppress(OSError):
            if time.time() - part.stat().st_mtime > _ABANDONED:
                part.unlink()
