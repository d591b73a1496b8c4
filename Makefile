# Every path is relative: the checkout may lie in a folder whose name has spaces.
.DEFAULT_GOAL := help
.PHONY: help setup models demo test lint

READY := .venv/.ready
# As in an activated environment: Ray and DeepSpeed look for their programs on the PATH.
RUN := PATH="$$PWD/.venv/bin:$$PATH"

help:
	@echo "make setup   make .venv with everything that is needed (CPU; Python 3.11 or 3.12)"
	@echo "make models  fetch the two models of the demo into models/"
	@echo "make demo    move a real adapter from SmolLM2 135M to Gemma 3 270M and show the report"
	@echo "make test    check the style and the types, run the tests"
	@echo "make lint    check the style and the types only"
	@echo "demo and test do the set-up first where it is missing."

setup: $(READY)
	@echo "The environment in .venv is up to date."

$(READY): pyproject.toml setup.sh
	@sh setup.sh
	@touch $@

models: $(READY)
	@echo "== The two models, as Hugging Face folders in models/"
	@$(RUN) python examples/models.py models

demo: models
	@echo "== The demo"
	@$(RUN) python examples/demo.py

lint: $(READY)
	@echo "== Style and types"
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .
	@$(RUN) mypy crosslora benchmarks examples tests ray_jobs

test: lint models
	@echo "== Tests"
	@$(RUN) python -m pytest
