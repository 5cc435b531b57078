PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test lint results notebooks book

demo: .venv/installed  ## both models on the artificial language
	$(BIN)/python experiment.py --preset demo

test: lint  ## the whole suite
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

results: .venv/installed  ## bring research/results/*.json into the pages and their figures
	$(BIN)/python -m research.pages

notebooks: .venv/installed  ## run both again in place; QRNN_DATA names the folder that holds wikitext-2/
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False derivation.ipynb data_prep.ipynb

book: .venv/installed  ## both as pages that need no network, in build/book/
	$(BIN)/python -m docs.book derivation.ipynb data_prep.ipynb

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@
