# `make demo` and `make test` do everything on a fresh machine: environment, installation, run.
# TORCH is the build of PyTorch. auto: without CUDA on Linux x86_64 machines that have no NVIDIA GPU, where it would be
# gigabytes for nothing; everywhere else what pip's index gives. Or choose: make TORCH=cpu, cuda or default.
PYTHON ?= python3
TORCH ?= auto
VENV ?= .venv
BIN := $(VENV)/bin
PROMPT ?= In the beginning

.PHONY: demo test test-long test-ecosystem lint format types clean

demo: $(VENV)/.installed
	$(BIN)/gemma2 generate "$(PROMPT)" --echo -n 120 --temperature 0.9 --top-p 0.95 --repetition-penalty 1.15 --seed 3 --verbose

test: lint types
	$(BIN)/pytest

# The same tests with four times as many random files and texts.
test-long: lint types
	GEMMA2_LONG=1 $(BIN)/pytest

# Tools that attach to the model from outside: PEFT, trl, nnsight, torchao and others, in the extra `ecosystem`. The
# page for users of transformers shows some of them. `make test` runs those tests whose package is there.
test-ecosystem: $(VENV)/.installed-ecosystem
	$(BIN)/pytest tests/ecosystem tests/test_readme.py::test_the_page_for_users_of_transformers_runs_and_prints_what_it_shows -rs

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.installed-dev
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV)

$(VENV)/.made:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "gemma2 needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.torch-$(TORCH): constraints.txt $(VENV)/.made
	$(BIN)/python scripts/install_torch.py $(TORCH)
	rm -f $(VENV)/.torch-*
	touch $@

$(VENV)/.installed: pyproject.toml constraints.txt $(VENV)/.torch-$(TORCH)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/.installed-ecosystem: $(VENV)/.installed-dev
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[ecosystem]'
	touch $@
