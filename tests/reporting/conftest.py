# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a tiny model with their pages, made once; a browser that looks at them."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import nm_permute_plugin as nmp
from nm_permute_plugin.checkpoint.report import make_page

sys.path.insert(0, str(Path(__file__).parent))

SIZE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "tie_word_embeddings": False,
}
LEARNED = {
    "method": "learned",
    "search": {"rounds": 3},
    "learn": {"steps": 4},
    "validation": {"every": 2},
    "recover": {"stages": ["end_to_end"], "end_to_end": {"steps": 2}},
}


def pruned(folder: Path, **settings: object) -> Path:
    """The checkpoint of a tiny model, with its page."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SIZE)).eval()
        rows = torch.randint(64, (12, 24))
    data = nmp.read_samples(model, [{"input_ids": rows}], batch_size=4)
    nmp.save(model, folder, nmp.prune(model, data, nmp.Settings(**settings)))
    make_page(folder)
    return folder


@pytest.fixture(scope="session")
def learned_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pruned(tmp_path_factory.mktemp("reports") / "learned", **LEARNED)


@pytest.fixture
def learned(learned_once: Path, tmp_path: Path) -> Path:
    """A checkpoint by the method learned, with recovery; one's own copy."""
    return Path(shutil.copytree(learned_once, tmp_path / "learned"))


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint by the plain score, which all tests look at only."""
    return pruned(tmp_path_factory.mktemp("reports") / "plain", method="identity")


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A runner: headless Chromium on a page, with a profile of its own."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    found = found or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")

    def run(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [
                found,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                f"--user-data-dir={tmp_path / 'profile'}",
                *options,
                page.as_uri(),
            ],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done

    return run
