"""Answers from a server: whatever it does, every prompt gets one answer or one recorded failure, and none gets two."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from orthrus.datagen.answers import Answer, AnswerSettings, Encoder, Failure
from orthrus.datagen.endpoint import Endpoint, EndpointSettings, retry_after
from orthrus.datagen.prompts import Prompt
from tests.cli.tiny import TEMPLATE, byte_tokenizer
from tests.datagen.server import END_ID, Server, answer_to, ids_of

PROMPTS = [Prompt.of([{"role": "user", "content": f"question {i}"}]) for i in range(24)]


def content(prompt: Prompt) -> str:
    assert prompt.messages is not None
    return prompt.messages[-1]["content"]


def endpoint(
    server: Server | str, *, encoder: Encoder | None = None, api_key: str | None = None,
    answers: AnswerSettings | None = None, **settings: Any,
) -> Endpoint:  # fmt: skip
    url = server.url if isinstance(server, Server) else server
    fast: dict[str, Any] = {
        "route": "chat",
        "first_pause_s": 0.01,
        "timeout_s": 10.0,
        "concurrency": 8,
        "max_retries": 4,
    }
    return Endpoint(
        EndpointSettings(url=url, model="m", **fast | settings),
        answers or AnswerSettings(), encoder=encoder, api_key=api_key,
    )  # fmt: skip


def write(
    writer: Endpoint, prompts: list[Prompt] = PROMPTS, is_stopping: Callable[[], bool] = lambda: False
) -> dict[str, Answer | Failure]:
    """What came of each prompt, by its text."""
    results: list[Answer | Failure] = []
    writer.write(iter(prompts), results.append, is_stopping)
    texts = {prompt.id: content(prompt) for prompt in prompts}
    assert len({result.id for result in results}) == len(results), "a prompt came back twice"
    return {texts[result.id]: result for result in results}


def encoder(*, template: bool = True, thinking: bool = False) -> Encoder:
    tokenizer = byte_tokenizer()
    if template:
        tokenizer.chat_template = TEMPLATE
    return Encoder(tokenizer, name="tiny", enable_thinking=thinking)


def test_answers_carry_the_servers_own_token_ids():
    with Server() as server:
        results = write(endpoint(server))
    for text, answer in results.items():
        assert isinstance(answer, Answer)
        assert answer.response == answer_to(text) and answer.finish_reason == "stop" and answer.ids_from == "server"
        assert answer.response_ids == [*ids_of(answer_to(text)), END_ID] and answer.prompt_ids == ids_of(text)
    assert len(results) == len(PROMPTS)


def test_request_says_what_was_asked():
    settings = AnswerSettings(max_new_tokens=7, temperature=0.5, top_p=0.9, seed=3)
    with Server() as server:
        write(endpoint(server, answers=settings, api_key="sk-secret"), PROMPTS[:2])
        write(endpoint(server, answers=AnswerSettings(enable_thinking=True)), PROMPTS[2:3])
    first, second, third = sorted(server.bodies, key=lambda body: body["messages"][-1]["content"])
    assert first["seed"] == settings.seed_of(PROMPTS[0].id) != second["seed"], "each prompt has its own seed"
    assert {name: first[name] for name in ("model", "max_tokens", "temperature", "top_p", "return_token_ids")} == {
        "model": "m", "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "return_token_ids": True,
    }  # fmt: skip
    assert first["chat_template_kwargs"] == {"enable_thinking": False}
    assert third["chat_template_kwargs"] == {"enable_thinking": True} and "seed" not in third
    assert [fields.get("Authorization") for fields in server.headers].count("Bearer sk-secret") == 2


def test_so_many_requests_are_in_flight_and_no_more():
    with Server(delay_s=0.1) as server:
        write(endpoint(server, concurrency=6))
    assert 4 <= server.most_in_flight <= 6


FAULTS = (
    "500", "503", "429", "408", "reset", "truncated", "truncated json", "empty", "no choices", "no reason", "no text",
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_that_passes_loses_no_prompt(fault: str):
    with Server(lambda text, number: fault if number <= 2 else None) as server:
        writer = endpoint(server)
        results = write(writer, PROMPTS[:6])
    assert len(results) == 6 and all(isinstance(answer, Answer) for answer in results.values())
    assert all(answer.response == answer_to(text) for text, answer in results.items() if isinstance(answer, Answer))
    assert set(server.asked.values()) == {3} and writer.facts()["retries"] == 12


def test_fault_that_stays_is_recorded_and_the_others_are_answered():
    bad = content(PROMPTS[3])
    with Server(lambda text, number: "truncated" if text == bad else None) as server:
        results = write(endpoint(server))
    failure = results.pop(bad)
    assert isinstance(failure, Failure) and failure.attempts == server.asked[bad] == 5
    assert "peer closed connection" in failure.reason
    assert len(results) == 23 and all(isinstance(answer, Answer) for answer in results.values())


def test_server_that_never_answers_one_prompt_loses_that_one_alone():
    bad = content(PROMPTS[0])
    with Server(lambda text, number: "hang" if text == bad else None) as server:
        results = write(endpoint(server, timeout_s=0.3, max_retries=1))
    failure = results.pop(bad)
    assert isinstance(failure, Failure) and failure.reason == "no answer within 0.3 s" and failure.attempts == 2
    assert len(results) == 23 and all(isinstance(answer, Answer) for answer in results.values())


def test_server_asks_to_wait_and_is_heard():
    with Server(lambda text, number: "429 after=0.4" if number == 1 else None) as server:
        started = time.monotonic()
        results = write(endpoint(server), PROMPTS[:2])
    assert time.monotonic() - started >= 0.4 and all(isinstance(answer, Answer) for answer in results.values())


def test_retry_after_is_a_number_or_a_date():
    assert retry_after("12") == 12 and retry_after("-1") == 0
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert (retry_after("Wed, 21 Oct 2099 07:28:00 GMT") or 0) > 1e9
    assert retry_after(None) is None and retry_after("soon") is None and retry_after("nan") is None


def test_request_that_can_never_succeed_is_not_repeated():
    bad = content(PROMPTS[1])
    with Server(lambda text, number: "400 maximum context length exceeded" if text == bad else None) as server:
        results = write(endpoint(server))
    failure = results[bad]
    assert isinstance(failure, Failure) and "maximum context length" in failure.reason
    assert failure.attempts == server.asked[bad] == 1


@pytest.mark.parametrize("status", ["401", "403", "404"])
def test_wrong_key_or_name_ends_the_run_at_once(status: str):
    with Server(lambda text, number: f"{status} bad key sk-secret") as server:
        with pytest.raises(ValueError, match=f"refuses: HTTP {status}.*bad key") as caught:
            write(endpoint(server, api_key="sk-secret"))
        assert "sk-secret" not in str(caught.value) and "***" in str(caught.value)
    assert sum(server.asked.values()) <= 8


@pytest.mark.parametrize("fault", ["500", "400 unknown field"])
def test_server_that_fails_always_does_not_burn_every_prompt(fault: str):
    many = [Prompt.of([{"role": "user", "content": f"{i}"}]) for i in range(200)]
    results: list[Answer | Failure] = []
    with Server(lambda text, number: fault) as server, pytest.raises(RuntimeError, match="one after another"):
        endpoint(server, max_retries=0).write(iter(many), results.append, lambda: False)
    assert len(results) < 32


def test_server_that_is_not_there_is_said_so():
    with Server() as server:
        url = server.url
    with pytest.raises(RuntimeError, match="failed one after another, the last with: ConnectError"):
        write(endpoint(url, max_retries=0))


def test_stop_waits_for_what_is_in_flight_but_not_for_retries():
    stop = threading.Event()
    slow, failing = content(PROMPTS[0]), content(PROMPTS[1])

    def faults(text: str, number: int) -> str | None:
        if text == slow:
            stop.set()
            time.sleep(0.5)
        return "429 after=60" if text == failing else None

    with Server(faults) as server:
        started = time.monotonic()
        results = write(endpoint(server, concurrency=2), PROMPTS[:2], stop.is_set)
    assert set(results) == {slow}, "the slow one is kept, the waiting one stays open and has not failed"
    assert time.monotonic() - started < 10


# Token ids


def test_server_that_is_strict_about_fields_is_asked_without():
    def faults(text: str, number: int) -> str | None:
        return "400 unknown field: return_token_ids" if "return_token_ids" in server.bodies[-1] else None

    with Server(faults, returns_ids=False) as server:
        results = write(endpoint(server, encoder=encoder(), concurrency=1, max_retries=0), PROMPTS[:3])
    assert all(isinstance(answer, Answer) and answer.ids_from == "text" for answer in results.values())
    assert sum(server.asked.values()) == 4


def test_ids_come_from_the_text_where_the_server_gives_none():
    with Server(returns_ids=False) as server:
        results = write(endpoint(server, encoder=encoder()), PROMPTS[:2])
    tokenizer = byte_tokenizer()
    for text, answer in results.items():
        assert isinstance(answer, Answer) and answer.ids_from == "text"
        assert tokenizer.decode(answer.response_ids[:-1]) == answer_to(text)
        assert answer.response_ids[-1] == tokenizer.eos_token_id, "a finished answer ends with the token that ends it"
        assert tokenizer.decode(answer.prompt_ids) == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def test_ids_from_nowhere_are_refused():
    with Server(returns_ids=False) as server, pytest.raises(ValueError, match="returns no token ids of the answer"):
        write(endpoint(server))


def test_reasoning_set_apart_is_refused_where_ids_are_read_from_the_text():
    with Server(lambda text, number: "reasoning", returns_ids=False) as server:
        with pytest.raises(ValueError, match="without a reasoning parser"):
            write(endpoint(server, encoder=encoder()))
    with Server(lambda text, number: "reasoning") as server:
        assert all(isinstance(answer, Answer) for answer in write(endpoint(server)).values())


def test_half_a_character_does_not_reach_the_files():
    with Server(lambda text, number: "half a character") as server:
        (answer,) = write(endpoint(server), PROMPTS[:1]).values()
    assert isinstance(answer, Answer) and answer.response == "broken \ufffd and whole \U0001f600"


class ByteEncoder(Encoder):
    """Ids that the test server reads back."""

    def encode(self, prompt: Prompt) -> list[int]:
        return [300, *ids_of(content(prompt))]


def test_completions_are_asked_with_exact_token_ids():
    exact = ByteEncoder(byte_tokenizer(), name="tiny", enable_thinking=False)
    with Server() as server:
        results = write(endpoint(server, encoder=exact, route="completions"), PROMPTS[:3])
    for text, answer in results.items():
        assert isinstance(answer, Answer) and answer.ids_from == "server"
        assert answer.prompt_ids == [300, *ids_of(text)] and answer.response == answer_to(text)
    assert all("messages" not in body and "chat_template_kwargs" not in body for body in server.bodies)


def test_prompt_that_the_template_refuses_is_recorded():
    strict = encoder()
    strict.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with Server() as server:
        results = write(endpoint(server, encoder=strict, route="completions"), PROMPTS[:2])
    assert all(isinstance(f, Failure) and "roles must alternate" in f.reason for f in results.values())


# Settings


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"url": "localhost:8000"}, "endpoint must be an address"),
        ({"url": "http://user:key@host"}, "a key belongs into OPENAI_API_KEY"),
        ({"url": "http://host?key=1"}, "only scheme, host, port and path"),
        ({"concurrency": 0}, "concurrency must be at least 1"),
        ({"max_retries": -1}, "max_retries must be at least 0"),
        ({"timeout_s": 0.0}, "timeout must be more than 0"),
        ({"model": " "}, "model is empty"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str):
    fine: dict[str, Any] = {"url": "http://host", "model": "m", "route": "chat"}
    with pytest.raises(ValueError, match=message):
        EndpointSettings(**fine | settings)


@pytest.mark.parametrize(
    "url, address",
    [
        ("http://host:8000", "http://host:8000/v1/chat/completions"),
        ("http://host:8000/", "http://host:8000/v1/chat/completions"),
        ("http://host:8000/v1/", "http://host:8000/v1/chat/completions"),
        ("https://host/openai/v2", "https://host/openai/v2/chat/completions"),
    ],
)
def test_address_with_and_without_v1(url: str, address: str):
    assert EndpointSettings(url=url, model="m", route="chat").address == address
