# Everything sets itself up in .venv from a fresh clone; Python 3.11, 3.12 or 3.13 and make are all it takes.
#
#   make demo        train a small network and see every backend compute the same integers
#   make test        lint, types and the tests that pip packages alone can run
#   make smoke       the ten-second tour of the tests
#   make test-full   every sample on every backend
#   make bench       the benchmark table
#   make lint        style and types only            make format   rewrite the files in that style
#   make toolchains  (Debian, as root or with sudo)  compilers, QEMU, yosys and SystemC for the tests that wait for them
#   make clean       remove .venv and the caches
#
# PYTHON=python3.12 chooses the interpreter of a new .venv. WORKERS=4 runs four test processes.
# EDGEMAT_DATA=/folder points the tests at the real data sets; tests that need them skip without it.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
PYTEST_ARGS ?=
# A terminal sees pip's progress bars, a log only its complaints.
PIP := $(BIN)/python -m pip --disable-pip-version-check install $(shell [ -t 2 ] || echo --quiet)
# An index of CPU builds of torch (a twentieth of Linux's default one), if you have one; nothing else is taken from it.
TORCH_WHEELS ?=

NATIVE = $(shell find edgemat hls_templates tests examples -type f \
    \( -name '*.c' -o -name '*.h' -o -name '*.hpp' -o -name '*.cpp' \) 2>/dev/null)

DEBIAN_PACKAGES := g++ clang make cmake \
    qemu-system-arm qemu-system-misc qemu-user \
    gcc-arm-none-eabi libnewlib-arm-none-eabi gcc-riscv64-unknown-elf \
    libsystemc-dev yosys

export PYTHONUNBUFFERED := 1

.PHONY: help demo test smoke test-full bench lint format toolchains headers clean

help:
	@sed -n 's/^# \{0,1\}//; 3,14p' Makefile

demo: $(VENV)/.demo
	@$(BIN)/edgemat demo

test: $(VENV)/.dev lint
	@echo "== pytest (-n $(WORKERS))"
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" \
	    --durations=10 -rs $(PYTEST_ARGS)

smoke: $(VENV)/.dev
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -q -m smoke $(PYTEST_ARGS)

test-full: $(VENV)/.dev lint
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=20 -rs \
	    $(PYTEST_ARGS)

bench: $(VENV)/.dev
	@$(BIN)/python -m tests.benchmarks

lint: $(VENV)/.dev
	@echo "== ruff check"
	@$(BIN)/ruff check .
	@echo "== ruff format --check"
	@$(BIN)/ruff format --check .
	@echo "== clang-format --dry-run -Werror"
	@files="$(NATIVE)"; [ -z "$$files" ] || $(BIN)/clang-format --dry-run -Werror $$files
	@echo "== mypy"
	@$(BIN)/mypy

format: $(VENV)/.dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@files="$(NATIVE)"; [ -z "$$files" ] || $(BIN)/clang-format -i $$files

headers: $(VENV)/.demo
	@$(BIN)/edgemat headers

toolchains:
	@command -v apt-get >/dev/null || { echo "make toolchains knows Debian's packages only;" \
	    "install these with your own package manager: $(DEBIAN_PACKAGES)" >&2; exit 1; }
	@as=; [ "$$(id -u)" = 0 ] || as=sudo; \
	echo "== apt-get install $(DEBIAN_PACKAGES)"; \
	$$as apt-get update -qq && \
	$$as env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(DEBIAN_PACKAGES) \
	    >/dev/null

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info

# ---- the environment ------------------------------------------------------------------------------------------

$(BIN)/python:
	@found=; \
	for candidate in $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python); do \
	    if "$$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then \
	        found=$$candidate; break; \
	    fi; \
	done; \
	if [ -z "$$found" ]; then \
	    echo "edgemat needs Python 3.11, 3.12 or 3.13 and found none" \
	        "$(if $(PYTHON),(PYTHON=$(PYTHON) is not one),on PATH);" \
	        "install one or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; \
	fi; \
	if ! "$$found" -c 'import ensurepip, venv' 2>/dev/null; then \
	    echo "$$found cannot create environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; \
	fi; \
	echo "== creating $(VENV) with $$($$found --version)"; \
	"$$found" -m venv $(VENV)

$(VENV)/.torch: .ci/constraints.txt | $(BIN)/python
	@if [ -n "$(TORCH_WHEELS)" ]; then \
	    echo "== installing torch for the CPU"; \
	    $(PIP) --no-deps --index-url "$(TORCH_WHEELS)" "$$(grep '^torch==' .ci/constraints.txt)"; \
	fi
	@touch $@

$(VENV)/.demo: pyproject.toml .ci/constraints.txt $(VENV)/.torch
	@echo "== installing edgemat and what the demo needs into $(VENV) (a few minutes the first time)"
	@$(PIP) -c .ci/constraints.txt -e '.[demo,mcu]'
	@$(BIN)/python -m edgemat.targets.inventory --prepare
	@$(BIN)/edgemat headers >/dev/null || echo "== going on without the headers of the HLS C simulation" >&2
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	@echo "== installing what the tests need into $(VENV)"
	@$(PIP) -c .ci/constraints.txt -e '.[dev]'
	@touch $@
