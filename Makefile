# make test and make demo set up everything they need: .venv, packages, data.
PYTHON ?= python3
BIN := .venv/bin
DEMO_FLAGS ?=
# One process more than there are cores: some tests wait for what they have started.
WORKERS = $$($(PYTHON) -c "import os; print(os.cpu_count() + 1)")

.PHONY: setup test test-oldest lint demo clean

setup: .venv/ready

.venv/ready: requirements.txt requirements-export.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --durations=15

# The oldest versions that requirements.txt allows, in an environment of their own. They exist for Python 3.10 to 3.12.
test-oldest: .venv-oldest/ready
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -q -n auto --dist loadfile -m "not slow"

.venv-oldest/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv-oldest
	sed -n 's/>=\([0-9.]*\)/==\1.*/p' requirements.txt > .venv-oldest/requirements.txt
	grep '^pytest\|^hypothesis\|^pandas' requirements-dev.txt >> .venv-oldest/requirements.txt
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check -r .venv-oldest/requirements.txt
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

demo: setup
	$(BIN)/python bench/demo.py $(DEMO_FLAGS)

clean:
	rm -rf .venv .venv-oldest runs data/shapes
