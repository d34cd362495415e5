# Two commands matter: `make run` (the whole series) and `make test`.

PYTHON ?= python3
NB ?=
# The torch that every stored number was measured with; `make lock` after a change.
TORCH := torch==2.13.0
TORCH_INDEX_URL ?=

BIN := .venv/bin
STAMP := .venv/.installed
PYTEST := $(BIN)/python -m pytest

# Nothing is downloaded, except at DLM_SCALE=full. Tests are small; where two
# processes run side by side each has one thread.
OFFLINE := $(if $(filter full,$(DLM_SCALE)),,HF_HUB_OFFLINE=1)
CI := HF_HUB_OFFLINE=1 DLM_SCALE=ci
TWO_WORKERS := $(CI) OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

# $(call stage,name,command): run a command, then print its time and keep its status.
stage = @echo "== $(1)"; start=$$(date +%s); { $(2); }; status=$$?; \
	echo "== $(1): $$(( $$(date +%s) - start )) s"; exit $$status

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help venv run lab test lint unit mechanics nbval browser store \
	checkpoints picture lock clean

help: ## list the commands
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1 | \2/p' $(MAKEFILE_LIST) | \
		awk -F'|' '{printf "%-20s%s\n", $$1, $$2}'

venv: $(STAMP) ## set up .venv with the pinned packages

# torch goes first and alone, so that another index can serve it and nothing else.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; '$(PYTHON)' is not." \
		"Name another one: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --no-deps $(TORCH) \
		$(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL))
	$(BIN)/python -m pip install -c constraints.txt -e '.[notebooks,test]'
	@touch $@

run: $(STAMP) ## run the series, or one notebook (NB=02), into build/
	@$(OFFLINE) $(BIN)/python -m tools.notebooks run $(NB)

lab: $(STAMP) ## open the series in JupyterLab
	$(BIN)/jupyter lab notebooks

test: lint unit mechanics nbval browser ## every test
	@echo "== all tests passed"

lint: $(STAMP) ## ruff: rules and format, notebooks included
	$(call stage,lint,$(BIN)/ruff check . && $(BIN)/ruff format --check .)

unit: $(STAMP) ## unit and parity tests, with coverage
	$(call stage,unit and parity,$(TWO_WORKERS) $(PYTEST) -n 2 \
		$(wildcard tests/unit tests/parity) \
		--cov=dlmlib --cov-report=term:skip-covered --cov-fail-under=90)

mechanics: $(STAMP) ## the rules every stored notebook keeps
	$(call stage,mechanics,$(CI) $(PYTEST) tests/notebooks)

nbval: $(STAMP) ## run every notebook and solution at the ci scale
	$(call stage,notebooks and solutions,$(TWO_WORKERS) $(PYTEST) --nbval-lax \
		--nbval-current-env --dist loadfile -n 2 notebooks)

browser: $(STAMP) ## JupyterLab in headless Chromium
	$(call stage,browser,$(CI) $(PYTEST) -m browser tests/browser)

store: $(STAMP) ## run NB=02 at the laptop scale and store its outputs in place
	@HF_HUB_OFFLINE=1 DLM_SCALE=laptop $(BIN)/python -m tools.notebooks store $(NB)

checkpoints: $(STAMP) ## train every shipped checkpoint again
	$(BIN)/python -m dlmlib.training.shipping

picture: $(STAMP) ## draw the README's picture again
	@HF_HUB_OFFLINE=1 $(BIN)/python -m tools.picture

lock: ## resolve every version but torch's anew; writes constraints.txt
	$(PYTHON) tools/lock.py $(TORCH)

clean: ## remove .venv, build/ and caches
	rm -rf .venv build .pytest_cache .ruff_cache .hypothesis .coverage* *.egg-info
