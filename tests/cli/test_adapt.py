# SPDX-License-Identifier: Apache-2.0
"""A LoRA adapter of the base does the same on the folded model, or is refused by name."""

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from commands import assert_one_error, listing, nm_permute
from loguru import logger
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import nm_permute_plugin as nmp
from nm_permute_plugin.checkpoint.record import composed, write_record
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.specs.architectures import head_dim_of
from nm_permute_plugin.specs.spec import resolve

sys.path.insert(0, str(Path(__file__).parents[1] / "specs"))
from zoo import ZOO, tiny

EXACT = 1e-5
"""Largest difference of two logits in float32, relative to the largest of all."""

MODELS = {entry.id: entry.values for entry in ZOO}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PACKED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
TOKENS = torch.randint(48, (3, 12), generator=torch.Generator().manual_seed(5))

CASES = [
    pytest.param("llama-gqa", {"target_modules": LINEARS}, id="llama"),
    pytest.param(
        "llama-mqa",
        {
            "target_modules": "all-linear",
            "rank_pattern": {"down_proj": 2, r"layers\.1\..*v_proj": 6},
            "alpha_pattern": {"v_proj": 3},
            "use_rslora": True,
            "lora_bias": True,
        },
        id="patterns of ranks",
    ),
    pytest.param(
        "qwen2-gqa", {"target_modules": LINEARS, "bias": "all"}, id="trained biases"
    ),
    pytest.param(
        "llamaforsequenceclassification",
        {"target_modules": LINEARS, "bias": "lora_only", "task_type": "SEQ_CLS"},
        id="labels and biases",
    ),
    pytest.param(
        "gemma2-gqa", {"target_modules": LINEARS, "use_dora": True}, id="dora"
    ),
    pytest.param(
        "llama-gqa",
        {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True},
        id="dora of embeddings",
    ),
    pytest.param(
        "llama-gqa",
        {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
        id="head",
    ),
    pytest.param("llama-mha-tied", {"target_modules": ["embed_tokens"]}, id="tied"),
    pytest.param(
        "qwen3-gqa",
        {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        id="modules to save",
    ),
    pytest.param(
        "qwen3-gqa",
        {"target_modules": ["v_proj"], "modules_to_save": ["norm", "mlp"]},
        id="norms to save",
    ),
    pytest.param(
        "mistral-gqa",
        {"target_modules": ["v_proj"], "trainable_token_indices": [1, 5]},
        id="trained tokens",
    ),
    pytest.param(
        "phi3-gqa",
        {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]},
        id="fused",
    ),
    pytest.param(
        "gpt2-tied",
        {"target_modules": ["c_attn", "c_fc", "c_proj", "wpe"], "fan_in_fan_out": True},
        id="conv1d",
    ),
    pytest.param(
        "qwen3moe-gqa",
        {"target_modules": ["v_proj"], "target_parameters": PACKED},
        id="experts",
    ),
    pytest.param(
        "mixtral-gqa",
        {"target_modules": ["o_proj"], "target_parameters": [*PACKED, "gate.weight"]},
        id="experts and router",
    ),
]


def fold(model: PreTrainedModel, legal_perms, out: Path, seed: int = 0) -> dict:
    """Folds random permutations into a model, and saves it with its record."""
    head_dim = head_dim_of(model.config)
    resolved = resolve(model, nmp.spec_of(model), NMPattern(2, 4), [], head_dim)
    perms = legal_perms(resolved, seed)
    nmp.fold(model, resolved, perms)
    model.save_pretrained(out)
    write_record(out, perms, {"base_model": "dense", "modifier": {}})
    return perms


def load(folder: Path, name: str) -> PreTrainedModel:
    kind = getattr(transformers, name)
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits_of(model: PreTrainedModel, adapter: Path | None) -> Tensor:
    """The logits of a model with an adapter, its own where there is none."""
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    return model(input_ids=TOKENS).logits


def make_adapter(model: PreTrainedModel, config: PeftConfig, out: Path) -> Path:
    """An adapter of random values, which changes what the model says."""
    torch.manual_seed(1)
    made = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.requires_grad and "magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            elif parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    made.save_pretrained(str(out))
    return out


@pytest.fixture
def ready(tiny_checkpoint, legal_perms, tmp_path: Path) -> Path:
    """An adapter and a folded checkpoint of one tiny Llama lie there."""
    dense = tiny_checkpoint()
    fold(load(dense, "LlamaForCausalLM"), legal_perms, tmp_path / "folded")
    config = LoraConfig(target_modules=["v_proj", "down_proj"], r=4)
    make_adapter(load(dense, "LlamaForCausalLM"), config, tmp_path / "adapter")
    return tmp_path


def adapt(ready: Path):
    return nm_permute("adapt", *(ready / name for name in ("adapter", "folded", "out")))


@pytest.mark.parametrize(("case", "options"), CASES)
def test_an_adapted_adapter_does_the_same(
    legal_perms, tmp_path: Path, case: str, options: dict
) -> None:
    name, *rest = MODELS[case]
    dense, folded = tmp_path / "dense", tmp_path / "folded"
    tiny(name, *rest, torch.float32).save_pretrained(dense)
    fold(load(dense, name), legal_perms, folded)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, **options})
    adapter = make_adapter(load(dense, name), config, tmp_path / "adapter")
    (adapter / "notes.txt").write_text("mine")

    result = nm_permute("adapt", adapter, folded, tmp_path / "out")
    assert result.exit_code == 0, result.output

    plain = logits_of(load(dense, name), None)
    right = logits_of(load(dense, name), adapter)
    scale = right.abs().max()
    adapted = logits_of(load(folded, name), tmp_path / "out")
    assert (adapted - right).abs().max() / scale < EXACT
    # The adapter matters, and would be wrong as it is.
    assert (plain - right).abs().max() / scale > 0.01
    wrong = logits_of(load(folded, name), adapter)
    assert (wrong - right).abs().max() / scale > 0.01
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folded)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_an_adapter_of_an_earlier_fold_is_carried_from_there(
    tiny_checkpoint, legal_perms, tmp_path: Path
) -> None:
    name = "LlamaForCausalLM"
    once, twice = tmp_path / "once", tmp_path / "twice"
    first = fold(load(tiny_checkpoint(), name), legal_perms, once)
    second = fold(load(once, name), legal_perms, twice, seed=1)
    told = {"base_model": "dense"}
    write_record(twice, *composed(first, told, second, told))
    config = LoraConfig(target_modules=LINEARS, r=4)
    adapter = make_adapter(load(once, name), config, tmp_path / "adapter")
    result = nm_permute("adapt", adapter, twice, tmp_path / "out")
    assert result.exit_code == 0, result.output
    right = logits_of(load(once, name), adapter)
    adapted = logits_of(load(twice, name), tmp_path / "out")
    assert (adapted - right).abs().max() / right.abs().max() < EXACT


def test_a_sparse_checkpoint_takes_an_adapter(
    tiny_checkpoint, run_oneshot, tmp_path: Path
) -> None:
    """The checkpoint need not be dense, nor the record come from a test."""
    from helpers import ours

    dense = tiny_checkpoint()
    recipe = ours(method="search", search={"rounds": 2})
    run_oneshot(dense, recipe, tmp_path / "folded")
    config = LoraConfig(target_modules=LINEARS, r=4)
    make_adapter(load(dense, "LlamaForCausalLM"), config, tmp_path / "adapter")
    result = adapt(tmp_path)
    assert result.exit_code == 0, result.output
    model = load(tmp_path / "folded", "LlamaForCausalLM")
    PeftModel.from_pretrained(model, str(tmp_path / "out"))


def change_config(ready: Path, **values: object) -> None:
    path = ready / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(ready: Path, **values: Tensor) -> None:
    path = ready / "adapter" / "adapter_model.safetensors"
    added = {name.replace("__", "."): value for name, value in values.items()}
    save_file(load_file(path) | added, path)


BAD = {
    "no adapter": (
        lambda ready: (ready / "adapter" / "adapter_config.json").unlink(),
        r"adapter holds no LoRA adapter of PEFT \(no adapter_config\.json\)",
    ),
    "pickled": (
        lambda ready: (ready / "adapter" / "adapter_model.safetensors").rename(
            ready / "adapter" / "adapter_model.bin"
        ),
        r"no adapter_model\.safetensors\); save it by PEFT's save_pretrained",
    ),
    "damaged": (
        lambda ready: (ready / "adapter" / "adapter_model.safetensors").write_text("?"),
        r"adapter_model\.safetensors: is cut off",
    ),
    "damaged config": (
        lambda ready: (ready / "adapter" / "adapter_config.json").write_text("{"),
        r"adapter_config\.json is no JSON",
    ),
    "another kind": (
        lambda ready: change_config(ready, peft_type="IA3"),
        r"peft_type 'IA3' is no LORA, which cannot be carried over",
    ),
    "changes the base": (
        lambda ready: change_config(ready, init_lora_weights="pissa_niter_4"),
        r"init_lora_weights 'pissa_niter_4' changes the base's weights",
    ),
    "layers replicated": (
        lambda ready: change_config(ready, layer_replication=[[0, 2], [1, 2]]),
        r"layer_replication gives layers other numbers",
    ),
    "groups": (
        lambda ready: change_config(ready, use_qalora=True),
        r"use_qalora takes groups of channels together",
    ),
    "another layer": (
        lambda ready: change_weights(
            ready,
            base_model__model__model__layers__7__mlp__up_proj__lora_A__weight=(
                torch.ones(4, 32)
            ),
        ),
        r"layers\.7\.mlp\.up_proj\.lora_A\.weight belongs to no weight of LlamaForCausal",
    ),
    "another width": (
        lambda ready: change_weights(
            ready,
            base_model__model__model__layers__0__mlp__down_proj__lora_A__weight=(
                torch.ones(4, 64)
            ),
        ),
        r"down_proj\.lora_A\.weight has shape \[4, 64\], and the checkpoint has \[48\] ch",
    ),
    "an unknown tensor": (
        lambda ready: change_weights(
            ready,
            base_model__model__model__layers__0__mlp__down_proj__lora_diag=torch.ones(
                4
            ),
        ),
        r"down_proj\.lora_diag belongs to no weight",
    ),
    "no record": (
        lambda ready: [
            *(file.unlink() for file in (ready / "folded" / "nm_permute").iterdir()),
            (ready / "folded" / "nm_permute").rmdir(),
        ],
        r"folded has no record of a fold \(nm_permute/permutations\.safetensors\); name",
    ),
    "half a record": (
        lambda ready: (ready / "folded" / "nm_permute" / "report.json").unlink(),
        r"folded/nm_permute is no whole record of a run",
    ),
    "no checkpoint": (
        lambda ready: (ready / "folded" / "config.json").unlink(),
        r"folded holds no checkpoint \(no config\.json\)",
    ),
    "an occupied place": (
        lambda ready: (
            (ready / "out").mkdir(),
            (ready / "out" / "mine.txt").write_text("mine"),
        ),
        r"out exists and is not an empty folder",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(ready: Path, case: str) -> None:
    damage, said = BAD[case]
    damage(ready)
    before = listing(ready)
    assert_one_error(adapt(ready), said)
    assert listing(ready) == before


@pytest.mark.parametrize("identities", [False, True])
def test_an_adapter_of_what_did_not_move_is_copied(
    ready: Path, identities: bool
) -> None:
    perms = load_file(ready / "folded" / "nm_permute" / "permutations.safetensors")
    still = {name: torch.arange(len(perm)) for name, perm in perms.items()}
    write_record(ready / "folded", still if identities else {}, {})
    result = adapt(ready)
    assert result.exit_code == 0, result.output
    assert "which fits" in result.stdout
    assert "as it is; next: PeftModel" in result.stdout
    old, new = (
        load_file(ready / x / "adapter_model.safetensors") for x in ("adapter", "out")
    )
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    config = json.loads((ready / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(ready / "folded")


def test_an_adapter_of_another_kind_is_refused_as_peft_wrote_it(
    ready: Path, tiny_checkpoint
) -> None:
    model = load(ready / "dense", "LlamaForCausalLM")
    config = IA3Config(target_modules=["v_proj"], feedforward_modules=[])
    for file in (ready / "adapter").iterdir():
        file.unlink()
    make_adapter(model, config, ready / "adapter")
    assert_one_error(adapt(ready), "peft_type 'IA3' is no LORA")


def test_an_adapter_of_another_base_is_told(ready: Path) -> None:
    told: list[str] = []
    change_config(ready, base_model_name_or_path="some/other")
    sink = logger.add(told.append, format="{message}")
    assert adapt(ready).exit_code == 0
    logger.remove(sink)
    assert "was made for some/other, and" in "".join(told)
