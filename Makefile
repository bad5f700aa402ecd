# Everything here works on a fresh machine that has Python 3.11 or newer: `.venv` is built first, once.
#   make quickstart          train a small Llama on two processes (QUICKSTART_ARGS="training.max_steps=20")
#   make test                every gate: lint, types, contracts, tests (TESTS=tests/recipe for one folder)

PYTHON ?=
FIND_PYTHON = $(or $(PYTHON),$(firstword $(shell command -v python3 python3.11 python3.12 python3.13)),python3)
BIN := .venv/bin
QUICKSTART_ARGS ?=
TESTS ?=

# Else every process that tests start would compile what it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: venv quickstart test lint types docs bench
.NOTPARALLEL:

venv:
	@$(FIND_PYTHON) tools/make_venv.py $(if $(PYTHON),--python $(PYTHON))

quickstart: venv
	@$(BIN)/camshaft train recipes/quickstart.yaml $(QUICKSTART_ARGS)

test: lint types
	@# More than there are processors here: tests also wait, for messages and for processes.
	$(BIN)/python -m pytest -n 3 --dist worksteal $(TESTS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/changelog.py check
	$(BIN)/lint-imports

types: venv
	$(BIN)/mypy engine/camshaft plugins/*/ tools

docs: venv
	$(BIN)/python -m tools.docs

bench: venv
	$(BIN)/python -m tools.bench
