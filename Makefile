# Everything is installed into $(VENV); nothing else on the machine is changed.
# Needs GNU make and Python 3.11, 3.12 or 3.13 with pip.

PYTHON ?= python3
VENV   ?= .venv
# Test processes. Each keeps torch to one thread.
JOBS   ?= 2
# An extra package index to take torch from. On Linux the usual index has the CUDA build of several
# gigabytes; the index of CPU builds that PyTorch's own installation page names saves that.
TORCH_INDEX ?=
# Where models that `make measure` trains are kept.
WORK   ?= build/measure
# More words for the command that is run: make demo ARGS="--fast --open"
ARGS   ?=

BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt --build-constraint constraints.txt \
           $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
CODE := src tests tools benchmarks

.PHONY: help demo test lint types pages docs site file-scanners measure constraints clean

help:  ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.core  ## Plant a backdoor, train, scan a backdoored and a clean model, mend the first.
	$(BIN)/doorward demo $(ARGS)

test: $(VENV)/.test  ## Run the tests (ARGS="tests/test_contract.py -x" runs some, ARGS="-m long" those that take long).
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/.test  ## Check style and format.
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

types: $(VENV)/.test  ## Check types.
	$(BIN)/mypy

pages: $(VENV)/.test  ## Write docs/cli.md and docs/methods/ from the code, tables from results.
	$(BIN)/python tools/docs_pages.py
	$(BIN)/python tools/readme_tables.py

docs: pages site  ## The same, and build the documentation site in build/site.

site: build/site-tools/.made  ## Build the documentation site from docs/ and check its links.
	build/site-tools/bin/mkdocs build --quiet --strict
	@echo "written: build/site/index.html"

file-scanners: $(VENV)/.test  ## Measure the table of file scanners again.
	$(INSTALL) --group peers
	$(BIN)/python benchmarks/file_scanners.py
	$(BIN)/python tools/readme_tables.py

measure: $(VENV)/.test  ## Measure formats, real sizes and cost of a scan again (an hour; DOORWARD_DATA names the data).
	code=0; for name in scan_cost real_sizes formats; do \
	  $(BIN)/python benchmarks/$$name.py --work $(WORK) || code=$$?; done; exit $$code

constraints:  ## Pin the newest versions of everything but torch and the build tool.
	$(PYTHON) -m venv --clear build/pins
	build/pins/bin/python -m pip install --quiet --upgrade pip
	build/pins/bin/python -m pip install --quiet $$(grep '^torch==' constraints.txt) hatchling==1.27.0 editables \
	  --editable '.[all]' --group dev --group peers
	{ grep '^#' constraints.txt; \
	  build/pins/bin/python -m pip freeze --all --exclude-editable | sed 's/+[a-z0-9.]*$$//'; } > build/constraints.txt
	mv build/constraints.txt constraints.txt

clean:  ## Remove what make made.
	rm -rf $(VENV) dist build doorward-demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name .git -prune -o -name __pycache__ -prune -exec rm -rf {} +

# The stamps say what is installed; they are made again when dependencies, pins or this file change.
$(VENV)/.core: pyproject.toml constraints.txt Makefile
	@command -v $(PYTHON) >/dev/null || { \
	  echo "$(PYTHON) is not there: name a Python 3.11, 3.12 or 3.13, as in make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else \
	  "Doorward needs Python 3.11, 3.12 or 3.13, but $(PYTHON) is %d.%d: name another, as in make PYTHON=python3.12" % v)'
	@echo "Installing into $(VENV) (once; torch alone is some hundred megabytes) ..."
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt pip
	$(INSTALL) --editable .
	touch $@

# MkDocs reads the code and imports none of it, so that the site needs no torch.
build/site-tools/.made: pyproject.toml
	$(PYTHON) -m venv --clear build/site-tools
	build/site-tools/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	build/site-tools/bin/python -m pip install --quiet --disable-pip-version-check --group site
	touch $@

$(VENV)/.test: $(VENV)/.core
	$(INSTALL) --editable '.[all]' --group dev
	touch $@
