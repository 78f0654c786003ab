# SPDX-License-Identifier: Apache-2.0
"""
Does a checkpoint say the same in onnxruntime as in torch, exported by optimum?

Usage::

    python benchmarks/export_onnx.py CHECKPOINT --python PYTHON [--out FOLDER]

PYTHON is an interpreter with ``optimum-onnx[onnxruntime]``, which wants transformers 4: the
checkpoint is converted to the format ``dense`` with a config of that version. Logits are
compared in float32, with those of the checkpoint as it is, read by transformers 5.
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nm_permute_plugin.checkpoint.writer import convert
from nm_permute_plugin.evaluation.model_names import must_be_model
from nm_permute_plugin.evaluation.pretrained import load_model

SESSION = Path(__file__).parent / "onnx_session.py"
ROWS, TOKENS = 2, 64


@dataclass(frozen=True)
class Compared:
    """
    How far onnxruntime is from torch.

    :param error: the largest difference of a logit
    :param largest: the largest logit of torch, by its absolute value
    :param same: the share of tokens whose most likely successor is the same
    :param seconds: of the export
    :param size: of the exported file, in bytes
    :param versions: of what exported and ran it
    """

    error: float
    largest: float
    same: float
    seconds: float
    size: int
    versions: dict[str, str]


def compare(checkpoint: Path, python: str, out: Path) -> Compared:
    """
    Export a checkpoint, and run it on random tokens in torch and in onnxruntime.

    :param python: the interpreter beside optimum's exporter and onnxruntime
    :param out: a folder that takes the dense checkpoint (``dense``) and ``onnx``
    :raises RuntimeError: with the exporter's last words, if it stops
    """
    must_be_model(checkpoint)
    model = load_model(checkpoint, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    count = model.config.get_text_config().vocab_size
    ids = torch.randint(count, (ROWS, TOKENS), generator=generator)
    with torch.no_grad():
        wanted = model(ids).logits.numpy()
    del model
    out.mkdir(parents=True, exist_ok=True)
    convert(checkpoint, out / "dense", "dense", legacy=True)
    np.save(out / "tokens.npy", ids.numpy())
    started = time.perf_counter()
    _run(
        [python, "-m", "optimum.commands.optimum_cli", "export", "onnx"]
        + ["--model", str(out / "dense"), "--task", "text-generation-with-past"]
        + ["--dtype", "fp32", str(out / "onnx")]
    )
    seconds = time.perf_counter() - started
    file = out / "onnx" / "model.onnx"
    files = [str(x) for x in (file, out / "tokens.npy", out / "logits.npy")]
    versions = json.loads(_run([python, str(SESSION), *files]).splitlines()[-1])
    found = np.load(out / "logits.npy")
    return Compared(
        error=float(np.abs(found - wanted).max()),
        largest=float(np.abs(wanted).max()),
        same=float((found.argmax(-1) == wanted.argmax(-1)).mean()),
        seconds=seconds,
        size=sum(x.stat().st_size for x in file.parent.glob("model.onnx*")),
        versions=versions,
    )


def _run(words: list[str]) -> str:
    """Run a command of the other environment; what it wrote to stdout."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env["HF_HUB_OFFLINE"] = "1"
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} stopped:\n{done.stderr[-3000:]}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description="See the head of this file.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--python", required=True)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp(prefix="nm-permute-onnx-"))
    found = compare(args.checkpoint, args.python, out)
    print("| largest difference | largest logit | same next token | export | file |")
    print("|---|---|---|---|---|")
    print(
        f"| {found.error:.1e} | {found.largest:.1f} | {found.same:.1%} | "
        f"{found.seconds:.0f} s | {found.size / 1e6:.0f} MB |"
    )
    print(", ".join(f"{name} {value}" for name, value in found.versions.items()))


if __name__ == "__main__":
    main()
