# SPDX-License-Identifier: Apache-2.0
"""From a folder through ``oneshot`` to a folder, judged by what is read back from disk."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import ours, quantize, wanda
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from nm_permute_plugin.maths.masks import nm_mask
from nm_permute_plugin.maths.pattern import NMPattern

pytestmark = pytest.mark.slow

LEARN = {"learn": {"steps": 3}, "validation": {"every": 1}}


def recipe(method: str = "search", pattern: str = "2:4", prune: bool = True) -> str:
    learn = LEARN if method == "learned" else {}
    fields = {"method": method, "mask_structure": pattern, "prune": prune}
    return ours(format="dense", **fields, **learn)


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def logits_of(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.usefixtures("newest_is_best")
@pytest.mark.parametrize("method", ["identity", "search", "learned"])
def test_every_method_leaves_two_of_four_on_disk(
    tiny_checkpoint, run_oneshot, assert_exactly, tokens, tmp_path: Path, method: str
) -> None:
    folder, out = tiny_checkpoint(), tmp_path / "out"
    model = run_oneshot(folder, recipe(method), out)
    reloaded = load(out)
    assert_exactly(reloaded)
    assert torch.equal(logits_of(reloaded, tokens), logits_of(model.eval(), tokens))
    dense, pruned = stored(folder), stored(out)
    assert set(dense) == set(pruned)
    moved = not torch.equal(dense["lm_head.weight"], pruned["lm_head.weight"])
    assert moved == (method != "identity")
    assert "LearnablePermutationModifier" in (out / "recipe.yaml").read_text()


@pytest.mark.usefixtures("newest_is_best")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_without_pruning_the_checkpoint_computes_the_same(
    tiny_checkpoint, run_oneshot, tokens, tmp_path: Path, architecture: str, tied: bool
) -> None:
    folder = tiny_checkpoint(architecture, tie_word_embeddings=tied)
    run_oneshot(folder, recipe(prune=False), tmp_path / "out")
    dense, ours = load(folder), load(tmp_path / "out")
    assert ours.config.tie_word_embeddings == tied
    torch.testing.assert_close(
        logits_of(ours, tokens), logits_of(dense, tokens), atol=1e-5, rtol=1e-5
    )
    before, after = dense.state_dict(), ours.state_dict()
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert [
        name for name in still if "q_norm" not in name and "k_norm" not in name
    ] == [name for name in still if name.endswith(("q_proj.bias", "k_proj.bias"))]
    same = [
        torch.equal(x.flatten().sort().values, after[name].flatten().sort().values)
        for name, x in before.items()
    ]
    assert all(same)


def test_a_pruning_modifier_of_the_host_may_follow(
    tiny_checkpoint, run_oneshot, assert_exactly, tmp_path: Path
) -> None:
    folder = tiny_checkpoint()
    run_oneshot(folder, recipe(prune=False) + wanda(), tmp_path / "out")
    assert_exactly(load(tmp_path / "out"))
    # The host pruned weights in our order, not in the one they came in.
    dense, pruned = stored(folder), stored(tmp_path / "out")
    head = "lm_head.weight"
    assert torch.equal(dense[head].sort().values, pruned[head].sort().values)
    assert not torch.equal(dense[head], pruned[head])


def test_four_of_eight_on_disk(
    tiny_checkpoint, run_oneshot, assert_exactly, tmp_path: Path
) -> None:
    run_oneshot(tiny_checkpoint(), recipe("learned", pattern="4:8"), tmp_path / "out")
    assert_exactly(load(tmp_path / "out"), "4:8")


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "W8A8"])
def test_quantization_afterwards_keeps_the_zeros(
    tiny_checkpoint, run_oneshot, tokens, tmp_path: Path, scheme: str
) -> None:
    folder = tiny_checkpoint()
    run_oneshot(folder, recipe("learned"), tmp_path / "sparse")
    both = recipe("learned") + quantize(scheme)
    run_oneshot(folder, both, tmp_path / "quantized")
    sparse, quantized = stored(tmp_path / "sparse"), stored(tmp_path / "quantized")
    names = [name for name in sparse if name.endswith("_proj.weight")]
    assert len(names) == 14
    for name in names:
        assert quantized[name].dtype in (torch.float8_e4m3fn, torch.int8)
        filled = (quantized[name].float() != 0) & (sparse[name] == 0)
        assert not bool(filled.any()), name
        # Quantized to 8 bits, nearly all kept weights stay apart from zero.
        assert float((quantized[name].float() != 0).float().mean()) > 0.45, name
    logits = logits_of(load(tmp_path / "quantized"), tokens)
    assert bool(logits.isfinite().all())
    dense = logits_of(load(tmp_path / "sparse"), tokens)
    assert float((logits - dense).norm() / dense.norm()) < 0.2


def test_the_saved_recipe_repeats_the_run(
    tiny_checkpoint, run_oneshot, tmp_path: Path
) -> None:
    folder = tiny_checkpoint()
    run_oneshot(folder, recipe("learned"), tmp_path / "first")
    run_oneshot(folder, str(tmp_path / "first" / "recipe.yaml"), tmp_path / "again")
    first, again = stored(tmp_path / "first"), stored(tmp_path / "again")
    assert [name for name in first if not torch.equal(first[name], again[name])] == []


def test_a_data_set_is_shuffled_by_the_seed(
    tiny_checkpoint, run_oneshot, chain_rows, tmp_path: Path
) -> None:
    folder, rows = tiny_checkpoint(), chain_rows(40, 32, seed=999).tolist()
    # The defaults of the host: 12 of 40 rows, drawn anew by every run.
    drawn = {"rows": rows, "shuffle_calibration_samples": True}
    drawn |= {"num_calibration_samples": 12}
    weights = []
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        fields = {"method": "search", "format": "dense", "seed": seed}
        run_oneshot(folder, ours(**fields), tmp_path / name, **drawn)
        weights.append(stored(tmp_path / name))
    first, again, other = weights
    assert [name for name in first if not torch.equal(first[name], again[name])] == []
    assert [name for name in first if not torch.equal(first[name], other[name])]


def test_only_the_tokens_of_a_loss_mask_count(
    tiny_checkpoint, run_oneshot, chain_rows, tmp_path: Path
) -> None:
    folder, ids = tiny_checkpoint(), chain_rows(24, 32, seed=999)
    late = (torch.arange(32) >= 16).long().expand(24, 32)
    runs = {"all": None, "ones": torch.ones_like(late), "late": late}
    for name, mask in runs.items():
        column = {} if mask is None else {"loss_mask": mask.tolist()}
        data = Dataset.from_dict({"input_ids": ids.tolist(), **column})
        options = {"dataset": data, "use_loss_mask": True}
        options |= {"num_calibration_samples": 24}
        run_oneshot(folder, recipe("identity"), tmp_path / name, **options)
    whole, ones, some = (stored(tmp_path / name) for name in runs)
    assert [name for name in whole if not torch.equal(whole[name], ones[name])] == []
    # By hand: Wanda's mask of the norms over the second halves of the rows.
    name = "model.layers.0.self_attn.q_proj"
    dense, inputs = load(folder), []
    dense.get_submodule(name).register_forward_pre_hook(
        lambda _, args: inputs.append(args[0])
    )
    logits_of(dense, ids)
    weight = stored(folder)[f"{name}.weight"]
    for saved, counted in ((whole, inputs[0]), (some, inputs[0][:, 16:])):
        # A tenth of the rows judges, and the seed says which.
        norms = counted.flatten(0, 1).norm(dim=0)
        kept = nm_mask(weight.abs() * norms, NMPattern(2, 4))
        agree = (kept == (saved[f"{name}.weight"] != 0)).float().mean()
        assert agree > 0.97
    changed = (whole[f"{name}.weight"] != 0) != (some[f"{name}.weight"] != 0)
    assert bool(changed.any())


def test_a_search_loses_less_than_the_order_as_it_is(
    trained_checkpoint: Path, run_oneshot, chain_rows, tmp_path: Path
) -> None:
    losses = {}
    for method in ("identity", "search"):
        out = tmp_path / method
        run_oneshot(trained_checkpoint, recipe(method), out)
        rows = chain_rows(20, 32, seed=4242)
        with torch.no_grad():
            losses[method] = float(load(out)(rows, labels=rows).loss)
    assert losses["search"] < losses["identity"]


def test_a_pruned_checkpoint_generates(
    tiny_checkpoint, run_oneshot, tmp_path: Path
) -> None:
    run_oneshot(tiny_checkpoint(), recipe(), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer("w03 w07 w09", return_tensors="pt")
    made = load(tmp_path / "out").generate(
        input_ids=prompt["input_ids"],
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
    )
    assert made.shape == (1, 8)
    assert len(tokenizer.decode(made[0]).split()) == 8
