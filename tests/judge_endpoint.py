"""A server that answers as an OpenAI-compatible endpoint does."""

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[str], tuple[int, Any]]  # the question -> (status, the reply or a whole body)


class Endpoint:
    """A server on a free port: `answer` decides, `requests` and `headers` keep what came in."""

    def __init__(self) -> None:
        self.answer: Answer = lambda question: (200, "[[C]]")
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.requests.append({"path": self.path, **body})
                endpoint.headers.append(dict(self.headers))
                status, reply = endpoint.answer(body["messages"][0]["content"])
                if isinstance(reply, str):
                    reply = {"choices": [{"message": {"role": "assistant", "content": reply}}]}
                content = json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Retry-After", "0")
                self.send_header("Content-Length", str(len(content)))
                with contextlib.suppress(ConnectionError):  # the client may have lost patience
                    self.end_headers()
                    self.wfile.write(content)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@contextlib.contextmanager
def serving() -> Iterator[Endpoint]:
    """An endpoint that runs while the block does."""
    found = Endpoint()
    thread = threading.Thread(target=found.server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield found
    finally:
        found.server.shutdown()
        found.server.server_close()


def replies(question: str) -> tuple[str, str]:
    """The two replies shown to the judge."""
    first, second = re.findall(r"<reply_.>\n(.*?)\n</reply_.>", question, re.DOTALL)
    return first, second


def longer_is_better(question: str) -> tuple[int, str]:
    first, second = map(len, replies(question))
    return 200, "Let me see. " + ("[[C]]" if first == second else "[[A]]" if first > second else "[[B]]")
