# SPDX-License-Identifier: Apache-2.0
"""Name the versions of the hosts that this package was tested with."""

import re
import warnings
from importlib.metadata import PackageNotFoundError, version

TESTED = {
    "transformers": ("5.15", "5.24"),
    "compressed-tensors": ("0.15", "0.20"),
    "llmcompressor": ("0.14", "0.14"),
}
"""Lists the oldest and the newest minor version of each; pyproject.toml pins these."""

_NUMBERS = re.compile(r"(\d+)(?:\.(\d+))?")


def warn_if_untested(*packages: str) -> None:
    """
    Warns of each installed package whose version was not tested, and says what was.

    :param packages: keys of ``TESTED``; one that is not installed is passed over
    """
    for package in packages:
        try:
            installed = version(package)
        except PackageNotFoundError:
            continue
        if not is_tested(package, installed):
            warnings.warn(
                f"nm-permute-plugin was not tested with {package} {installed}. If "
                f"something fails: pip install '{requirement(package)}'",
                stacklevel=2,
            )


def is_tested(package: str, installed: str) -> bool:
    """
    Tells whether a version lies between the oldest and the newest tested one.

    >>> [is_tested("transformers", x) for x in ("5.9.0", "5.24.1", "5.25rc1", "6")]
    [False, True, False, False]
    """
    oldest, newest = map(_minor, TESTED[package])
    return oldest <= _minor(installed) <= newest


def requirement(package: str) -> str:
    """
    Returns what pip has to be asked for.

    >>> requirement("transformers")
    'transformers>=5.15,<5.25'
    """
    oldest, newest = TESTED[package]
    major, minor = _minor(newest)
    return f"{package}>={oldest},<{major}.{minor + 1}"


def _minor(release: str) -> tuple[int, int]:
    major, minor = _NUMBERS.match(release).groups("0")  # type: ignore[union-attr]
    return int(major), int(minor)
