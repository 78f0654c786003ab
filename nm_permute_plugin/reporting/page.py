# SPDX-License-Identifier: Apache-2.0
"""
Write the page of one checkpoint, or of several side by side.

A page is one file: it loads nothing, runs no script, and says so to the browser.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nm_permute_plugin.reporting.compared import overlaid, table
from nm_permute_plugin.reporting.drawing import (
    as_png,
    as_svg,
    require_matplotlib,
    style,
)
from nm_permute_plugin.reporting.pictures import PICTURES
from nm_permute_plugin.reporting.subject import Subject

GENERATOR = "nm-permute report"
"""Marks a page as ours, so that it may be written over."""


def write_page(subject: Subject, path: Path, pictures: Path | None = None) -> None:
    """
    Write the page of one checkpoint.

    :param pictures: a folder for the same pictures as PNG, made if it is not there;
        pictures of an older page in it are removed
    :raises ModuleNotFoundError: without matplotlib
    :raises OSError: if it cannot be written
    """
    require_matplotlib()
    drawn, files = [], {}
    with style():
        for picture in PICTURES:
            figure = picture.draw(subject.run)
            if figure is None:
                continue
            drawn.append({"of": picture, "address": as_svg(figure)})
            if pictures is not None:
                files[f"{picture.name}.png"] = as_png(figure)
    text = _render("run.html", subject=subject, run=subject.run, pictures=drawn)
    _write(path, text.encode())
    if pictures is not None:
        pictures.mkdir(exist_ok=True)
        for picture in PICTURES:
            name = f"{picture.name}.png"
            if name in files:
                _write(pictures / name, files[name])
            else:
                (pictures / name).unlink(missing_ok=True)


def write_comparison(subjects: Sequence[Subject], path: Path) -> None:
    """
    Write one page on several checkpoints.

    :raises ModuleNotFoundError: without matplotlib
    :raises OSError: if it cannot be written
    """
    require_matplotlib()
    with style():
        curves = [
            {"title": title, "address": as_svg(figure)}
            for title, figure in overlaid(subjects)
        ]
    text = _render(
        "compared.html", table=table(subjects), pictures=curves, count=len(subjects)
    )
    _write(path, text.encode())


def refuse_foreign(path: Path) -> None:
    """
    See that a page may be written to a path.

    :raises FileExistsError: if something stands there that is no page of ours
    :raises FileNotFoundError: if the folder is not there
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"{path.parent} does not exist; make it, or name another file"
        )
    if not path.exists():
        return
    if path.is_dir():
        raise FileExistsError(f"{path} is a folder; name a file, such as report.html")
    with path.open("rb") as file:
        ours = GENERATOR.encode() in file.read(2000)
    if not ours:
        raise FileExistsError(f"{path} exists and is no report; name another file")


def _render(template: str, **values: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,  # names of models and files are anybody's words
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["generator"] = GENERATOR
    return environment.get_template(template).render(**values)


def _write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_bytes(content)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
