# Every target sets up what it needs in .venv first.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready

.PHONY: demo test lint format clean

demo: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/teleport-optim demo

test: lint
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n 2 --dist worksteal

lint: $(READY)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

format: $(READY)
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

clean:
	rm -rf $(VENV) dist .mypy_cache .pytest_cache .ruff_cache

$(READY): pyproject.toml teleport_optim/optim/kernels/_native.c
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable '.[dev]'
	touch $@
