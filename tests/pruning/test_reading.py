# SPDX-License-Identifier: Apache-2.0
"""
What a data set says beside its tokens: which of them count, and where documents begin.

Each is obeyed or refused by name; a loader that shuffles draws by the seed.
"""

import pytest
import torch
from loguru import logger
from torch import Tensor
from torch.utils.data import DataLoader
from whole_runs import go, weights_of
from zoo_models import zoo_batches, zoo_model

from nm_permute_plugin.pruning.data import Data, token_mask
from nm_permute_plugin.pruning.reading import read_samples, rows_of
from nm_permute_plugin.pruning.statistics import input_norms

NAME = "model.layers.1.mlp.down_proj"


def ids_of(rows: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(48, (rows, tokens), generator=generator)


def answers(ids: Tensor) -> Tensor:
    """A loss mask that leaves a beginning out, longer from row to row."""
    mask = torch.ones_like(ids)
    for row in range(len(ids)):
        mask[row, : 3 + row] = 0
    return mask


def rows_in(data: Data) -> list[list[int]]:
    return [
        row[: int(row_mask.sum())].tolist()
        for batch in [*data.train, *data.validation]
        for row, row_mask in zip(
            batch["input_ids"],
            batch.get("attention_mask", torch.ones_like(batch["input_ids"])),
            strict=True,
        )
    ]


def test_a_loss_mask_says_which_tokens_count(tiny_model) -> None:
    ids = ids_of(12, 32)
    batches = [
        {"input_ids": row[None], "loss_mask": mask[None]}
        for row, mask in zip(ids, answers(ids), strict=True)
    ]
    data = read_samples(tiny_model("llama"), batches, 4, 0.25)
    counted = sum(
        int(token_mask(batch).sum()) for batch in [*data.train, *data.validation]
    )
    assert counted == int(answers(ids).sum())
    # The tokens that do not count are read all the same.
    assert sorted(rows_in(data)) == sorted(ids.tolist())


def test_few_tokens_that_count_for_validation_are_warned_of(tiny_model) -> None:
    said: list[str] = []
    sink = logger.add(said.append, level="WARNING", format="{message}")
    ids = ids_of(12, 32)
    read_samples(tiny_model("llama"), [{"input_ids": ids}], 4, 0.25)
    assert said == []  # how many there are is plain to see
    marks = answers(ids)
    data = read_samples(
        tiny_model("llama"), [{"input_ids": ids, "loss_mask": marks}], 4, 0.25
    )
    logger.remove(sink)
    counted = sum(int(token_mask(batch).sum()) for batch in data.validation)
    (line,) = said
    assert line.startswith(
        f"Of the 3 rows for validation, {counted} tokens count, fewer"
    )


def test_norms_are_those_of_the_tokens_that_count(tiny_model) -> None:
    model, ids = tiny_model("llama"), ids_of(12, 32)
    inputs: list[Tensor] = []
    hook = model.get_submodule(NAME).register_forward_pre_hook(
        lambda _, args: inputs.append(args[0].detach())
    )
    with torch.no_grad():
        model(ids)
    hook.remove()
    marks = answers(ids)
    expected = inputs[0][marks.bool()].norm(dim=0)
    data = read_samples(model, [{"input_ids": ids, "loss_mask": marks}], 4, 0.25)
    found = input_norms(model, [NAME], [*data.train, *data.validation])
    torch.testing.assert_close(found[NAME], expected)


def test_a_loss_mask_keeps_its_place_in_padded_rows(tiny_model) -> None:
    ids = ids_of(60, 32)
    lengths = 20 + torch.arange(60) % 13
    there = (torch.arange(32) >= 32 - lengths[:, None]).long()  # padded on the left
    marks = torch.zeros_like(ids)
    marks[:, -5:] = 1
    batch = {"input_ids": ids, "attention_mask": there, "loss_mask": marks}
    data = read_samples(tiny_model("llama"), [batch], 4, 0.25)
    last = sorted(row[-5:].tolist() for row in ids)
    found = [
        row[mask].tolist()
        for part in [*data.train, *data.validation]
        for row, mask in zip(part["input_ids"], token_mask(part), strict=True)
    ]
    assert sorted(found) == last


@pytest.mark.parametrize("method", ["search", "learned"])
def test_a_run_follows_the_loss_mask(tiny_model, method: str) -> None:
    ids = ids_of(24, 32)
    weights = {}
    late = (torch.arange(32) >= 20).expand(24, 32)
    masks = {"none": None, "ones": torch.ones_like(ids), "answers": late}
    for name, marks in masks.items():
        model = tiny_model("llama")
        batch = {"input_ids": ids} | ({} if marks is None else {"loss_mask": marks})
        go(model, read_samples(model, [batch], 4, 0.25), method=method)
        weights[name] = weights_of(model)
    for name, weight in weights["none"].items():
        assert torch.equal(weights["ones"][name], weight)
    changed = [
        name
        for name, weight in weights["none"].items()
        if not torch.equal(weights["answers"][name], weight)
    ]
    assert changed


def test_rows_in_which_nothing_counts_are_left_out(tiny_model) -> None:
    ids = ids_of(12, 32)
    marks = torch.ones_like(ids)
    marks[3] = 0
    batch = {"input_ids": ids, "loss_mask": marks}
    data = read_samples(tiny_model("llama"), [batch], 4, 0.25)
    assert sorted(rows_in(data)) == sorted(ids[marks[:, 0].bool()].tolist())
    with pytest.raises(ValueError, match="loss_mask marks no token"):
        read_samples(tiny_model("llama"), [{**batch, "loss_mask": marks * 0}])
    marks[:, 8:] = 0
    message = "holds 88 tokens that loss_mask marks, of 352, in 11 rows; at least 256"
    with pytest.raises(ValueError, match=message):
        read_samples(tiny_model("llama"), [batch])


def test_experts_cannot_be_told_what_counts() -> None:
    model = zoo_model("mixtral-gqa")
    ids = ids_of(12, 32)
    assert read_samples(model, [{"input_ids": ids}]).train
    with pytest.raises(ValueError, match=r"loss_mask, but MixtralForCausalLM .*remove"):
        read_samples(model, [{"input_ids": ids, "loss_mask": answers(ids)}])


def test_a_loss_mask_counts_in_samples_with_images() -> None:
    model = zoo_model("qwen2.5-vl")
    batches = zoo_batches(model)
    marked = [{**b, "loss_mask": answers(b["input_ids"])} for b in batches]
    data = read_samples(model, marked, 4, 0.25)
    assert data.tokens == sum(int(token_mask(batch).sum()) for batch in data.train)
    assert data.tokens < sum(batch["input_ids"].numel() for batch in data.train)
    marked[2]["loss_mask"] = marked[2]["loss_mask"] * 0
    with pytest.raises(ValueError, match="no token of calibration batch 2"):
        read_samples(model, marked, 4, 0.25)


PACKED = torch.cat([torch.arange(20), torch.arange(12)])


def test_packed_documents_become_rows_of_their_own(tiny_model) -> None:
    ids = ids_of(12, 32)
    batches = [{"input_ids": ids, "position_ids": PACKED.expand(12, 32)}]
    data = read_samples(tiny_model("llama"), batches, 4, 0.25)
    apart = [*ids[:, :20].tolist(), *ids[:, 20:].tolist()]
    assert sorted(rows_in(data)) == sorted(apart)


def test_a_loss_mask_is_cut_as_its_row_is(tiny_model) -> None:
    ids = ids_of(12, 32)
    batch = {
        "input_ids": ids, "position_ids": PACKED.expand(12, 32), "loss_mask": answers(ids)
    }  # fmt: skip
    data = read_samples(tiny_model("llama"), [batch], 4, 0.25)
    found = [
        row[mask].tolist()
        for part in [*data.train, *data.validation]
        for row, mask in zip(part["input_ids"], token_mask(part), strict=True)
    ]
    expected = [[*row[3 + i : 20].tolist()] for i, row in enumerate(ids)]
    assert sorted(found) == sorted([*expected, *ids[:, 20:].tolist()])


@pytest.mark.parametrize(
    "positions",
    [
        torch.arange(32).expand(12, 32),
        torch.arange(40).expand(12, 40),  # llm-compressor shortens the tokens alone
        torch.arange(32).expand(1, 32),
        (torch.arange(32) + 2).expand(12, 32),  # as RoBERTa counts
        torch.arange(32).expand(3, 12, 32),  # as Qwen2-VL counts
    ],
    ids=["plain", "longer", "one row", "from 2", "three axes"],
)
def test_positions_of_single_documents_change_nothing(positions: Tensor) -> None:
    ids = ids_of(12, 32)
    rows = rows_of([{"input_ids": ids, "position_ids": positions}], 48)
    assert [row.tolist() for row in rows] == ids.tolist()


def test_positions_of_padding_are_no_documents() -> None:
    ids, there = ids_of(12, 32), torch.ones(12, 32, dtype=torch.int64)
    there[:, :7] = 0
    positions = (there.cumsum(1) - 1).masked_fill(there == 0, 1)
    batch = {"input_ids": ids, "attention_mask": there, "position_ids": positions}
    assert [row.tolist() for row in rows_of([batch], 48)] == ids[:, 7:].tolist()


NUMBERED = torch.tensor([1] * 20 + [2] * 12).expand(12, 32)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"position_ids": torch.arange(32).mul(2).expand(12, 32)}, "position_ids that"),
        ({"attention_mask": NUMBERED}, "attention_mask with the number 2: packed"),
        ({"attention_mask": torch.ones(12, 1, 32, 32)}, "attention_mask of shape"),
        ({"loss_mask": torch.ones(12, 31)}, r"loss_mask of shape \[12, 31\] for"),
    ],
)
def test_columns_that_cannot_be_followed_are_refused(
    tiny_model, column: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=f"calibration batch 0 holds.*{message}"):
        read_samples(tiny_model("llama"), [{"input_ids": ids_of(12, 32), **column}])


def test_packed_samples_with_images_are_refused() -> None:
    model = zoo_model("qwen2.5-vl")
    batches = zoo_batches(model)
    tokens = batches[1]["input_ids"].shape[1]
    batches[1] = {**batches[1], "position_ids": torch.arange(tokens)[None] % 5}
    with pytest.raises(ValueError, match="batch 1 holds position_ids that begin again"):
        read_samples(model, batches, 4, 0.25)


def test_a_loader_that_shuffles_draws_by_the_seed(tiny_model) -> None:
    samples = [{"input_ids": row} for row in ids_of(40, 32)]

    def read(seed: int) -> list[list[int]]:
        # Ten of forty: chance says which, not only in what order.
        sampler = torch.utils.data.RandomSampler(samples, num_samples=10)
        loader = DataLoader(samples, batch_size=1, sampler=sampler)
        return rows_in(read_samples(tiny_model("llama"), loader, 4, 0.25, seed=seed))

    first = read(0)
    torch.rand(7)
    assert read(0) == first
    assert read(1) != first


def test_chance_outside_of_the_loader_goes_on_as_before(tiny_model) -> None:
    model, ids = tiny_model("llama"), ids_of(12, 32)
    state = torch.get_rng_state()
    read_samples(model, [{"input_ids": ids}])
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_longer_than_learned_positions_are_refused() -> None:
    model = zoo_model("gpt2-tied")
    count = model.config.n_positions
    with pytest.raises(ValueError, match=f"{count} learned positions .*max_seq_length"):
        read_samples(model, [{"input_ids": ids_of(8, count + 1)}])
    assert read_samples(model, [{"input_ids": ids_of(8, count)}]).train


def test_rows_longer_than_rotary_positions_are_warned_of(tiny_model) -> None:
    said: list[str] = []
    sink = logger.add(said.append, level="WARNING")
    assert read_samples(tiny_model("llama"), [{"input_ids": ids_of(8, 64)}]).train
    assert said == []
    assert read_samples(tiny_model("llama"), [{"input_ids": ids_of(8, 65)}]).train
    logger.remove(sink)
    assert "has 64 positions, and rows of 65 tokens go beyond" in said[0]
