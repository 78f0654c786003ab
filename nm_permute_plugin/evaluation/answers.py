# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a conversation the assistant says, its end of turn among them."""

import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from nm_permute_plugin.evaluation.records import Document

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""In a chat template: the block ``{% generation %}`` holds what the assistant says."""


def answer_marks(tokenizer: Any, document: Document, ids: Sequence[int]) -> list[bool]:
    """
    Mark the tokens of a conversation that the assistant says.

    A chat template that marks them itself is asked. Of any other, what comes between the
    conversation up to a turn, with the generation prompt, and the same with the turn is
    the assistant's; where a template writes earlier turns in another way, the words of the
    turn are looked for in its place.

    :param ids: the conversation as the chat template gives it
    :return: one for each token
    :raises ValueError: if they cannot be told from the others
    """
    if _marks_itself(tokenizer):
        found = tokenizer.apply_chat_template(
            document.content,
            tools=document.tools,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        # A block that begins with a blank between two tokens is lost there.
        if list(found["input_ids"]) == list(ids) and any(found["assistant_masks"]):
            return [bool(mark) for mark in found["assistant_masks"]]
    whole = _rendered(tokenizer, document, len(document.content))
    spans = list(_spans(tokenizer, document, whole))
    if not tokenizer.is_fast:
        raise ValueError(
            _cannot(document, "the tokenizer does not say where tokens are")
        )
    read = tokenizer(
        whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    if list(read["input_ids"]) != list(ids):
        raise ValueError(
            _cannot(document, "its text gives other tokens when it is read")
        )
    return [
        any(first <= start < last for first, last in spans) and end > start
        for start, end in read["offset_mapping"]
    ]


def _marks_itself(tokenizer: Any) -> bool:
    template = tokenizer.chat_template
    return isinstance(template, str) and bool(GENERATION.search(template))


def _spans(tokenizer: Any, document: Document, whole: str) -> Iterator[tuple[int, int]]:
    """Where in the rendered conversation the assistant's turns begin and end."""
    special = _special_tokens(tokenizer)
    for turn, message in enumerate(_messages(document)):
        if message["role"] != "assistant":
            continue
        content = str(message.get("content") or "")
        # What a template writes where it leaves out the reasoning of a turn of the past.
        said = [x.strip() for x in (content, content.rpartition("</think>")[2])]
        first = _begin_of_turn(tokenizer, document, turn, whole, said)
        after = _rendered(tokenizer, document, turn + 1)
        if whole.startswith(after):
            # The line break that many templates put behind the end of a turn is theirs.
            ended = after.rstrip()
            yield first, len(ended if ended.endswith(special) else after)
            continue
        start = _skip_blanks(whole, first)
        found = next((x for x in said if x and whole.startswith(x, start)), None)
        if found is None:
            raise ValueError(
                _cannot(document, f"message {turn} is not there word for word")
            )
        last = start + len(found)
        close = _skip_blanks(whole, last)
        end = next(
            (close + len(x) for x in special if whole.startswith(x, close)), last
        )
        yield first, end


def _begin_of_turn(
    tokenizer: Any, document: Document, turn: int, whole: str, said: list[str]
) -> int:
    """
    Where a turn begins behind its generation prompt.

    :param said: the words of the turn, with reasoning and without
    """
    place = -1
    if turn == 0:  # nothing comes before it that could be rendered
        place = next((whole.find(x) for x in said if x and x in whole), -1)
    else:
        before = _rendered(tokenizer, document, turn)
        prompt = _rendered(tokenizer, document, turn, add_generation_prompt=True)
        if whole.startswith(prompt):
            return len(prompt)
        # A generation prompt may go on where a turn of the past does not: "<think>".
        shared = _skip_blanks(whole, len(os.path.commonprefix([prompt, whole])))
        if whole.startswith(before):
            found = (whole.rfind(x, len(before), shared + len(x)) for x in said if x)
            place = max(found, default=-1)
    if place < 0:
        raise ValueError(_cannot(document, f"message {turn} changes those before it"))
    return place


def _skip_blanks(text: str, start: int) -> int:
    return len(text) - len(text[start:].lstrip())


def _messages(document: Document) -> list[dict[str, Any]]:
    assert isinstance(document.content, list)
    return document.content


def _special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The special tokens, long ones first: one may begin as another does."""
    added = tokenizer.added_tokens_decoder.values()
    names = {*tokenizer.all_special_tokens, *(str(x) for x in added if x.special)}
    return tuple(sorted(names, key=lambda name: (-len(name), name)))


def _rendered(tokenizer: Any, document: Document, turns: int, **options: bool) -> str:
    """The text that the chat template makes of the first messages."""
    try:
        rendered: str = tokenizer.apply_chat_template(
            _messages(document)[:turns], tools=document.tools, tokenize=False, **options
        )
    except Exception as error:  # of Jinja, or of the template's own
        said = " ".join(str(error).split())
        raise ValueError(
            _cannot(
                document, f"it does not take the first {turns} messages alone: {said}"
            )
        ) from error
    return rendered


def _cannot(document: Document, why: str) -> str:
    return (
        f"{document.where}: the assistant's tokens cannot be told from the others by this "
        f"chat template ({why}): give the tokenizer a template with {{% generation %}}, or "
        "leave out --answers-only"
    )
