# SPDX-License-Identifier: Apache-2.0
"""Tells a server's log how the 2:4 layers of a model are served."""

from collections import defaultdict
from collections.abc import Callable, Sequence


class LayerReport:
    """
    Collects how each 2:4 layer is served, and logs it once all of them are loaded.

    :param warn: takes one message for each reason why layers are served dense
    :param inform: takes the message on the layers that are served sparse

    >>> report = LayerReport(print, print)
    >>> report.expect("up"), report.expect("down")
    (None, None)
    >>> report.note("up", "no CUDA device")
    >>> report.note("down", "no CUDA device")
    2 of 2 2:4 layers are served dense, from up to down: no CUDA device
    """

    def __init__(
        self, warn: Callable[[str], object], inform: Callable[[str], object]
    ) -> None:
        self._warn = warn
        self._inform = inform
        self._expected: set[str] = set()
        self._dense: dict[str, list[str]] = defaultdict(list)
        self._noted: set[str] = set()

    def expect(self, name: str) -> None:
        """Announce a layer, which ``note`` will be called for."""
        self._expected.add(name)

    def note(self, name: str, reason: str | None) -> None:
        """
        Record how a loaded layer is served.

        :param reason: why it is served dense; None if it is served sparse
        """
        self._noted.add(name)
        if reason is not None:
            self._dense[reason].append(name)
        if self._noted != self._expected:
            return
        total = len(self._noted)
        for why, names in self._dense.items():
            self._warn(
                f"{len(names)} of {total} 2:4 layers are served dense, "
                f"{from_to(names)}: {why}"
            )
        sparse = total - sum(map(len, self._dense.values()))
        if sparse:
            self._inform(f"{sparse} of {total} 2:4 layers are served sparse")
        self._noted.clear()
        self._dense.clear()


def from_to(names: Sequence[str]) -> str:
    """
    Name layers in few words.

    >>> from_to(["head"]), from_to(["up", "gate", "down"])
    ('head', 'from up to down')
    """
    return names[0] if len(names) == 1 else f"from {names[0]} to {names[-1]}"
