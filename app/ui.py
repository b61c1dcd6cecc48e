"""`trueup app`: talk to models, compare them blindly, vote, and read the verdicts, in a browser."""

import ipaddress
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from trueup.recipes.errors import TrueupError, UsageError


def app(
    runs: Annotated[
        list[str] | None,
        typer.Argument(help="Model directories, comparisons, folders of them, Hub ids.", metavar="[RUNS]..."),
    ] = None,
    votes: Annotated[Path, typer.Option(help="The SQLite file of the votes.")] = Path("votes.sqlite"),
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all of them.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Port; default: the first free one from 7860.")] = None,
    share: Annotated[
        bool, typer.Option("--share", help="A public address for 72 hours, through Gradio's servers.")
    ] = False,
    auth: Annotated[Path | None, typer.Option(help="A file of USER:PASSWORD lines: who may come in.")] = None,
    memory: Annotated[
        float | None,
        typer.Option(min=0, help="GiB that all models may take; default: half of what is free."),
    ] = None,
) -> None:
    """Chat, side-by-side comparison, leaderboard and reports in the browser, of the runs named, or of runs/.

    Only what is named can be reached, from this machine alone unless --host or --share say otherwise.
    """
    users = read_users(auth) if auth else None
    places = runs or ["runs"]
    if not runs and not Path("runs").is_dir():
        raise UsageError("there is no folder runs/ here; name what to show: trueup app RUN ... (or a Hub id)")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from trueup.app.conversation import Arena
    from trueup.app.models_pool import ModelPool, default_memory, find_entries
    from trueup.app.ui_page import build_page, serve_page
    from trueup.app.votes import VoteStore

    entries = find_entries(places)
    pool = ModelPool(entries, default_memory() if memory is None else int(memory * 2**30))
    if not pool.names("chat"):
        raise UsageError(f"{', '.join(places)}: there is no language model among them")
    page = build_page(Arena(pool, VoteStore(votes)))
    try:
        _, local, public = serve_page(page, host, port, share=share, auth=users)
    except OSError as error:
        raise TrueupError(
            f"--port {port or 'from 7860'}: cannot be listened on ({error}); choose another"
        ) from error
    print(f"{len(pool.names('chat'))} models at {public or local}, votes in {votes}; Ctrl-C ends", flush=True)
    if users is None and (share or not is_loopback(host)):
        print("anyone who reaches this address can use it: --auth asks for a password", file=sys.stderr)
    page.block_thread()


def read_users(path: Path) -> list[tuple[str, str]]:
    """The users of an --auth file.

    Raises:
        UsageError: it is not there, holds none, or a line is not USER:PASSWORD; the line itself is not shown.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"--auth {path}: {error.strerror}") from error
    users = []
    for number, line in enumerate(lines, start=1):
        user, _, password = line.strip().partition(":")
        if line.strip() and not (user and password):
            raise UsageError(f"--auth {path}:{number}: is not USER:PASSWORD")
        users += [(user, password)] if user else []
    if not users:
        raise UsageError(f"--auth {path}: holds no USER:PASSWORD")
    return users


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
