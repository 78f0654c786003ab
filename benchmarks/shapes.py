# SPDX-License-Identifier: Apache-2.0
"""
Time and memory of learning for a model of a true shape, with random weights.

    python benchmarks/shapes.py llama-2-7b --rows 8 --sequence-length 2048 --search

A plain forward and backward pass of the same model and batch comes first, then learning
with the package's default settings, and the search over all spaces where asked for. Time
and memory do not depend on the values of weights and tokens.
"""

import argparse
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from methods import prunable
from nm_permute_plugin.pruning.data import Batch, Data
from nm_permute_plugin.pruning.learn.loop import learn
from nm_permute_plugin.pruning.problem import Problem, Solution
from nm_permute_plugin.pruning.running.memory import checkpointed, repeated_layers
from nm_permute_plugin.pruning.search import search
from nm_permute_plugin.pruning.settings import Settings
from nm_permute_plugin.specs.architectures import LLAMA
from nm_permute_plugin.specs.spec import resolve

T = TypeVar("T")

SHAPES: dict[str, dict[str, int | bool]] = {
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "llama-2-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
}


@dataclass(frozen=True)
class TimedData(Data):
    """
    One batch, and the times at which it was asked for: a step begins with its batch.

    :param new: how often it comes in new memory first, as a batch that was never seen
    """

    new: int
    times: list[float] = field(default_factory=list)

    def batches(self, seed: int) -> Iterator[Batch]:
        """The batch for ever."""
        for number in count():
            self.times.append(now())
            batch = self.train[0]
            is_new = number < self.new
            yield {k: v.clone() for k, v in batch.items()} if is_new else batch

    def step(self, first: int, last: int) -> float:
        """The seconds of a step, the median of those of these numbers, from 1 on."""
        times = self.times[first - 1 : last + 1]
        return statistics.median(b - a for a, b in zip(times, times[1:], strict=False))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure one shape."""
    args = arguments(argv)
    torch.manual_seed(0)
    model = model_of(args)
    ids = torch.randint(
        model.config.vocab_size,
        (args.rows, args.sequence_length),
        device=model.device,
    )
    weights = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{args.shape}, {len(model.model.layers)} layers, {weights / 1e9:.2f}e9 weights, "
        f"{args.rows} x {args.sequence_length} tokens, {hardware(args)}"
    )
    linears = prunable(model)
    plain = plain_pass(model, ids, linears, args)
    # A step that warms up, some with new batches, one by which the batch is known from then
    # on, some with the known batch, and one that ends the last of those.
    steps = 2 * args.steps + 3
    settings = Settings.model_validate(
        {
            "score": "magnitude",  # values do not matter
            "learn": {"steps": steps},
            "validation": {"every": steps},
            "batch_size": args.rows,
            "memory": {
                "micro_batch_size": args.micro_batch_size,
                "gradient_checkpointing": args.gradient_checkpointing,
            },
        }
    )
    batches: list[Batch] = [{"input_ids": ids}]
    data = TimedData(batches, batches, new=args.steps + 1)

    def prepared() -> Problem:
        resolved = resolve(
            model, LLAMA, settings.pattern, linears, model.config.head_dim
        )
        return Problem.prepare(model, resolved, linears, data, settings)

    def prepared_and_searched() -> Problem:
        problem = prepared()
        rounds, seed = settings.search.rounds, settings.seed
        search(problem.spaces, problem.pattern, rounds, seed, lambda perms: 0.0)
        return problem

    if args.search:
        problem, seconds, peak = measured(prepared_and_searched)
        print(
            f"search over {len(problem.spaces)} spaces, its scores and the weights of "
            f"their rows: {seconds:.1f} s{peak}, validation left out",
            flush=True,
        )
    else:
        problem = prepared()
    start = Solution(
        {
            name: torch.arange(of.space.size, device=model.device)
            for name, of in problem.spaces.items()
        }
    )
    _, _, peak = measured(lambda: learn(problem, start, settings))
    first = data.step(2, args.steps + 1)
    later = data.step(args.steps + 3, steps - 1)
    _, validation, _ = measured(lambda: problem.validate(start))
    print(
        f"learning, {args.steps} steps of each kind{peak}; a validation of a batch "
        f"{validation:.3f} s"
    )
    for epoch, step in (("first epoch", first), ("later epochs", later)):
        print(
            f"a step of the {epoch}: {step:.3f} s, learning / plain {step / plain:.2f}, "
            f"300 steps {300 * step / 60:.1f} minutes"
        )


def plain_pass(
    model: LlamaForCausalLM, ids: Tensor, linears: list[str], args: argparse.Namespace
) -> float:
    """Gradients of the activations and of every weight, as in training."""

    def run() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    layers: list[nn.Module] = []
    try:
        measured(run)
    except RuntimeError as error:
        # cuBLAS, which allocates for itself, has a failure of its own.
        if not re.search("out of memory|ALLOC_FAILED", str(error)):
            raise
        layers = repeated_layers(model, linears)
        model.zero_grad(set_to_none=True)
    with checkpointed(layers):
        seconds = [measured(run) for _ in range(args.steps + 1)][1:]
    _, middle, peak = sorted(seconds, key=lambda one: one[1])[len(seconds) // 2]
    how = ", layers run again in backward" if layers else ""
    print(f"plain forward and backward: {middle:.3f} s{peak}{how}")
    return middle


def model_of(args: argparse.Namespace) -> LlamaForCausalLM:
    shape = dict(SHAPES[args.shape])
    if args.layers is not None:
        shape["num_hidden_layers"] = args.layers
    config = LlamaConfig(**shape, max_position_embeddings=args.sequence_length)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(args.device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)


def measured(run: Callable[[], T]) -> tuple[T, float, str]:
    """What it gives, seconds, and on a GPU the most memory taken meanwhile, as text."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    begin = now()
    found = run()
    seconds = now() - begin
    if not torch.cuda.is_available():
        return found, seconds, ""
    peak = torch.cuda.max_memory_allocated() / 2**30
    return found, seconds, f", peak memory {peak:.1f} GiB"


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def hardware(args: argparse.Namespace) -> str:
    where = f"CPU, {torch.get_num_threads()} threads"
    if args.device == "cuda":
        where = torch.cuda.get_device_name()
    return f"{where}, torch {torch.__version__}"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed")
    parser.add_argument("--search", action="store_true", help="time the search too")
    parser.add_argument(
        "--micro-batch-size", type=int, help="see the recipe's `memory`"
    )
    parser.add_argument(
        "--gradient-checkpointing", action=argparse.BooleanOptionalAction
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
