# On a fresh machine with Python 3.11+ and make:
#   make demo   trains, samples in few steps, compares, and leaves runs/demo/report.html
#   make test   passes the whole suite
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lowest newest lint format bench bench-full docs clean

demo: $(VENV)/installed
	$(BIN)/dualout demo --out runs/demo

test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# the suite with the oldest and the newest versions that pyproject.toml allows; torch comes with CUDA then, which is some
# gigabytes
lowest newest: %: $(VENV)-%/installed
	OMP_NUM_THREADS=1 $(VENV)-$@/bin/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/installed
	$(BIN)/python benchmarks/run.py

bench-full: $(VENV)/installed
	$(BIN)/python benchmarks/run.py --full

$(VENV)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' \
	  || { echo "dualout needs Python 3.11 to 3.13; name one with PYTHON=…  (found: $$($(PYTHON) --version 2>&1))"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/installed: $(VENV)/python pyproject.toml constraints.txt
	@echo "Installing dualout into $(VENV) (torch and its friends: a few minutes the first time)"
	$(INSTALL) --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/python pyproject.toml constraints.txt
	@echo "Installing dualout and its test tools into $(VENV)"
	$(INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/installed

$(VENV)-lowest/installed: RESOLUTION := lowest-direct
$(VENV)-newest/installed: RESOLUTION := highest
$(VENV)-%/installed: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(@D)/bin/uv pip install --quiet --python $(@D)/bin/python --resolution $(RESOLUTION) --upgrade --editable '.[dev]'
	@touch $@

# strict: a warning is an error. The variable silences the theme's advertisement of its successor.
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "site/index.html opens in a browser; python3 -m http.server -d site also serves its search"

$(VENV)/installed-docs: $(VENV)/python pyproject.toml constraints.txt
	@echo "Installing dualout and what builds its documentation into $(VENV)"
	$(INSTALL) --editable '.[docs]'
	@touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-newest build site dist src/*.egg-info .pytest_cache .ruff_cache
