# SPDX-License-Identifier: Apache-2.0
"""The real engine says the same with sparse checkpoints as with their dense forms."""

import json
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

RECORD = "nm_permute/report.json"
SPARSE = "16 of 16 2:4 layers are served sparse"
FAMILIES = ["qwen2", "qwen3-moe", "qwen2-moe", "gpt-neox", "cohere", "olmo2"]
KINDS = ["bf16", "budget", *FAMILIES, "fp8", "int8", "int8-static"]


def same(left: dict, right: dict) -> bool:
    return all(left[key] == right[key] for key in ("tokens", "logprobs"))


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_logprobs_are_those_of_the_dense_checkpoint(said, kind: str) -> None:
    assert same(said[f"{kind}-sparse"], said[f"{kind}-dense"])
    assert said[f"{kind}-sparse"]["config"] == "Sparse24Config"
    assert [len(tokens) for tokens in said[f"{kind}-sparse"]["tokens"]] == [12, 12]


def test_quantizing_changes_what_is_said(said) -> None:
    # that it does shows that the comparison above can fail
    assert not same(said["bf16-sparse"], said["int8-sparse"])
    assert not same(said["fp8-sparse"], said["int8-sparse"])
    for family in FAMILIES:
        assert not same(said[f"{family}-sparse"], said["bf16-sparse"])


def test_2of4_with_stored_zeros_is_served_too(said) -> None:
    assert said["int8-declared"]["config"] == "Sparse24Config"
    assert same(said["int8-declared"], said["int8-dense"])


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_a_quantized_checkpoint_that_is_not_sparse_keeps_the_stock_class(
    said, kind: str
) -> None:
    assert said[f"{kind}-dense"]["config"] == "CompressedTensorsConfig"


def test_without_a_gpu_one_warning_names_layers_and_reason(said, pruned) -> None:
    warnings = [line for line in said["log"]["lines"] if "served dense" in line]
    assert len(warnings) == 12  # one for each checkpoint that is claimed
    counts = re.findall(r"(\d+ of \d+) 2:4 layers", "\n".join(warnings))
    # in each of four layers of mixtures: two linears of attention and the experts, and two
    # linears of the shared one; a budget left groups of linears dense
    record = json.loads((pruned("budget", "sparse-24-bitmask") / RECORD).read_text())
    left = sum(not group["stays_dense"] for group in record["budget"]["groups"])
    assert 8 < left < 16
    expected = ["16 of 16"] * 9 + ["12 of 12", "20 of 20", f"{left} of {left}"]
    assert sorted(counts) == sorted(expected)
    for warning in warnings:
        assert re.search(r"from model\.layers\.0\.(self_attn|attention)\.", warning)
        assert "no CUDA device" in warning


def test_the_way_of_a_gpu_says_the_same_with_a_dense_product(
    pruned, run_engine, tmp_path: Path
) -> None:
    out = tmp_path / "said.json"
    kinds = ["bf16", "int8", "int8-static"]  # CPUs do not quantize to fp8
    sparse = [pruned(kind, "sparse-24-bitmask") for kind in kinds]
    dense = [pruned(kind, "dense") for kind in kinds]
    done = run_engine("stand_in.py", out, *sparse, *dense)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count(SPARSE) + done.stdout.count(SPARSE) == 3
    said = json.loads(out.read_text())
    for path, right in zip(sparse, dense, strict=True):
        found, expected = said[str(path)], said[str(right)]
        assert found["tokens"] == expected["tokens"]
        # int8 sums are rounded by another routine; 0.0 as measured with AVX-512
        assert found["logprobs"] == [
            [[[i, pytest.approx(p, abs=0.05)] for i, p in step] for step in answer]
            for answer in expected["logprobs"]
        ]


def test_experts_take_the_way_of_a_gpu_to_the_same_words(
    pruned, run_engine, tmp_path: Path
) -> None:
    out = tmp_path / "said.json"
    forms = ("dense", "sparse-24-bitmask")
    paths = [pruned("qwen2-moe", form) for form in forms]
    done = run_engine("stand_in.py", out, *paths)
    assert done.returncode == 0, done.stderr[-3000:]
    log = done.stdout + done.stderr
    assert log.count("20 of 20 2:4 layers are served sparse") == 1
    dense, sparse = (json.loads(out.read_text())[str(path)] for path in paths)
    # float32 between two products, where vLLM rounds: words as likely change places, and
    # what follows is another text
    alike, off = 0, []
    for number in range(2):
        left, right = dense["tokens"][number], sparse["tokens"][number]
        count = next((i for i in range(12) if left[i] != right[i]), 11)
        alike += count
        for step in range(count + 1):
            likely = dict(dense["logprobs"][number][step])
            found = dict(sparse["logprobs"][number][step])
            off += [abs(found[i] - likely[i]) for i in found.keys() & likely]
    assert alike >= 8  # of 22
    assert sum(off) / len(off) < 0.03


TENSORS = {"tensor_parallel_size": 2}
FEW = {"max_num_batched_tokens": 128, "max_num_seqs": 8}
EXPERTS = {**TENSORS, **FEW, "enable_expert_parallel": True}
STAGES = {**FEW, "pipeline_parallel_size": 2}


@pytest.mark.parametrize(
    ("kind", "script", "options"),
    [
        ("bf16", "generate.py", TENSORS),
        ("mixtral", "generate.py", TENSORS),
        ("mixtral", "parallel.py", EXPERTS),
        ("bf16", "parallel.py", STAGES),
    ],
    ids=["tensors", "tensors of experts", "experts", "stages"],
)
def test_two_workers_say_what_they_say_with_the_dense_checkpoint(
    pruned, run_engine, tmp_path: Path, kind: str, script: str, options: dict
) -> None:
    out = tmp_path / "said.json"
    paths = [pruned(kind, format) for format in ("dense", "sparse-24-bitmask")]
    done = run_engine(
        script,
        out,
        *paths,
        OPTIONS=json.dumps(options),
        VLLM_CPU_OMP_THREADS_BIND="0|0",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    dense, sparse = (json.loads(out.read_text())[str(path)] for path in paths)
    assert same(sparse, dense)
    assert (dense["config"], sparse["config"]) == ("NoneType", "Sparse24Config")


def test_without_the_plugin_vllm_refuses_the_checkpoint_itself(
    pruned, run_engine, tmp_path: Path
) -> None:
    path = pruned("fp8", "sparse-24-bitmask")
    done = run_engine("generate.py", tmp_path / "said.json", path, VLLM_PLUGINS="")
    assert done.returncode != 0
    assert "Sparsity support has been removed from compressed-tensors" in done.stderr
