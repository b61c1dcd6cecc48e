"""`trueup push`: a model or a data set goes to the Hub, verified first and whole; from a recipe too."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trueup.recipes.directory import RECORD, read_json, write_json
from trueup.recipes.errors import TrueupError, UsageError
from trueup.recipes.hub import HUB_ID
from trueup.recipes.reader import Recipe
from trueup.recipes.run import Run, is_main_process

if TYPE_CHECKING:
    from trueup.app.push_check import Findings
    from trueup.app.push_files import Parcel
    from trueup.app.push_hub import Destination, Pushed

RECEIPT = "pushed.json"  # in a run's work directory: what of it is on the Hub


def push(
    source: Annotated[
        Path,
        typer.Argument(
            help="A model directory (also one that export wrote), a directory of pairs, or a .jsonl of rows.",
            metavar="DIR|PAIRS",
        ),
    ],
    to: Annotated[str, typer.Option(help="The repository: user/name.")],
    private: Annotated[
        bool, typer.Option("--private", help="Only you see it; default: as your account has it.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="The branch; made if it is not there.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without this it is only shown.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For machines: one JSON object.")] = False,
) -> None:
    """Publish a model or a data set on the Hub, with a card: verified beforehand, in one commit.

    Without --yes it shows what would go up. Only what others need goes: weights, configuration, tokenizer,
    code, adapter, record, evaluations. The token is huggingface_hub's own: `hf auth login`, or HF_TOKEN.
    """
    from trueup.app.push_check import verify
    from trueup.app.push_files import gathered
    from trueup.app.push_hub import Destination
    from trueup.app.push_hub import push as push_parcel

    if HUB_ID.fullmatch(to) is None or "@" in to:
        raise UsageError(f"--to {to}: a repository is named user/name; a branch goes into --revision")
    destination = Destination(to, private or None, revision)
    with gathered(source, to) as parcel:
        if not as_json:
            _show(parcel, destination)
        findings = verify(parcel)
        pushed = push_parcel(parcel, destination) if yes else None
        if as_json:
            print(json.dumps(_report(parcel, destination, findings, pushed)))
            return
    _tell(findings)
    if pushed is None:
        print("nothing went up: --yes pushes it")
    else:
        _tell_pushed(pushed)


def _show(parcel: "Parcel", destination: "Destination") -> None:
    """The plan: destination, files with sizes, what stays here, the card's head."""
    seen = "private" if destination.private else "public, unless it is there already and private"
    print(f"{parcel.source} -> {destination} ({parcel.kind}, {seen})")
    files = {name: path.stat().st_size for name, path in parcel.files.items()}
    width = max(map(len, files))
    for name, size in files.items():
        print(f"  {name.ljust(width)}  {_bytes(size):>9}")
    print(f"  {f'{len(files)} files'.ljust(width)}  {_bytes(sum(files.values())):>9}")
    if parcel.left:
        print(f"stays here: {', '.join(parcel.left)}")
    print(parcel.head(), flush=True)


def _tell(findings: "Findings") -> None:
    print(f"verified in a process without trueup: {'; '.join(findings.seen)}")
    for remark in findings.remarks:
        print(f"note: {remark}")


def _tell_pushed(pushed: "Pushed") -> None:
    if pushed.removed:
        print(f"removed, of an earlier push: {', '.join(pushed.removed)}")
    print(pushed.url, flush=True)


def _report(
    parcel: "Parcel", destination: "Destination", findings: "Findings", pushed: "Pushed | None"
) -> dict[str, Any]:
    return {
        "to": destination.repo_id,
        "revision": destination.revision,
        "private": destination.private,
        "kind": parcel.kind,
        "files": {name: path.stat().st_size for name, path in parcel.files.items()},
        "left": list(parcel.left),
        "verified": findings.as_dict(),
        "url": pushed.url if pushed else None,
        "removed": pushed.removed if pushed else [],
    }


def _bytes(size: int) -> str:
    value, units = float(size), iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while value >= 1000 and unit != "TB":
        value, unit = value / 1000, next(units)
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


# ---------------------------------------------------------------- at a stage's end


@dataclass(frozen=True)
class StagePush:
    """What a recipe with `push_to_hub: true` asks for, by the names of TrainingArguments."""

    recipe: Recipe

    @classmethod
    def of(cls, recipe: Recipe) -> "StagePush | None":
        """None where the recipe does not ask."""
        return cls(recipe) if recipe.values.get("push_to_hub") else None

    def check(self) -> None:
        """Fail before the stage rather than after it: somebody must be logged in.

        Raises:
            TrueupError: nobody is, or the Hub cannot be reached.
        """
        from trueup.app.push_hub import account

        if is_main_process():
            if self.recipe.values["hub_strategy"] != "end":
                print(
                    "hub_strategy: end (a stage is pushed once, when it is complete and verified)", flush=True
                )
            try:
                account()
            except TrueupError as error:
                raise TrueupError(f"push_to_hub: {error}") from error

    def due(self, run: Run) -> bool:
        """Whether a finished run is not yet where the recipe wants it."""
        receipt = run.work_dir / RECEIPT
        return not receipt.exists() or read_json(receipt).get("of") != self._of(run)

    def push(self, run: Run) -> None:
        """Push the finished run, as `trueup push --yes` does.

        Raises:
            TrueupError: it is not fit to be published, or could not be; the run itself is complete.
        """
        from trueup.app.push_check import verify
        from trueup.app.push_files import gathered
        from trueup.app.push_hub import Destination, account
        from trueup.app.push_hub import push as push_parcel

        if not is_main_process():
            return
        values = self.recipe.values
        name = values["hub_model_id"] or run.output_dir.name
        try:
            repo_id = name if "/" in name else f"{account()}/{name}"
            destination = Destination(repo_id, values["hub_private_repo"], values["hub_revision"])
            with gathered(run.output_dir, repo_id) as parcel:
                findings = verify(parcel)
                pushed = push_parcel(parcel, destination)
        except TrueupError as error:
            raise TrueupError(
                f"{run.output_dir}: complete, and not pushed: {error}\nthe same command tries the push again"
            ) from error
        write_json(run.work_dir / RECEIPT, {"of": self._of(run), "url": pushed.url})
        _tell(findings)
        _tell_pushed(pushed)

    def _of(self, run: Run) -> list[Any]:
        keys = ("hub_model_id", "hub_revision", "hub_private_repo")
        return [
            read_json(run.output_dir / RECORD)["identity"],
            *(self.recipe.values[key] for key in keys),
        ]
