# SPDX-License-Identifier: Apache-2.0
"""Text that a model itself says: to calibrate and train on where there is little other."""

from pathlib import Path
from typing import Any

import torch
from loguru import logger
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nm_permute_plugin.evaluation.perplexity import load_checkpoint


def sample_text(
    checkpoint: Path,
    rows: int,
    tokens: int,
    start: str | None,
    seed: int,
    batch_size: int,
    device: str,
) -> list[str]:
    """
    Texts drawn from a language model's own predictions, at temperature 1.

    Every text goes on until it is long enough; special tokens are never drawn.

    :param tokens: of each text
    :param start: the special token that begins a document; the tokenizer's beginning of
        text by default, or its end of text where it has none
    :param seed: of the draws; the same one gives the same text on the same hardware
    :raises ValueError: for a start that is no single token, or for none at all
    """
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    first = _first_token(tokenizer, start)
    # Loosely typed: transformers' stubs do not know what a loaded model can do.
    model: Any = load_checkpoint(checkpoint, device)
    if not model.can_generate():
        raise ValueError(f"{type(model).__name__} predicts no next token of text")
    known = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    options = {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_new_tokens": tokens,
        "max_new_tokens": tokens,
        "suppress_tokens": sorted(known | set(tokenizer.all_special_ids)),
        "pad_token_id": first,
    }
    texts: list[str] = []
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for begun in tqdm(range(0, rows, batch_size), desc="Sampling text"):
            beginning = torch.full((min(batch_size, rows - begun), 1), first)
            drawn = model.generate(beginning.to(device), **options)[:, 1:]
            texts += tokenizer.batch_decode(drawn, skip_special_tokens=True)
    logger.info(f"sampled {rows} texts of {tokens} tokens from {checkpoint}")
    return texts


def _first_token(tokenizer: PreTrainedTokenizerBase, start: str | None) -> int:
    """The token that begins a document."""
    if start is not None:
        ids = tokenizer(start, add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise ValueError(
                f"--start {start!r} is {len(ids)} tokens of this tokenizer, not one; "
                f"special ones are {', '.join(tokenizer.all_special_tokens)}"
            )
        return int(ids[0])
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ValueError(
        "the tokenizer has no token that begins or ends a text: give --start"
    )
