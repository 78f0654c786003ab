# SPDX-License-Identifier: Apache-2.0
"""What is certain to fail is refused before the model is run, all of it at once."""

from pathlib import Path

import pytest
import torch
from helpers import modifier, ours, quantize, wanda
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from nm_permute_plugin.checkpoint.verify import verify

FAST = {"method": "search", "search": {"rounds": 2}}
STAGE = "prune_stage:\n"
OURS = ours(**FAST)
SPIN = modifier("rotation", "SpinQuantModifier", rotations=["R1", "R2"])
ONLINE = modifier("rotation", "SpinQuantModifier", rotations=["R4"])
QUIP = modifier("rotation", "QuIPModifier", ignore=["lm_head"])
SPARSEGPT = wanda().replace("WandaPruning", "SparseGPT")
GPTQ = quantize("W8A8", "GPTQModifier")
MAGNITUDE = modifier(
    "magnitude",
    "MagnitudePruningModifier",
    targets=["re:.*proj.weight"],
    init_sparsity=0.5,
    final_sparsity=0.5,
    start=0.0,
    end=1.0,
)
SMOOTH = modifier("smoothing", "SmoothQuantModifier", smoothing_strength=0.5)
CONSTANT = modifier(
    "constant", "ConstantPruningModifier", targets=["re:.*proj.weight"], start=0.0
)
ROTATES = "mixes the channels that are permuted and pruned.*leave it out"


def before(*groups: str) -> str:
    """A recipe where the groups stand before our modifier."""
    return STAGE + "".join(groups) + OURS.removeprefix(STAGE)


def two_of_ours() -> str:
    return OURS + OURS.removeprefix(STAGE).replace("permutation_m", "second_m")


def grouped(size: int) -> str:
    weights = {"num_bits": 4, "strategy": "group", "group_size": size}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    fields = {"config_groups": groups, "ignore": ["lm_head"]}
    return modifier("quantization", "QuantizationModifier", **fields)


REFUSED = {
    "groups wider than the inputs": (
        OURS + quantize("W4A16"),
        r"groups of 128 weights, which the 32 input channels of model\.layers\.0\.self_"
        r"attn\.q_proj \(and \d+ more\)",
    ),
    "a class that the model does not have": (
        OURS + quantize("FP8_DYNAMIC", targets=["FalconLinear"]),
        "targets FalconLinear means no linear .* are of class Linear; name that class",
    ),
    "groups that leave a rest": (OURS + grouped(24), "groups of 24 weights"),
    "GPTQ before": (before(GPTQ), "GPTQModifier before .*: put it after"),
    "GPTQ in an order that is gone": (
        OURS + quantize("W8A8", "GPTQModifier", actorder="group"),
        "GPTQModifier after .* by actorder: group, .* any more: write actorder: static",
    ),
    "quantization before": (before(quantize("W8A8")), "before .*: put it after"),
    "SpinQuant before": (before(SPIN), f"SpinQuantModifier before .*{ROTATES}"),
    "SpinQuant after": (OURS + SPIN, f"SpinQuantModifier after .*{ROTATES}"),
    "an online rotation": (before(ONLINE), f"SpinQuantModifier before .*{ROTATES}"),
    "QuIP before": (before(QUIP), f"QuIPModifier before .*{ROTATES}"),
    "QuIP after": (OURS + QUIP, f"QuIPModifier after .*{ROTATES}"),
    "two of ours": (two_of_ours(), "names LearnablePermutationModifier 2 times"),
    "Wanda before": (before(wanda()), "WandaPruningModifier before .*prune: false"),
    "SparseGPT before": (before(SPARSEGPT), "SparseGPTModifier before .*prune: false"),
    "magnitude before": (before(MAGNITUDE), "MagnitudePruningModifier before"),
    "magnitude after": (OURS + MAGNITUDE, "MagnitudePruningModifier after"),
    "another pattern after": (
        ours(prune=False, **FAST) + wanda(mask_structure="4:8"),
        "WandaPruningModifier after .* prunes '4:8'.*'2:4': give both the same",
    ),
    "a width that M does not divide": (
        ours(mask_structure="2:5", **FAST),
        "of 32 input channels, which M=5 of mask_structure 2:5 does not divide",
    ),
    "a batch larger than the text": (
        ours(batch_size=12),
        r"batch_size: 12 is more than the 11 rows to train on \(12 rows, of which "
        r"validation takes 1\).*batch_size: 11",
    ),
}


@pytest.fixture
def never_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is run fails the test: the refusal must come before."""

    def run(*arguments: object, **options: object) -> None:
        raise AssertionError("the model was run")

    monkeypatch.setattr("transformers.LlamaModel.forward", run)


@pytest.mark.parametrize(("recipe", "message"), REFUSED.values(), ids=REFUSED)
def test_a_recipe_that_must_fail_is_refused_before_the_model_is_run(
    tiny_checkpoint, run_oneshot, never_run, tmp_path: Path, recipe: str, message: str
) -> None:
    folder = tiny_checkpoint()
    with pytest.raises(ValueError, match=message) as caught:
        run_oneshot(folder, recipe, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize(
    "recipe",
    [
        before(SMOOTH),
        OURS + CONSTANT,
        OURS + grouped(16),
        ours(prune=False, **FAST) + GPTQ,
        ours(prune=False, **FAST) + wanda() + GPTQ,
        ours(batch_size=12, **FAST),
    ],
    ids=[
        "smoothing",
        "constant",
        "groups that fit",
        "GPTQ alone",
        "GPTQ after Wanda",
        "batch of search",
    ],
)
def test_what_works_is_not_refused(
    tiny_checkpoint, run_oneshot, tmp_path: Path, recipe: str
) -> None:
    run_oneshot(tiny_checkpoint(), recipe, tmp_path / "out")
    assert verify(tmp_path / "out").good


def test_all_findings_are_told_in_one_refusal(
    tiny_checkpoint, run_oneshot, never_run
) -> None:
    folder = tiny_checkpoint()
    recipe = ours(batch_size=99) + SPIN + quantize("W4A16")
    with pytest.raises(ValueError, match="^4 things would make this run fail:\n") as e:
        run_oneshot(folder, recipe, folder / "sparse")
    words = ["SpinQuantModifier", "groups of 128", "batch_size: 99", "lies inside of"]
    lines = str(e.value).splitlines()[1:]
    assert len(lines) == 4
    assert all(word in line for word, line in zip(words, lines, strict=True))
    assert not (folder / "sparse").exists()


@pytest.mark.parametrize("kind", ["QuantizationModifier", "GPTQModifier"])
def test_quantization_of_what_the_host_does_not_quantize_is_refused(
    tiny_checkpoint, run_oneshot, tmp_path: Path, kind: str
) -> None:
    folder, tokenizer = (
        tmp_path / "gpt2",
        AutoTokenizer.from_pretrained(tiny_checkpoint()),
    )
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(vocab_size=64, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    recipe = ours(targets=["Conv1D"], **FAST) + quantize(
        "W8A8", kind, targets=["Conv1D"]
    )
    with pytest.raises(
        ValueError, match=f"^{kind} .* would quantize nothing: .* Conv1D"
    ):
        run_oneshot(folder, recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_folder_of_the_model_is_no_place_for_the_result(
    tiny_checkpoint, run_oneshot, never_run
) -> None:
    folder = tiny_checkpoint()
    weights = (folder / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="is the folder of the dense model"):
        run_oneshot(folder, OURS, folder)
    assert (folder / "model.safetensors").read_bytes() == weights


def test_a_folder_below_a_file_is_refused(
    tiny_checkpoint, run_oneshot, never_run, tmp_path: Path
) -> None:
    folder = tiny_checkpoint()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write to .*file is no folder"):
        run_oneshot(folder, OURS, tmp_path / "file" / "out")


def test_inference_mode_is_refused_where_something_is_learned(
    tiny_checkpoint, run_oneshot, never_run
) -> None:
    folder = tiny_checkpoint()
    with (
        torch.inference_mode(),
        pytest.raises(ValueError, match=r"needs gradients.*inference_mode"),
    ):
        run_oneshot(folder, ours(learn={"steps": 2}))


def test_other_processes_are_refused(
    tiny_checkpoint, run_oneshot, never_run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes.*without torchrun"):
        run_oneshot(tiny_checkpoint(), OURS)


def test_experts_that_another_modifier_removes_are_refused(
    run_oneshot, tiny_checkpoint, tmp_path: Path
) -> None:
    folder = _mixture(tmp_path / "moe", tiny_checkpoint())
    reap = modifier("experts", "REAPPruningModifier", sparsity=0.5)
    for recipe, where in ((before(reap), "before"), (OURS + reap, "after")):
        with pytest.raises(ValueError, match=f"REAPPruningModifier {where} .*alone"):
            run_oneshot(folder, recipe, tmp_path / "out")
    run_oneshot(folder, STAGE + reap, tmp_path / "fewer")
    run_oneshot(tmp_path / "fewer", OURS, tmp_path / "out")
    assert verify(tmp_path / "out").good


def test_a_disk_that_is_too_small_is_refused(
    tiny_checkpoint, run_oneshot, never_run, tmp_path: Path, monkeypatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint())
    # a stand-in for a disk: mounting a small one needs root
    room = int(2 * _bytes(model))
    _give_room(monkeypatch, room - _bytes(model))
    with pytest.raises(
        ValueError, match=r"has .* free, and the checkpoint takes .* as "
    ):
        run_oneshot(tmp_path / "dense", OURS, tmp_path / "out")


def _bytes(model: PreTrainedModel) -> int:
    return sum(p.numel() * p.itemsize for p in model.parameters())


def _give_room(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    from shutil import _ntuple_diskusage

    usage = _ntuple_diskusage(1 << 40, (1 << 40) - free, free)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)


def _mixture(folder: Path, words: Path) -> Path:
    """A tiny Qwen3-MoE with the tokenizer of another folder."""
    from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2}
    config = Qwen3MoeConfig(vocab_size=48, **size, **heads, **experts)
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(words).save_pretrained(folder)
    return folder
