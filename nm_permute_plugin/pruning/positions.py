# SPDX-License-Identifier: Apache-2.0
"""How many tokens a row may have: the positions that a model knows."""

from dataclasses import dataclass
from typing import Any

from loguru import logger


@dataclass(frozen=True)
class Positions:
    """
    How many positions a model knows.

    :param count: the longest row in tokens
    :param learned: whether each position has a learned embedding, so that a longer row
        cannot be read; rotary positions go on beyond ``count``, where no model was trained
    """

    count: int
    learned: bool


def positions_of(config: Any) -> Positions | None:
    """
    What a transformers config says of the positions of text; None if it says nothing.

    >>> from transformers import GPT2Config, LlamaConfig, RobertaConfig
    >>> positions_of(GPT2Config(n_positions=512))
    Positions(count=512, learned=True)
    >>> positions_of(LlamaConfig(max_position_embeddings=2048))
    Positions(count=2048, learned=False)
    >>> positions_of(RobertaConfig(max_position_embeddings=514))
    Positions(count=512, learned=True)
    """
    text = config.get_text_config()
    count = getattr(text, "max_position_embeddings", None)
    if not isinstance(count, int) or count < 1:
        return None
    if getattr(text, "rope_parameters", None):
        return Positions(count, learned=False)
    if "roberta" in text.model_type or text.model_type == "camembert":
        count -= text.pad_token_id + 1  # the table's first rows belong to padding
    return Positions(count, learned=True)


def fit_length(config: Any, asked: int | None, default: int, option: str) -> int:
    """
    The length of rows: as asked for, or the default, which the model's positions limit.

    :param asked: in tokens; None for the default
    :param option: what asks for another length
    :raises ValueError: if the model has fewer learned positions than was asked for
    """
    positions = positions_of(config)
    if asked is None:
        return default if positions is None else min(default, positions.count)
    check_length(config, asked, f"give {option} {{count}} or less")
    return asked


def check_length(config: Any, length: int, remedy: str) -> None:
    """
    Refuse rows that a model with learned positions cannot read; warn where it can.

    :param length: of the longest row, in tokens
    :param remedy: what to do, with ``{count}`` in place of the model's positions
    :raises ValueError: if the model has fewer learned positions
    """
    positions = positions_of(config)
    if positions is None or length <= positions.count:
        return
    has = f"the model ({config.model_type}) has {positions.count}"
    advice = remedy.format(count=positions.count)
    if positions.learned:
        raise ValueError(
            f"{has} learned positions and cannot read rows of {length} tokens: {advice}"
        )
    logger.warning(
        f"{has} positions, and rows of {length} tokens go beyond what it was trained on; "
        f"{advice} to stay inside"
    )
