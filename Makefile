# Two commands do everything on a machine with Python >= 3.11, pip and make: `make demo` and `make test`.
# The first of them creates .venv and installs the pinned versions of constraints.txt; a stamp file remembers that.
PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.memlayers-installed

.PHONY: help install demo test test-full lint format clean

help:
	@echo "make demo    wrap, train and evaluate the embedded tiny base; leaves runs/demo/report.json and passkey.png"
	@echo "make test    run the tests (JOBS=$(JOBS) processes); make test-full runs every cell of the matrix, Triton and notebooks"
	@echo "make lint    ruff check and ruff format --check"
	@echo "make format  let ruff fix and format"
	@echo "make clean   remove runs/, build products and caches; .venv stays"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "memlayers needs Python 3.11 or newer; \
	this is " + sys.version.split()[0] + ". Name another one: make PYTHON=/path/to/python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,eval,dev]'
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/memlayers demo

# One thread a process: the tests use tiny models, on which more threads only get in each other's way.
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal
test: $(STAMP)
	$(PYTEST) -m "not full" $(ARGS)

test-full: $(STAMP)
	$(PYTEST) $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf runs dist build .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
