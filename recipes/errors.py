"""The two ways trueup says no. Anything else that reaches the user is a bug."""

import difflib
from pathlib import Path


class TrueupError(Exception):
    """Something went wrong that the user can mend: a data row, a directory, the disk, a missing package.

    The message names the place (file, row, key) and the fix. `trueup` prints it without a traceback and
    exits with `exit_code`; `--debug` shows the traceback.
    """

    exit_code = 1


class UsageError(TrueupError):
    """The command line or the recipe is wrong: mended by editing what was typed. Exit code 2."""

    exit_code = 2


def nearest_path(path: Path) -> str:
    """For a path that does not exist: `; did you mean X?`, or where its folders end; else nothing."""
    folder = path.parent
    if not folder.is_dir():
        there = next(parent for parent in folder.parents if parent.is_dir())
        return f"; there is no folder {folder}" + (f" ({there} exists)" if there != Path() else "")
    near = difflib.get_close_matches(path.name, [entry.name for entry in folder.iterdir()], n=1)
    return f"; did you mean {folder / near[0]}?" if near else ""
