# SPDX-License-Identifier: Apache-2.0
"""The notebook runs from its first cell to its last, and holds what it printed."""

import base64
import math
import re
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from nbformat import NotebookNode
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nm_permute_plugin.cli.embedded import embedded_text

FILE = Path(__file__).parents[2] / "recipes" / "2of4_in_memory.ipynb"
QUICK = """
from pathlib import Path

work = Path({work!r})
ROWS, TOKENS = 8, 48
ROUNDS, STEPS = 1, 2
WINDOWS = 2
"""
PNG = b"\x89PNG\r\n"
ROW = re.compile(r"^(\w+) +(\d+\.\d\d)(?: +(\d+\.\d)%)? *$", re.M)


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook: NotebookNode) -> str:
    """All text that the cells wrote to stdout."""
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    return "".join(o.text for o in outputs if o.get("name") == "stdout")


def pictures(notebook: NotebookNode) -> list[bytes]:
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    found = [
        output.data["image/png"]
        for output in outputs
        if "image/png" in output.get("data", {})
    ]
    return [base64.b64decode(picture) for picture in found]


def measured(notebook: NotebookNode) -> tuple[dict[str, float], dict[str, float]]:
    """By method: perplexity, and the share of the score that is kept."""
    rows = ROW.findall(printed(notebook))
    values = {name: float(value) for name, value, _ in rows}
    return values, {name: float(kept) for name, _, kept in rows if kept}


@pytest.fixture(scope="module")
def stored() -> NotebookNode:
    return nbformat.read(FILE, 4)


@pytest.fixture
def small_model(tmp_path: Path) -> Path:
    """A folder that holds a tiny random model in place of the real one, as ``dense``."""
    words = ByteLevelBPETokenizer()
    words.train_from_iterator([embedded_text().train[:50_000]], vocab_size=300)
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=300, **size, **heads)
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "dense")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words._tokenizer)
    tokenizer.save_pretrained(tmp_path / "dense")
    return tmp_path


@pytest.mark.slow
def test_it_runs_to_its_end(stored: NotebookNode, small_model: Path) -> None:
    notebook = nbformat.from_dict(stored)
    for cell in code(notebook):
        cell.outputs = []
    (parameters,) = (
        c for c in code(notebook) if "parameters" in c.metadata.get("tags", [])
    )
    parameters.source = QUICK.format(work=str(small_model))
    NotebookClient(notebook, timeout=900, kernel_name="python3").execute()
    perplexity, kept = measured(notebook)
    assert list(perplexity) == ["dense", "wanda", "search", "learned"]
    assert all(math.isfinite(value) for value in perplexity.values())
    assert len(set(perplexity.values())) == 4
    assert kept["wanda"] < kept["search"] < 100
    assert "14 matrices are 2:4, stored as sparse-24-bitmask; faults: 0" in printed(
        notebook
    )
    assert [picture[: len(PNG)] for picture in pictures(notebook)] == [PNG] * 3
    assert {path.name for path in small_model.iterdir()} == {"dense", *kept}


def test_the_cells_ran_in_order_and_nothing_went_wrong(stored: NotebookNode) -> None:
    cells = code(stored)
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} == {"stream", "display_data"}
    assert {o.name for o in outputs if o.output_type == "stream"} == {"stdout"}
    assert len(pictures(stored)) == 3
    assert all(len(picture) > 2_000 for picture in pictures(stored))


def test_what_it_printed_is_what_it_says(stored: NotebookNode) -> None:
    perplexity, kept = measured(stored)
    order = ["dense", "learned", "search", "wanda"]
    assert sorted(perplexity, key=perplexity.__getitem__) == order
    # as the text below the table says
    assert kept["wanda"] < kept["search"] == kept["learned"]
    assert "210 matrices are 2:4" in printed(stored)


def test_it_is_small_and_names_no_folder_of_a_machine(stored: NotebookNode) -> None:
    assert FILE.stat().st_size < 300_000
    said = [str(output) for cell in code(stored) for output in cell.outputs]
    texts = [re.sub(r"'image/png': '[^']*'", "", output) for output in said]
    folder = re.compile(r"(?<![\w.])/[\w.-]+/[\w./-]+|[A-Z]:\\|file:")
    assert [found for text in texts for found in folder.findall(text)] == []
    assert [cell.source for cell in stored.cells if folder.search(cell.source)] == []
