# SPDX-License-Identifier: Apache-2.0
"""``import nm_permute_plugin`` is enough to read sparse files, in any order of imports."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_files import MakeDense

from nm_permute_plugin.checkpoint.writer import convert

READ = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers import auto
sparse, dense, foreign = sys.argv[1:]
def logits(path):
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        return model(torch.arange(32)[None]).logits
assert torch.equal(logits(sparse), logits(dense))
config = AutoConfig.from_pretrained(foreign).quantization_config
made = auto.AutoQuantizationConfig.from_dict(config)
assert type(made).__module__.startswith("transformers."), type(made)
quantizer = auto.AutoHfQuantizer.from_config(made)
assert type(quantizer).__module__.startswith("transformers."), type(quantizer)
assert logits(foreign).isfinite().all()
assert not [f for f in sys.meta_path if getattr(f, "host", "").startswith("transf")]
print("read")
"""

ORDERS = {
    "plugin first": "import nm_permute_plugin",
    "transformers first": "import transformers, nm_permute_plugin",
    "a model class first": (
        "from transformers import LlamaForCausalLM\nimport nm_permute_plugin"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("before", ORDERS.values(), ids=ORDERS)
def test_transformers_reads_sparse_files_after_the_import_alone(
    make_dense: MakeDense, tmp_path: Path, before: str
) -> None:
    dense, foreign = make_dense("bf16"), make_dense("fp8")
    convert(dense, tmp_path / "sparse", "sparse-24-bitmask")
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{before}\n{READ}",
            tmp_path / "sparse",
            dense,
            foreign,
        ],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert run.stdout.splitlines()[-1:] == ["read"], run.stderr
