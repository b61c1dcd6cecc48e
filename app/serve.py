"""`trueup serve`: a model directory behind an OpenAI-compatible address."""

from pathlib import Path
from typing import Annotated

import typer

from trueup.recipes.errors import TrueupError


def serve(
    directory: Annotated[str, typer.Argument(help="A model directory, or a Hub id.", metavar="DIR")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all of them.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port.")] = 8000,
) -> None:
    """Serve a model to what speaks OpenAI's API: chat pages, clients, the judge of a comparison.

    /v1/models and /v1/chat/completions, streaming too, at http://HOST:PORT/v1. There is no key, and no limit
    but a queue: keep other addresses than this machine's own for networks that you trust.
    """
    import socket
    import sys

    import uvicorn

    from trueup.app.models_pool import Entry, ModelPool
    from trueup.app.serve_api import build_api

    name = Path(directory).resolve().name
    pool = ModelPool([Entry(name, directory, "chat")], sys.maxsize)  # there are no others to leave room for
    with pool.using(name) as loaded:  # what is wrong with it is said now, and not to the first client
        api = build_api(loaded, host)
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listening = socket.create_server((host, port), family=family)
        except OSError as error:
            raise TrueupError(
                f"{host}:{port}: cannot be listened on ({error.strerror}); choose another --port"
            ) from error
        print(f"{name} at http://{host}:{port}/v1; Ctrl-C ends", flush=True)
        uvicorn.Server(uvicorn.Config(api, log_level="warning")).run([listening])
