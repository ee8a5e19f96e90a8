# Everything runs in an environment of its own, so that a fresh clone needs nothing but Python.
PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

FAMILIES := gemma phi qwen llama moe
RESULTS ?= results/runs

.PHONY: run test lint compare baselines

run: $(VENV)/.installed
	$(BIN)/spath-eval run --arch gemma --strategy negative

test: $(VENV)/.installed
	TQDM_DISABLE=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.linters
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) '.[gguf,test]'
	touch $@

$(VENV)/.linters: $(VENV)/.installed
	$(INSTALL) '.[lint]'
	touch $@

# The main job, and the same on 100 documents a task with the other families' small models. The cache is their own.
FAMILY = SPATH_CACHE_DIR=$(RESULTS)/cache $(BIN)/spath-eval run --arch $$family --strategy negative \
	$$(test $$family = gemma || echo --limit 100) -o $(RESULTS)/$$family.json

compare: $(VENV)/.installed
	for family in $(FAMILIES); do $(FAMILY) --baseline results/baselines/$$family-negative.json || exit; done

baselines: $(VENV)/.installed
	for family in $(FAMILIES); do $(FAMILY) || exit; done
	for family in $(FAMILIES); do $(BIN)/spath-eval baseline update $(RESULTS)/$$family.json || exit; done
