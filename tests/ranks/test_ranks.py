# SPDX-License-Identifier: Apache-2.0
"""``torchrun`` on two CPU ranks: they find what one finds, and end together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ours
from safetensors.torch import load_file

import nm_permute_plugin as nmp

pytestmark = pytest.mark.slow

BASE = {
    "batch_size": 4,
    "search": {"rounds": 3},
    "learn": {"steps": 6},
    "validation": {"every": 3},
    "recover": {"stages": ["end_to_end"], "end_to_end": {"steps": 4}},
}

RECIPES = {
    "plain": ours(**BASE),
    "sharded": ours(**BASE, memory={"shard": True}),
    "layers": ours(
        **{**BASE, "recover": {"stages": ["rescale", "blocks"]}},
        objective="layer_wise",
    ),
    "long": ours(**{**BASE, "learn": {"steps": 60}, "validation": {"every": 20}}),
}

ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
}


@pytest.fixture(scope="module")
def folder(trained_checkpoint: Path, chain_rows, words, tmp_path_factory: Any) -> Path:
    """A folder with ``dense``, ``text.txt``, ``rows.json`` and the recipes."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    (folder / "dense").symlink_to(trained_checkpoint)
    rows = chain_rows(40, 32, seed=3)
    (folder / "text.txt").write_text(words(rows))
    (folder / "rows.json").write_text(json.dumps(rows.tolist()))
    for name, recipe in RECIPES.items():
        (folder / f"{name}.yaml").write_text(recipe)
    return folder


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def torchrun(*hosts: Sequence[object]) -> list[str]:
    """The words of every host's ``torchrun``, of one rank each, or of two on one host."""
    count = 2 if len(hosts) == 1 else 1
    port = free_port()
    return [
        [sys.executable, "-W", "ignore", "-m", "torch.distributed.run"]
        + ["--nnodes", str(len(hosts)), "--node-rank", str(number)]
        + ["--nproc-per-node", str(count), "--master-port", str(port)]
        + ["--master-addr", "127.0.0.1", *map(str, words)]
        for number, words in enumerate(hosts)
    ]


def begin(words: Sequence[str], log: Path) -> "subprocess.Popen[bytes]":
    with log.open("w") as file:
        return subprocess.Popen(
            words, stdout=file, stderr=subprocess.STDOUT, env=ENVIRONMENT
        )


def command(folder: Path, recipe: str, out: str, *more: object) -> list[object]:
    paths = [folder / "dense", folder / f"{recipe}.yaml", folder / out]
    options = ["--text", folder / "text.txt", "--sequence-length", 32]
    return ["prune", *paths, *options, "--device", "cpu", *more]


@pytest.fixture(scope="module")
def pruned(folder: Path) -> Callable[..., tuple[Path, str]]:
    """A factory: the checkpoint of a recipe by 1 rank, 2 ranks, or 2 hosts; and the log."""
    made: dict[str, tuple[Path, str]] = {}

    def prune(recipe: str, ranks: int = 1, hosts: int = 1) -> tuple[Path, str]:
        out = f"{recipe}-{ranks}-{hosts}"
        if out in made:
            return made[out]
        given = command(folder, recipe, out)
        if ranks == 1:
            words = [
                [sys.executable, "-W", "ignore", "-m", "nm_permute_plugin"]
                + list(map(str, given))
            ]
        else:
            words = torchrun(*[["-m", "nm_permute_plugin", *given]] * hosts)
        logs = [folder / f"{out}.{number}.log" for number in range(len(words))]
        runs = [begin(each, log) for each, log in zip(words, logs, strict=True)]
        statuses = [run.wait(timeout=300) for run in runs]
        said = "\n".join(log.read_text() for log in logs)
        assert statuses == [0] * len(runs), said
        made[out] = folder / out, said
        return made[out]

    return prune


def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "nm_permute" / "report.json").read_text())
    return found


def losses(out: Path) -> list[float]:
    told = report(out)
    of_stages = [loss for stage in told["recovered"] for loss in stage["validation"]]
    return [entry["validation"] for entry in told["history"]] + of_stages


def weights(out: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint, dense."""
    nmp.convert(out, tmp_path / out.name, "dense")
    return load_file(tmp_path / out.name / "model.safetensors")


@pytest.mark.parametrize(
    ("recipe", "hosts", "like"),
    [("plain", 2, "plain"), ("sharded", 1, "plain"), ("layers", 1, "layers")],
)
def test_two_ranks_find_what_one_finds(
    pruned, tmp_path: Path, recipe: str, hosts: int, like: str
) -> None:
    one, _ = pruned(like)
    two, said = pruned(recipe, ranks=2, hosts=hosts)
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)
    assert report(two)["searched"] == pytest.approx(report(one)["searched"]) or (
        [e["validation"] for e in report(two)["searched"]]
        == pytest.approx([e["validation"] for e in report(one)["searched"]], rel=1e-3)
    )
    ours, theirs = weights(one, tmp_path), weights(two, tmp_path)
    same = total = 0
    for name, weight in ours.items():
        if weight.dim() == 2:
            same += int(((weight != 0) == (theirs[name] != 0)).sum())
            total += weight.numel()
    assert same / total > 0.99
    assert nmp.verify(two).good
    assert said.count("This run prunes") == 1


def test_two_ranks_give_the_same_bytes_twice(pruned, folder: Path) -> None:
    first, _ = pruned("plain", ranks=2, hosts=2)
    second, _ = pruned("plain", ranks=2, hosts=1)
    name = "model.safetensors"
    assert (first / name).read_bytes() == (second / name).read_bytes()


def rank_of(run: "subprocess.Popen[bytes]", number: int) -> int:
    """The process of a rank that ``torchrun`` has started."""
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    for child in children:
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if f"RANK={number}".encode() in environment:
            return int(child)
    raise AssertionError(f"rank {number} has ended: {children}")


def test_a_rank_that_dies_ends_the_others_and_the_run_goes_on(
    pruned, folder: Path
) -> None:
    undisturbed, _ = pruned("long", ranks=2)
    given = command(folder, "long", "died")
    (words,) = torchrun(["-m", "nm_permute_plugin", *given])
    log = folder / "died.log"
    run = begin(words, log)
    until = time.monotonic() + 200
    while "The stage search took" not in log.read_text():
        assert time.monotonic() < until and run.poll() is None, log.read_text()
        time.sleep(0.1)
    time.sleep(1)
    os.kill(rank_of(run, 1), signal.SIGKILL)
    assert run.wait(timeout=60) != 0
    assert "exitcode  : -9" in log.read_text()
    out, state = folder / "died", folder / ".died.nm_permute_state"
    assert not out.exists()
    assert state.is_dir(), log.read_text()
    (words,) = torchrun(["-m", "nm_permute_plugin", *given])
    again = begin(words, log)
    assert again.wait(timeout=300) == 0, log.read_text()
    assert "The run goes on from" in log.read_text()
    assert not state.exists()
    name = "model.safetensors"
    assert (out / name).read_bytes() == (undisturbed / name).read_bytes()


def test_oneshot_on_ranks_that_share_memory(
    pruned, folder: Path, tmp_path: Path
) -> None:
    script, out = Path(__file__).with_name("host_way.py"), folder / "host"
    given = [folder / "dense", folder / "plain.yaml", out, folder / "rows.json"]
    (words,) = torchrun([script, *given])
    log = folder / "host.log"
    assert begin(words, log).wait(timeout=300) == 0, log.read_text()
    assert nmp.verify(out).good
    assert losses(out) == pytest.approx(losses(pruned("plain")[0]), rel=1e-3)


def one_process(
    *given: object, **environment: str
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "nm_permute_plugin", *map(str, given)],
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT | environment,
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["verify", "OUT"], "`nm-permute verify` is done by one"),
        (
            ["prune", "M", "R", "OUT", "--dry-run"],
            "--dry-run measures with one process",
        ),
    ],
)
def test_what_is_for_one_process_says_so(given: list[str], message: str) -> None:
    result = one_process(*given, WORLD_SIZE="2", RANK="0")
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_shards_of_one_process_are_refused_before_the_work(folder: Path) -> None:
    result = one_process(*command(folder, "sharded", "alone"))
    assert result.returncode == 1
    assert "start the run by `torchrun" in result.stderr
    assert not (folder / "alone").exists()
