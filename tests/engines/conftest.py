"""One tiny model, one vLLM engine in this process and one `vllm serve`, each started once and only if asked for."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from bot.engines.vllm import VllmEngine, cpu_profile, vllm_environment
from tests.engines import tiny_model as tiny


def pytest_configure(config: pytest.Config) -> None:
    # vLLM 0.32 drops the ZeroMQ context of its start-up handshake without closing it.
    config.addinivalue_line("filterwarnings", "ignore:Unclosed context:ResourceWarning")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a made-up model whose greedy reply is `tiny_model.REPLY`."""
    with warnings.catch_warnings(action="ignore"):  # of torch and transformers, while they are imported
        return tiny.build(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def engine(tiny_model: Path) -> Iterator[VllmEngine]:
    """Return a started engine, shared by the whole run: leave nothing under way in it."""
    engine = VllmEngine(tiny_model, "tiny", tiny.tiny_profile())
    with warnings.catch_warnings(action="ignore"):  # of vLLM and torch, while they are imported
        asyncio.run(engine.start())
    yield engine
    asyncio.run(engine.close())
    assert engine.processes() == []


@pytest.fixture(scope="session")
def vllm_server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the base URL of `vllm serve` with the tiny model, named "tiny"."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny_model)]
    command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    command += ["--max-model-len", "2048", "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(1 << 26)]
    command += ["--block-size", "32", "--generation-config", "vllm", "--scheduling-policy", "priority"]
    log = tmp_path_factory.mktemp("vllm-serve") / "log.txt"
    with log.open("wb") as file:
        environment = os.environ | vllm_environment(cpu_profile())
        server = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        deadline = time.monotonic() + 240
        with httpx.Client(trust_env=False) as client:
            while True:
                assert server.poll() is None, f"vllm serve ended:\n{log.read_text()[-3000:]}"
                assert time.monotonic() < deadline, f"vllm serve did not start:\n{log.read_text()[-3000:]}"
                try:
                    if client.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
