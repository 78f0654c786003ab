# SPDX-License-Identifier: Apache-2.0
"""``vllm serve`` with a sparse checkpoint: a real server, a real request, a clean end."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest

SCRIPTS = Path(__file__).parent / "scripts"
sys.path.insert(0, str(SCRIPTS))
from generate import PROMPTS  # noqa: E402

pytestmark = pytest.mark.slow

PATIENCE = 300  # seconds: a start or an answer, on a machine that does other things too


@pytest.fixture(scope="module")
def port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number: int = free.getsockname()[1]
    return number


@pytest.fixture(scope="module")
def server(
    vllm_python: str,
    engine_environment: Mapping[str, str],
    pruned,
    port: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[subprocess.Popen[bytes]]:
    """``vllm serve`` on a sparse FP8 checkpoint, once it answers."""
    command = [vllm_python, SCRIPTS / "vllm_command.py", "serve"]
    command += [pruned("fp8", "sparse-24-bitmask"), "--served-model-name", "pruned"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", "128", "--enforce-eager"]
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    with log.open("wb") as file:
        process = subprocess.Popen(
            list(map(str, command)),
            env={**engine_environment, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + PATIENCE
        while not answers(port):
            text = log.read_text()[-3000:]
            assert process.poll() is None, f"the server ended: {text}"
            assert time.monotonic() < deadline, f"the server does not answer: {text}"
            time.sleep(0.5)
        yield process
    finally:
        process.kill()
        process.wait()


def answers(port: int) -> bool:
    try:
        with urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
            return response.status == 200
    except (URLError, OSError):
        return False


def complete(port: int, prompt: str) -> dict:
    """The answer of the server's OpenAI interface to a prompt."""
    wanted = {
        "model": "pruned",
        "prompt": prompt,
        "max_tokens": 12,
        "temperature": 0,
        "logprobs": 3,
        "return_token_ids": True,
    }
    request = Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(wanted).encode(),
        {"Content-Type": "application/json"},
    )
    with urlopen(request, timeout=PATIENCE) as response:
        return json.load(response)["choices"][0]


def test_the_server_answers_as_the_dense_checkpoint_does(
    server, port: int, pruned, run_engine, tmp_path: Path
) -> None:
    choices = [complete(port, prompt) for prompt in PROMPTS]
    dense, out = pruned("fp8", "dense"), tmp_path / "said.json"
    done = run_engine("generate.py", out, dense)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = json.loads(out.read_text())[str(dense)]
    assert [choice["token_ids"] for choice in choices] == expected["tokens"]
    for choice, tokens, steps in zip(
        choices, expected["tokens"], expected["logprobs"], strict=True
    ):
        best = [dict(map(tuple, s))[t] for s, t in zip(steps, tokens, strict=True)]
        assert choice["logprobs"]["token_logprobs"] == best


def test_the_server_ends_when_asked_to(server, port: int) -> None:
    server.send_signal(signal.SIGINT)
    assert server.wait(timeout=PATIENCE) == 0
    assert not answers(port)
