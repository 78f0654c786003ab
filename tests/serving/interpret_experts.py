# SPDX-License-Identifier: Apache-2.0
"""
Run the kernels of routed experts and print how far they are from float64, as JSON.

A process of its own: Triton decides whether to interpret when it is first imported.
"""

import io
import json
import os
from contextlib import redirect_stdout
from itertools import product

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if __name__ == "__main__" and DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

from weights import error, sparse_weight  # noqa: E402

from nm_permute_plugin.checkpoint.codec import compress  # noqa: E402
from nm_permute_plugin.serving import expert_probe, expert_table  # noqa: E402
from nm_permute_plugin.serving.kernels import experts as kernel  # noqa: E402

TILES = {"four products": (16, 16, 16, 32, 16, 0), "interleaved": (16, 32, 8, 16, 8, 1)}
CASES = [
    # tokens, experts, of a token, hidden, inner
    (1, 8, 2, 64, 32),
    (5, 4, 3, 72, 40),
    (40, 3, 1, 64, 24),
    (3, 16, 8, 96, 16),
]
"""The tiles fit none of these shapes; in the third an expert has several blocks."""


def stacked(experts: int, rows: int, columns: int, seed: int) -> tuple:
    """A weight of all experts: dense [experts, rows, columns], and as it is stored."""
    weights = [
        sparse_weight(rows, columns, torch.float16, seed + i, DEVICE)
        for i in range(experts)
    ]
    stored = [compress(weight) for weight in weights]
    values = torch.stack([each.compressed for each in stored])
    bits = torch.stack([each.bitmask for each in stored])
    return torch.stack(weights), kernel.StoredExperts(values, bits)


def exact(x, up, down, weights, ids):
    """The experts' sum in float64; experts below zero count as nothing."""
    out = x.new_zeros(x.shape, dtype=torch.float64)
    for token, (of_token, chosen) in enumerate(zip(weights, ids, strict=True)):
        for weight, expert in zip(of_token, chosen.tolist(), strict=True):
            if expert < 0:
                continue
            gate, value = (up[expert].double() @ x[token].double()).chunk(2)
            inner = torch.nn.functional.silu(gate) * value
            out[token] += weight.double() * (down[expert].double() @ inner)
    return out


def experts_error(case: tuple[int, ...], tile: tuple[int, ...], apart: bool) -> float:
    """
    The largest error of one routing, as a share of the largest output.

    :param apart: half of the experts are on another device, as with expert parallelism
    """
    tokens, experts, top_k, hidden, inner = case
    up, stored_up = stacked(experts, 2 * inner, hidden, 1)
    down, stored_down = stacked(experts, hidden, inner, 100)
    generator = torch.Generator(DEVICE).manual_seed(tokens)
    x = torch.randn(tokens, hidden, generator=generator, device=DEVICE) / 8
    x = x.to(torch.float16)
    order = torch.rand(tokens, experts, generator=generator, device=DEVICE)
    ids = order.argsort(-1)[:, :top_k].to(torch.int32)
    if tokens > 20:
        ids[:] = 1  # all to one expert: the others are empty
    weights = torch.rand(tokens, top_k, generator=generator, device=DEVICE)
    settings = (*tile, 4, 2)
    if not apart:
        out = kernel.run(x, stored_up, stored_down, weights, ids, settings)
        return error(out, exact(x, up, down, weights, ids))
    here = experts // 2
    places = torch.full((experts,), -1, dtype=torch.int32, device=DEVICE)
    places[::2][:here] = torch.arange(here, dtype=torch.int32, device=DEVICE)
    out = kernel.run(x, stored_up, stored_down, weights, ids, settings, places)
    expected = exact(x, up, down, weights, places[ids.long()])
    if not expected.any():
        return float(out.abs().max())
    return error(out, expected)


def alignments() -> list[bool]:
    """Whether both ways of sorting pairs into blocks agree, for random routings."""
    found = []
    for seed, experts, pairs, size in (
        (0, 5, 37, 16),
        (1, 128, 64, 16),
        (2, 3, 200, 32),
    ):
        generator = torch.Generator(DEVICE).manual_seed(seed)
        ids = torch.randint(-1, experts, (pairs,), generator=generator, device=DEVICE)
        left = kernel.align(ids, experts, size)
        right = tuple(torch.full_like(each, -1) for each in left)
        kernel._align_in_torch(ids, experts, *right)
        found += [torch.equal(*both) for both in zip(left, right, strict=True)]
        held = left[0][left[0] >= 0].sort().values.tolist()
        found.append(held == (ids >= 0).nonzero().flatten().tolist())
        expert = left[1].long()[:, None].expand_as(left[0])
        own = ids[left[0].long().clamp_min(0)] == expert
        found.append(bool((own | (left[0] < 0)).all()))
    return found


def expansions() -> list[bool]:
    """Whether the dense weights that are written are those that were stored."""
    found = []
    for rows, columns in ((16, 64), (7, 40)):
        dense, stored = stacked(3, rows, columns, 5)
        found.append(torch.equal(stored.expand(torch.empty_like(dense)), dense))
    return found


def choices() -> list[list[object]]:
    """
    The kernel chosen for a few tokens, and the settings that were timed.

    No clock is looked at: times are made up. One setting gives wrong results, and vLLM's
    product is a stand-in.
    """
    run, timed = kernel.run, []
    wrong, right = (16, *[16] * 4, 0, 4, 1), (*TILES["interleaved"], 4, 2)
    times = {right: 7.0, wrong: 1.0}

    def known(x, up, down, weights, ids, settings):
        out = run(x, up, down, weights, ids, right)
        return out * 2 if settings == wrong else out

    def microseconds(calls):
        settings = calls[0].args[0] if type(calls[0].args[0]) is tuple else ()
        timed.append(settings)
        return times[settings]

    def dense(x, up, down, weights, ids):
        return exact(x, up, down, weights, ids).to(x.dtype)

    expert_table.experts.run = known
    expert_table.experts.candidates = lambda *sizes: [wrong, right]
    expert_table.microseconds = microseconds
    weights = stacked(4, 32, 64, 1)[1], stacked(4, 64, 16, 9)[1]
    found = []
    for times[()] in (9.0, 7.0, 3.0):
        bucket = expert_table._bucket(*weights, 3, 2, dense)
        found.append([bucket.chosen.kernel, len(bucket.fastest), wrong in timed])
    return found


def tried() -> dict[str, object]:
    """What is run to find crashes: tokens, settings, whether all experts are here."""
    run, calls, said = kernel.run, [], io.StringIO()
    refused, good = (16, *[16] * 4, 0, 4, 1), (*TILES["interleaved"], 4, 2)

    def seen(x, up, down, weights, ids, settings, places):
        calls.append((len(x), settings, places is None))
        if len(x) == 4 and settings == refused and places is not None:
            raise RuntimeError("refused")
        return run(x, up, down, weights, ids, settings, places)

    expert_probe.BUCKETS = (1, 4)
    expert_probe.experts.run = seen
    expert_probe.experts.candidates = lambda *sizes: [refused, good]
    with redirect_stdout(said):
        expert_probe.try_settings(stacked(4, 32, 64, 1)[1], stacked(4, 64, 16, 9)[1], 2)
    expert_probe.experts.run = run
    return {"tried": calls, "refused": said.getvalue().strip()}


if __name__ == "__main__":
    cases = list(product(CASES, TILES.values(), (False, True)))
    print(
        json.dumps(
            {
                "products": [experts_error(*case) for case in cases],
                "alignments": alignments(),
                "expansions": expansions(),
                **tried(),
                "choices": choices(),
            }
        )
    )
