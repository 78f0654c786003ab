# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of routed experts, run on the CPU, and the choice between kernels."""

from pathlib import Path

import cuda_on_cpu
import pytest
import torch
from cards import CARDS, weight_on
from weights import BOUND, DTYPES, error, exact_experts, expert_weights, sparse_weight

from nm_permute_plugin.checkpoint.codec import clear_negative_zeros
from nm_permute_plugin.serving.kernels import experts
from nm_permute_plugin.serving.kernels.expert_product import ExpertSettings
from nm_permute_plugin.serving.kernels.experts import (
    align,
    pack_experts,
    run,
    settings_for,
    unsupported,
)

HALVES = ("bf16", "fp16")


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Where kernels that were compiled for the CPU are kept."""
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def on_cpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels run on the CPU."""
    if not cuda_on_cpu.is_available():
        pytest.skip("g++ is not installed")
    function = cuda_on_cpu.function_on_cpu
    monkeypatch.setattr(experts, "function", lambda *of: function(folder, *of))


# tokens, experts, experts of a token, hidden, inner; in the third all go to one expert
FEW, SOME = (3, 8, 2, 384, 128), (21, 5, 3, 256, 256)
ONE, EVERY = (40, 3, 1, 128, 128), (2, 6, 6, 128, 128)
CASES = [
    (FEW, ExpertSettings(1, 1, (2, 2, 0), (1, 1, 0)), "bf16"),
    (FEW, ExpertSettings(1, 0, (2, 4, 1), (4, 1, 1)), "fp16"),
    (SOME, ExpertSettings(1, 0, (4, 2, 1), (3, 2, 1)), "bf16"),
    (SOME, ExpertSettings(2, 1, (2, 1, 1), (2, 3, 0)), "fp16"),
    (ONE, ExpertSettings(1, 1, (6, 1, 0), (1, 1, 1)), "fp16"),
    (ONE, ExpertSettings(2, 0, (2, 2, 1), (3, 1, 0)), "bf16"),
    (EVERY, ExpertSettings(1, 0, (4, 1, 0), (2, 2, 1)), "bf16"),
]
"""Row blocks that do not divide the rows, and more warps than chunks, are among them."""


@pytest.mark.parametrize("apart", [False, True], ids=["all here", "some elsewhere"])
@pytest.mark.parametrize(("case", "settings", "kind"), CASES)
@pytest.mark.usefixtures("on_cpu")
def test_products_agree_with_float64(
    case: tuple[int, ...], settings: ExpertSettings, kind: str, apart: bool
) -> None:
    dtype = DTYPES[kind]
    tokens, count, top_k, hidden, inner = case
    weights = expert_weights(count, hidden, inner, dtype)
    up, down = (pack_experts(weight) for weight in weights)
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    ids = torch.rand(tokens, count, generator=generator).argsort(-1)[:, :top_k].int()
    if case is ONE:
        ids[:] = 1
    scales = torch.rand(tokens, top_k, generator=generator)
    places = None
    if apart:  # as with expert parallelism; the experts that are here change places
        places = torch.arange(count, dtype=torch.int32).roll(1)
        places[::3] = -1
    out = run(x, up, down, scales, ids, settings.flat(), places)
    known = ids if places is None else places[ids.long()]
    expected = exact_experts(*weights, x, scales, known)
    assert out.dtype == dtype
    if expected.any():
        assert error(out, expected) < BOUND
    else:
        assert not out.any()
    none = run(x[:0], up, down, scales[:0], ids[:0], settings.flat(), places)
    assert none.shape == (0, hidden)


@pytest.mark.parametrize(
    ("count", "pairs", "size"), [(5, 37, 8), (128, 64, 8), (3, 200, 16), (700, 90, 8)]
)
@pytest.mark.usefixtures("on_cpu")
def test_pairs_are_sorted_into_slots_of_one_expert(
    count: int, pairs: int, size: int
) -> None:
    generator = torch.Generator().manual_seed(pairs)
    ids = torch.randint(-1, count, (pairs,), generator=generator).int()
    pair_of, expert_of = align(torch.zeros(1).half(), ids, count, size)
    pair_of = pair_of.view(-1, size)
    known = expert_of[expert_of >= 0]
    assert len(known) == sum(
        -(-int((ids == expert).sum()) // size) for expert in range(count)
    )
    assert torch.equal(known, known.sort().values)
    assert (expert_of[len(known) :] == -1).all()
    held = pair_of[pair_of >= 0].sort().values.tolist()
    assert held == (ids >= 0).nonzero().flatten().tolist()
    for pairs_of_slot, expert in zip(pair_of, expert_of, strict=True):
        used = pairs_of_slot >= 0
        assert (ids[pairs_of_slot[used].long()] == expert).all()
        assert used[0] == (expert >= 0)  # the kernel repeats the first one


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.usefixtures("on_cpu")
def test_dense_weights_are_written_bit_by_bit(kind: str) -> None:
    dtype = DTYPES[kind]
    weights = [
        clear_negative_zeros(sparse_weight(96, 384, dtype, seed)) for seed in range(3)
    ]
    at = weights[1][-1].nonzero()
    weights[1][-1, at[0]], weights[1][-1, at[1]] = torch.inf, torch.nan
    packed = pack_experts(weights)
    assert packed.dense_shape == (3, 96, 384)
    assert packed.packed.nbytes == sum(weight.nbytes for weight in weights) * 9 // 16
    out = packed.expand(torch.full((3, 96, 384), 7.0, dtype=dtype))
    assert torch.equal(out.view(torch.int16), torch.stack(weights).view(torch.int16))


@pytest.mark.parametrize("tokens", [1, 8, 9, 16, 17, 64, experts.MOST_TOKENS])
def test_settings_come_back_from_a_table_and_fit_every_card(tokens: int) -> None:
    found = settings_for(tokens, 8, 64)
    assert len(found) == len(set(found))
    smallest = min(card.shared_bytes for card in CARDS.values())
    for each in found:
        assert ExpertSettings.of(each.flat()) == each
        assert each.direct == (tokens <= 16)  # one launch less, for few pairs
        for shape in each.shapes():
            assert shape.shared_bytes <= min(smallest, 48 << 10)
            assert shape.threads <= 512
    assert {each.tiles for each in found} == ({1} if tokens <= 32 else {1, 2})


def test_prompts_are_left_to_the_dense_kernel() -> None:
    assert not settings_for(experts.MOST_TOKENS + 1, 8, 128)


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((2, 64, 128), torch.bfloat16, "no CUDA device"),
        ((2, 64, 128), torch.float8_e4m3fn, "float8_e4m3fn has no kernel"),
    ],
)
def test_what_the_kernel_does_not_multiply_is_told(
    shape: tuple[int, int, int], dtype: torch.dtype, reason: str
) -> None:
    assert reason in str(unsupported(shape, torch.empty(0, dtype=dtype)))


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((2, 64, 128), None),
        ((2, 64, 96), "64 x 96 is no multiple of 32 x 128"),
        ((2000, 64, 128), "there are 2000 experts, and the kernel sorts 1024"),
    ],
)
def test_shapes_that_the_kernel_does_not_have_are_told(
    shape: tuple[int, int, int], reason: str | None
) -> None:
    with weight_on(CARDS["sm_90"], torch.bfloat16) as like:
        assert unsupported(shape, like) == reason
