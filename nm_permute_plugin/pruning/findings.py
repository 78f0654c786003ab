# SPDX-License-Identifier: Apache-2.0
"""Tell all that would make a run fail at once, each in a line of its own."""

from collections.abc import Callable, Sequence
from typing import Any


class FindingsError(ValueError):
    """
    Several things would make a run fail.

    :ivar findings: a line each
    """

    def __init__(self, findings: Sequence[str]) -> None:
        lines = "".join(f"\n- {finding}" for finding in findings)
        super().__init__(f"{len(findings)} things would make this run fail:{lines}")
        self.findings = list(findings)


def refuse(findings: Sequence[str]) -> None:
    """
    Refuse a run for what was found.

    :raises ValueError: if there is something

    >>> try:
    ...     refuse(["OUT is full", "TEXT is short"])
    ... except ValueError as error:
    ...     print(error)
    2 things would make this run fail:
    - OUT is full
    - TEXT is short
    """
    if len(findings) == 1:
        raise ValueError(findings[0])
    if findings:
        raise FindingsError(findings)


def together(*checks: Callable[[], Any]) -> list[Any]:
    """
    What every check returns; all are made before any refusal.

    :raises ValueError: with a line for every check that refused, if several did
    :raises OSError: as the only check that refused
    """
    results: list[Any] = []
    refused: list[ValueError | OSError] = []
    for check in checks:
        try:
            results.append(check())
        except (ValueError, OSError) as error:
            refused.append(error)
    if len(refused) == 1:
        raise refused[0]
    refuse(
        [line for error in refused for line in getattr(error, "findings", [str(error)])]
    )
    return results
