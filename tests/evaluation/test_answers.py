# SPDX-License-Identifier: Apache-2.0
"""What the assistant says in a conversation is found in templates of many forms."""

from pathlib import Path

import pytest
from helpers import give_template

from nm_permute_plugin.evaluation.answers import answer_marks
from nm_permute_plugin.evaluation.records import Document
from nm_permute_plugin.evaluation.text import TextTokenizer

# w01 and w02 are the tokenizer's beginning and end of a text, special tokens both.
PLAIN = (
    "{% for m in messages %}{{ 'w10 ' if m.role == 'user' else 'w11 ' }}"
    "{{ m.content }} w02 {% endfor %}{% if add_generation_prompt %}w11 {% endif %}"
)
SYSTEM = "w12 w13 w02 " + PLAIN
MARKED = (
    "{% for m in messages %}{% if m.role == 'user' %}w10 {{ m.content }} w02 {% else %}"
    "w11 {% generation %}{{ m.content }} w02{% endgeneration %} {% endif %}{% endfor %}"
)
# Earlier turns lose their reasoning, and the last one has a place for it.
REASONS = (
    "{% for m in messages %}{% if m.role == 'user' %}w10 {{ m.content }} w02 {% else %}"
    "w11 {% if loop.last %}w14 w15 {% endif %}{{ m.content.split('</think>')[-1] }} w02 "
    "{% endif %}{% endfor %}{% if add_generation_prompt %}w11 {% endif %}"
)
# The prompt goes on where turns of the past do not.
THINKS = PLAIN.replace("%}w11 {% endif", "%}w11 w14 {% endif")
# transformers finds no token where this block begins.
BLANK = MARKED.replace("{% generation %}", "{% generation %} ")
NO_PROMPT = PLAIN.replace("{% if add_generation_prompt %}w11 {% endif %}", "")


def conversation(*turns: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": said} for i, said in enumerate(turns)]


def answers(folder: Path, messages: list[dict[str, str]]) -> str:
    text = TextTokenizer(folder)
    ids = text.tokenizer.apply_chat_template(messages, return_dict=False)
    marks = answer_marks(text.tokenizer, Document("chat.jsonl line 3", messages), ids)
    assert len(marks) == len(ids)
    kept = [token for token, mark in zip(ids, marks, strict=True) if mark]
    return " ".join(text.tokenizer.convert_ids_to_tokens(kept))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (PLAIN, "w30 w31 w02 w33 w02"),
        (SYSTEM, "w30 w31 w02 w33 w02"),
        (MARKED, "w30 w31 w02 w33 w02"),
        (REASONS, "w30 w31 w02 w14 w15 w33 w02"),
        (BLANK, "w11 w30 w31 w02 w11 w33 w02"),
        (THINKS, "w30 w31 w02 w33 w02"),
        # Without a prompt, what says whose turn it is counts too.
        (NO_PROMPT, "w11 w30 w31 w02 w11 w33 w02"),
    ],
    ids=["plain", "system", "marked", "reasons", "blank", "thinks", "no prompt"],
)
def test_turns_of_the_assistant_are_found(
    template: str, expected: str, tiny_checkpoint
) -> None:
    folder = tiny_checkpoint()
    give_template(folder, template)
    assert answers(folder, conversation("w20", "w30 w31", "w22", "w33")) == expected


def test_words_that_are_said_before_are_no_answer(tiny_checkpoint) -> None:
    folder = tiny_checkpoint()
    give_template(folder, REASONS)
    said = conversation("w30 w31", "w30 w31", "w30 w31", "w30 w31")
    assert answers(folder, said) == "w30 w31 w02 w14 w15 w30 w31 w02"


def test_reasoning_that_a_template_leaves_out_is_no_answer(tiny_checkpoint) -> None:
    folder = tiny_checkpoint()
    give_template(folder, REASONS)
    said = conversation("w20", "<think> w40 </think>w30", "w22", "w33")
    assert answers(folder, said) == "w30 w02 w14 w15 w33 w02"


@pytest.mark.parametrize("template", [PLAIN, SYSTEM, MARKED])
def test_the_assistant_may_begin(template: str, tiny_checkpoint) -> None:
    folder = tiny_checkpoint()
    give_template(folder, template)
    said = conversation("w20", "w30", "w21", "w31")[1:]
    assert answers(folder, said) == "w30 w02 w31 w02"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (
            REASONS.replace("m.content.split('</think>')[-1]", "'w41 ' ~ m.content"),
            "message 1 is not there word for word",
        ),
        ("{{ messages | length }} " + PLAIN, "message 1 changes those before it"),
        (
            "{% if messages | length < 3 %}{{ raise_exception('more') }}{% endif %}"
            + PLAIN,
            "it does not take the first 1 messages alone: more",
        ),
    ],
)
def test_what_cannot_be_told_is_refused_by_name(
    template: str, why: str, tiny_checkpoint
) -> None:
    folder = tiny_checkpoint()
    give_template(folder, template)
    said = conversation("w20", "w30 w31", "w22", "w33")
    with pytest.raises(ValueError, match=rf"chat.jsonl line 3: the .* \({why}\): give"):
        answers(folder, said)
