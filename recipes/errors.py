"""The two ways trueup says no. Anything else that reaches the user is a bug."""


class TrueupError(Exception):
    """Something went wrong that the user can mend: a data row, a directory, the disk, a missing package.

    The message names the place (file, row, key) and the fix. `trueup` prints it without a traceback and
    exits with `exit_code`; `--debug` shows the traceback.
    """

    exit_code = 1


class UsageError(TrueupError):
    """The command line or the recipe is wrong: mended by editing what was typed. Exit code 2."""

    exit_code = 2
