# SPDX-License-Identifier: Apache-2.0
"""
A step of learning, and of recovery, against a plain forward and backward pass of the same
model and batch.

    python benchmarks/step.py --rows 8 --sequence-length 1024

The model has SmolLM2-135M's shape, or the one given, and random weights: time and memory
do not depend on their values. A step with a batch that was never seen runs the dense model
too; one with a batch of an earlier epoch only its last layer. ``--once`` keeps nothing of
any batch, as where there is more text than memory. All run in turn; medians are printed
with the ratios. On a GPU all run once more with compiled elementwise parts, as a run has
them.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from methods import prunable
from nm_permute_plugin.pruning.data import Batch, Data
from nm_permute_plugin.pruning.learn.loop import LEARNERS
from nm_permute_plugin.pruning.problem import Problem, Solution
from nm_permute_plugin.pruning.recover.optimizer import RelativeAdamW
from nm_permute_plugin.pruning.recover.student import Student
from nm_permute_plugin.pruning.running.backward import Backward
from nm_permute_plugin.pruning.running.compiled import compiled_elementwise
from nm_permute_plugin.pruning.running.teacher import Teacher
from nm_permute_plugin.pruning.settings import LearnStage, Settings
from nm_permute_plugin.specs.architectures import LLAMA
from nm_permute_plugin.specs.spec import resolve

SMOLLM2 = (576, 1536, 30, 9, 3, 49152)
WARM_UPS = 3
STEPS = 10**6
"""Of the schedules: so many that a rate does not fall while it is timed."""

Run = Callable[[], None]


def main() -> None:
    """Time what the command line asks for."""
    args = _arguments()
    torch.manual_seed(0)
    model = _model(args).to(args.device, torch.bfloat16).eval()
    shape = (args.rows, args.sequence_length)
    ids = torch.randint(0, args.shape[5], shape, device=args.device)
    problem, settings = _problem(model, ids, args)
    model.requires_grad_(False)
    print(f"{args.rows} x {args.sequence_length} tokens, shape {tuple(args.shape)}")
    _compare(model, problem, settings, ids, args, "")
    if args.device == "cuda":
        with compiled_elementwise(model, STEPS):
            _compare(model, problem, settings, ids, args, ", compiled")
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def _compare(
    model: LlamaForCausalLM,
    problem: Problem,
    settings: Settings,
    ids: Tensor,
    args: argparse.Namespace,
    how: str,
) -> None:
    """Time all kinds of steps in turn, and print their medians."""
    problem = replace(problem, teacher=Teacher(model, settings.loss, not args.once))
    runs: dict[str, Run] = {}
    for stage in settings.learn.stages:
        learning = _Learning(problem, settings, stage, ids)
        runs[f"{stage}, first epoch"] = partial(learning.step, True)
        if not args.once:
            runs[f"{stage}, later epochs"] = partial(learning.step, False)
    runs["recovery, first epoch"] = _Recovery(problem, settings, ids).step
    runs["plain"] = partial(_plain, model, ids)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(args.repeats + WARM_UPS):
        for name, run in runs.items():
            elapsed = _timed(run, args.device)
            if turn >= WARM_UPS:
                seconds[name].append(elapsed)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    once = middle.pop("plain")
    print(f"a plain forward and backward pass{how}: {once:.4f} s")
    for name, value in middle.items():
        print(f"a step of {name}{how}: {value:.4f} s, {value / once:.2f} times plain")


class _Learning:
    """Steps of one stage, from the channels as they are."""

    def __init__(
        self, problem: Problem, settings: Settings, stage: LearnStage, ids: Tensor
    ) -> None:
        start = Solution(
            {
                name: torch.arange(of.space.size, device=problem.device)
                for name, of in problem.spaces.items()
            }
        )
        self._ids, self._numbers = ids, count(1)
        self._learner = LEARNERS[stage](problem, start, settings.learn, STEPS)
        self._backward = Backward(
            problem.teacher,
            self._learner.masks,
            self._learner.parameters,
            problem.data.train,
            settings.memory,
            self._learner.use_graph,
        )

    def step(self, is_new: bool) -> None:
        """Take one step; in other memory, a batch was never seen."""
        batch = {"input_ids": self._ids.clone() if is_new else self._ids}
        self._backward(batch, partial(self._learner.prepare, next(self._numbers)))
        self._learner.update()


class _Recovery:
    """Steps of the recovery end to end, under the masks of the channels as they are."""

    def __init__(self, problem: Problem, settings: Settings, ids: Tensor) -> None:
        student = Student(problem.model, problem.masks(Solution()))
        masters = student.masters(student.linears)
        self._ids, self._optimizer = ids, RelativeAdamW(masters, 0.001, STEPS)
        self._backward = Backward(
            problem.teacher,
            partial(student.masks, masters, student.served(masters)),
            masters.values(),
            problem.data.train,
            settings.memory,
            use_graph=True,
        )

    def step(self) -> None:
        """Take one step with a batch that was never seen."""
        self._backward({"input_ids": self._ids.clone()})
        self._optimizer.step()


def _plain(model: LlamaForCausalLM, ids: Tensor) -> None:
    """Gradients of the activations and of every linear's weight, as a training step."""
    model.requires_grad_(True)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)


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


def _problem(
    model: LlamaForCausalLM, ids: Tensor, args: argparse.Namespace
) -> tuple[Problem, Settings]:
    stages: list[LearnStage] = ["swaps", "multipliers"]
    swaps = {"share": 0.5, "row_limit": args.row_limit}
    settings = Settings.model_validate(
        {"score": "magnitude", "learn": {"stages": stages, "swaps": swaps}}
    )
    linears = prunable(model)
    head_dim = model.config.hidden_size // model.config.num_attention_heads
    resolved = resolve(model, LLAMA, settings.pattern, linears, head_dim)
    batches: list[Batch] = [{"input_ids": ids}]
    data = Data(batches, batches)
    return Problem.prepare(model, resolved, linears, data, settings), settings


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
    parser.add_argument("--once", action="store_true", help="batches come once")
    parser.add_argument("--row-limit", type=int, help="learn.swaps.row_limit")
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
