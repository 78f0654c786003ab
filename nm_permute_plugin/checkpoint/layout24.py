# SPDX-License-Identifier: Apache-2.0
"""List the dtypes that sparse formats store, and which two of four weights they keep."""

import torch

WORDS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float8_e4m3fn: torch.int8,
    torch.int8: torch.int8,
}
"""Lists the dtypes that can be stored, each with the integer dtype of the same width in
which its bits are moved: the codecs never look at values."""

STORED = (12, 5, 10, 3, 12, 5, 6, 0, 12, 9, 10, 0, 12, 0, 0, 0)
"""Maps the non-zeros of four weights (bit i: weight i) to the two that are stored. Where
fewer than two are not zero the choice is free; this is the one that the format's first
implementation made on CPUs, so that files agree byte for byte. 0 means: not 2:4."""

FIRST_TWO = 0x33
"""The byte of a bitmask that keeps the first two of every four weights."""
