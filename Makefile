# make test and make demo set up everything they need: .venv, packages, data.
PYTHON ?= python3
BIN := .venv/bin
DEMO_FLAGS ?=

.PHONY: setup test lint demo clean

setup: .venv/ready

.venv/ready: requirements.txt requirements-export.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile --durations=15

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

demo: setup
	$(BIN)/python bench/demo.py $(DEMO_FLAGS)

clean:
	rm -rf .venv runs data/shapes
