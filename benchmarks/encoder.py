# SPDX-License-Identifier: Apache-2.0
"""
How near a pruned text encoder's embeddings stay to the dense model's, by method.

    python benchmarks/encoder.py MODEL --train brown.txt --test wikitext-2/test.txt

MODEL has no head (BertModel, MiniLM for example). Each run loads it, permutes and prunes
it, saves it, reads it back, and measures the mean cosine between its embeddings of test
rows (the mean of the final hidden states, unit length) and the dense model's.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig

from compared import arguments, compare
from nm_permute_plugin.evaluation.classification import mean_cosine
from nm_permute_plugin.evaluation.pretrained import model_class
from nm_permute_plugin.pruning.data import split_text
from nm_permute_plugin.pruning.pipeline import Record
from nm_permute_plugin.pruning.reading import rows_of
from texts import text_rows


def main() -> None:
    parser = arguments(__doc__, "encoder")
    parser.add_argument("--train", type=Path, nargs="+", required=True)
    parser.add_argument("--test", type=Path, nargs="+", required=True)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--test-rows", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=128, help="of a row")
    args = parser.parse_args()
    train = text_rows(args.model, args.train, args.rows, args.tokens)
    test = torch.stack(text_rows(args.model, args.test, args.test_rows, args.tokens))
    dense = _embeddings(args.model, test, args)
    print(f"{len(train)} training rows, {len(test)} test rows of {args.tokens} tokens")
    vocabulary = AutoConfig.from_pretrained(args.model).vocab_size
    rows = rows_of([{"input_ids": torch.stack(train)}], vocabulary)

    def measure(folder: Path, record: Record) -> Mapping[str, float]:
        return {"fidelity": mean_cosine(_embeddings(folder, test, args), dense)}

    compare(
        args,
        {"fidelity": 1.0},
        lambda settings: split_text(
            rows, settings.batch_size, settings.validation.share, settings.seed
        ),
        measure,
    )


def _embeddings(folder: Path, rows: Tensor, args: argparse.Namespace) -> Tensor:
    model = model_class(folder).from_pretrained(folder, dtype="auto")
    model = model.to(args.device).eval()
    found = []
    with torch.no_grad():
        for batch in rows.split(args.batch_size):
            hidden = model(input_ids=batch.to(args.device)).last_hidden_state
            found.append(F.normalize(hidden.float().mean(1), dim=-1).cpu())
    return torch.cat(found)


if __name__ == "__main__":
    main()
