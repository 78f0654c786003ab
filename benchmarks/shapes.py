# SPDX-License-Identifier: Apache-2.0
"""
Time and memory of learning an order for a model of a true shape, with random weights.

    python benchmarks/shapes.py llama-2-7b --rows 8 --sequence-length 2048 --search

A plain forward and backward pass of the same model and batch comes first, then learning
with the package's default settings, and the search over all spaces where asked for. Time
and memory do not depend on the values of weights and tokens.
"""

import argparse
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.pruning.energy import row_weights
from nm_permute_plugin.pruning.learn.loop import LearnSettings, learn_orders
from nm_permute_plugin.pruning.learn.order_shape import OrderShape
from nm_permute_plugin.pruning.problem import Learned, Subject
from nm_permute_plugin.pruning.running.memory import checkpointed, repeated_layers
from nm_permute_plugin.pruning.samples import Samples
from nm_permute_plugin.pruning.search import search_orders
from nm_permute_plugin.pruning.stacking import StackedScore
from nm_permute_plugin.specs.architectures import LLAMA
from nm_permute_plugin.specs.spec import resolve

PATTERN = NMPattern(2, 4)
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


class Batches(list[dict[str, Tensor]]):
    """
    One batch, and the times at which it was asked for: a step begins with its batch.

    The first ``new`` times it comes in new memory, as a batch that was never seen.
    """

    def __init__(self, ids: Tensor, new: int) -> None:
        super().__init__([{"input_ids": ids}])
        self.new = new
        self.times: list[float] = []

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        self.times.append(now())
        batch = super().__getitem__(index)
        if len(self.times) > self.new:
            return batch
        return {"input_ids": batch["input_ids"].clone()}

    def step(self, first: int, last: int) -> float:
        """The seconds of a step, the median from the first to before the last."""
        times = self.times[first : last + 1]
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
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]
    plain = plain_pass(model, ids, linears, args)
    stacks: dict[str, StackedScore] = {}

    def search() -> None:
        weights = row_weights(model, linears, [{"input_ids": ids}], seed=0)
        stacks.update(stacks_of(model, linears, weights))
        search_orders(stacks, PATTERN, 12, 0, lambda perms: 0.0)

    if args.search:
        seconds, peak = measured(search)
        print(
            f"search over {len(stacks)} spaces, its scores and the weights of their "
            f"rows: {seconds:.1f} s{peak}, judge left out",
            flush=True,
        )
    else:
        stacks.update(stacks_of(model, linears))
    start = {
        name: torch.arange(stack.space.size, device=model.device)
        for name, stack in stacks.items()
    }
    # Asked for: once before the first step, which warms up, then `count` times as new;
    # once more, to be known from then on, then `count` times, and once for the last's end.
    count = args.steps
    batches = Batches(ids, new=count + 2)
    settings = LearnSettings(
        steps=2 * count + 3,
        evaluate_every=2 * count + 3,
        shape=OrderShape(multipliers=True, row_limit=args.row_limit),
        micro_batch_size=args.micro_batch_size,
        gradient_checkpointing=args.gradient_checkpointing,
    )
    samples = Samples(batches, [{"input_ids": ids}])
    subject = Subject(model, stacks, {}, samples, PATTERN)
    _, peak = measured(lambda: learn_orders(subject, start, settings))
    first = batches.step(2, count + 2)
    later = batches.step(count + 3, 2 * count + 3)
    look, _ = measured(lambda: subject.validation_loss(Learned(start), settings.loss))
    print(f"learning, {count} steps of each kind{peak}; a look at a batch {look:.3f} s")
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
    middle, peak = sorted(seconds)[len(seconds) // 2]
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


def stacks_of(
    model: LlamaForCausalLM,
    linears: list[str],
    weights: Mapping[str, Tensor] | None = None,
) -> dict[str, StackedScore]:
    """Scores by space, their rows weighted; magnitudes, since values do not matter."""
    resolved = resolve(model, LLAMA, PATTERN, linears, model.config.head_dim)
    scores = {
        name: model.get_submodule(name).weight.detach().float().abs()
        for name in linears
    }
    stacks: dict[str, StackedScore] = {}
    for name, space in resolved.spaces.items():
        stacks[name] = StackedScore.of(space, scores, weights)
        scores |= stacks[name].split(stacks[name].score)
    return stacks


def measured(run: Callable[[], object]) -> tuple[float, str]:
    """Seconds, and on a GPU the most memory that was taken meanwhile, as text."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    begin = now()
    run()
    seconds = now() - begin
    if not torch.cuda.is_available():
        return seconds, ""
    return seconds, f", peak memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"


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
    parser.add_argument("--row-limit", type=int, help="see the modifier, as the next")
    parser.add_argument("--micro-batch-size", type=int)
    parser.add_argument(
        "--gradient-checkpointing", action=argparse.BooleanOptionalAction
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
