# Every target first installs what it needs in .venv: the demo the extra "cli", all others "dev".
# test-oldest has an environment of its own, with the oldest torch that pyproject.toml allows.
PYTHON ?= python3
VENV := .venv
SOURCES := pyproject.toml teleport_optim/optim/kernels/_native.c

.PHONY: demo test test-oldest lint format clean
.NOTPARALLEL: # both installations write to one environment

demo: $(VENV)/.ready-cli
	OMP_NUM_THREADS=1 $(VENV)/bin/teleport-optim demo

test: lint
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n 2 --dist worksteal

test-oldest: .venv-oldest/.ready
	OMP_NUM_THREADS=1 .venv-oldest/bin/pytest -n 2 --dist worksteal -m private_torch tests/optim tests/symmetry tests/meta_training

lint: $(VENV)/.ready-dev
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

format: $(VENV)/.ready-dev
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

clean:
	rm -rf $(VENV) .venv-oldest dist .mypy_cache .pytest_cache .ruff_cache

$(VENV)/.ready-%: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable '.[$*]'
	touch $@

.venv-oldest/.ready: $(SOURCES)
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --editable '.[alignment,cli,testing]' expecttest pytest pytest-xdist \
		'torch==2.9.0' 'torchvision==0.24.0' 'transformers>=5.24'
	touch $@
