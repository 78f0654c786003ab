# SPDX-License-Identifier: Apache-2.0
"""
Prune a model in memory with several settings, on every rank that there is.

``torchrun --nproc-per-node 2 api_runs.py FOLDER``: FOLDER holds ``dense``, ``rows.json``
and ``settings.json``, by name, and gets a checkpoint for each, ``NAME-RANKS``.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import nm_permute_plugin as nmp
from nm_permute_plugin.pruning import ranks


def main(folder: Path) -> None:
    """Prune and save, once for all settings."""
    ranks.begin(torch.device("cpu"))
    rows = json.loads((folder / "rows.json").read_text())
    samples = [{"input_ids": torch.tensor([row])} for row in rows]
    for name, given in json.loads((folder / "settings.json").read_text()).items():
        model = AutoModelForCausalLM.from_pretrained(
            folder / "dense", dtype=torch.float32
        ).eval()
        settings = nmp.Settings.model_validate(given)
        data = nmp.read_samples(model, samples, batch_size=settings.batch_size)
        pruned = nmp.prune(model, data, settings)
        nmp.save(model, folder / f"{name}-{ranks.count()}", pruned)
    ranks.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
