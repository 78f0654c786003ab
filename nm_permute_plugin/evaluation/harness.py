# SPDX-License-Identifier: Apache-2.0
"""Run lm-eval's tasks on a checkpoint, in whatever format it is stored."""

import argparse
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from nm_permute_plugin._words import install
from nm_permute_plugin.evaluation.pretrained import load_checkpoint, tokenizer_of
from nm_permute_plugin.evaluation.results import TaskResult

OF_A_LOADED_MODEL = frozenset(
    {
        "add_bos_token",
        "backend",
        "chat_template_args",
        "enable_thinking",
        "logits_cache",
        "max_length",
        "mixed_precision_dtype",
        "prefix_token_id",
        "softmax_dtype",
        "think_end_token",
        "truncation",
    }
)
"""What ``--model_args`` may say: the rest is for models that lm-eval loads itself."""

TRACKERS = ("wandb_args", "wandb_config_args", "trackio_args")
"""Options of lm-eval's that only its own command follows."""

SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")

_WITHOUT_FILTER = ",none"
"""Behind the name of a metric whose answers went through no filter."""


@dataclass(frozen=True)
class Options:
    """
    How tasks are run.

    :param config: lm-eval's own ``EvaluatorConfig``, the names of its tasks resolved
    :param manager: lm-eval's ``TaskManager``, which makes the tasks
    :param device: that was asked for; None if none was
    """

    config: Any
    manager: Any
    device: str | None


class _Parser(argparse.ArgumentParser):
    """Raises what argparse would print with all its usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (these options are lm-eval's: lm-eval run --help)")


def require_lm_eval() -> None:
    """
    See that lm-eval is installed.

    :raises ModuleNotFoundError: if it is not, with the remedy
    """
    if find_spec("lm_eval") is None:
        raise ModuleNotFoundError(f"tasks are run by lm-eval: {install('eval')}")


def read_options(words: Sequence[str]) -> Options:
    """
    Read lm-eval's own options, find its tasks, and load their data.

    :param words: as they stand on lm-eval's command line
    :raises ValueError: for what lm-eval would refuse, and for options that say which model
        it is to load
    :raises ModuleNotFoundError: without lm-eval
    """
    require_lm_eval()
    # The parser has no public name; what it reads, and what runs the tasks, has one.
    from lm_eval._cli.run import Run
    from lm_eval.config.evaluate_config import EvaluatorConfig

    parser = _Parser(prog="nm-permute lm-eval")
    Run.create(parser.add_subparsers())
    given = parser.parse_args(["run", *words])
    if given.tasks is None and given.config is None:
        raise ValueError("give --tasks TASK; `lm-eval ls tasks` lists all of lm-eval's")
    if given.model is not None:
        raise ValueError(
            f"leave out --model {given.model}: the model is the checkpoint"
        )
    for name in TRACKERS:
        if getattr(given, name):
            raise ValueError(f"--{name} is not followed here; take --output_path")
    config = EvaluatorConfig.from_cli(given)
    foreign = sorted(set(config.model_args) - OF_A_LOADED_MODEL)
    if foreign:
        raise ValueError(
            f"--model_args {foreign[0]} says how lm-eval loads a model, but the checkpoint "
            f"is loaded here; it may say {', '.join(sorted(OF_A_LOADED_MODEL))}"
        )
    if not re.fullmatch(r"\d+|auto(:\d+(\.\d+)?)?", str(config.batch_size)):
        raise ValueError(
            f"--batch_size {config.batch_size} is neither a number nor auto nor auto:N"
        )
    manager = _manager(config)
    _load_data(manager, config.tasks)
    return Options(config, manager, given.device)


def run_tasks(
    checkpoint: str | Path, options: Options, device: str, role: str = ""
) -> dict[str, Any]:
    """
    Run the tasks on a checkpoint, read back from disk, and return lm-eval's results.

    What ``--output_path`` asks for is written as lm-eval writes it.

    :param role: goes into the name of the cache, where two models are measured
    :raises ValueError: for a checkpoint that is damaged, or tasks that lm-eval refuses
    """
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.models.huggingface import HFLM

    config = options.config
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as lm-eval's command does
    # Loosely typed: lm-eval takes any model of transformers.
    model: Any = load_checkpoint(checkpoint, device)
    said = dict(config.model_args)
    if config.max_batch_size is not None:
        said["max_batch_size"] = config.max_batch_size
    with _quiet("lm_eval.models.huggingface"):
        lm = HFLM(
            pretrained=model,
            tokenizer=tokenizer_of(checkpoint),
            batch_size=config.batch_size,
            **said,
        )
    tracker = EvaluationTracker(
        **{"output_path": config.output_path, **config.hf_hub_log_args}
    )
    caching = config.cache_requests
    seeds = dict(zip(SEEDS, config.seed or (), strict=False))
    try:
        results = simple_evaluate(
            model=lm,
            model_args={"pretrained": str(checkpoint), **config.model_args},
            tasks=config.tasks,
            num_fewshot=config.num_fewshot,
            batch_size=config.batch_size,
            max_batch_size=config.max_batch_size,
            device=device,
            use_cache=config.use_cache and config.use_cache + role,
            cache_requests=caching.get("cache_requests", False),
            rewrite_requests_cache=caching.get("rewrite_requests_cache", False),
            delete_requests_cache=caching.get("delete_requests_cache", False),
            limit=config.limit,
            samples=config.samples,
            check_integrity=config.check_integrity,
            write_out=config.write_out,
            log_samples=True,  # flips are counted item by item
            evaluation_tracker=tracker,
            system_instruction=config.system_instruction,
            apply_chat_template=config.apply_chat_template,
            fewshot_as_multiturn=config.fewshot_as_multiturn,
            gen_kwargs=config.gen_kwargs,
            task_manager=options.manager,
            verbosity=config.verbosity,
            predict_only=config.predict_only,
            confirm_run_unsafe_code=config.confirm_run_unsafe_code,
            metadata=config.metadata,
            **seeds,
        )
    except AssertionError as error:  # so lm-eval says what was asked wrongly
        raise ValueError(f"lm-eval refuses this: {error}") from error
    found: dict[str, Any] = dict(results or {})
    samples = found.pop("samples")
    tracker.save_results_aggregated(
        results=found, samples=samples if config.log_samples else None
    )
    if config.log_samples:
        for task, of in samples.items():
            tracker.save_results_samples(task_name=task, samples=of)
    return {**found, "samples": samples}


def lm_eval_tables(results: Mapping[str, Any]) -> str:
    """The results as lm-eval itself shows them, with its groups of tasks."""
    from lm_eval.utils import make_table

    shown: list[str] = [make_table(results)]
    if results.get("groups"):
        shown.append(make_table(results, "groups"))
    return "\n".join(shown)


def task_results(
    ours: Mapping[str, Any], dense: Mapping[str, Any] | None = None
) -> list[TaskResult]:
    """
    Every metric of every task, beside the dense model's where it was measured.

    :param ours: lm-eval's results, with the samples of every task
    """
    rows = []
    for task, values in ours["results"].items():
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not _is_number(value):
                continue
            other = {} if dense is None else dense["results"].get(task, {})
            error = f"{metric}_stderr,{filtered}"
            counts = ours.get("n-samples", {}).get(task, {})
            shots = ours.get("n-shot", {}).get(task)
            better = ours.get("higher_is_better", {}).get(task, {}).get(metric)
            rows.append(
                TaskResult(
                    task=f"{task} ({shots}-shot)" if shots else task,
                    metric=key.removesuffix(_WITHOUT_FILTER),
                    value=value,
                    error=_number(values.get(error)),
                    items=counts.get("effective"),
                    dense=_number(other.get(key)),
                    dense_error=_number(other.get(error)),
                    flips=None if dense is None else _flips(ours, dense, task, key),
                    higher_is_better=better is not False,
                )
            )
    return rows


def _flips(
    ours: Mapping[str, Any], dense: Mapping[str, Any], task: str, key: str
) -> float | None:
    """The share of items that exactly one is right about; None without right and wrong."""
    metric, _, filtered = key.partition(",")
    mine, theirs = (
        {
            sample["doc_id"]: sample[metric]
            for sample in results["samples"].get(task, ())
            if sample["filter"] == filtered and metric in sample
        }
        for results in (ours, dense)
    )
    if not mine or mine.keys() != theirs.keys():
        return None
    pairs = [(mine[item], theirs[item]) for item in mine]
    if not all(_is_number(x) and x in (0, 1) for pair in pairs for x in pair):
        return None
    return float(sum(a != b for a, b in pairs) / len(pairs))


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Without what a logger says where lm-eval does not see what is done here."""
    log = logging.getLogger(name)
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def _manager(config: Any) -> Any:
    """
    What makes the tasks: of ``--include_path`` alone where that has them all.

    lm-eval's own tasks are more than ten thousand files, which take seconds to list.
    """
    from lm_eval.tasks import TaskManager

    if config.include_path is not None:
        manager = TaskManager(
            include_path=config.include_path,
            include_defaults=False,
            metadata=config.metadata,
        )
        asked = [name for names in config.tasks for name in str(names).split(",")]
        if set(asked) <= set(manager.all_subtasks):
            config.tasks = asked
            return manager
    return config.process_tasks(config.metadata)


def _load_data(manager: Any, tasks: Sequence[Any]) -> None:
    """Load what the tasks ask, before any model is."""
    try:
        with _quiet("lm_eval"):  # it logs a traceback, too
            manager.load(tasks)
    except (
        Exception
    ) as error:  # of datasets, of huggingface_hub, or of a task's own code
        names = ", ".join(str(task) for task in tasks)
        lines = str(error).strip().splitlines() or [type(error).__name__]
        remedy = (
            "; where the hub cannot be reached, take a task whose data was loaded before, "
            "or is a local file"
        )
        raise ValueError(
            f"the data of --tasks {names} cannot be loaded: {lines[0]}"
            + remedy * isinstance(error, ConnectionError)
        ) from error


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _is_number(value: object) -> bool:
    return _number(value) is not None
