PYTHON ?= python3
BIN = .venv/bin

.PHONY: help demo test lint lab notebooks book results

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: .venv/installed  ## train a QRNN and an LSTM on the artificial language
	$(BIN)/python experiment.py --preset demo

test: lint  ## the whole suite, after lint
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: .venv/installed  ## style, types, and which module may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

lab: .venv/installed  ## open the notebooks in the browser
	$(BIN)/jupyter lab derivation.ipynb

notebooks: .venv/installed  ## run both again in place; QRNN_DATA names the folder that holds wikitext-2/
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False derivation.ipynb data_prep.ipynb

book: .venv/installed  ## both notebooks as pages that need no network, in build/book/
	$(BIN)/python -m docs.book derivation.ipynb data_prep.ipynb

results: .venv/installed  ## bring research/results/*.json into the pages and their figures
	$(BIN)/python -m research.pages

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@
