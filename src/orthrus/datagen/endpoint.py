"""Answers from an OpenAI-compatible server: many requests in flight, and none lost to a server that misbehaves.

Two routes. `chat`: /v1/chat/completions, the server applies its chat template. `completions`: /v1/completions with the
prompt's token ids, made here with the model's own tokenizer, so that both sides mean the same tokens.

Token ids of the answer are asked for with `return_token_ids` (vLLM, SGLang): `token_ids` of the choice, and
`prompt_token_ids` of the choice or of the answer. A server without them makes the tokenizer necessary, which then reads
the answer's text.
"""

import asyncio
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx2

from orthrus.datagen.answers import Answer, AnswerSettings, Encoder, Enter, Failure
from orthrus.datagen.prompts import Prompt

Route = Literal["chat", "completions"]

IDS_FIELD = "return_token_ids"
"""The request's field that asks for token ids."""
RETRIED = (408, 409, 425, 429)
"""Statuses below 500 that another try may turn; all of 500 and above are tried again."""
REFUSED = (401, 403, 404)
"""Statuses that, before any success, speak of the key, the address or the model's name, not of the prompt."""
LONGEST_PAUSE_S = 60.0
LONGEST_RETRY_AFTER_S = 600.0
TICK_S = 0.2
"""How often a stop is looked for while requests are in flight."""
REASON_CHARACTERS = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class EndpointSettings:
    """Which server, and how it is asked."""

    url: str
    """Its address, with or without /v1 behind it."""
    model: str
    """What the server calls the model."""
    route: Route
    concurrency: int = 64
    """Requests in flight."""
    max_retries: int = 8
    """Further tries of a request that failed in a way that may pass."""
    timeout_s: float = 600.0
    """Longest wait for one answer."""
    first_pause_s: float = 0.5
    """Pause before the first retry; each further one is twice as long, up to a minute."""

    def __post_init__(self):
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"endpoint must be an address such as http://localhost:8000/v1, got {self.url!r}")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("endpoint: only scheme, host, port and path; a key belongs into OPENAI_API_KEY")
        if not self.model.strip():
            raise ValueError("model is empty; name the model as the server calls it")
        for name, least in (("concurrency", 1), ("max_retries", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.timeout_s > 0:
            raise ValueError(f"timeout must be more than 0 seconds, got {self.timeout_s}")

    @property
    def address(self) -> str:
        """Where requests go."""
        root = self.url.rstrip("/")
        root = root if urlsplit(root).path else f"{root}/v1"
        return f"{root}/{'chat/completions' if self.route == 'chat' else 'completions'}"


class Trouble(Exception):
    """A request failed in a way that may pass; `retry_after_s` is what the server asked to wait."""

    def __init__(self, reason: str, *, retry_after_s: float | None = None):
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class Refusal(Exception):
    """The server will not answer this prompt, however often it is asked."""


class Endpoint:
    """A writer that asks a server."""

    def __init__(
        self,
        settings: EndpointSettings,
        answers: AnswerSettings,
        *,
        encoder: Encoder | None,
        api_key: str | None = None,
    ):
        if settings.route == "completions" and encoder is None:
            raise ValueError("the completions route needs a tokenizer, which makes the prompts' token ids")
        self._settings = settings
        self._answers = answers
        self._encoder = encoder
        self._api_key = api_key
        self._asks_ids = True
        self._num_answered = 0
        self._num_retries = 0
        self._num_troubled = 0
        """Prompts given up one after another, with no answer in between; refused ones count before the first answer."""

    def facts(self) -> dict[str, Any]:
        """How often requests were repeated."""
        return {"retries": self._num_retries}

    def write(self, prompts: Iterator[Prompt], enter: Enter, is_stopping: Callable[[], bool]) -> None:
        """Answer prompts until the iterator ends; `ValueError` when the server refuses key, address or model."""
        asyncio.run(self._write(prompts, enter, is_stopping))

    async def _write(self, prompts: Iterator[Prompt], enter: Enter, is_stopping: Callable[[], bool]) -> None:
        halt = asyncio.Event()
        limits = httpx2.Limits(
            max_connections=self._settings.concurrency, max_keepalive_connections=self._settings.concurrency
        )
        headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        async with httpx2.AsyncClient(limits=limits, timeout=self._settings.timeout_s, headers=headers) as client:
            ticker = asyncio.create_task(watch(is_stopping, halt))
            workers = [
                asyncio.create_task(self._work(client, prompts, enter, halt)) for _ in range(self._settings.concurrency)
            ]
            try:
                await asyncio.gather(*workers)
            finally:
                for task in (ticker, *workers):
                    task.cancel()
                await asyncio.gather(ticker, *workers, return_exceptions=True)

    async def _work(
        self, client: httpx2.AsyncClient, prompts: Iterator[Prompt], enter: Enter, halt: asyncio.Event
    ) -> None:
        """One of the requests in flight: the next prompt, to its end, and so on."""
        for prompt in prompts:
            result = await self._settle(client, prompt, halt)
            if result is not None:
                enter(result)

    async def _settle(self, client: httpx2.AsyncClient, prompt: Prompt, halt: asyncio.Event) -> Answer | Failure | None:
        """A prompt's answer, or why there is none; None when a stop came before a retry."""
        reason, prompt_ids = "", None
        for attempt in range(1, self._settings.max_retries + 2):
            try:
                if self._settings.route == "completions" and prompt_ids is None:
                    prompt_ids = self._encode(prompt, self._encoder)
                answer = self._read(prompt, prompt_ids, await self._ask(client, self._body(prompt, prompt_ids)))
                self._num_answered += 1
                self._num_troubled = 0
                return answer
            except Refusal as refusal:
                if not self._num_answered:
                    self._give_up_if_all_fail(str(refusal))
                return Failure(id=prompt.id, reason=str(refusal), attempts=attempt)
            except Trouble as trouble:
                reason = str(trouble)
                if attempt <= self._settings.max_retries:
                    if await is_set_within(halt, self._pause_s(attempt, trouble.retry_after_s)):
                        return None
                    self._num_retries += 1
        self._give_up_if_all_fail(reason)
        return Failure(id=prompt.id, reason=reason, attempts=self._settings.max_retries + 1)

    def _give_up_if_all_fail(self, reason: str) -> None:
        """A server that is gone, or takes none of our requests, must not turn every prompt into a failure."""
        self._num_troubled += 1
        if self._num_troubled >= max(16, 2 * self._settings.concurrency):
            raise RuntimeError(f"{self._num_troubled} prompts failed one after another, the last with: {reason}")

    def _pause_s(self, attempt: int, retry_after_s: float | None) -> float:
        """Seconds before the next try: what the server asked for, else twice as long each time; jitter on both."""
        if retry_after_s is not None:
            return min(retry_after_s, LONGEST_RETRY_AFTER_S) + random.uniform(0, self._settings.first_pause_s)
        pause_s = min(self._settings.first_pause_s * 2 ** (attempt - 1), LONGEST_PAUSE_S)
        return pause_s * random.uniform(0.5, 1)

    # Asking

    def _body(self, prompt: Prompt, prompt_ids: list[int] | None) -> dict[str, Any]:
        """The request's document."""
        settings = self._answers
        body: dict[str, Any] = {
            "model": self._settings.model,
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
        }
        if settings.temperature:
            body |= {"top_p": settings.top_p, "seed": settings.seed_of(prompt.id)}
        if self._asks_ids:
            body[IDS_FIELD] = True
        if self._settings.route == "completions":
            return body | {"prompt": prompt_ids}
        thinking = {"enable_thinking": settings.enable_thinking}
        return body | {"messages": prompt.messages, "chat_template_kwargs": thinking}

    async def _ask(self, client: httpx2.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
        """One request: the document the server answers with, `Trouble` or `Refusal`."""
        try:
            # The client's own limit is one of silence; a body that drips for ever never reaches it.
            async with asyncio.timeout(self._settings.timeout_s):
                response = await client.post(self._settings.address, json=body)
        except TimeoutError:
            raise Trouble(f"no answer within {self._settings.timeout_s:g} s") from None
        except httpx2.HTTPError as error:
            raise Trouble(self._short(f"{type(error).__name__}: {error}")) from None
        if response.status_code in (400, 422) and IDS_FIELD in response.text and body.pop(IDS_FIELD, None):
            self._asks_ids = False  # a server that is strict about fields it does not know
            return await self._ask(client, body)
        if not response.is_success:
            self._refuse(response)
        try:
            document = response.json()
        except ValueError:
            raise Trouble(f"the answer's body is no JSON ({len(response.content)} bytes)") from None
        if not isinstance(document, dict):
            raise Trouble("the answer's body is no JSON object")
        return document

    def _refuse(self, response: httpx2.Response) -> None:
        """Raise what a status that is no success means."""
        status = response.status_code
        reason = self._short(f"HTTP {status}: {response.text}")
        if status in RETRIED or status >= 500:
            raise Trouble(reason, retry_after_s=retry_after(response.headers.get("Retry-After")))
        if status in REFUSED and not self._num_answered:
            raise ValueError(f"{self._settings.address} refuses: {reason}")
        raise Refusal(reason)

    def _short(self, reason: str) -> str:
        """A reason on one line, cut, with the key made unreadable: servers like to quote it."""
        if self._api_key:
            reason = reason.replace(self._api_key, "***")
        reason = " ".join(reason.split())
        return reason if len(reason) <= REASON_CHARACTERS else reason[:REASON_CHARACTERS] + " ..."

    # Reading

    def _read(self, prompt: Prompt, prompt_ids: list[int] | None, document: dict[str, Any]) -> Answer:
        """The answer in a document; `Trouble` for one that is none."""
        choice, text = first_choice(document, self._settings.route)
        finish_reason = choice.get("finish_reason")
        if finish_reason not in ("stop", "length"):
            raise Trouble(self._short(f"finish_reason is {json.dumps(finish_reason)}, not stop or length"))
        response_ids = token_ids(choice.get("token_ids"))
        if not text and not response_ids:
            raise Trouble("the answer is empty")
        if not response_ids and splits_reasoning(choice):
            raise ValueError(
                f"{self._settings.address} sets the reasoning apart from the answer and returns no token ids: the "
                "tokens between them cannot be known; run the server without a reasoning parser"
            )
        ids_from: Literal["server", "text"] = "server" if response_ids else "text"
        if not response_ids:
            response_ids = self._need_encoder("the answer").encode_answer(text, finish_reason)
        if prompt_ids is None:
            prompt_ids = token_ids(choice.get("prompt_token_ids")) or token_ids(document.get("prompt_token_ids"))
        if not prompt_ids:
            prompt_ids = self._encode(prompt, self._need_encoder("the prompt"))
        return Answer(
            id=prompt.id,
            prompt_ids=prompt_ids,
            response_ids=response_ids,
            response=text,
            finish_reason=finish_reason,
            ids_from=ids_from,
        )

    def _encode(self, prompt: Prompt, encoder: Encoder | None) -> list[int]:
        assert encoder is not None, "checked when the writer was made"
        try:
            return encoder.encode(prompt)
        except Exception as error:  # chat templates raise what they like
            raise Refusal(self._short(f"the chat template refuses it: {error}")) from None

    def _need_encoder(self, what: str) -> Encoder:
        if self._encoder is None:
            raise ValueError(
                f"{self._settings.address} returns no token ids of {what} ({IDS_FIELD}): name the model's "
                "tokenizer with --tokenizer, which makes them from the text"
            )
        return self._encoder


def first_choice(document: dict[str, Any], route: Route) -> tuple[dict[str, Any], str]:
    """The first choice and its text; `Trouble` where there is none."""
    choices = document.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise Trouble("the answer has no choices")
    choice = choices[0]
    if route == "completions":
        text = choice.get("text")
    else:
        message = choice.get("message")
        text = message.get("content") if isinstance(message, dict) else None
    if text is not None and not isinstance(text, str):
        raise Trouble("the answer's text is no text")
    # JSON can carry half a character, which no file of text can: it becomes the sign for a broken one.
    return choice, (text or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def splits_reasoning(choice: dict[str, Any]) -> bool:
    """Whether a part of what the model wrote stands beside the answer's text."""
    message = choice.get("message")
    return isinstance(message, dict) and bool(message.get("reasoning_content") or message.get("reasoning"))


def token_ids(value: Any) -> list[int] | None:
    """A list of token ids, None where there is none; `Trouble` for anything else."""
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(type(id_) is int and 0 <= id_ < 2**31 for id_ in value):
        raise Trouble("token ids that are none")
    return value


def retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which holds a number or a date; None for nothing readable."""
    if value is None:
        return None
    try:
        return max(float(value), 0.0) if value.strip().lower() not in ("nan", "inf", "-inf") else None
    except ValueError:
        pass
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max((moment - datetime.now(UTC)).total_seconds(), 0.0)


async def watch(is_stopping: Callable[[], bool], halt: asyncio.Event) -> None:
    """Set `halt` once a stop is asked for."""
    while not is_stopping():
        await asyncio.sleep(TICK_S)
    halt.set()


async def is_set_within(event: asyncio.Event, seconds: float) -> bool:
    """Wait so long at most; whether the event is set by then."""
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return False
    return True
