# SPDX-License-Identifier: Apache-2.0
"""``nm-permute sample``: have a model write the text that ``--text`` takes."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from nm_permute_plugin.cli.common import Device, Model, find_device, must_be_device
from nm_permute_plugin.evaluation.model_names import must_be_model
from nm_permute_plugin.pruning.findings import together


def sample(
    model: Model,
    out: Annotated[Path, Argument(help="Text file to write, new.")],
    rows: Annotated[int, Option(min=1, help="Texts to write.")] = 768,
    tokens: Annotated[
        int | None,
        Option(min=1, help="Tokens of each text (1024, or the model's positions)."),
    ] = None,
    start: Annotated[
        str | None,
        Option(
            help="First token of a document; as the tokenizer begins a text if left out."
        ),
    ] = None,
    seed: Annotated[int, Option(help="Seed of the random draws.")] = 0,
    batch_size: Annotated[
        int | None,
        Option(min=1, help="Texts at a time (as many as fit; 128 on a CPU)."),
    ] = None,
    device: Device = None,
) -> None:
    """Write text that the model itself generates, for the option --text of prune.

    It covers what the model knows, where there is little other text of many kinds.
    """
    together(
        lambda: _must_be_new(out),
        lambda: must_be_model(model),
        lambda: must_be_device(device),
    )
    where = find_device(device)
    from nm_permute_plugin.evaluation.pretrained import row_length

    length = row_length(model, tokens, 1024, "--tokens")
    texts = sample_text(model, rows, length, start, seed, batch_size, where)
    out.write_text("\n\n".join(texts), encoding="utf-8")
    following = ["nm-permute", "prune", model, "RECIPE", "OUT", "--text", str(out)]
    typer.echo(f"{out}: {rows} texts of {length} tokens; next: {shlex.join(following)}")


def _must_be_new(file: Path) -> None:
    if file.exists():
        raise FileExistsError(f"{file} exists; give a new file")


def sample_text(
    model: str | Path,
    rows: int,
    tokens: int,
    start: str | None,
    seed: int,
    batch_size: int | None,
    device: str,
) -> list[str]:
    """
    Draw texts from a language model's own predictions, at temperature 1.

    Every text goes on until it is long enough; special tokens are never drawn.

    :param tokens: the length of each text
    :param start: the special token that begins a document. By default what the tokenizer
        puts before a text; its beginning of text, or its end, if it puts nothing there
    :param seed: the same one gives the same text on the same hardware
    :param batch_size: texts at a time; as many as fit if None
    :raises ValueError: for a start that is no single token, or for none at all
    """
    import torch
    from loguru import logger

    from nm_permute_plugin.evaluation.pretrained import load_checkpoint
    from nm_permute_plugin.evaluation.sampling import draw, texts_at_a_time
    from nm_permute_plugin.evaluation.text import TextTokenizer

    text = TextTokenizer(model)
    tokenizer = text.tokenizer
    first = text.begin if start is None and text.begin else [_first(tokenizer, start)]
    # Loosely typed: transformers' stubs do not know what a loaded model can do.
    loaded: Any = load_checkpoint(model, device)
    if not loaded.can_generate():
        raise ValueError(f"{type(loaded).__name__} predicts no next token of text")
    known = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    ends = loaded.generation_config.eos_token_id
    known |= set(ends if isinstance(ends, list) else [ends]) - {None}
    never = sorted(known | set(tokenizer.all_special_ids))
    size = batch_size or texts_at_a_time(loaded, len(first) + tokens)
    texts: list[str] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for begun in range(0, rows, size):
            drawn = draw(loaded, first, min(size, rows - begun), tokens, never)
            texts += tokenizer.batch_decode(drawn, skip_special_tokens=True)
    logger.info(f"sampled {rows} texts of {tokens} tokens from {model}")
    return texts


def _first(tokenizer: Any, start: str | None) -> int:
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
