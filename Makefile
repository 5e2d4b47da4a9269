# Sets up, runs and checks everything; `make` lists what there is. Needs make and Python 3.11 with venv.
# The caches that tests and demo fill lie outside the checkout: $GPUGLASS_CACHE, else ~/.cache/gpuglass.

PYTHON ?= python3
BIN := .venv/bin
T ?=
SECONDS ?=
QUICK ?=

.DEFAULT_GOAL := help
.PHONY: help bpf demo test lint generated check-generated bench fresh-machine clean

# The commands that keep committed generated files up to date, one a line; $(1) is --write, or --check, which writes
# nothing and fails if a file differs.
define GENERATORS
	@$(BIN)/gpuglass metrics $(1) README.md
	@$(BIN)/gpuglass rules check $(1)
	@$(BIN)/gpuglass dashboards check $(1)
	@$(BIN)/python -m tests.support.stream_page $(1) exporters/engine_probe/STREAM.md
	@$(BIN)/python -m otel_bridge.page $(1) otel_bridge/README.md
endef

help:  ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/make \1\t\2/p' Makefile | expand -t 22

demo: .venv/.demo  ## shows the pack on a simulated GPU, for SECONDS=n or until Ctrl-C
	@library=$$($(BIN)/python -m tests.fakes.nvml) && \
	exec $(BIN)/gpuglass demo --nvml-library "$$library" $(if $(SECONDS),--seconds $(SECONDS))

test: .venv/.test  ## runs the tests, or T="paths and pytest options"; GPUGLASS_REQUIRE: see tests/README.md
	@$(BIN)/python -m pytest $(T)

lint: .venv/.lint  ## checks style, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/mypy --explicit-package-bases tests/support tests/conftest.py

generated: .venv/.test  ## writes the generated files anew
	$(call GENERATORS,--write)

check-generated: .venv/.test  ## fails if a generated file differs from what would be written
	$(call GENERATORS,--check)

bpf: ebpf/program/trace.x86_64.o ebpf/program/trace.aarch64.o  ## compiles the CUDA tracer's program (needs clang, llvm, libbpf-dev, linux-libc-dev)

ebpf/program/trace.%.o: ebpf/program/trace.c ebpf/program/layout.h ebpf/program/dialect.h
	@command -v clang >/dev/null && command -v llvm-objcopy >/dev/null || { echo 'clang or llvm-objcopy not found: apt-get install clang llvm libbpf-dev' >&2; exit 1; }
	@clang -O2 -g -target bpf -DTARGET_$(shell echo $* | tr a-z A-Z) -Wall -Wextra -Werror -Wno-unused-parameter \
		-I/usr/include/$$(uname -m)-linux-gnu -c $< -o $@.new
	@llvm-objcopy --strip-debug --remove-section=.BTF.ext --remove-section=.rel.BTF.ext $@.new && mv $@.new $@

bench: .venv/.test  ## runs all benchmarks (QUICK=1: each under a minute) and prints a table
	@$(BIN)/python -m tests.support.bench $(if $(QUICK),--quick)

fresh-machine:  ## as root: tries demo and tests on an empty Debian (needs debootstrap and git)
	@sh tests/fresh_machine.sh

clean:  ## removes what make made in this folder; the caches stay
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .demo
	find . -name __pycache__ -prune -exec rm -rf {} +

# The virtual environment, made anew only when pyproject.toml changed or its Python is gone.
.venv/.demo: pyproject.toml exporters/engine_probe/pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo '$(PYTHON) not found: apt-get install python3 python3-venv' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "GPUGlass needs Python 3.11, this is $$($(PYTHON) -V): make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	{ echo '$(PYTHON) lacks venv: apt-get install python3-venv' >&2; exit 1; }
	@echo 'preparing .venv' >&2
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install -qq --upgrade 'pip>=25.1'
	@$(BIN)/python -m pip install -qq -e exporters/engine_probe -e '.[demo,kubernetes]'
	@touch $@

.venv/.test: .venv/.demo
	@$(BIN)/python -m pip install -qq --group test -e '.[anomaly,traces,dashboards]'
	@touch $@

.venv/.lint: .venv/.test
	@$(BIN)/python -m pip install -qq --group lint
	@touch $@
