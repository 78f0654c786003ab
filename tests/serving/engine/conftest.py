# SPDX-License-Identifier: Apache-2.0
"""Pruned checkpoints of a real model cut small, and the interpreter that has vLLM."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
import yaml
from helpers import draw_no_pages
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    CohereConfig,
    CohereForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RobertaConfig,
    RobertaModel,
)

from nm_permute_plugin.checkpoint.config import SparsityConfig
from nm_permute_plugin.checkpoint.writer import convert
from nm_permute_plugin.cli.embedded import embedded_text
from nm_permute_plugin.cli.prune import calibration_rows, prune_checkpoint
from nm_permute_plugin.evaluation.corpus import Corpus

collect_ignore = ["scripts"]  # for the interpreter that has vLLM
SCRIPTS = Path(__file__).parent / "scripts"
ROOT = Path(__file__).parents[3]

_TENSOR = {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": True}
_GROUP = {
    "targets": ["Linear"],
    "weights": _TENSOR,
    "input_activations": {**_TENSOR, "dynamic": False},
}
_CACHE = {**_TENSOR, "type": "float", "dynamic": False}
SCHEMES: dict[str, dict[str, object]] = {
    "bf16": {},
    "fp8": {"scheme": "FP8_DYNAMIC", "targets": ["Linear"]},
    "fp8-static": {"scheme": "FP8", "targets": ["Linear"]},
    "int8": {"scheme": "W8A8", "targets": ["Linear"]},
    "int8-cache": {"scheme": "W8A8", "targets": ["Linear"], "kv_cache_scheme": _CACHE},
    "int8-static": {"config_groups": {"group_0": _GROUP}},
}
"""How each kind is quantized after it has been pruned; static: one scale a tensor; cache:
with scales for the cache of keys and values."""

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 96}
FEW = {"num_local_experts": 4, "num_experts_per_tok": 2}
HEAD_NORMS = {"use_qk_norm": True, "tie_word_embeddings": True}
RANDOM = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3-moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, EXPERTS),
    "qwen2-moe": (Qwen2MoeConfig, Qwen2MoeForCausalLM, SHARED),
    "gpt-neox": (GPTNeoXConfig, GPTNeoXForCausalLM, {"num_key_value_heads": 4}),
    "cohere": (CohereConfig, CohereForCausalLM, HEAD_NORMS),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, {}),
}
"""
Random models: one whose q, k and v have biases, one of experts, one that has a shared one
as well, one whose checkpoint has q, k and v in one, one with a tied head, and one that vLLM
runs by transformers' own code.
"""
MIXTRAL = {"mixtral": (MixtralConfig, MixtralForCausalLM, FEW)}
GATE = "re:.*shared_expert_gate"
MORE = {
    "budget": {"budget": {"dense_share": 0.3}},
    "qwen2-moe": {"ignore": ["lm_head", GATE]},
}
"""Fields of the recipe that some kinds have beside those of all."""
ENCODERS = {
    "bert": (BertConfig, BertModel, {"num_key_value_heads": 4}),
    "roberta": (RobertaConfig, RobertaModel, {"num_key_value_heads": 4}),
}

# One thread: what is computed twice is the same twice. Little memory for the cache.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}

PATIENCE = 1800  # seconds: engines one after the other, on busy machines

Pruned = Callable[[str, str], Path]
RunEngine = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """The interpreter that has vLLM; the test is skipped where there is none."""
    found = os.environ.get("NM_PERMUTE_VLLM_PYTHON")
    if not found:
        pytest.skip("NM_PERMUTE_VLLM_PYTHON names no interpreter with vLLM")
    return found


@pytest.fixture(scope="session")
def engine_environment() -> Mapping[str, str]:
    """What a process of vLLM finds in its environment."""
    return os.environ | ENVIRONMENT


class Forks:
    """Runs scripts beside vLLM, in forks of one process that has imported it: forks.py."""

    def __init__(
        self, command: list[str], environment: Mapping[str, str], folder: Path
    ) -> None:
        self._folder, self._count = folder, 0
        self._log = folder / "forks.txt"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def run(
        self, command: list[str], environment: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """Run a script to its end."""
        self._count += 1
        outputs = [self._folder / f"{self._count}.{name}" for name in ("out", "err")]
        job = {
            "script": command[0],
            "words": command[1:],
            "environment": environment,
            "stdout": str(outputs[0]),
            "stderr": str(outputs[1]),
            "timeout": PATIENCE,
        }
        print(json.dumps(job), file=self._process.stdin, flush=True)
        status = self._process.stdout.readline()
        assert status, f"the process of the forks ended: {self._log.read_text()}"
        said = [path.read_text() for path in outputs]
        return subprocess.CompletedProcess(command, int(status), *said)

    def close(self) -> None:
        """End the process, which waits for the next script."""
        self._process.communicate()


@pytest.fixture(scope="session")
def forks(
    vllm_python: str,
    engine_environment: Mapping[str, str],
    pytestconfig: pytest.Config,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Forks]:
    """The process that has imported vLLM, in which coverage has not slowed the imports."""
    command = [vllm_python, str(SCRIPTS / "forks.py")]
    if pytestconfig.pluginmanager.hasplugin("_cov"):
        command.append(str(ROOT / ".coverage"))
    forks = Forks(command, engine_environment, tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()


@pytest.fixture(scope="session")
def run_engine(
    forks: Forks,
    vllm_python: str,
    engine_environment: Mapping[str, str],
    pytestconfig: pytest.Config,
) -> RunEngine:
    """
    A factory: ``run_engine("load.py", ...)`` runs a script beside vLLM to its end.

    ``alone`` starts an interpreter for it, where it matters what is imported when.
    """
    command = [vllm_python]
    if pytestconfig.pluginmanager.hasplugin("_cov"):
        data = f"--data-file={ROOT / '.coverage'}"
        source = "--source=nm_permute_plugin"
        command += ["-m", "coverage", "run", "--parallel-mode", data, source]

    def run(
        script: str, *words: object, alone: bool = False, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        line = [str(SCRIPTS / script), *map(str, words)]
        if not alone:
            return forks.run(line, environment)
        return subprocess.run(
            [*command, *line],
            env={**engine_environment, **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )

    return run


@pytest.fixture(scope="session")
def engine_says(run_engine: RunEngine) -> Callable[..., Any]:
    """A factory: what a script beside vLLM prints last, as JSON."""

    def say(script: str, **how: bool) -> Any:
        done = run_engine(script, **how)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return say


@pytest.fixture(scope="session")
def cut_model(smollm2: Path, made_once) -> Path:
    """
    SmolLM2-135M-Instruct cut small: real weights, of 4 layers and 6 of 9 heads.

    The heads that are left, and their keys and values, fall into two halves.
    """

    def make(out: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
        config = model.config
        config.update(
            {
                "num_hidden_layers": 4,
                "num_attention_heads": 6,
                "num_key_value_heads": 2,
                "head_dim": 64,
            }
        )
        cut = LlamaForCausalLM(config).to(torch.bfloat16)
        weights = model.state_dict()
        for name, weight in cut.state_dict().items():
            weight.copy_(weights[name][tuple(map(slice, weight.shape))])
        cut.save_pretrained(out)
        AutoTokenizer.from_pretrained(smollm2).save_pretrained(out)

    return made_once("cut", make)


@pytest.fixture(scope="session")
def random_model(
    cut_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A factory: the folder of a random model, with the tokenizer of the other."""

    def make(kind: str) -> Path:
        tokenizer = AutoTokenizer.from_pretrained(cut_model)
        config_class, model_class, more = (RANDOM | MIXTRAL | ENCODERS)[kind]
        config = config_class(**SIZES | more, vocab_size=len(tokenizer))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = model_class(config)
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.data.uniform_(0.5, 1.5)
                else:
                    parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
        out = tmp_path_factory.mktemp(kind) / "dense"
        model.to(torch.bfloat16).save_pretrained(out)
        tokenizer.save_pretrained(out)
        return out

    return make


@pytest.fixture(scope="session")
def pruned(
    cut_model: Path,
    random_model: Callable[[str], Path],
    made_once,
    tmp_path_factory: pytest.TempPathFactory,
) -> Pruned:
    """A factory: the folder of ``("fp8", "dense")``, pruned by our recipe once."""

    def prune(kind: str, out: Path) -> None:
        recipe = tmp_path_factory.mktemp("recipe") / f"{kind}.yaml"
        recipe.write_text(_recipe(SCHEMES.get(kind, {}), MORE.get(kind, {})))
        is_random = kind in RANDOM | MIXTRAL | ENCODERS
        source = random_model(kind) if is_random else cut_model
        rows = calibration_rows(source, Corpus(embedded_text().train), 8, 128)
        with pytest.MonkeyPatch.context() as patch:
            draw_no_pages(patch)
            prune_checkpoint(source, recipe, out, rows, "cpu")

    def make(kind: str, format: str) -> Path:
        if format == "dense":
            sparse = make(kind, "sparse-24-bitmask")
            return made_once(f"{kind}-dense", lambda out: convert(sparse, out, "dense"))
        return made_once(f"{kind}-sparse", lambda out: prune(kind, out))

    return make


@pytest.fixture(scope="session")
def said(
    pruned: Pruned, run_engine: RunEngine, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, dict]:
    """What each checkpoint's engine says, one engine after the other in one process."""
    folder = tmp_path_factory.mktemp("said")
    paths = {}
    for kind in ("bf16", "budget", *RANDOM, "fp8", "int8", "int8-static"):
        paths[f"{kind}-dense"] = pruned(kind, "dense")
        paths[f"{kind}-sparse"] = pruned(kind, "sparse-24-bitmask")
    # as llm-compressor 0.10 left it: said to be 2:4, zeros stored
    declared = copytree(pruned("int8", "dense"), folder / "declared")
    block = SparsityConfig(format="dense", targets=("Linear",), ignore=("lm_head",))
    config = json.loads((declared / "config.json").read_text())
    config["quantization_config"]["sparsity_config"] = block.to_json()
    (declared / "config.json").write_text(json.dumps(config))
    paths["int8-declared"] = declared
    out = folder / "said.json"
    done = run_engine("generate.py", out, *paths.values())
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    by_name = {name: found[str(path)] for name, path in paths.items()}
    return {**by_name, "log": {"lines": (done.stdout + done.stderr).splitlines()}}


def _recipe(scheme: Mapping[str, object], more: Mapping[str, object]) -> str:
    order = {"method": "search", "search": {"rounds": 1}, **more}
    stage = {"permutation_modifiers": {"LearnablePermutationModifier": order}}
    if scheme:
        fields = {**scheme, "ignore": ["lm_head"]}
        stage["quantization_modifiers"] = {"QuantizationModifier": fields}
    return yaml.safe_dump({"prune_stage": stage})
