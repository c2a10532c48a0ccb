# What a contributor types. `make` alone lists it.
.DEFAULT_GOAL := help
NB ?= 00_whole_game

help:  ## this list
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 10

setup:  ## install what developers need, and let git keep notebooks and commits clean
	pip install -e ".[dev]"
	nbdev_install_hooks
	pre-commit install

export:  ## notebooks -> package, README; strip what changes by itself
	nbdev_export
	nbdev_clean
	python tools/notebooks.py readme

fix:  ## mend what ruff can mend
	ruff check --fix .
	ruff format .

check:  ## style and types, as the tests check them
	ruff check .
	ruff format --check .
	mypy

test: check  ## everything
	pytest

run:  ## run one notebook and store its outputs: make run NB=21_jaccard
	python tools/notebooks.py run nbs/$(NB).ipynb

docs:  ## the documentation site, in _docs; needs pip install -e ".[docs]"
	python tools/docs.py

.PHONY: help setup export fix check test run docs
