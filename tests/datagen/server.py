"""An OpenAI-compatible server that answers deterministically, and misbehaves when told to."""

import hashlib
import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

END_ID = 257
Faults = Callable[[str, int], str | None]
"""faults(prompt, number of its request, from 1) -> what goes wrong, or None."""


def answer_to(prompt: str) -> str:
    """What the server says to a prompt."""
    return f"answer {hashlib.sha256(prompt.encode()).hexdigest()[:12]} to {prompt}"


def ids_of(text: str) -> list[int]:
    """One token a byte."""
    return list(text.encode())


class Server:
    """The server in a thread, with a count of what it was asked and what it gave away."""

    def __init__(self, faults: Faults = lambda prompt, number: None, *, returns_ids: bool = True, delay_s: float = 0):
        self.faults = faults
        self.returns_ids = returns_ids
        self.delay_s = delay_s
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.in_flight = self.most_in_flight = 0
        self.released = threading.Event()
        """Lets go of requests that hang."""
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer.serve(self)

            def log_message(self, format: str, *_: Any) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

            def handle_error(self, request: Any, client_address: Any) -> None:  # clients that were killed
                pass

        self._server = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Server":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer one request, or fail as told."""
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        is_chat = handler.path.endswith("/chat/completions")
        prompt = (
            body["messages"][-1]["content"]
            if is_chat
            else bytes(i for i in body["prompt"] if i < 256).decode(errors="replace")
        )
        with self.lock:
            self.asked[prompt] += 1
            number = self.asked[prompt]
            self.bodies.append(body)
            self.headers.append(dict(handler.headers))
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            # Requests overtake each other, each time in another way.
            time.sleep(self.delay_s * (hash((prompt, number)) % 7) / 3)
            fault = self.faults(prompt, number)
            if fault == "hang":
                self.released.wait()
                return
        finally:  # before the reply: the client's next request may come at once
            with self.lock:
                self.in_flight -= 1
        self._reply(handler, body, prompt, fault, is_chat=is_chat)

    def _reply(
        self, handler: BaseHTTPRequestHandler, body: dict[str, Any], prompt: str, fault: str | None, *, is_chat: bool
    ) -> None:
        if fault == "reset":
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()
            handler.close_connection = True
            return
        if fault is not None and fault.split()[0].isdigit():
            status, _, rest = fault.partition(" ")
            headers = {"Retry-After": rest.split("=")[1]} if rest.startswith("after=") else {}
            message = "no" if headers else rest or "no"
            send(handler, int(status), json.dumps({"error": {"message": message}}).encode(), headers)
            return
        document = self._document(body, prompt, is_chat=is_chat)
        choice = document["choices"][0]
        if fault == "no choices":
            document["choices"] = []
        elif fault == "no reason":
            choice["finish_reason"] = None
        elif fault == "reasoning":
            choice["message"]["reasoning_content"] = "Hm."
        elif fault == "half a character":
            choice["message"]["content"] = "broken \ud83d and whole \U0001f600"
        elif fault == "no text":
            choice |= {"message": {"content": ""}, "text": "", "token_ids": None}
        payload = json.dumps(document).encode()
        if fault == "truncated":
            send(handler, 200, payload[: len(payload) // 2], {"Content-Length": str(len(payload))})
            handler.close_connection = True
        elif fault == "truncated json":
            send(handler, 200, payload[: len(payload) // 2])
        elif fault == "empty":
            send(handler, 200, b"")
        elif send(handler, 200, payload) and fault is None:
            with self.lock:
                self.answered[prompt] += 1

    def _document(self, body: dict[str, Any], prompt: str, *, is_chat: bool) -> dict[str, Any]:
        text = answer_to(prompt)
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
        choice |= {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
        document: dict[str, Any] = {"object": "chat.completion", "model": body["model"], "choices": [choice]}
        if self.returns_ids and body.get("return_token_ids"):
            choice["token_ids"] = [*ids_of(text), END_ID]
            (document if is_chat else choice)["prompt_token_ids"] = ids_of(prompt) if is_chat else body["prompt"]
        return document


def send(handler: BaseHTTPRequestHandler, status: int, payload: bytes, headers: dict[str, str] | None = None) -> bool:
    """Send a response; whether the client was still there to take it."""
    fields = {"Content-Type": "application/json", "Content-Length": str(len(payload))} | (headers or {})
    with suppress(OSError):
        handler.send_response(status)
        for name, value in fields.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(payload)
        handler.wfile.flush()
        return True
    return False
