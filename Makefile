# Every target first installs what it needs in .venv: the demo the extra "cli", all others "dev".
PYTHON ?= python3
VENV := .venv
SOURCES := pyproject.toml teleport_optim/optim/kernels/_native.c

.PHONY: demo test lint format clean
.NOTPARALLEL: # both installations write to one environment

demo: $(VENV)/.ready-cli
	OMP_NUM_THREADS=1 $(VENV)/bin/teleport-optim demo

test: lint
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n 2 --dist worksteal

lint: $(VENV)/.ready-dev
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

format: $(VENV)/.ready-dev
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

clean:
	rm -rf $(VENV) dist .mypy_cache .pytest_cache .ruff_cache

$(VENV)/.ready-%: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable '.[$*]'
	touch $@
