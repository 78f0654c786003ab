# SPDX-License-Identifier: Apache-2.0
"""
A step of learning on one GPU or several, for a model of a true shape with random weights.

    torchrun --nproc-per-node 4 benchmarks/ranks.py llama-3.2-1b --rows 32 --micro 8

Every rank makes the same model and the same batches, and takes its rows of each. Run it
with 1, 2 and 4 processes on one machine: the batch of a step is the same, so the times
compare. ``--shard`` keeps a part of every weight on each GPU; ``--layers`` cuts the model;
``--recover`` times the recovery end to end instead. Time and memory do not depend on the
values of weights and tokens.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from loguru import logger
from transformers import LlamaConfig, LlamaForCausalLM

from methods import prunable
from nm_permute_plugin.cli.torchrun import own_device
from nm_permute_plugin.maths.masks import nm_mask
from nm_permute_plugin.pruning import ranks
from nm_permute_plugin.pruning.data import Batch, Data
from nm_permute_plugin.pruning.learn.loop import learn
from nm_permute_plugin.pruning.learn.sharded import ShardedProblem
from nm_permute_plugin.pruning.problem import Problem, Solution
from nm_permute_plugin.pruning.recover.distill import distill
from nm_permute_plugin.pruning.recover.sharded import distill_in_shards
from nm_permute_plugin.pruning.recover.student import Student
from nm_permute_plugin.pruning.running.teacher import Teacher
from nm_permute_plugin.pruning.settings import Settings
from nm_permute_plugin.specs.architectures import LLAMA
from nm_permute_plugin.specs.conv1d import weight_of
from nm_permute_plugin.specs.spec import resolve
from shapes import SHAPES

LARGE: dict[str, dict[str, int | bool]] = {
    "llama-2-13b": {
        "vocab_size": 32000,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
    "llama-2-70b": {
        "vocab_size": 32000,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
}


@dataclass(frozen=True)
class TimedData(Data):
    """Batches, and the times at which they were asked for: a step begins with its batch."""

    times: list[float] = field(default_factory=list)

    def batches(self, seed: int) -> Iterator[Batch]:
        """Every batch once."""
        for batch in self.train:
            self.times.append(now())
            yield batch

    def step(self) -> float:
        """The seconds of a step: the median, without the first three."""
        pairs = zip(self.times[3:], self.times[4:], strict=False)
        return statistics.median(b - a for a, b in pairs)


def main() -> None:
    """Measure one shape on the processes that there are."""
    args = arguments()
    logger.disable("nm_permute_plugin")
    device = own_device("cuda" if torch.cuda.is_available() else "cpu")
    ranks.begin(device)
    settings = Settings.model_validate(
        {
            "score": "magnitude",  # values do not matter
            "learn": {"steps": args.steps},
            "recover": {
                "stages": ["end_to_end"],
                "end_to_end": {"steps": args.steps},
            }
            if args.recover
            else {},
            "validation": {"every": args.steps},
            "batch_size": args.rows,
            "memory": {
                "micro_batch_size": args.micro,
                "gradient_checkpointing": args.gradient_checkpointing,
                "shard": args.shard,
            },
        }
    )
    model = model_of(args)
    weights = sum(parameter.numel() for parameter in model.parameters())
    if not args.shard:
        model.to(device)
    torch.manual_seed(0)
    shape = args.steps + 1, args.rows, args.sequence_length
    batches = [{"input_ids": ids} for ids in torch.randint(args.vocabulary, shape)]
    data = TimedData(batches[1:], [{"input_ids": batches[0]["input_ids"][:4]}])
    linears = prunable(model)
    began = now()
    if args.recover and args.shard:

        def kept(name: str) -> torch.Tensor:
            weight = weight_of(model.get_submodule(name))
            return weight * nm_mask(weight.abs().to(device), settings.pattern).cpu()

        distill_in_shards(model, linears, kept, lambda *_: None, data, settings)
    elif args.recover:
        masks = {
            name: nm_mask(weight_of(model.get_submodule(name)).abs(), settings.pattern)
            for name in linears
        }
        student = Student(model, masks)
        distill(student, Teacher(model, settings.loss), data, settings)
    else:
        resolved = resolve(
            model, LLAMA, settings.pattern, linears, model.config.head_dim
        )
        problem: Problem
        if args.shard:
            parts = model, resolved, linears, data, settings
            problem = ShardedProblem.of_shards(*parts)
        else:
            problem = Problem.prepare(model, resolved, linears, data, settings)
        learn(problem, Solution(), settings)
    if ranks.is_first():
        tell(args, weights, data.step(), now() - began, device)
    ranks.leave()


def model_of(args: argparse.Namespace) -> LlamaForCausalLM:
    """A model in bfloat16 on the CPU, whose weights repeat a million random numbers."""
    shape = dict({**SHAPES, **LARGE}[args.shape])
    if args.layers:
        shape["num_hidden_layers"] = args.layers
    args.vocabulary = int(shape["vocab_size"])
    config = LlamaConfig(**shape, max_position_embeddings=4096)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    rotary = type(model.model.rotary_emb)(config)
    model.to_empty(device="cpu")
    model.model.rotary_emb = rotary
    model.tie_weights()
    numbers = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    numbers = (0.02 * numbers).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            for part in parameter.flatten().split(len(numbers)):
                part.copy_(numbers[: len(part)])
            if parameter.dim() == 1:
                parameter.fill_(1.0)
    return model.eval().requires_grad_(False)


def tell(
    args: argparse.Namespace,
    weights: int,
    step: float,
    all_of_it: float,
    device: torch.device,
) -> None:
    """Print the figures, and add them to a file of JSON lines."""
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    figures = {
        "shape": args.shape,
        "layers": args.layers,
        "weights": weights,
        "what": "recovery" if args.recover else "learning",
        "shard": args.shard,
        "ranks": ranks.count(),
        "rows": args.rows,
        "sequence_length": args.sequence_length,
        "micro_batch_size": args.micro,
        "seconds of a step": round(step, 4),
        "tokens a second": round(args.rows * args.sequence_length / step),
        "seconds of all": round(all_of_it, 1),
        "peak GiB of a rank": round(peak / 2**30, 2),
        "hardware": f"{torch.cuda.get_device_name() if peak else 'CPU'}, "
        f"torch {torch.__version__}",
    }
    print(json.dumps(figures), flush=True)
    if args.out is not None:
        with args.out.open("a") as file:
            file.write(json.dumps(figures) + "\n")


def now() -> float:
    """The time when the device has done all that it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def arguments() -> argparse.Namespace:
    """The arguments of the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=sorted({**SHAPES, **LARGE}))
    parser.add_argument("--rows", type=int, default=32, help="of a step, of all ranks")
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--micro", type=int, default=None, help="rows at a time")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--shard", action="store_true")
    parser.add_argument("--recover", action="store_true")
    parser.add_argument("--gradient-checkpointing", action="store_true", default=None)
    parser.add_argument("--out", type=Path, default=None, help="a file of JSON lines")
    return parser.parse_args()


if __name__ == "__main__":
    main()
