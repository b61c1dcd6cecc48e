"""`python toy_launcher.py -m trueup.app ...` is trueup with the toy stage: a launcher, as torchrun is one."""

import sys

from trueup.recipes.stages import STAGES

if __name__ == "__main__":
    STAGES["toy"] = ("conftest:ToyRecipe", "A toy.")  # before the verbs are made from the table
    from trueup.app.cli import main

    assert sys.argv[1:3] == ["-m", "trueup.app"]
    main(sys.argv[3:])
