PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test lint results

demo: .venv/installed  ## both models on the synthetic language, a few minutes on a CPU
	$(BIN)/python experiment.py --preset demo

test: .venv/installed lint  ## the whole suite
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

results: .venv/installed  ## bring results/*.json into the README
	$(BIN)/python results/readme.py

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@
