# SPDX-License-Identifier: Apache-2.0
"""The block in config.json is read strictly, and written without touching the rest."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from nm_permute_plugin.checkpoint.config import (
    SparsityConfig,
    quantization_format,
    read_sparsity_config,
    with_sparsity_config,
)
from nm_permute_plugin.checkpoint.legacy import legacy_config, legacy_tokenizer_config
from nm_permute_plugin.maths.pattern import NMPattern

FP8 = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {},
    "sparsity_config": {},
}
configs = st.builds(
    SparsityConfig,
    format=st.sampled_from(["dense", "sparse-24-bitmask", "sparse-bitmask"]),
    sparsity_structure=st.sampled_from(["2:4", "4:8", "unstructured"]),
    global_sparsity=st.floats(0, 1),
    targets=st.none() | st.lists(st.text()).map(tuple),
    ignore=st.lists(st.text()).map(tuple),
)


@given(configs, st.sampled_from([{}, {"quantization_config": FP8}]))
def test_what_is_written_is_read(config: SparsityConfig, rest: dict) -> None:
    whole = with_sparsity_config({"hidden_size": 4, **rest}, config)
    assert read_sparsity_config(whole) == config
    assert with_sparsity_config(whole, None) == {"hidden_size": 4, **rest}


def test_the_block_of_the_first_implementation_is_read() -> None:
    block = {
        "format": "sparse-24-bitmask",
        "global_sparsity": 0.35,
        "ignore": None,
        "registry_requires_subclass": False,
        "sparsity_structure": "2:4",
        "targets": ["Linear"],
    }
    config = read_sparsity_config({"compression_config": {"sparsity_config": block}})
    assert config is not None
    assert config.pattern == NMPattern(2, 4)
    assert config.to_json() == {**block, "ignore": []}


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"format": "marlin-24"}, "sparsity_config.format is 'marlin-24'"),
        ({"format": "dense", "axis": 0}, "sparsity_config.axis is 0"),
        ({"global_sparsity": 1.5}, "global_sparsity is 1.5"),
        ([1], "dict"),
    ],
)
def test_a_block_that_is_not_understood_is_refused(block, message) -> None:
    with pytest.raises(ValueError, match=message):
        read_sparsity_config({"quantization_config": {"sparsity_config": block}})


def test_the_config_is_a_value() -> None:
    with pytest.raises(ValidationError):
        SparsityConfig().format = "dense"


def test_a_promise_is_by_name_class_or_expression() -> None:
    config = SparsityConfig(targets=("re:.*down_proj$", "a.b"), ignore=("a.down_proj",))
    names = ["x.down_proj", "a.down_proj", "a.b", "a.b.c"]
    assert [config.promises(name) for name in names] == [True, False, True, False]
    assert SparsityConfig(targets=("Conv1D",)).promises("any", "Conv1D")
    assert SparsityConfig().promises("any")


def test_quantization_is_told_from_sparsity() -> None:
    sparse = with_sparsity_config({}, SparsityConfig())
    assert quantization_format(sparse) is None
    assert quantization_format({"quantization_config": FP8}) == "float-quantized"
    gptq = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    assert quantization_format(gptq) == "gptq"


def test_legacy_configs_say_what_transformers_4_reads() -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
    config = {"dtype": "bfloat16", "text_config": {"rope_parameters": rope}}
    assert legacy_config(config) == {
        "torch_dtype": "bfloat16",
        "text_config": {
            "rope_theta": 5e5,
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
        },
    }


def test_a_legacy_config_is_refused_where_it_would_be_wrong() -> None:
    rope = {"full_attention": {"rope_theta": 1e6}}
    with pytest.raises(NotImplementedError, match="full_attention"):
        legacy_config({"rope_parameters": rope})


def test_legacy_tokenizers_have_a_class_that_transformers_4_knows() -> None:
    new = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"]}
    assert legacy_tokenizer_config(new) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<a>"],
    }
    assert legacy_tokenizer_config({"tokenizer_class": "X"}) == {"tokenizer_class": "X"}
