# SPDX-License-Identifier: Apache-2.0
"""
What does rounding cost a pruned model, and what does recovery under that rounding regain?

    python benchmarks/rounding.py MODEL --train brown.txt --test wikitext-2/test.txt

Learns masks once (or takes those of ``--pruned CHECKPOINT``), and recovers them once
without rounding and once under each scheme: plain rounding to the nearest, as
llm-compressor's ``QuantizationModifier`` rounds. Each model is measured as it is and served
in the schemes: weights and, where the scheme says so, activations are rounded by
compressed-tensors. What ``--out FOLDER`` keeps are the weights before they are rounded, for
``oneshot`` to quantize.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import (
    calculate_qparams,
    compute_dynamic_scales_and_zp,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import nm_permute_plugin as nmp
from methods import prunable
from nm_permute_plugin.checkpoint.record import read_record
from nm_permute_plugin.evaluation.perplexity import perplexity
from nm_permute_plugin.evaluation.pretrained import load_checkpoint
from nm_permute_plugin.evaluation.text import Window
from nm_permute_plugin.maths.permutation import Permutation
from nm_permute_plugin.pruning.data import Data, split_text
from nm_permute_plugin.pruning.recover.stages import recover
from nm_permute_plugin.pruning.recover.student import Student
from nm_permute_plugin.pruning.running.teacher import Teacher
from nm_permute_plugin.pruning.settings import Settings
from nm_permute_plugin.specs.architectures import head_dim_of, spec_of
from nm_permute_plugin.specs.fold import fold, write_in_place
from nm_permute_plugin.specs.spec import resolve
from texts import text_rows, text_windows


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    args = _arguments(argv)
    settings = _settings(args)
    rows = text_rows(args.model, args.train, args.rows, args.sequence_length)
    data = split_text(
        rows, settings.batch_size, settings.validation.share, settings.seed
    )
    test = text_windows(args.model, args.test, args.window, False, None)
    test = test[:: max(1, len(test) // (args.windows or len(test)))][: args.windows]
    schemes = {name: _scheme(name, args.group_size) for name in args.schemes}

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    dense = model.to(args.device).eval()
    names = prunable(dense)
    print(
        f"{data}; {len(test)} windows of {args.window} tokens of the test", flush=True
    )
    print(f"dense {perplexity(dense, test):.3f}", flush=True)
    pruned, perms = _pruned(args, data, settings)
    heads = head_dim_of(dense.config)
    fold(dense, resolve(dense, spec_of(dense), settings.pattern, names, heads), perms)
    masks = {name: pruned.get_submodule(name).weight.detach() != 0 for name in names}

    teacher = Teacher(dense, settings.loss)
    print("| recovered | served | perplexity | of its own bf16 | seconds |")
    print("|---|---|---|---|---|")
    for variant in args.variants or ["frozen", "bf16", *schemes]:
        rounding = None
        if variant in schemes:
            rounding = partial(rounded, args=schemes[variant].weights)
        student = Student(dense, masks, rounding and dict.fromkeys(masks, rounding))
        started = time.perf_counter()
        if variant != "frozen":
            recover(student, teacher, data, settings)
        seconds = time.perf_counter() - started
        other = Student(pruned, masks)
        other.values.update(student.values)
        with torch.no_grad():
            other.write(write_in_place)
        if args.out:
            pruned.save_pretrained(args.out / variant)
            AutoTokenizer.from_pretrained(args.model).save_pretrained(
                args.out / variant
            )
        alone = perplexity(pruned, test)
        print(f"| {variant} | bf16 | {alone:.3f} | | {seconds:.0f} |", flush=True)
        for name, scheme in schemes.items():
            if variant in ("frozen", "bf16", name):
                value = _served(pruned, student, scheme, test)
                more = f"{value / alone - 1:+.1%}"
                print(f"| {variant} | {name} | {value:.3f} | {more} | |", flush=True)


def _settings(args: argparse.Namespace) -> Settings:
    training = {"steps": args.recover_steps}
    if args.recover_rate is not None:
        training["rate"] = args.recover_rate
    return Settings.model_validate(
        {
            "batch_size": args.batch_size,
            "seed": args.seed,
            "learn": {"steps": args.steps},
            "recover": {"stages": ["end_to_end"], "end_to_end": training},
            "validation": {"share": args.validation_share},
        }
    )


def _pruned(
    args: argparse.Namespace, data: Data, settings: Settings
) -> tuple[PreTrainedModel, dict[str, Permutation]]:
    """The pruned model, with frozen weights, and the permutations that it was folded by."""
    if args.pruned:
        perms, _ = read_record(args.pruned)
        return load_checkpoint(args.pruned, args.device), perms
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    frozen = settings.model_copy(update={"recover": Settings().recover})
    model = model.to(args.device).eval()
    return model, nmp.prune(model, data, frozen).record.perms


def _scheme(name: str, group_size: int) -> QuantizationScheme:
    """A scheme of compressed-tensors by its name, with groups of another size."""
    scheme: QuantizationScheme = preset_name_to_scheme(name, ["Linear"])
    if scheme.weights.group_size:
        scheme.weights.group_size = group_size
    return scheme


def rounded(weight: Tensor, args: QuantizationArgs) -> Tensor:
    """A weight [out, in] to the nearest, its scales by minimum and maximum."""
    size = args.group_size or (weight.shape[1] if args.strategy == "channel" else None)
    groups = weight.flatten()[None] if size is None else weight.unflatten(1, (-1, size))
    scale, point = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    served: Tensor = fake_quantize(weight, scale, point, args)
    return served


def _served(
    model: nn.Module,
    student: Student,
    scheme: QuantizationScheme,
    test: list[Window],
) -> float:
    """The perplexity with weights and activations rounded."""
    before = {
        name: model.get_submodule(name).weight.clone() for name in student.linears
    }
    with torch.no_grad(), _rounding_inputs(model, student, scheme):
        for name, weight in before.items():
            served = rounded(weight, scheme.weights)
            model.get_submodule(name).weight.copy_(served)
        value = perplexity(model, test)
        for name, weight in before.items():
            model.get_submodule(name).weight.copy_(weight)
    return value


@contextmanager
def _rounding_inputs(
    model: nn.Module, student: Student, scheme: QuantizationScheme
) -> Iterator[None]:
    args = scheme.input_activations

    def round_inputs(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        scale, point = compute_dynamic_scales_and_zp(inputs[0], args, None)
        return fake_quantize(inputs[0], scale, point, args), *inputs[1:]

    linears = [model.get_submodule(name) for name in student.linears]
    hooks = [each.register_forward_pre_hook(round_inputs) for each in linears if args]
    yield
    for hook in hooks:
        hook.remove()


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--pruned", type=Path, help="a checkpoint, instead of learning")
    parser.add_argument("--train", type=Path, nargs="+", required=True)
    parser.add_argument("--test", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, help="keeps the weights, not rounded")
    parser.add_argument(
        "--schemes", nargs="+", default=["W4A16", "FP8_DYNAMIC", "W8A8"]
    )
    parser.add_argument("--variants", nargs="+", help="frozen, bf16 and schemes; all")
    parser.add_argument("--group-size", type=int, default=64, help="of W4A16")
    parser.add_argument("--rows", type=int, default=2304)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--windows", type=int, help="at most, evenly over the test")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--recover-steps", type=int, default=600)
    parser.add_argument("--recover-rate", type=float)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--validation-share", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
