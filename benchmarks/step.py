# SPDX-License-Identifier: Apache-2.0
"""
A step of learning against a plain forward and backward pass of the same model and batch.

    python benchmarks/step.py --rows 8 --sequence-length 1024

The model has SmolLM2-135M's shape, or the one given, and random weights: time and memory
do not depend on their values. Orders learn first, then the multipliers of the
scores. A step with a batch that was never seen runs the dense model too; one with a batch
of an earlier epoch only its last layer. All five run in turn; medians are printed with the
ratios.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import get_args

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.pruning.learn.order_shape import Learns, OrderShape
from nm_permute_plugin.pruning.learn.orders import LearnableOrders
from nm_permute_plugin.pruning.running.backward import BackwardStep
from nm_permute_plugin.pruning.running.loss import LossWeights
from nm_permute_plugin.pruning.running.teacher import Teacher
from nm_permute_plugin.pruning.stacking import StackedScore
from nm_permute_plugin.specs.architectures import LLAMA
from nm_permute_plugin.specs.spec import resolve

SMOLLM2 = (576, 1536, 30, 9, 3, 49152)
WARM_UPS = 3
Run = Callable[[], None]


def main() -> None:
    args = _arguments()
    torch.manual_seed(0)
    model = _model(args).to(args.device, torch.bfloat16).eval()
    orders = _orders(model, args.row_limit)
    shape = (args.rows, args.sequence_length)
    ids = torch.randint(0, args.shape[5], shape, device=args.device)
    steps = iter(range(10**6))

    model.requires_grad_(False)
    weights = LossWeights()
    teacher = Teacher(model, weights)
    logs = orders.log_multipliers()
    optimizer = torch.optim.AdamW(logs, lr=0.01, weight_decay=0.0)

    def swap() -> None:
        orders.swap(0.5)

    def descend() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    def learning(what: Learns, update: Callable[[], None], is_new: bool) -> Run:
        def step() -> None:
            orders.learn(what)
            # In other memory, a batch was never seen.
            batch = {"input_ids": ids.clone() if is_new else ids}
            backwards[what](batch, partial(orders.at, 0.5, next(steps)))
            update()

        return step

    def plain() -> None:
        # Gradients of the activations and of every linear's weight, as a training step.
        model.requires_grad_(True)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)
        model.requires_grad_(False)

    backwards: dict[Learns, BackwardStep] = {
        what: BackwardStep(
            model,
            orders.masks,
            weights,
            teacher=teacher,
            replay=not orders.steps_differ,
        )
        for what in get_args(Learns)
    }
    runs: dict[str, Run] = {
        "orders, first epoch": learning("order", swap, True),
        "orders, later epochs": learning("order", swap, False),
        "multipliers, first epoch": learning("multipliers", descend, True),
        "multipliers, later epochs": learning("multipliers", descend, False),
        "plain": plain,
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(args.repeats + WARM_UPS):
        for name, run in runs.items():
            elapsed = _timed(run, args.device)
            if turn >= WARM_UPS:
                seconds[name].append(elapsed)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    once = middle.pop("plain")
    print(f"{args.rows} x {args.sequence_length} tokens, shape {tuple(args.shape)}")
    print(f"a plain forward and backward pass: {once:.3f} s")
    for name, value in middle.items():
        print(f"a step of {name}: {value:.3f} s, {value / once:.2f} times plain")
    if args.device == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def _model(args: argparse.Namespace) -> LlamaForCausalLM:
    hidden, inner, layers, heads, kv_heads, vocabulary = args.shape
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            vocab_size=vocabulary,
            tie_word_embeddings=True,
        )
    )


def _orders(model: LlamaForCausalLM, row_limit: int | None) -> LearnableOrders:
    pattern = NMPattern(2, 4)
    scores: dict[str, Tensor] = {
        name: module.weight.detach().float().abs()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    head_dim = model.config.hidden_size // model.config.num_attention_heads
    resolved = resolve(model, LLAMA, pattern, list(scores), head_dim)
    stacks = {n: StackedScore.of(s, scores) for n, s in resolved.spaces.items()}
    device = next(model.parameters()).device
    start = {n: torch.arange(s.space.size, device=device) for n, s in stacks.items()}
    shape = OrderShape(row_limit=row_limit, multipliers=True)
    return LearnableOrders(stacks, start, pattern, shape, torch.bfloat16)


def _timed(run: Run, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--row-limit", type=int, help="see LearnablePermutationModifier"
    )
    parser.add_argument(
        "--shape",
        type=int,
        nargs=6,
        default=SMOLLM2,
        help="hidden, intermediate, layers, heads, key/value heads, vocabulary",
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default)
    return parser.parse_args()


if __name__ == "__main__":
    main()
