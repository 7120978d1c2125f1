# Each target sets up what it needs: a fresh machine needs Python >= 3.11, pip, make, a C++ compiler.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LINKS := build/typing

# Keeps the current directory off sys.path, where our kernels/ would pose as the Hugging Face
# package of that name.
export PYTHONSAFEPATH := 1

# OpenMP threads that spin at a barrier starve each other where two processes share the cores, as
# pytest-xdist's do: 8 ms an operator instead of 0.1.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: help setup demo test test-slow lint format typecheck clean

help:
	@echo "make demo       train a small Llama in bf16, NVFP4 and 4/6 (CPU: under 6 minutes)"
	@echo "make test       the test suite, without the tests marked slow"
	@echo "make test-slow  only the tests marked slow"
	@echo "make lint       ruff, mypy, codespell"
	@echo "make format     let ruff rewrite the sources"

setup: $(STAMP)

# torch is installed first and under its pin, so that no dependency can choose another build.
$(STAMP): pyproject.toml constraints.txt
	@python=; for p in $(PYTHON) python3 python3.13 python3.12 python3.11 python; do \
	  if "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    python="$$p"; break; \
	  fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "No Python >= 3.11 found. Install one, or name it: make PYTHON=/path/to/python3" >&2; \
	  exit 1; \
	fi; \
	echo "Setting up $(VENV) with $$("$$python" --version)"; \
	"$$python" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m fos_compile demo $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	@$(MAKE) --no-print-directory typecheck

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# mypy cannot follow the package mapping of an editable install, so it is shown a tree of links
# in which passes/ and kernels/ lie where they are installed.
typecheck: $(STAMP)
	@rm -rf $(LINKS) && mkdir -p $(LINKS)/fos_compile
	@ln -s $(CURDIR)/fos_compile/* $(LINKS)/fos_compile/
	@ln -s $(CURDIR)/passes $(CURDIR)/kernels $(LINKS)/fos_compile/
	@ln -s $(CURDIR)/benchmarks/*.py $(LINKS)/
	cd $(LINKS) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml \
	  --cache-dir $(CURDIR)/.mypy_cache -p fos_compile \
	  $(patsubst benchmarks/%.py,-m %,$(wildcard benchmarks/*.py))

clean:
	rm -rf $(VENV) build demo-results .mypy_cache .pytest_cache .ruff_cache
