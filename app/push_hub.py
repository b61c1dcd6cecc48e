"""The Hub's side of a push: who is asking, the repository, and one commit with all that changes.

The token comes from where huggingface_hub keeps it (`hf auth login`, HF_TOKEN), and is never shown.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trueup.app.push_files import Parcel
from trueup.recipes.errors import TrueupError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN, with a token that may write"


@dataclass(frozen=True)
class Destination:
    """Where on the Hub.

    Args:
        repo_id: user/name.
        private: None: as the account has it for new repositories.
        revision: the branch; None: main.
    """

    repo_id: str
    private: bool | None = None
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.revision}" if self.revision else self.repo_id


@dataclass(frozen=True)
class Pushed:
    """A commit, and what it removed of an earlier push."""

    url: str
    commit: str
    removed: list[str]


def account() -> str:
    """The name of whoever is logged in.

    Raises:
        TrueupError: nobody is, the token is not accepted, or the Hub cannot be reached.
    """
    with explained("your account"):
        name: str = _api().whoami()["name"]
    return name


def push(parcel: Parcel, destination: Destination) -> Pushed:
    """Put a parcel on the Hub, in one commit: all of it is there, or nothing.

    `upload_folder` would not do: beside hf_xet it commits in parts.

    Raises:
        TrueupError: it was refused or broken off; says whether something was published.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api: Any = _api()  # whose overloads know no keyword arguments as a whole
    repo = {"repo_id": destination.repo_id, "repo_type": parcel.kind}
    with explained(str(destination)):
        api.whoami()  # a wrong token creates nothing
        api.create_repo(**repo, private=destination.private, exist_ok=True)
        if destination.private and not api.repo_info(**repo).private:
            raise TrueupError(
                f"{destination.repo_id}: is there already and is public; make it private on its settings "
                "page, or choose another name"
            )
        if destination.revision:
            api.create_branch(**repo, branch=destination.revision, exist_ok=True)
        there = api.repo_info(**repo, revision=destination.revision)
        files = parcel.files
        gone = [one.rfilename for one in there.siblings or [] if one.rfilename not in files]
        removed = sorted(name for name in gone if parcel.replaces(name))
        operations: list[Any] = [CommitOperationDelete(name) for name in removed]
        operations += [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        done = api.create_commit(
            **repo, operations=operations, revision=destination.revision, parent_commit=there.sha,
            commit_message=f"{parcel.about}, by trueup",
        )  # fmt: skip
    return Pushed(done.commit_url, done.oid, removed)


def _api() -> "HfApi":
    from huggingface_hub import HfApi

    return HfApi(library_name="trueup")


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into one message without addresses' signatures, or a token."""
    try:
        yield
    except TrueupError:
        raise
    except Exception as error:
        raise TrueupError(f"{what}: {_without_secrets(_reason(error))}") from error


def _reason(error: Exception) -> str:
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

    causes = _causes(error)
    status = next((code for one in causes if (code := _status(one)) is not None), None)
    said = " ".join(str(error).split()) if status is None else _server_words(causes)
    if any(isinstance(one, LocalTokenNotFoundError) for one in causes):
        return f"nobody is logged in to the Hub here; {LOG_IN}"
    if any(isinstance(one, OfflineModeIsEnabled) for one in causes):
        return "HF_HUB_OFFLINE is set, so nothing can be pushed; unset it"
    if status == 401:
        return f"the Hub does not accept the token, or there is none; {LOG_IN}. Nothing was published"
    if status in (403, 404):
        return f"the token may not write there; {LOG_IN} to that name. Nothing was published ({said})"
    if status is not None:
        again = "run the same command again: what has arrived is not sent twice"
        return f"the Hub refused ({said}). Nothing was published; {again}"
    if isinstance(error, ValueError):  # the card's head, or an answer that makes no sense
        return f"{said}. Nothing was published"
    return f"the Hub cannot be reached ({said}); run the same command again: what has arrived is kept"


def _causes(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _status(error: BaseException) -> int | None:
    code = getattr(getattr(error, "response", None), "status_code", None)
    return code if isinstance(code, int) else None


def _server_words(causes: list[BaseException]) -> str:
    """What the server said, and of which file, in one line."""
    server = next(one for one in causes if _status(one) is not None)
    lines = [" ".join(str(one).split()) for one in (causes[0], server)]
    return "; ".join(dict.fromkeys(line for line in lines if line))


def _without_secrets(text: str) -> str:
    from huggingface_hub import get_token

    token = get_token()
    text = text.replace(token, "(hidden)") if token else text
    return re.sub(r"\?[\w%&=.~+-]+", "", text)  # of an upload address: the query is its key
