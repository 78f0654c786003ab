# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint's model is for, by the name of its class: words for its card."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Task:
    """
    What a model does.

    :param tag: the hub's word for it
    :param auto_class: what loads it in transformers
    :param pictures: whether it takes pictures alone: no text measures it, and vLLM does not
        serve it
    """

    tag: str
    auto_class: str
    pictures: bool = False


LANGUAGE = Task("text-generation", "AutoModelForCausalLM")
TASKS = {
    "ForCausalLM": LANGUAGE,
    "LMHeadModel": LANGUAGE,
    "ForConditionalGeneration": Task(
        "image-text-to-text", "AutoModelForImageTextToText"
    ),
    "ForImageClassification": Task(
        "image-classification", "AutoModelForImageClassification", pictures=True
    ),
    "ForSequenceClassification": Task(
        "text-classification", "AutoModelForSequenceClassification"
    ),
    "ForTokenClassification": Task(
        "token-classification", "AutoModelForTokenClassification"
    ),
}
"""By a part of the class's name."""


def task_of(config: Mapping[str, Any]) -> Task:
    """
    The task of a model.

    >>> task_of({"architectures": ["Dinov2Model"], "patch_size": 14}).tag
    'image-feature-extraction'

    :param config: the content of its config.json
    """
    name = (config.get("architectures") or [""])[0]
    for part, task in TASKS.items():
        if part in name:
            return task
    if "patch_size" in config:
        return Task("image-feature-extraction", "AutoModel", pictures=True)
    return Task("feature-extraction", "AutoModel") if name else LANGUAGE
