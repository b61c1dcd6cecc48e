# Two commands on a machine with Python 3.11+ and make:
#   make demo   set up .venv and run the lab, from raw text to a model you can talk to
#   make test   set up .venv and run the linter, the type checker and the tests
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test lint types clean

demo: $(READY)
	$(BIN)/trueup run recipes/lab
	$(BIN)/trueup lab score runs/lab/sft --prompts 420 --temperature 0 --show 4
	@echo "Go on with:"
	@echo "  $(BIN)/trueup chat runs/lab/sft          talk to it (ask who is the mayor of Fernstead)"
	@echo "  $(BIN)/trueup inspect runs/lab/sft       where it comes from"
	@echo "  $(BIN)/trueup lab score runs/lab/sft     its answers marked, greedy and at temperature 1"

test: lint types
	$(BIN)/pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# .typing/trueup/ holds links to the folders, so that the checker sees trueup.base and not a bare `base`.
types: $(READY)
	$(BIN)/mypy .typing/trueup

# torch first, pinned: the other packages would pull whatever build is newest.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "trueup needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache
