# SPDX-License-Identifier: Apache-2.0
"""
What must hold on a GPU, as plain functions: pytest runs them, and so does this file.

Usage, where there is no pytest::

    PYTHONPATH=. python tests/serving/gpu_checks.py [BEGINNING_OF_NAMES...]
"""

import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import wait

from gpu_accelerated import accelerated_8_bits, accelerated_model
from gpu_kernels import (
    Skip,
    experts_are_exact,
    kernel_is_exact_for_all_shapes,
    kernel_is_steady,
    plans_multiply_as_torch_does,
    weights_come_back,
)
from gpu_layers import (
    LAYER,
    a_dense_weight_stays_dense,
    kernel_table_is_kept,
    layer_works,
    memory_mode_keeps_one_sparse_copy,
)
from weights import DTYPES

from nm_permute_plugin.serving import cache
from nm_permute_plugin.serving.card_check import check_card
from nm_permute_plugin.serving.probe import crash_of


def the_card_is_checked() -> None:
    """``bench-serve --check`` finds nothing wrong."""
    text = check_card(shapes=[LAYER])
    if "WRONG" in text or "by PyTorch" in text:
        raise AssertionError(text)


def experts_crash_nowhere() -> None:
    """The kernel of experts ends well with every setting, in a process of its own."""
    words = (8, 768, 2048, 2, "bfloat16", "cuda:0")
    reason = crash_of("nm_permute_plugin.serving.expert_probe", *words)
    assert reason is None, reason


CHECKS: dict[str, Callable[[], None]] = (
    {
        "a_dense_weight_stays_dense": a_dense_weight_stays_dense,
        "experts_crash_nowhere": experts_crash_nowhere,
    }
    | {
        f"{name} {kind}": partial(kernel_is_exact_for_all_shapes, name, dtype)
        for name in ("dense", "triton", "mma_sp", "cusparselt")
        for kind, dtype in DTYPES.items()
    }
    | {
        f"experts {kind}": partial(experts_are_exact, DTYPES[kind])
        for kind in ("bf16", "fp16")
    }
    | {
        f"steady mma_sp {kind}": partial(kernel_is_steady, dtype)
        for kind, dtype in DTYPES.items()
    }
    | {
        f"plans {kind}": partial(plans_multiply_as_torch_does, dtype)
        for kind, dtype in DTYPES.items()
    }
    | {
        f"unpack {name} {kind}": partial(weights_come_back, name, dtype)
        for name in ("triton", "mma_sp", "cusparselt")
        for kind, dtype in DTYPES.items()
    }
    | {
        f"accelerate {kind} {mode}": partial(accelerated_model, DTYPES[kind], mode)
        for kind in ("bf16", "fp16")
        for mode in ("auto", "memory")
    }
    | {
        f"accelerate {kind}": partial(accelerated_8_bits, DTYPES[kind])
        for kind in ("fp8", "int8")
    }
    | {f"layer {kind}": partial(layer_works, dtype) for kind, dtype in DTYPES.items()}
    | {
        check.__name__: check
        for check in (
            memory_mode_keeps_one_sparse_copy,
            kernel_table_is_kept,
            the_card_is_checked,
        )
    }
)
"""By name, the cheap ones first."""


def outcome_of(name: str) -> str:
    """``ok``, or ``skipped`` or ``FAILED`` with the reason."""
    try:
        CHECKS[name]()
    except Skip as reason:
        return f"skipped: {reason}"
    except Exception as wrong:
        if not isinstance(wrong, AssertionError):
            traceback.print_exc(limit=-4)
        where = " ".join(("", *getattr(wrong, "__notes__", ())))
        first = (str(wrong).splitlines() or [""])[0]
        return f"FAILED{where}: {type(wrong).__name__}: {first[:300]}"
    return "ok"


def run_one(name: str) -> None:
    """A check and its line; exits with 1 if it failed."""
    started = time.perf_counter()
    outcome = outcome_of(name)
    say(started, name, outcome)
    sys.exit(int(outcome.startswith("FAILED")))


def say(started: float, name: str, outcome: str) -> None:
    """A line, at once."""
    print(f"{time.perf_counter() - started:6.2f} s  {name}: {outcome}", flush=True)


def in_children(names: list[str], at_once: int = 8, most: float = 150) -> list[str]:
    """
    Run checks in a process each, for a kernel that crashes takes its process with it.

    They are forks, which need not import torch again: this process leaves the GPU alone.

    :param at_once: what is checked is right or wrong, not fast or slow
    :param most: seconds that a check may take
    :return: the names of those that failed
    """
    fork = get_context("fork")
    waiting, running, failed = list(names), {}, []
    while waiting or running:
        while waiting and len(running) < at_once:
            name = waiting.pop(0)
            process = fork.Process(target=run_one, args=(name,))
            process.start()
            running[process.sentinel] = (name, process, time.perf_counter())
        ended = wait(running, timeout=1)
        for sentinel, (name, process, started) in list(running.items()):
            if sentinel not in ended:
                if time.perf_counter() - started > most:
                    process.kill()
                continue
            process.join()
            del running[sentinel]
            if process.exitcode:
                failed.append(name)
            if process.exitcode < 0:  # it could not say so itself
                ending = signal.Signals(-process.exitcode).name
                say(started, name, f"FAILED: ended with {ending}")
    return failed


def main() -> int:
    """Run every check; the number of those that failed."""
    logging.basicConfig(level=logging.INFO)
    os.environ.setdefault(cache.FOLDER, tempfile.mkdtemp())
    names = [name for name in CHECKS if name.startswith(tuple(sys.argv[1:] or [""]))]
    failed = in_children(names)
    print(f"{len(names)} checks, {len(failed)} failed: {failed}", flush=True)
    return len(failed)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
