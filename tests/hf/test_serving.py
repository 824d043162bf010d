"""An exported folder behind the servers that exist: vLLM's transformers backend and `transformers serve`.

Each server lives in an environment of its own (docs/export.md says how to make them), named by its Python:
TIDE_VLLM_PYTHON and TIDE_TRANSFORMERS_PYTHON.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import urllib.request
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import tiny, train_here

pytestmark = [pytest.mark.slow, pytest.mark.serving]

# vLLM's attention for CPUs has heads of 32 and more.
SHAPE = (
    "model.hidden_size=64",
    "model.num_attention_heads=2",
    "model.num_query_groups=1",
    "model.ffn_hidden_size=128",
)
PROMPTS = ["def main(", "import os\n\nclass ", "# Copyright", "for name in"]
TOKENS = 12

VLLM = ["-m", "vllm.entrypoints.openai.api_server", "--model-impl", "transformers", "--enforce-eager"]
VLLM += ["--dtype", "float32", "--max-model-len", "32", "--trust-remote-code", "--host", "127.0.0.1"]
TRANSFORMERS = [
    "-c",
    "from transformers.cli.transformers import main; main()",
    "serve",
    "--trust-remote-code",
]
TRANSFORMERS += ["--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32", "--log-level", "info"]

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
}


@pytest.fixture(scope="module")
def folders(pools, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exports of one tiny run: tables among the weights, and in a file of their own."""
    root = tmp_path_factory.mktemp("served")
    pools(1).run(
        train_here, tiny(tiny_data, root, *SHAPE, "memory.router_init_std=0.5", "trainer.max_steps=60")
    )
    export(root / "tiny", root / "inline")
    export(root / "tiny", root / "sidecar", "memory=sidecar", "tables=fp32")
    return {name: root / name for name in ("inline", "sidecar")}


def export(run: Path, out: Path, *words: str) -> None:
    """Export in a process of its own, as users do."""
    command = ["-m", "tide_mega.export", f"run={run}", f"out={out}", "dtype=fp32", *words]
    subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True)


def generated(folder: Path) -> list[str]:
    """Return what our own decode path says, greedily."""
    command = ["-m", "tide_mega.generate", f"model={folder}", "prompts=-", f"max_tokens={TOKENS}"]
    words = [*command, "json=true", "dtype=fp32", "device=cpu"]
    lines = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS)
    done = subprocess.run([sys.executable, *words], input=lines, check=True, capture_output=True, text=True)
    return [json.loads(line)["text"] for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> list[str]:
    return generated(folders["inline"])


class Server:
    """A server's process and its address."""

    def __init__(self, python: str, words: list[str], ready_line: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | SETTINGS
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [python, *words, "--port", str(port)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        said: deque[str] = deque(maxlen=40)
        ready = threading.Event()

        def listen() -> None:
            assert self.process.stdout is not None
            for line in self.process.stdout:
                said.append(line)
                if ready_line in line:
                    ready.set()
            ready.set()

        threading.Thread(target=listen, daemon=True).start()
        assert ready.wait(timeout=300) and self.process.poll() is None, "".join(said)

    def ask(self, path: str, **body: Any) -> Any:
        request = urllib.request.Request(
            f"{self.url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=60)


@contextmanager
def served(variable: str, words: list[str], ready_line: str) -> Iterator[Server]:
    """Start a server, unless its environment is not named; end it in any case."""
    python = os.environ.get(variable)
    if python is None:
        pytest.skip(f"{variable} names no Python of an environment with this server")
    server = Server(python, words, ready_line)
    try:
        yield server
    finally:
        server.close()


@pytest.mark.parametrize("memory", ["inline", "sidecar"])
def test_vllm_serves_the_text_that_we_generate(memory, folders, expected) -> None:
    words = [*VLLM, "--model", str(folders[memory]), "--served-model-name", "tide"]
    with served("TIDE_VLLM_PYTHON", words, "Application startup complete") as server:

        def ask(prompt: str) -> str:
            answer = server.ask(
                "/v1/completions",
                model="tide",
                prompt=prompt,
                max_tokens=TOKENS,
                temperature=0,
                ignore_eos=False,
            )
            return answer["choices"][0]["text"]

        with ThreadPoolExecutor(len(PROMPTS)) as at_once:
            assert list(at_once.map(ask, PROMPTS)) == expected


def test_transformers_serves_a_baseline_with_the_text_that_we_generate(tiny_runs, tmp_path) -> None:
    folder = tmp_path / "base"
    export(tiny_runs[0], folder)
    words = [*TRANSFORMERS, str(folder)]
    with served("TIDE_TRANSFORMERS_PYTHON", words, "Uvicorn running on") as server:
        for prompt, text in zip(PROMPTS, generated(folder), strict=True):
            answer = server.ask(
                "/v1/completions", model=str(folder), prompt=prompt, max_tokens=TOKENS, temperature=0
            )
            assert answer["choices"][0]["text"] == text
