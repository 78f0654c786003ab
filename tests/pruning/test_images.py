# SPDX-License-Identifier: Apache-2.0
"""Models that take images go the whole way, whatever their output is."""

import copy

import pytest
import torch
from torch import nn
from whole_runs import resolved_of
from zoo_models import CASES, tiny, zoo_batches, zoo_linears, zoo_model

from nm_permute_plugin.pruning.data import first_sample
from nm_permute_plugin.pruning.pipeline import Record, permute_and_prune
from nm_permute_plugin.pruning.reading import read_samples
from nm_permute_plugin.pruning.running.loss import answer
from nm_permute_plugin.pruning.settings import RecoverStage, Settings
from nm_permute_plugin.pruning.statistics import input_norms, output_sensitivity

IMAGES = [
    "vit-labels", "vit-bare", "deit-teacher", "dinov2-labels", "dinov2-bare",
    "dinov2-swiglu-three-heads", "clip-vision", "siglip-vision", "siglip-vision-no-head",
]  # fmt: skip
ENCODERS = ["bertmodel", "bertforsequenceclassification", "bertfortokenclassification"]
BOTH = ["qwen2-vl", "qwen2.5-vl"]
SAVING = {
    "layer_wise": {"objective": "layer_wise"},
    "micro batches": {"memory": {"micro_batch_size": 2}},
}
HIDDEN = {"hidden": 0.1, "cosine": 1.0}
FAST = {
    "search": {"rounds": 2},
    "learn": {"stages": "swaps", "steps": 2, "swaps": {"block_size": 4}},
    "validation": {"every": 1},
}
STAGES = {
    "rescale": {},
    "blocks": {"blocks": {"epochs": 1}},
    "end_to_end": {"end_to_end": {"steps": 2}},
}


def run(
    model: nn.Module,
    stages: tuple[RecoverStage, ...] = (),
    prunable: list[str] | None = None,
    **changes: object,
) -> Record:
    prunable = zoo_linears(model) if prunable is None else prunable
    recover: dict[str, object] = {"stages": stages}
    for stage in stages:
        recover |= STAGES[stage]
    settings = Settings.model_validate(FAST | {"recover": recover} | changes)
    data = read_samples(model, zoo_batches(model), 3, 0.25, seed=0)
    resolved = resolved_of(model, prunable)
    return permute_and_prune(model, resolved, prunable, data, settings)


@pytest.mark.parametrize("case", [*IMAGES, *ENCODERS, *BOTH])
def test_a_model_is_permuted_pruned_and_recovered(case: str) -> None:
    model = zoo_model(case)
    both: tuple[RecoverStage, ...] = (
        "rescale",
        "end_to_end",
    )  # no list holds both towers
    record = run(model, both if case in BOTH else ("rescale", "blocks", "end_to_end"))
    assert record.fold_error < 1e-5
    assert record.perms
    assert all(entry["validation"] > 0 for entry in record.history)
    assert all(stage.validation[0] > 0 for stage in record.recovered)
    for name in zoo_linears(model):
        groups = (model.get_submodule(name).weight != 0).unflatten(1, (-1, 4)).sum(-1)
        assert bool((groups <= 2).all()), name


@pytest.mark.parametrize("case", ["dinov2-labels", "bertmodel", "qwen2.5-vl"])
@pytest.mark.parametrize("how", ["layer_wise", "micro batches"])
def test_memory_is_saved_alike(case: str, how: str) -> None:
    model = zoo_model(case)
    prunable = [name for name in zoo_linears(model) if ".visual." not in name]
    record = run(model, prunable=prunable, **SAVING[how])
    assert len(record.history) >= 2
    assert all(entry["validation"] > 0 for entry in record.history)
    assert record.fold_error < 1e-5


@pytest.mark.parametrize("case", ["dinov2-labels", "dinov2-bare", "bertmodel"])
def test_hidden_states_may_join_the_loss(case: str) -> None:
    with_hidden = run(zoo_model(case), loss=HIDDEN).history[0]["validation"]
    alone = run(zoo_model(case)).history[0]["validation"]
    assert with_hidden > alone


@pytest.mark.parametrize("case", ["dinov2-labels", "qwen2.5-vl"])
def test_bf16_models_take_pixels_of_float32(case: str) -> None:
    model = zoo_model(case, torch.bfloat16)
    batches = [
        {k: v.float() if v.is_floating_point() else v for k, v in batch.items()}
        for batch in zoo_batches(model)
    ]
    data = read_samples(model, batches, 3, 0.25, seed=0)
    names = zoo_linears(model)
    norms = input_norms(model, names, data.train)
    assert {bool((norm > 0).all()) for norm in norms.values()} == {True}


@pytest.mark.parametrize("case", ["dinov2-bare", "bertmodel"])
def test_a_model_without_a_head_keeps_the_order_of_what_it_gives_back(
    case: str,
) -> None:
    model = zoo_model(case)
    prunable = zoo_linears(model)
    dense = copy.deepcopy(model)
    record = run(model)
    families = {name.split(".")[0] for name in record.perms}
    assert families == {"hidden", "value"}
    resolved = resolved_of(dense, prunable)
    assert {consumer for consumer in resolved.unordered} != set()
    batch = zoo_batches(model)[0]
    with torch.no_grad():
        ours, theirs = (m(**batch).last_hidden_state for m in (model, dense))
    similar = torch.nn.functional.cosine_similarity(ours, theirs, dim=-1)
    assert float(similar.mean()) > 0.2  # random weights; another order gives about 0


def test_the_language_tower_alone_is_pruned_where_only_it_is_named() -> None:
    model = zoo_model("qwen2.5-vl")
    visual = {
        n: p.clone() for n, p in model.named_parameters() if ".visual.blocks" in n
    }
    prunable = [name for name in zoo_linears(model) if "language_model" in name]
    record = run(model, ("blocks",), prunable=prunable)
    assert record.recovered
    zeros = {n: float((model.get_parameter(n) == 0).float().mean()) for n in visual}
    assert max(zeros.values()) < 0.05
    assert (
        min(
            float((model.get_submodule(name).weight == 0).float().mean())
            for name in prunable
        )
        >= 0.5
    )


def test_input_norms_count_every_patch_of_every_image() -> None:
    model = zoo_model("vit-labels")
    batches = [{"pixel_values": zoo_batches(model)[0]["pixel_values"]}]
    seen = []
    name = "vit.layers.1.mlp.fc2"
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0])
    )
    (norm,) = input_norms(model, [name], batches).values()
    hook.remove()
    by_hand = seen[0].double().flatten(0, -2).norm(dim=0)
    torch.testing.assert_close(norm.double(), by_hand, rtol=1e-5, atol=1e-6)
    assert seen[0].shape[:2] == (2, 17)


def test_padding_hides_tokens_of_text_and_no_patches() -> None:
    model = zoo_model("qwen2.5-vl")
    (batch,) = zoo_batches(model, 1)
    masked = torch.ones_like(batch["input_ids"])
    masked[0, -4:] = 0
    names = [
        "model.visual.blocks.0.attn.proj",
        "model.language_model.layers.0.mlp.up_proj",
    ]
    plain = input_norms(model, names, [batch])
    hidden = input_norms(model, names, [batch | {"attention_mask": masked}])
    torch.testing.assert_close(plain[names[0]], hidden[names[0]])
    assert bool((hidden[names[1]] < plain[names[1]]).all())


def test_the_first_sample_is_one_row_or_all_of_a_sample_with_images() -> None:
    images = {"pixel_values": torch.zeros(5, 3, 8, 8)}
    assert first_sample(images)["pixel_values"].shape == (1, 3, 8, 8)
    model = zoo_model("qwen2.5-vl")
    (batch,) = zoo_batches(model, 1)
    assert {k: v.shape for k, v in first_sample(batch).items()} == {
        k: v.shape for k, v in batch.items()
    }


@pytest.mark.parametrize(
    ("case", "loss", "message"),
    [
        ("vit-labels", HIDDEN | {"cross_entropy": 1.0}, "is for language models"),
        ("bertmodel", {"cross_entropy": 1.0}, "is for language models"),
        (
            "bertforsequenceclassification",
            {"cross_entropy": 1.0},
            "is for language models",
        ),
    ],
)
def test_a_loss_that_needs_text_is_refused(case, loss, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(zoo_model(case), loss=loss)


def test_an_output_with_nothing_to_compare_is_refused() -> None:
    model = zoo_model("clip")
    with torch.no_grad():
        out = model(**zoo_batches(model, 1)[0])
    with pytest.raises(ValueError, match="logits_per_image.* has neither logits nor"):
        answer(out)


def one_label(architecture: str) -> nn.Module:
    """A reward model: one number for a row of text."""
    name, config, options = CASES[architecture]
    return tiny(name, config, options | {"num_labels": 1}, torch.float32)


ONE_LABEL = ["llamaforsequenceclassification", "bertforsequenceclassification"]


@pytest.mark.parametrize("case", ONE_LABEL)
def test_one_label_has_finite_statistics(case: str) -> None:
    model = one_label(case)
    names = zoo_linears(model)
    batches = zoo_batches(model)
    for measured in (
        input_norms(model, names, batches),
        output_sensitivity(model, names, batches, seed=0),
    ):
        for name, values in measured.items():
            assert bool(values.isfinite().all()), name
            assert float(values.max()) > float(values.min()), name


@pytest.mark.parametrize("case", ONE_LABEL)
@pytest.mark.parametrize("method", ["search", "learned"])
def test_one_label_is_pruned_and_recovered(case: str, method: str) -> None:
    model = one_label(case)
    learned = {} if method == "learned" else {"learn": {}}
    record = run(model, ("rescale", "blocks", "end_to_end"), method=method, **learned)
    assert record.fold_error < 1e-5
    losses = [entry["validation"] for entry in record.history]
    assert 0 < min(losses) < 100
    assert 0.5 < record.retained[1] < 1
    for name in zoo_linears(model):
        groups = (model.get_submodule(name).weight != 0).unflatten(1, (-1, 4)).sum(-1)
        assert bool((groups <= 2).all()), name
