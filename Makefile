# Every target works on a bare machine that has only Python (3.11 or newer) and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Which PyTorch: without a GPU the CPU build spares gigabytes, TORCH='torch --index-url https://download.pytorch.org/whl/cpu'.
TORCH ?= torch
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt

.PHONY: demo study miniature test check bench docs format clean

$(VENV)/.core: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) $(TORCH)
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	$(INSTALL) --editable '.[dev]'
	@touch $@

$(VENV)/.docs: $(VENV)/.core
	$(INSTALL) --editable '.[docs]'
	@touch $@

$(VENV)/.study: $(VENV)/.core
	$(INSTALL) --editable '.[study]'
	@touch $@

demo: $(VENV)/.study  ## merge two LoRAs of different tools, check the result, draw it, score it, report
	$(BIN)/python examples/quickstart.py
	$(BIN)/python -m examples.virtual_tryon run --preset demo --processes 2 --out demo_output/pictures

study: $(VENV)/.study  ## the whole virtual try-on study in miniature, in build/study/mini
	$(BIN)/python -m examples.virtual_tryon run --preset mini --processes 2 --extended

MINIATURE := $(BIN)/python -m examples.virtual_tryon
miniature: $(VENV)/.study  ## train judge, autoencoder and base of the miniature from nothing, in build/miniature: seven and a half hours of two cores
	$(MINIATURE).train_scorer --device cpu --minutes 45 --pictures 32000
	$(MINIATURE).train_autoencoder --minutes 85 --pictures 30000 --processes 2
	$(MINIATURE).train_autoencoder --minutes 15 --rate 0.006 --go-on --decoder-only --scorer build/miniature/scorer
	$(MINIATURE).train_base --device cpu --minutes 295 --processes 2 --vae build/miniature/vae --text-steps 500 --scorer build/miniature/scorer

test: $(VENV)/.dev  ## every test
	$(BIN)/python -m pytest -n 2

check: $(VENV)/.dev $(VENV)/.docs  ## all that must be green: style, types, layers, tests, docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.dev  ## speed and memory beside the peers, on real SDXL shapes
	$(BIN)/python benchmarks/merge.py; merge=$$?; $(BIN)/python benchmarks/methods.py && exit $$merge

docs: $(VENV)/.docs  ## the documentation, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) site build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
