# SPDX-License-Identifier: Apache-2.0
"""``nm-permute sample``: have a model write the text that ``--text`` takes."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from nm_permute_plugin.cli.common import Device, Model, find_device


def sample(
    model: Model,
    out: Annotated[Path, Argument(help="Text file to write, new.")],
    rows: Annotated[int, Option(min=1, help="Texts to write.")] = 768,
    tokens: Annotated[int, Option(min=1, help="Tokens of each text.")] = 1024,
    start: Annotated[
        str | None,
        Option(help="First token of a document; the tokenizer's if left out."),
    ] = None,
    seed: Annotated[int, Option(help="Seed of the random draws.")] = 0,
    batch_size: Annotated[int, Option(min=1, help="Texts at a time.")] = 128,
    device: Device = None,
) -> None:
    """Write text that the model itself generates, for the option --text of prune.

    It covers what the model knows, where there is little other text of many kinds.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists; give a new file")
    where = find_device(device)
    texts = sample_text(model, rows, tokens, start, seed, batch_size, where)
    out.write_text("\n\n".join(texts), encoding="utf-8")
    typer.echo(f"{out}: {rows} texts of {tokens} tokens")


def sample_text(
    model: str | Path,
    rows: int,
    tokens: int,
    start: str | None,
    seed: int,
    batch_size: int,
    device: str,
) -> list[str]:
    """
    Draw texts from a language model's own predictions, at temperature 1.

    Every text goes on until it is long enough; special tokens are never drawn.

    :param tokens: the length of each text
    :param start: the special token that begins a document; the tokenizer's beginning of
        text by default, or its end of text where it has none
    :param seed: the same one gives the same text on the same hardware
    :raises ValueError: for a start that is no single token, or for none at all
    """
    import torch
    from loguru import logger
    from tqdm import tqdm

    from nm_permute_plugin.evaluation.pretrained import (
        load_checkpoint,
        must_be_model,
        tokenizer_of,
    )

    must_be_model(model)
    tokenizer = tokenizer_of(model)
    first = _first_token(tokenizer, start)
    # Loosely typed: transformers' stubs do not know what a loaded model can do.
    loaded: Any = load_checkpoint(model, device)
    if not loaded.can_generate():
        raise ValueError(f"{type(loaded).__name__} predicts no next token of text")
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
            drawn = loaded.generate(beginning.to(device), **options)[:, 1:]
            texts += tokenizer.batch_decode(drawn, skip_special_tokens=True)
    logger.info(f"sampled {rows} texts of {tokens} tokens from {model}")
    return texts


def _first_token(tokenizer: Any, start: str | None) -> int:
    """Return the token that begins a document."""
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
