# SPDX-License-Identifier: Apache-2.0
"""Words that every part of the package says alike: sizes, and how it is installed."""


def file_size(count: int) -> str:
    """
    Write the bytes of files and disks for people, in powers of ten.

    >>> file_size(45_568), file_size(176_312_000), file_size(25_000_000_000)
    ('46 kB', '176.3 MB', '25.0 GB')
    """
    if count < 1e6:
        return f"{count / 1e3:.0f} kB"
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def memory_size(count: int) -> str:
    """
    Write bytes of memory for people, in powers of two as GPUs have them.

    >>> memory_size(13_000_000), memory_size(80 * 2**30)
    ('12.4 MiB', '80.0 GiB')
    """
    if count < 2**30:
        return f"{count / 2**20:.1f} MiB"
    return f"{count / 2**30:,.1f} GiB"


def install(extra: str) -> str:
    """
    Say how an extra of this package is installed, which no index of packages holds yet.

    >>> install("eval")
    "pip install '.[eval]' in the folder of nm-permute-plugin's repository"
    """
    return f"pip install '.[{extra}]' in the folder of nm-permute-plugin's repository"
