# SPDX-License-Identifier: Apache-2.0
"""``nm-permute adapt``: carry a LoRA adapter of the base model over to its checkpoint."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument


def adapt(
    adapter: Annotated[
        Path, Argument(help="PEFT folder of a LoRA adapter of the base model.")
    ],
    checkpoint: Annotated[
        Path, Argument(help="Folder of the pruned or folded checkpoint.")
    ],
    out: Annotated[Path, Argument(help="Folder of the new adapter, new or empty.")],
) -> None:
    """Permute a LoRA adapter of the base model as the checkpoint's channels were."""
    from nm_permute_plugin.evaluation.model_names import must_be_model
    from nm_permute_plugin.evaluation.pretrained import empty_model
    from nm_permute_plugin.pruning.adapter import adapt as adapt_folder

    must_be_model(checkpoint)
    moved, count = adapt_folder(adapter, checkpoint, out, empty_model(checkpoint))
    said = f"{moved} of {count} tensors have moved to the places of {checkpoint}'s channels"
    if not moved:
        said = f"a copy of {adapter}, which fits {checkpoint} as it is"
    typer.echo(
        f"{out}: {said}; next: PeftModel.from_pretrained(model of {checkpoint}, "
        f"{str(out)!r})"
    )
