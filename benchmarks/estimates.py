# SPDX-License-Identifier: Apache-2.0
"""
What ``nm-permute prune --dry-run`` expects of a run, beside what the run then takes.

    python benchmarks/estimates.py MODEL --rows 44 --sequence-length 512 \
        --set batch_size=1 learn.steps=20
    python benchmarks/estimates.py llama-3.2-1b --rows 128 --sequence-length 1024 \
        --method learned+end_to_end --set learn.steps=60 recover.end_to_end.steps=40

The model is a folder, or a published shape with random weights (``shapes.SHAPES``). Tokens
are random: time and memory do not depend on them. Both are measured in one process, one
after the other, on the same model in memory. Errors are (expected - taken) / taken, by the
clock and by the seconds of all processors, which other programs of a busy machine change
less. What a process does once, compiling kernels for example, has been done when the run
begins, and only the expectation counts it.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from methods import Change, settings_of
from nm_permute_plugin.pruning import pipeline
from nm_permute_plugin.pruning.clock import Clock
from nm_permute_plugin.pruning.data import split_text
from nm_permute_plugin.pruning.estimate.meter import Meter, Took
from nm_permute_plugin.pruning.estimate.probe import Estimate, estimate
from nm_permute_plugin.pruning.run import Pruned, PrunePlan, save
from nm_permute_plugin.pruning.session import recognise, session
from nm_permute_plugin.pruning.settings import Settings
from shapes import SHAPES

Measured = dict[str, tuple[Took, int]]
"""By stage what it took, and the bytes that were held at most."""

JOINED = {"fold": "fold and prune", "prune": "fold and prune"}


def main(argv: Sequence[str] | None = None) -> None:
    """Estimate, run, and compare."""
    args = arguments(argv)
    torch.manual_seed(0)
    model = model_of(args)
    settings = settings_of(
        args.method, [Change.parse(f"{args.method}.{text}") for text in args.set]
    )
    vocabulary = model.config.vocab_size
    rows = torch.randint(vocabulary, (args.rows, args.sequence_length))
    data = split_text(
        list(rows), settings.batch_size, settings.validation.share, settings.seed
    )
    plan = PrunePlan.of(model, settings)
    before = recognised(model)
    expected = estimate(model, plan, data, settings)
    assert recognised(model) == before, "the estimate changed the model"
    for line in expected.unfit:
        print(f"unfit: {line}")
    taken = measured(model, plan, data, settings)
    print(hardware(args))
    print(compared(expected, taken), flush=True)
    if args.out:
        record = {
            "hardware": hardware(args),
            "arguments": {k: str(v) for k, v in vars(args).items()},
            "expected": {
                s.name: [*vars(s.took).values(), s.peak] for s in expected.stages
            },
            "taken": {
                n: [*vars(took).values(), peak] for n, (took, peak) in taken.items()
            },
            "spent": list(vars(expected.spent).values()),
        }
        args.out.write_text(json.dumps(record, indent=1) + "\n")


def recognised(model: nn.Module) -> str:
    """A digest of all weights."""
    with session():
        return recognise(model)


def measured(
    model: nn.Module, plan: PrunePlan, data: object, settings: Settings
) -> Measured:
    """Run the whole, and measure it by stage."""
    meter = Meter(next(model.parameters()).device)
    laps: list[float] = []

    class WithProcessors(Clock):
        """The run's clock, which takes down the seconds of all processors as well."""

        def _begin(self) -> None:
            if meter.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            laps.append(time.process_time())
            super()._begin()

    pipeline.Clock, before = WithProcessors, pipeline.Clock
    try:
        record = pipeline.permute_and_prune(
            model, plan.resolved, plan.prunable, data, settings
        )
    finally:
        pipeline.Clock = before
    found: Measured = {}
    for stage, begun, ended in zip(record.seconds, laps, laps[1:], strict=False):
        name = JOINED.get(stage, stage)
        took, peak = found.get(name, (Took(), 0))
        took += Took(record.seconds[stage], ended - begun)
        found[name] = took, max(peak, record.memory[stage])
    pruned = Pruned(settings, plan, record, plan.saved)
    with tempfile.TemporaryDirectory() as folder, meter.peak() as peak:
        _, took = meter.took(lambda: save(model, Path(folder) / "out", pruned))
    found["save"] = took, peak.value
    return found


def compared(expected: Estimate, taken: Measured) -> str:
    """A table of both, by stage."""
    lines = [
        "| stage | expected s | taken s | error | CPU s expected | taken | error "
        "| GiB expected | taken |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    stages = {stage.name: (stage.took, stage.peak) for stage in expected.stages}
    both = [name for name in stages if name in taken]
    stages["all"] = (
        sum((stages[name][0] for name in both), Took()),
        max(stages[name][1] for name in both),
    )
    taken = dict(taken)
    taken["all"] = (
        sum((taken[name][0] for name in both), Took()),
        max(taken[name][1] for name in both),
    )
    for name, (took, peak) in stages.items():
        if name not in taken:
            continue
        true, true_peak = taken[name]
        lines.append(
            f"| {name} | {took.seconds:.1f} | {true.seconds:.1f} | "
            f"{error(took.seconds, true.seconds)} | {took.cpu_seconds:.1f} | "
            f"{true.cpu_seconds:.1f} | {error(took.cpu_seconds, true.cpu_seconds)} | "
            f"{peak / 2**30:.2f} | {true_peak / 2**30:.2f} |"
        )
    alone = set(taken) - set(stages)
    lines += [f"only taken: {name} {taken[name][0].seconds:.1f} s" for name in alone]
    spent = expected.spent.seconds
    lines.append(
        f"measuring took {spent:.1f} s, {spent / taken['all'][0].seconds:.0%} of the run"
    )
    return "\n".join(lines)


def error(expected: float, taken: float) -> str:
    return f"{(expected - taken) / max(taken, 1e-9):+.0%}"


def model_of(args: argparse.Namespace) -> nn.Module:
    if args.model not in SHAPES:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
        return model.to(args.device).eval()
    config = LlamaConfig(**SHAPES[args.model], max_position_embeddings=8192)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(args.device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)


def hardware(args: argparse.Namespace) -> str:
    where = f"CPU, {torch.get_num_threads()} threads"
    if args.device == "cuda":
        where = torch.cuda.get_device_name()
    return f"{where}, torch {torch.__version__}"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", help=f"a folder, or one of {', '.join(SHAPES)}")
    add("--method", default="learned", help="as in quality.py")
    add("--rows", type=int, default=128)
    add("--sequence-length", type=int, default=1024)
    add(
        "--set",
        nargs="+",
        default=[],
        metavar="PATH=VALUE",
        help="settings of a recipe",
    )
    add("--out", type=Path, help="takes both as JSON")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
