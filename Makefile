# Four commands: make demo, make test, make test-slow, make format. Set-up runs only when pyproject.toml or
# constraints.txt changed. Another interpreter: make test PYTHON=python3.12. With the compilers of TPUs and GPUs, whose
# tests are skipped otherwise (800 MB): make test EXTRAS=test,aot

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= test
BIN := $(VENV)/bin

.PHONY: help demo test test-slow format clean

help:
	@echo "make demo       install and post-train a small model with GRPO on this machine"
	@echo "make test       install, lint, check types, run the tests"
	@echo "make test-slow  run the longer learning runs"
	@echo "make format     format and sort the code"
	@echo "make clean      remove $(VENV), build products and caches (runs/ stays)"

demo: $(VENV)/.installed-demo
	$(BIN)/jaxrl demo

test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/pytest -m "not slow" -n auto --dist loadfile

test-slow: $(VENV)/.installed-test
	$(BIN)/pytest -m slow || [ $$? -eq 5 ]  # 5: no test is marked slow

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "jaxrl needs Python 3.11 or newer; '$(PYTHON)' is `$(PYTHON) --version 2>/dev/null || echo not found`." >&2; \
	  echo "Name another one, for example: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-demo: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[plot]'
	@touch $@

$(VENV)/.installed-test: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@ $(VENV)/.installed-demo
