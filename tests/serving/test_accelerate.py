# SPDX-License-Identifier: Apache-2.0
"""A model of transformers on sparse kernels; stand-ins multiply, as there is no card."""

import copy
import inspect
import pickle
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from accelerating import DTYPE, accelerated, bits, same
from peft import LoraConfig, get_peft_model
from stand_in_kernels import stand_in_kernels
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CompileConfig,
    PreTrainedModel,
)

import nm_permute_plugin as nmp
from nm_permute_plugin.serving.accelerated_linear import AcceleratedLinear
from nm_permute_plugin.serving.ops import TABLES


def generate(model: PreTrainedModel, tokens: Tensor, **options: object) -> list:
    fixed = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
    return model.generate(tokens, **fixed, **options).tolist()


@pytest.mark.parametrize("names", [("triton",), ("triton", "dense", "cusparselt")])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_it_says_what_the_dense_model_says(
    sparse_model, tokens: Tensor, architecture: str, names: tuple[str, ...]
) -> None:
    model = sparse_model(architecture)
    expected, logits = generate(model, tokens), model(tokens).logits
    with stand_in_kernels(*names):
        assert nmp.accelerate(model) is model
        assert accelerated(model) == 14
        assert generate(model, tokens) == expected
        found = model(tokens).logits
    # qwen2 has biases, which torch adds before it rounds
    bound = 0 if architecture == "llama" else 0.02
    assert (found - logits).abs().max() <= bound * logits.abs().max()


@pytest.mark.usefixtures("kernels")
def test_a_compiled_layer_says_the_same_in_one_graph(sparse_model) -> None:
    """Its packed weights are where CUDA graphs read them, as parameters are."""
    mlp = sparse_model(num_hidden_layers=1).model.layers[0].mlp
    x = torch.randn(3, 5, 32).to(DTYPE)
    torch.compiler.reset()
    # compiled before: it is noticed that layers are replaced
    compiled = torch.compile(mlp, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = mlp(x)
        assert torch.equal(compiled(x), expected)
        nmp.accelerate(compiled)
        assert accelerated(mlp) == 3
        assert torch.equal(compiled(x), expected)
        assert torch.equal(compiled(x[:2]), expected[:2])
        static = [hasattr(b, "_dynamo_static_input_type") for b in mlp.buffers()]
        assert static == [True] * 3
        nmp.accelerate(compiled, undo=True)
        assert torch.equal(compiled(x), expected)
    torch.compiler.reset()


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers without the tests' checks of types, which no graph holds."""
    for name in ("forward", "product"):
        plain = inspect.unwrap(getattr(AcceleratedLinear, name))
        monkeypatch.setattr(AcceleratedLinear, name, plain)


@pytest.mark.usefixtures("kernels", "unchecked")
def test_generate_compiles_the_static_cache(sparse_model, tokens: Tensor) -> None:
    model = sparse_model(num_hidden_layers=1)
    expected = generate(model, tokens)
    torch.compiler.reset()
    how = CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    how._compile_all_devices = True  # a CPU as well
    nmp.accelerate(model)
    with patch.object(torch._dynamo.config, "error_on_recompile", True):
        found = generate(
            model, tokens, cache_implementation="static", compile_config=how
        )
    assert found == expected
    torch.compiler.reset()


@pytest.mark.usefixtures("kernels")
def test_undo_gives_back_every_bit_and_every_parameter(
    sparse_model, lines: list[str]
) -> None:
    model = sparse_model("qwen2")
    before, parameters = bits(model), dict(model.named_parameters())
    nmp.accelerate(model)
    assert "14 of 15 linears run on sparse kernels" in lines[-1]
    assert "dense stay 1 (lm_head: a weight that is not 2:4)" in lines[-1]
    assert nmp.accelerate(model, undo=True) is model
    assert lines[-1] == "accelerate: 14 linears have their dense weights back"
    assert accelerated(model) == 0
    assert same(bits(model), before)
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert list(parameters) == [name for name, _ in model.named_parameters()]


@pytest.mark.usefixtures("kernels")
def test_no_dense_weight_stays_beside_the_packed_one(sparse_model) -> None:
    model = sparse_model()
    linear = model.model.layers[0].mlp.up_proj
    dense, storage = linear.weight.nbytes, linear.weight.untyped_storage()
    nmp.accelerate(model)
    held = [*linear.parameters(), *linear.buffers(), linear.emptied]
    assert sum(tensor.untyped_storage().nbytes() for tensor in held) == dense * 9 / 16
    assert storage.data_ptr() not in [t.untyped_storage().data_ptr() for t in held]


def test_more_copies_than_one_are_told_with_the_way_to_fewer(
    sparse_model, lines: list[str]
) -> None:
    model = sparse_model()
    with stand_in_kernels("triton", "cusparselt"):
        nmp.accelerate(model)
    assert "mode='memory' keeps one packed copy of each" in lines[-1]


@pytest.mark.usefixtures("kernels")
def test_twice_is_once(sparse_model, tokens: Tensor, lines: list[str]) -> None:
    model = sparse_model()
    expected = generate(model, tokens)
    nmp.accelerate(nmp.accelerate(model))
    assert "14 of 15 linears run on sparse kernels" in lines[-1]
    assert generate(model, tokens) == expected


@pytest.mark.usefixtures("kernels")
def test_it_saves_what_the_dense_model_saves(sparse_model, tmp_path) -> None:
    model = sparse_model()
    before = bits(model)
    model.save_pretrained(tmp_path / "dense")
    nmp.accelerate(model)
    assert same(bits(model), before)
    model.save_pretrained(tmp_path / "saved")
    nmp.save(model, tmp_path / "again")
    assert accelerated(model) == 14
    for name in ("saved", "again"):
        files = [tmp_path / x / "model.safetensors" for x in ("dense", name)]
        if name == "saved":
            assert files[0].read_bytes() == files[1].read_bytes()
        read = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=DTYPE)
        assert same(bits(read), before)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: m.to(torch.float32), "it was moved to cpu as torch.float32"),
        (lambda m: m.half(), "it was moved to cpu as torch.float16"),
        (lambda m: m.to("meta"), "it was moved to meta as torch.bfloat16"),
        (lambda m: m.load_state_dict(m.state_dict()), "weights were loaded into it"),
        (
            lambda m: [x.weight for x in m.modules() if isinstance(x, nn.Linear)],
            "its weight was asked for",
        ),
    ],
    ids=["float", "half", "moved", "loaded", "read"],
)
def test_what_takes_the_weights_makes_the_model_dense_again_and_says_so(
    sparse_model, lines: list[str], change: Callable[[nn.Module], object], why: str
) -> None:
    model, right = sparse_model(), sparse_model()
    nmp.accelerate(model)
    change(model)
    change(right)
    said = [line for line in lines if "is dense again" in line]
    assert len(said) == 1
    assert f"because {why}" in said[0]
    assert accelerated(model) == 0
    for name, parameter in right.named_parameters():
        found = model.get_parameter(name)
        assert (found.dtype, found.device) == (parameter.dtype, parameter.device)
        if not found.is_meta:
            assert torch.equal(found, parameter)


@pytest.mark.usefixtures("kernels")
def test_moving_to_where_it_is_changes_nothing(sparse_model, tokens: Tensor) -> None:
    model = sparse_model()
    expected = generate(model, tokens)
    nmp.accelerate(model).to("cpu").to(DTYPE).eval()
    assert accelerated(model) == 14
    assert generate(model, tokens) == expected


@pytest.mark.usefixtures("kernels")
def test_a_copy_is_a_model_of_its_own(sparse_model, tokens: Tensor) -> None:
    model = nmp.accelerate(sparse_model())
    other = copy.deepcopy(model)
    before = bits(model)
    nmp.accelerate(model, undo=True)
    model.model.layers[0].mlp.up_proj.weight.data.zero_()
    assert accelerated(other) == 14
    assert same(bits(other), before)


@pytest.mark.usefixtures("kernels")
def test_a_pickle_is_read_by_processes_that_have_measured_no_kernels(
    sparse_model, lines: list[str]
) -> None:
    model = nmp.accelerate(sparse_model())
    before, pickled = bits(model), pickle.dumps(model)
    assert accelerated(pickle.loads(pickled)) == 14  # noqa: S301
    TABLES.clear()  # as in another process
    read = pickle.loads(pickled)  # noqa: S301
    assert accelerated(read) == 0
    assert same(bits(read), before)
    assert "because it was pickled by another process" in lines[-1]


def lora(model: PreTrainedModel) -> nn.Module:
    """The model with a LoRA adapter that changes what it says."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"])
        wrapped = get_peft_model(model, config)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.3)
    return wrapped.eval()


@pytest.mark.usefixtures("kernels")
def test_adapters_run_beside_packed_weights_and_merge_into_dense_ones(
    sparse_model, tokens: Tensor
) -> None:
    right, model = lora(sparse_model()), lora(sparse_model())
    expected = right(tokens).logits
    nmp.accelerate(model)
    assert accelerated(model) == 14
    assert torch.equal(model(tokens).logits, expected)
    right, model = right.merge_and_unload(), model.merge_and_unload()
    assert accelerated(model) == 10  # q and up of two layers are not 2:4 any more
    assert same(bits(model), bits(right))


@pytest.mark.usefixtures("kernels")
def test_adapters_may_come_later(sparse_model, tokens: Tensor) -> None:
    expected = lora(sparse_model())(tokens).logits
    model = lora(nmp.accelerate(sparse_model()))
    assert torch.equal(model(tokens).logits, expected)
    nmp.accelerate(model)
    assert accelerated(model) == 14
    assert torch.equal(model(tokens).logits, expected)
