# SPDX-License-Identifier: Apache-2.0
"""Keep a page on a run with its checkpoint: ``nm_permute/report.html``."""

from pathlib import Path

from loguru import logger

from nm_permute_plugin.checkpoint.directory import open_checkpoint, read_json
from nm_permute_plugin.checkpoint.record import FOLDER
from nm_permute_plugin.checkpoint.transaction import final_name
from nm_permute_plugin.reporting.measured import Measured
from nm_permute_plugin.reporting.page import write_page
from nm_permute_plugin.reporting.reading import read_as
from nm_permute_plugin.reporting.run import Run
from nm_permute_plugin.reporting.subject import Subject

PAGE = f"{FOLDER}/report.html"
PICTURES = f"{FOLDER}/report"
EVALUATIONS = f"{FOLDER}/evaluations.json"
"""Name the page, the folder of its pictures, and what is measured later: they have no
checksums, so that they can be made anew."""


def subject_of(folder: Path, name: str = "") -> Subject:
    """
    Reads what a page tells of a checkpoint.

    :param name: what the page calls it; by default as its folder is called
    :raises FileNotFoundError: if it holds no record of a run
    :raises ValueError: if its record, its evaluations or its weights are damaged, naming
        the file
    """
    record, results = folder / FOLDER / "report.json", folder / EVALUATIONS
    if not record.exists():
        raise FileNotFoundError(
            f"{record} does not exist: {folder} is no checkpoint that nm-permute made, or "
            "its folder nm_permute was left behind"
        )
    remedy = "fetch or make the checkpoint again"
    run = read_as(Run, read_json(record), str(record), remedy)
    measured = Measured()
    if results.exists():
        remedy = "remove it, or measure again"
        measured = read_as(Measured, read_json(results), str(results), remedy)
    stored = open_checkpoint(folder).bytes
    return Subject(name or final_name(folder), run, measured, stored)


def make_page(folder: Path) -> None:
    """
    Writes a checkpoint's page and its pictures, over older ones.

    :raises ModuleNotFoundError: without matplotlib
    :raises FileNotFoundError: if it holds no record of a run
    :raises ValueError: if something in it is damaged, naming the file
    """
    write_page(subject_of(folder), folder / PAGE, folder / PICTURES)


def make_page_if_possible(folder: Path) -> None:
    """
    Does as ``make_page`` does; where it cannot be, a line says so.

    A page is no reason to lose a checkpoint.
    """
    try:
        make_page(folder)
    except Exception as error:
        logger.warning(
            f"{PAGE} was not made: {error}. The checkpoint is whole without it; "
            "`nm-permute report FOLDER` makes it later"
        )
