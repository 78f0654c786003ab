# SPDX-License-Identifier: Apache-2.0
"""``torchrun`` on two CPU ranks: they find what one finds, and end together."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ours
from safetensors.torch import load_file

import nm_permute_plugin as nmp

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

BASE: dict[str, Any] = {
    "batch_size": 4,
    "search": {"rounds": 3},
    "learn": {"steps": 6},
    "validation": {"every": 3},
    "recover": {"stages": ["end_to_end"], "end_to_end": {"steps": 4}},
}

SETTINGS = {
    "plain": BASE,
    "sharded": {**BASE, "memory": {"shard": True}},
    "budget": {**BASE, "budget": {"dense_share": 0.3}},
    "layers": {
        **BASE,
        "objective": "layer_wise",
        "recover": {"stages": ["rescale", "blocks"]},
    },
}

RECIPES = {
    "long": ours(**{**BASE, "learn": {"steps": 200}, "validation": {"every": 100}}),
    "endless": ours(
        **{**BASE, "learn": {"steps": 100_000}, "validation": {"every": 50}}
    ),
    "plain": ours(**BASE),
    "sharded": (ROOT / "recipes" / "2of4_learned_sharded.yaml").read_text(),
}

API_RUNS = Path(__file__).with_name("api_runs.py")

ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
}


@pytest.fixture(scope="module")
def folder(trained_checkpoint: Path, chain_rows, words, tmp_path_factory: Any) -> Path:
    """A folder with a model, its text and rows, recipes and settings."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    (folder / "dense").symlink_to(trained_checkpoint)
    rows = chain_rows(40, 32, seed=3)
    (folder / "text.txt").write_text(words(rows))
    (folder / "rows.json").write_text(json.dumps(rows.tolist()))
    alone = {name: of for name, of in SETTINGS.items() if name != "sharded"}
    (folder / "settings.json").write_text(json.dumps(alone))
    for name, recipe in RECIPES.items():
        (folder / f"{name}.yaml").write_text(recipe)
    return folder


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def torchrun(*hosts: Sequence[object]) -> list[list[str]]:
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
def by_one(folder: Path) -> Path:
    """The folder, where one rank has pruned with all settings."""
    there = importlib.util.spec_from_file_location("api_runs", API_RUNS)
    assert there is not None
    assert there.loader is not None
    api_runs = importlib.util.module_from_spec(there)
    there.loader.exec_module(api_runs)
    api_runs.main(folder)
    return folder


@pytest.fixture(scope="module")
def by_two(by_one: Path) -> Path:
    """The folder, where two ranks have done so as well."""
    (by_one / "settings.json").write_text(json.dumps(SETTINGS))
    (words,) = torchrun([API_RUNS, by_one])
    log = by_one / "api_runs.log"
    assert begin(words, log).wait(timeout=300) == 0, log.read_text()
    return by_one


@pytest.fixture(scope="module")
def on_two_hosts(folder: Path) -> tuple[Path, str]:
    """The checkpoint of two ranks on two hosts, both of which are this one; the log."""
    given = ["-m", "nm_permute_plugin", *command(folder, "long", "hosts")]
    logs = [folder / f"host{number}.log" for number in range(2)]
    words = torchrun(given, given)
    runs = [begin(each, log) for each, log in zip(words, logs, strict=True)]
    statuses = [run.wait(timeout=300) for run in runs]
    said = "\n".join(log.read_text() for log in logs)
    assert statuses == [0, 0], said
    return folder / "hosts", said


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
    ("name", "like"),
    [
        ("plain", "plain"),
        ("sharded", "plain"),
        ("budget", "budget"),
        ("layers", "layers"),
    ],
)
def test_two_ranks_find_what_one_finds(
    by_two: Path, tmp_path: Path, name: str, like: str
) -> None:
    one, two = by_two / f"{like}-1", by_two / f"{name}-2"
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)
    ours, theirs = weights(one, tmp_path), weights(two, tmp_path)
    same = total = 0
    for matrix, weight in ours.items():
        if weight.dim() == 2:
            same += int(((weight != 0) == (theirs[matrix] != 0)).sum())
            total += weight.numel()
    assert same / total > 0.99
    assert nmp.verify(two).good


def test_the_command_on_two_hosts_speaks_once(on_two_hosts) -> None:
    out, said = on_two_hosts
    assert nmp.verify(out).good
    assert said.count("This run prunes") == 1
    assert said.count("next: nm-permute evaluate") == 1


def rank_of(run: "subprocess.Popen[bytes]", number: int) -> int:
    """The process of a rank that ``torchrun`` has started."""
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    for child in children:
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if f"RANK={number}".encode() in environment:
            return int(child)
    raise AssertionError(f"rank {number} has ended: {children}")


def learning(run: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait until a run learns."""
    until = time.monotonic() + 200
    while "The stage search took" not in log.read_text():
        assert run.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.1)


def test_a_rank_that_dies_ends_the_others_and_the_run_goes_on(
    on_two_hosts, folder: Path
) -> None:
    undisturbed, _ = on_two_hosts
    given = command(folder, "long", "died")
    (words,) = torchrun(["-m", "nm_permute_plugin", *given])
    log = folder / "died.log"
    run = begin(words, log)
    learning(run, log)
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


def test_a_rank_that_stands_still_ends_the_run(folder: Path) -> None:
    """It stands for a host that has vanished: none of its processes says anything."""
    (words,) = torchrun(
        ["-m", "nm_permute_plugin", *command(folder, "endless", "silent")]
    )
    log = folder / "silent.log"
    run = begin(words, log)
    learning(run, log)
    still = rank_of(run, 1)
    os.kill(still, signal.SIGSTOP)
    try:
        until = time.monotonic() + 60
        while "rank 1 has given no sign of life" not in log.read_text():
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.1)
    finally:
        os.kill(still, signal.SIGKILL)
    assert run.wait(timeout=60) != 0
    assert not (folder / "silent").exists()


def test_oneshot_on_ranks_that_share_memory(on_two_hosts, folder: Path) -> None:
    script, out = Path(__file__).with_name("host_way.py"), folder / "host"
    given = [folder / "dense", folder / "plain.yaml", out, folder / "rows.json"]
    (words,) = torchrun([script, *given])
    log = folder / "host.log"
    assert begin(words, log).wait(timeout=300) == 0, log.read_text()
    assert nmp.verify(out).good
    # The same rows, search and start of learning as the command's.
    found, expected = report(out), report(on_two_hosts[0])
    assert found["searched"][-1] == pytest.approx(expected["searched"][-1], rel=1e-3)
    assert found["history"][0] == pytest.approx(expected["history"][0], rel=1e-3)


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
