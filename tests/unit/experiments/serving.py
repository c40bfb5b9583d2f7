"""A server that speaks OpenAI's completions on localhost, as well or as badly as a test wants."""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODELS = {"data": [{"id": "tiny", "max_model_len": 4096, "meta": {"n_vocab": 100}}]}
PROBE_TOKENS = 2


def event(data: object) -> bytes:
    return b"data: " + (data if isinstance(data, bytes) else json.dumps(data).encode()) + b"\n\n"


def chunk(text: str = " a", **fields: Any) -> bytes:
    """Return one event with text; ``reason`` ends the completion, ``ids`` are its token ids."""
    names = {"reason": "finish_reason", "ids": "token_ids"}
    return event({"choices": [{"text": text, **{names[name]: value for name, value in fields.items()}}]})


def usage(completion: int, prompt: int = 5, **more: Any) -> bytes:
    return event({"choices": [], "usage": {"completion_tokens": completion, "prompt_tokens": prompt, **more}})


DONE = event(b"[DONE]")

Body = dict[str, Any]
Script = Callable[[Body], "Sequence[bytes] | tuple[int, object]"]


def well(body: Body) -> Sequence[bytes]:
    """One chunk per token, the last with a reason, then usage."""
    wanted, prompt = body["max_tokens"], body["prompt"]
    length = len(prompt) if isinstance(prompt, list) else len(prompt.split())
    last = chunk(" z", reason="length")
    return [*(chunk() for _ in range(wanted - 1)), last, usage(wanted, length), DONE]


class Server(ThreadingHTTPServer):
    """Keeps every request body; ``measured`` leaves out the probe that comes first."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, script: Script, models: object, *, chunked: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script, self.models, self.chunked = script, models, chunked
        self.bodies: list[Body] = []
        self.headers: list[dict[str, str]] = []
        self.stopping = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hung up is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._whole(200 if self.server.models is not None else 404, self.server.models)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        self.server.headers.append(dict(self.headers))
        answer = self.server.script(body)
        if isinstance(answer, tuple):
            self._whole(*answer)
        else:
            self._stream(answer)

    def _whole(self, status: int, body: object) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _stream(self, packets: Sequence[bytes]) -> None:
        """Send each packet on its own; an empty one waits until the server stops, ``b"!"`` hangs up."""
        self.close_connection = not self.server.chunked
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        framing = ("Transfer-Encoding", "chunked") if self.server.chunked else ("Connection", "close")
        self.send_header(*framing)
        self.end_headers()
        for packet in packets:
            if packet == b"":
                self.close_connection = True
                self.server.stopping.wait(10)
                return
            if packet == b"!":
                self.close_connection = True
                return
            self.wfile.write(b"%x\r\n%b\r\n" % (len(packet), packet) if self.server.chunked else packet)
            self.wfile.flush()
        if self.server.chunked:
            self.wfile.write(b"0\r\n\r\n")

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def serving(script: Script = well, models: object = MODELS, *, chunked: bool = True) -> Iterator[Server]:
    with Server(script, models, chunked=chunked) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.stopping.set()
            server.shutdown()
            thread.join()


def after_probe(script: Script) -> Script:
    """Answer the probe well, then follow the script."""
    return lambda body: well(body) if body["max_tokens"] == PROBE_TOKENS else script(body)
