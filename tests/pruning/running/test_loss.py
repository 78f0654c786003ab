# SPDX-License-Identifier: Apache-2.0
"""Each part of the loss equals its formula, over the tokens that count."""

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from nm_permute_plugin.pruning.running.loss import Outputs, check_finite, loss, run
from nm_permute_plugin.pruning.running.masked import masked
from nm_permute_plugin.pruning.settings import LossSettings
from nm_permute_plugin.specs.conv1d import weight_of

PARTS = ["divergence", "cross_entropy", "hidden", "cosine"]


def only(part: str, weight: float) -> LossSettings:
    """One part of the loss alone."""
    return LossSettings(**{"divergence": 0.0, part: weight})


@pytest.fixture
def outputs(generator: torch.Generator) -> tuple[Outputs, Outputs]:
    """A pruned and a dense model's outputs: 2 rows, 5 tokens, 7 words, 2 x width 3."""

    def some() -> Outputs:
        hidden = tuple(torch.randn(2, 5, 3, generator=generator) for _ in range(2))
        return Outputs(torch.randn(2, 5, 7, generator=generator), hidden)

    return some(), some()


@pytest.fixture
def batch(generator: torch.Generator) -> dict[str, Tensor]:
    """Two rows of text; the second has three tokens and two of padding."""
    mask = torch.ones(2, 5, dtype=torch.int64)
    mask[1, 3:] = 0
    return {
        "input_ids": torch.randint(7, (2, 5), generator=generator),
        "attention_mask": mask,
    }


def by_hand(
    part: str, pruned: Outputs, dense: Outputs, batch: dict[str, Tensor]
) -> float:
    """The formula of one part in float64, token by token."""
    counted = batch["attention_mask"].bool()
    places = counted.nonzero().tolist()
    values = []
    for row, token in places:
        if part == "divergence":
            p = dense.logits[row, token].double().softmax(-1)
            q = pruned.logits[row, token].double().softmax(-1)
            values.append(float((p * (p / q).log()).sum()))
        elif part == "cross_entropy":
            if token + 1 < 5 and counted[row, token + 1]:
                q = pruned.logits[row, token].double().softmax(-1)
                values.append(-float(q[batch["input_ids"][row, token + 1]].log()))
        elif part == "cosine":
            ours, theirs = (o.hidden[-1][row, token].double() for o in (pruned, dense))
            values.append(1 - float(ours @ theirs / (ours.norm() * theirs.norm())))
        else:
            values.append(
                sum(
                    float(
                        F.smooth_l1_loss(a[row, token].double(), b[row, token].double())
                    )
                    for a, b in zip(pruned.hidden, dense.hidden, strict=True)
                )
            )
    return sum(values) / len(values)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_equals_its_formula(
    outputs, batch: dict[str, Tensor], part: str
) -> None:
    value = loss(*outputs, batch, only(part, 2.0))
    assert float(value) == pytest.approx(2 * by_hand(part, *outputs, batch), rel=1e-5)


def test_the_loss_is_the_weighted_sum_of_its_parts(
    outputs, batch: dict[str, Tensor]
) -> None:
    weights = LossSettings(divergence=0.5, cross_entropy=2.0, hidden=3.0, cosine=0.1)
    expected = sum(
        getattr(weights, part) * by_hand(part, *outputs, batch) for part in PARTS
    )
    assert float(loss(*outputs, batch, weights)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("part", PARTS)
def test_padding_does_not_count(outputs, batch: dict[str, Tensor], part: str) -> None:
    pruned, dense = outputs
    weights = only(part, 1.0)
    before = loss(pruned, dense, batch, weights)
    pruned.logits[1, 3:] = 100
    for hidden in pruned.hidden:
        hidden[1, 3:] = 100
    batch["input_ids"][1, 3:] = 0
    assert torch.equal(loss(pruned, dense, batch, weights), before)


@pytest.mark.parametrize("part", ["divergence", "hidden", "cosine"])
def test_the_dense_model_loses_nothing(outputs, batch, part: str) -> None:
    _, dense = outputs
    value = loss(dense, dense, batch, only(part, 1.0))
    assert float(value) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("part", PARTS)
def test_every_part_has_a_gradient(outputs, batch, part: str) -> None:
    pruned, dense = outputs
    leaves = [pruned.logits, *pruned.hidden]
    for leaf in leaves:
        leaf.requires_grad_(True)
    loss(pruned, dense, batch, only(part, 1.0)).backward()
    norms = [
        float(leaf.grad.norm()) if leaf.grad is not None else 0.0 for leaf in leaves
    ]
    assert max(norms) > 0


@pytest.mark.parametrize(
    ("weights", "count"),
    [(LossSettings(), 0), (LossSettings(hidden=1.0), 3), (LossSettings(cosine=1.0), 3)],
    ids=["divergence", "hidden", "cosine"],
)
def test_hidden_states_are_taken_only_where_they_are_needed(
    tiny_model, tokens: Tensor, weights: LossSettings, count: int
) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        out = run(model, {"input_ids": tokens}, weights)
        plain = model(tokens).logits
    assert len(out.hidden) == count
    assert torch.equal(out.logits, plain)


def test_classes_of_rows_are_compared_row_by_row(
    batch: dict[str, Tensor], generator: torch.Generator
) -> None:
    pruned, dense = (Outputs(torch.randn(2, 7, generator=generator)) for _ in range(2))
    p, q = (out.logits.double().softmax(-1) for out in (dense, pruned))
    expected = float((p * (p / q).log()).sum(-1).mean())
    images = {"pixel_values": torch.zeros(2, 3, 8, 8)}
    for given in (batch, images):
        value = loss(pruned, dense, given, LossSettings())
        assert float(value) == pytest.approx(expected, rel=1e-5)


def test_without_a_head_final_hidden_states_are_compared_relative_to_their_size(
    batch: dict[str, Tensor], generator: torch.Generator
) -> None:
    pruned, dense = (
        Outputs(torch.randn(2, 5, 3, generator=generator), are_values=True)
        for _ in range(2)
    )
    errors = (pruned.logits - dense.logits).square().sum(
        -1
    ) / dense.logits.square().sum(-1)
    counted = batch["attention_mask"].bool()
    value = loss(pruned, dense, batch, LossSettings(divergence=2.0))
    assert float(value) == pytest.approx(2 * float(errors[counted].mean()), rel=1e-5)
    images = {"pixel_values": torch.zeros(2, 3, 8, 8)}
    value = loss(pruned, dense, images, LossSettings())
    assert float(value) == pytest.approx(float(errors.mean()), rel=1e-5)


@pytest.mark.parametrize(
    "case", ["Llama", "GPT2", "Qwen2"], ids=lambda case: f"{case} reward model"
)
def test_the_one_output_of_a_regression_is_a_value_to_be_met(
    case: str, tokens: Tensor
) -> None:
    """The divergence of distributions over one class would always be 0."""
    size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    if case != "GPT2":
        size["num_key_value_heads"] = 2
    config = getattr(transformers, f"{case}Config")(
        vocab_size=48, num_hidden_layers=2, num_labels=1, pad_token_id=0, **size
    )
    torch.manual_seed(0)
    name = f"{case}ForSequenceClassification"
    model = getattr(transformers, name)(config).eval()
    batch = {"input_ids": tokens.clamp_min(1)}
    with torch.no_grad():
        dense = run(model, batch, LossSettings())
    assert dense.are_values
    assert dense.logits.shape == (3, 1)
    linear = next(n for n, m in model.named_modules() if type(m) in (nn.Linear, Conv1D))
    weight = weight_of(model.get_submodule(linear))
    mask = torch.ones(weight.shape).tril().requires_grad_()
    with masked(model, {linear: mask}):
        ours = run(model, batch, LossSettings())
    value = loss(ours, dense, batch, LossSettings())
    value.backward()
    value = float(value.detach())
    error = (ours.logits.detach() - dense.logits).square().mean()
    expected = float(error / dense.logits.square().mean())
    assert value == pytest.approx(expected, rel=1e-5)
    assert 0 < value < float("inf")
    assert bool(mask.grad.isfinite().all())
    assert float(mask.grad.abs().max()) > 0


def test_a_value_of_zero_leaves_the_loss_finite() -> None:
    dense = Outputs(torch.tensor([[0.0], [2.0]]), are_values=True)
    pruned = Outputs(dense.logits + 1, are_values=True)
    images = {"pixel_values": torch.zeros(2, 3, 8, 8)}
    assert float(loss(pruned, dense, images, LossSettings())) == pytest.approx(0.5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_refused_by_its_name(value: float) -> None:
    assert check_finite(0.5, "training loss") == 0.5
    with pytest.raises(ValueError, match=f"the training loss is {value}; load"):
        check_finite(value, "training loss")
