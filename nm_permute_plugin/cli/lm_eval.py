# SPDX-License-Identifier: Apache-2.0
"""``nm-permute lm-eval``: run lm-eval's tasks on checkpoints, sparse ones included."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from nm_permute_plugin.cli.common import find_device, print_table

PASSED_ON = {"ignore_unknown_options": True}
"""Of typer: options that the command does not know are words, which go to lm-eval."""


def lm_eval(
    checkpoint: Annotated[
        str, Argument(help="Folder of the checkpoint; stands before lm-eval's options.")
    ],
    words: Annotated[
        list[str] | None,
        Argument(
            metavar="--tasks TASK [LM-EVAL'S OPTIONS]",
            help="As `lm-eval run --help` lists them.",
            show_default=False,
        ),
    ] = None,
    dense: Annotated[
        str | None,
        Option(help="Model before pruning, to run the same tasks on and compare with."),
    ] = None,
    card: Annotated[
        bool, Option("--card", help="Put the results into the model card.")
    ] = False,
) -> None:
    """Run tasks of lm-eval on a checkpoint, whatever its format: --tasks TASK.

    All other options are lm-eval's own, and mean what they mean there: --limit,
    --num_fewshot, --batch_size, --device, --include_path, --metadata,
    --apply_chat_template, --output_path, --log_samples (`lm-eval run --help`). As there,
    likelihoods are in the model's dtype: --model_args softmax_dtype=float32 is exacter.

    Printed is lm-eval's own table. With --dense, the dense model answers as well, and one
    table has the figures of both, the recovery, which is the share of the dense ones that
    is kept, and the flips, which is the share of items that exactly one of the two answers
    rightly.

    The results are kept in nm_permute/evaluations.json of a checkpoint that nm-permute
    made.
    """
    if checkpoint.startswith("-"):
        raise ValueError(
            f"the checkpoint stands first, before {checkpoint}: nm-permute lm-eval FOLDER "
            "--tasks TASK"
        )
    from nm_permute_plugin.checkpoint.card_file import CARD
    from nm_permute_plugin.evaluation import harness
    from nm_permute_plugin.evaluation.card import check_keeping, keep, tables
    from nm_permute_plugin.evaluation.model_names import must_be_model
    from nm_permute_plugin.evaluation.pretrained import refuse_perplexity_of
    from nm_permute_plugin.evaluation.results import Evaluations

    harness.require_lm_eval()
    for folder in (checkpoint, dense):
        if folder is not None:
            must_be_model(folder)
            refuse_perplexity_of(folder)
    check_keeping(checkpoint, card)
    options = harness.read_options(words or [])
    device = find_device(options.device)
    ours = harness.run_tasks(checkpoint, options, device)
    theirs = None
    if dense is not None:
        theirs = harness.run_tasks(dense, options, device, role="-dense")
    results = harness.task_results(ours, theirs)
    if theirs is None:
        typer.echo(f"{checkpoint}\n{harness.lm_eval_tables(ours)}")
    else:
        print_table(tables(Evaluations(tasks=tuple(results))))
    keep(checkpoint, tasks=results, card=card)
    if card:
        typer.echo(f"added to {Path(checkpoint) / CARD}")
