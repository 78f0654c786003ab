# SPDX-License-Identifier: Apache-2.0
"""What all tests share: the hypothesis profile, a seeded generator and tiny models."""

import fcntl
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange
from hypothesis import settings
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitImageProcessorPil,
    PreTrainedModel,
)

from nm_permute_plugin.cli.embedded import write_embedded_model
from nm_permute_plugin.cli.logs import QUIET
from nm_permute_plugin.pruning.problem import Problem
from nm_permute_plugin.specs.exactness import random_perms
from nm_permute_plugin.specs.spec import ResolvedSpec

# One model forward takes longer than hypothesis' 200 ms; no database in the work tree.
settings.register_profile("nm_permute", deadline=None, max_examples=40, database=None)
settings.load_profile("nm_permute")

# On tiny tensors threads only wait for each other.
torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(Path(__file__).parent))  # for helpers.py, in every folder
import tiny_models  # noqa: E402
from helpers import draw_no_pages  # noqa: E402

TinyModel = Callable[..., PreTrainedModel]
LegalPerms = Callable[..., dict[str, Tensor]]
Checkpoint = Callable[..., Path]
MadeOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded source of random numbers."""
    return torch.Generator().manual_seed(20260222)


@pytest.fixture
def tiny_model() -> Iterator[TinyModel]:
    """
    A factory: ``tiny_model("llama", num_key_value_heads=1)`` is a random model.

    Every parameter is random, norm weights and biases too: a fold that forgets one of
    them shows in the logits only if it is not constant.
    """
    with torch.random.fork_rng(devices=[]):
        yield tiny_models.tiny_model


@pytest.fixture
def resolve_model() -> Callable[..., ResolvedSpec]:
    """A factory: the resolved spec of a model whose linears are all pruned 2:4."""
    return tiny_models.resolve_model


@pytest.fixture
def legal_perms() -> LegalPerms:
    """A factory: a random permutation of every space that stays inside the segments."""
    return random_perms


@pytest.fixture
def newest_is_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation samples like whatever they see last: the orders of all spaces move."""
    losses = itertools.count(0, -1)
    monkeypatch.setattr(Problem, "validate", lambda *arguments: float(next(losses)))


@pytest.fixture
def tokens() -> Tensor:
    """Three rows of twelve tokens that every tiny model knows."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(tiny_models.VOCABULARY, (3, 12), generator=generator)


@pytest.fixture
def tiny_checkpoint(tmp_path: Path, tiny_model: TinyModel) -> Checkpoint:
    """A factory: the folder of a tiny random model and of a tokenizer that fits it."""

    def save(architecture: str = "llama", name: str = "dense", **options) -> Path:
        model = tiny_model(architecture, **options)
        return tiny_models.save(model, tmp_path / name)

    return save


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """
    A factory: a folder that is made by the first process of the tests that wants it.

    ``made_once("cut", make)`` calls ``make`` with the folder's path if nobody has; where
    another process does so at the moment, it waits.
    """
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent

    def once(name: str, make: Callable[[Path], object]) -> Path:
        folder, mark = base / "made" / name, base / "made" / f"{name}.made"
        folder.parent.mkdir(exist_ok=True)
        with mark.open("a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if mark.stat().st_size == 0:
                shutil.rmtree(folder, ignore_errors=True)
                make(folder)
                lock.write("made")
        return folder

    return once


@pytest.fixture(scope="session")
def smollm2(made_once: MadeOnce) -> Path:
    """SmolLM2-135M-Instruct as a transformers folder, which nobody may write to."""
    return made_once("smollm2", write_embedded_model)


@pytest.fixture(scope="session")
def trained_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model that has learned ``chain_rows``: pruning hurts it."""
    with torch.random.fork_rng(devices=[]):
        model = tiny_models.tiny_model("llama").train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for step in range(120):
            rows = tiny_models.chain_rows(16, 32, seed=step)
            model(rows, labels=rows).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return tiny_models.save(model.eval(), tmp_path_factory.mktemp("trained") / "dense")


@pytest.fixture(scope="session")
def chain_rows() -> Callable[..., Tensor]:
    """A factory: rows of tokens where nine of ten follow from the one before."""
    return tiny_models.chain_rows


@pytest.fixture(scope="session")
def words() -> Callable[[Tensor], str]:
    """A factory: the text that a tiny checkpoint's tokenizer turns into the tokens."""
    return lambda tokens: " ".join(
        f"w{token:02}" for token in tokens.flatten().tolist()
    )


@pytest.fixture
def image_checkpoint(tmp_path: Path) -> Checkpoint:
    """A factory: the folder of a tiny random model of 16 x 16 images, and a processor."""

    def save(case: str = "dinov2-labels", name: str = "dense", **options) -> Path:
        sys.path.insert(0, str(Path(__file__).parent / "specs"))
        from zoo import ZOO, tiny

        (values,) = [entry.values for entry in ZOO if entry.id == case]
        architecture, config, size = values
        tiny(architecture, config, size | options, torch.float32).save_pretrained(
            tmp_path / name
        )
        BitImageProcessorPil(
            size={"height": 16, "width": 16}, do_center_crop=False
        ).save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three class folders with six noisy pictures each, one colour a class."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(8)
    for channel, name in enumerate(("blue", "green", "red")):
        (folder / name).mkdir()
        for number in range(6):
            values = torch.randint(0, 80, (20, 24, 3), generator=generator)
            values[..., channel] += 150
            picture = Image.fromarray(values.to(torch.uint8).numpy())
            picture.save(folder / name / f"{number}.png")
    return folder


@pytest.fixture
def pages() -> None:
    """Asked for by tests whose checkpoints shall get their pages: see ``no_pages``."""


@pytest.fixture(autouse=True)
def loud(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command with --quiet silences all that its process starts: this test's alone."""
    for name in QUIET:
        monkeypatch.setenv(name, "")  # so that it is put back at the end
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def no_pages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no page at a save in this process: it takes longer than most of the tests."""
    if "pages" not in request.fixturenames:
        draw_no_pages(monkeypatch)


@pytest.fixture
def run_oneshot(chain_rows) -> Callable[..., PreTrainedModel]:
    """A factory: the model of a folder after ``oneshot``, which saves it to ``out``."""

    def run(
        folder: Path,
        recipe: object,
        out: Path | None = None,
        rows: list[list[int]] | None = None,
        **options: object,
    ) -> PreTrainedModel:
        from datasets import Dataset
        from llmcompressor import oneshot

        ids = chain_rows(12, 32, seed=999).tolist() if rows is None else rows
        return oneshot(
            **{
                "model": AutoModelForCausalLM.from_pretrained(folder, dtype="auto"),
                "tokenizer": AutoTokenizer.from_pretrained(folder),
                "recipe": recipe,
                "dataset": Dataset.from_dict({"input_ids": ids}),
                "max_seq_length": 64,
                "num_calibration_samples": len(ids),
                "shuffle_calibration_samples": False,
                "output_dir": None if out is None else str(out),
            }
            | options
        )

    return run


@pytest.fixture(scope="session")
def run_triton(pytestconfig: pytest.Config) -> Callable[[Path], Any]:
    """
    A runner: what a script prints last, read as JSON, in a process of its own.

    Triton decides whether to interpret when it is first imported, which torch may have
    done long before a test starts.
    """
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    command = [sys.executable]
    if pytestconfig.pluginmanager.hasplugin("_cov"):
        data = f"--data-file={ROOT / '.coverage'}"
        source = "--source=nm_permute_plugin"
        command += ["-m", "coverage", "run", "--parallel-mode", data, source]

    def run(script: Path) -> Any:
        done = subprocess.run(
            [*command, str(script)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture
def offload_to() -> Callable[[nn.Module, str, Path], None]:
    """A helper: offload all weights to ``cpu`` or ``disk``, as llm-compressor does."""
    offload = pytest.importorskip("compressed_tensors.offload")

    def to(model: nn.Module, place: str, folder: Path) -> None:
        options = {"offload_dir": str(folder)} if place == "disk" else {}
        for module in list(model.modules()):
            if len(module._parameters):
                offload.offload_module(module, "cpu", place, **options)

    return to


@pytest.fixture
def assert_exactly() -> Callable[..., None]:
    """A check: every linear but the named ones keeps exactly N of M, those are dense."""

    def check(
        model: nn.Module, pattern: str = "2:4", dense: tuple[str, ...] = ("lm_head",)
    ) -> None:
        n, m = map(int, pattern.split(":"))
        linears = {
            name: module.weight.detach()
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
        }
        kept = {
            name: rearrange(weight != 0, "out (group m) -> out group m", m=m).sum(-1)
            for name, weight in linears.items()
        }
        assert [x for x in kept if x not in dense and bool((kept[x] != n).any())] == []
        assert [x for x in dense if bool((kept[x] != m).any())] == []

    return check
