PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test marked check bench clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "leftfold needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed ## simulate a small shop and import its sales on SQLite
	$(BIN)/leftfold demo

test: $(VENV)/.installed ## every test, with real servers that pip brought; those of times afterwards
	$(MAKE) --no-print-directory marked MARKS="not timed"
	$(MAKE) --no-print-directory marked MARKS="timed"

# The longest tests come first, so whoever is free takes the next.
marked: $(VENV)/.installed ## the tests of some MARKS
	$(BIN)/python -m pytest -n auto --dist load --maxschedchunk 1 -m "$(MARKS)" $(OPTIONS)

check: $(VENV)/.installed ## style, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy tests/typing
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

bench: $(VENV)/.installed ## ratios against plain eventsourcing, in one run
	$(BIN)/python benchmarks/replay.py
	$(BIN)/python benchmarks/one_caller.py
	$(BIN)/python benchmarks/many_callers.py
	$(BIN)/python benchmarks/dispatch.py
	$(BIN)/python benchmarks/specifications.py
	$(BIN)/python benchmarks/projections.py
	$(BIN)/python benchmarks/shop_import.py

clean:
	rm -rf $(VENV) dist
