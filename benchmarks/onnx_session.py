# SPDX-License-Identifier: Apache-2.0
"""
Run an exported model in onnxruntime; ``export_onnx.py`` calls this beside onnxruntime.

``python onnx_session.py MODEL.onnx TOKENS.npy LOGITS.npy`` reads tokens, [rows, tokens],
writes their logits, and prints the versions of what made and ran the model as JSON. The
second half of the tokens is read with the cache of the first.
"""

import json
import sys
from importlib.metadata import version

import numpy as np
import onnxruntime

PACKAGES = ("optimum", "optimum-onnx", "onnx", "onnxruntime", "torch", "transformers")


def main(model: str, tokens: str, logits: str) -> None:
    """Read, run in two halves, write."""
    ids = np.load(tokens)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    rows, half = len(ids), ids.shape[1] // 2
    cache = {
        entry.name: np.zeros((rows, entry.shape[1], 0, entry.shape[3]), np.float32)
        for entry in session.get_inputs()
        if entry.name.startswith("past_key_values")
    }
    taken = {entry.name for entry in session.get_inputs()}
    outputs = [entry.name for entry in session.get_outputs()]
    found = []
    for first, last in ((0, half), (half, ids.shape[1])):
        places = np.broadcast_to(np.arange(first, last), (rows, last - first))
        feed = {
            "input_ids": ids[:, first:last],
            "attention_mask": np.ones((rows, last), np.int64),
            "position_ids": np.ascontiguousarray(places),
        }
        feed = {name: value for name, value in feed.items() if name in taken}
        got = dict(zip(outputs, session.run(outputs, feed | cache), strict=True))
        found.append(got["logits"])
        cache = {
            name: got[name.replace("past_key_values", "present")] for name in cache
        }
    np.save(logits, np.concatenate(found, axis=1))
    print(json.dumps({package: version(package) for package in PACKAGES}))


if __name__ == "__main__":
    main(*sys.argv[1:])
