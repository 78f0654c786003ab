# SPDX-License-Identifier: Apache-2.0
"""Write configs as transformers 4 and vLLM up to 0.18.1 read them."""

from collections.abc import Mapping

from nm_permute_plugin.checkpoint.config import Json

_TEXT_CONFIGS = ("text_config", "llm_config", "language_config")


def legacy_config(config: Mapping[str, object]) -> Json:
    """
    Translates a ``config.json`` of transformers 5 for transformers 4.

    Version 4 ignores ``rope_parameters`` and takes another base for its rotary
    embedding: the model would load and write nonsense.

    :raises NotImplementedError: where a model has rotary parameters by layer type

    >>> legacy_config({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    {'rope_theta': 500000.0, 'rope_scaling': None}
    """
    new = {k: v for k, v in config.items() if k not in ("rope_parameters", "dtype")}
    if "dtype" in config:
        new["torch_dtype"] = config["dtype"]
    rope = config.get("rope_parameters")
    if isinstance(rope, Mapping):
        if any(isinstance(value, Mapping) for value in rope.values()):
            raise NotImplementedError(
                f"config.json: rope_parameters by layer type ({', '.join(rope)}) have "
                "no common form in transformers 4. Convert without `legacy`."
            )
        scaling = dict(rope)
        for name in ("rope_theta", "partial_rotary_factor"):
            if name in scaling:
                new[name] = scaling.pop(name)
        kind = scaling.get("rope_type", "default")
        new["rope_scaling"] = None if kind == "default" else scaling
    for name in _TEXT_CONFIGS:
        part = new.get(name)
        if isinstance(part, Mapping):
            new[name] = legacy_config(part)
    return new


def legacy_tokenizer_config(config: Mapping[str, object]) -> Json:
    """
    Translates a ``tokenizer_config.json`` of transformers 5 for transformers 4.

    >>> legacy_tokenizer_config({"tokenizer_class": "TokenizersBackend"})
    {'tokenizer_class': 'PreTrainedTokenizerFast'}
    """
    new = dict(config)
    if new.get("tokenizer_class") == "TokenizersBackend":
        new["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = new.get("extra_special_tokens")
    if isinstance(extra, list):
        # version 4 wants names there, and has another key for tokens without one
        del new["extra_special_tokens"]
        new.setdefault("additional_special_tokens", extra)
    return new
