# make setup | demo | demo-compare | figures | docs | test | test-fast | torture | lint | format | bench | gpu | evidence | zoo        [STACK=onedl|openmmlab|oldest] [ARGS='...']
# STACK=oldest is openmmlab at the oldest supported versions, Python 3.9, torch 2.1.0, numpy 1.26.0,
# mmcv 2.1.0, mmengine 0.10.0, mmdet 3.3.0: PYTHON=python3.9 make test STACK=oldest
STACK ?= onedl
VENV := $(if $(filter onedl,$(STACK)),.venv,.venv-$(STACK))
ARGS ?=
STUDIES := law when recovery detection decay scratch finetuning imagenet cifar costs alpha networks shrink
# One file runs in one worker, in order: its tests share costly fixtures.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev demo demo-compare figures docs test test-fast torture lint format bench gpu evidence zoo

help:  ## this list
	@sed -nE 's/^([a-z-]+):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 22

setup:  ## create the virtual environment: torch, MMDetection, this package
	@scripts/setup.sh $(STACK)

setup-dev:
	@scripts/setup.sh $(STACK) dev

demo: setup  ## train a small psBN detector on synthetic data, count collapse, write a report
	@$(VENV)/bin/python scripts/demo.py $(ARGS)

demo-compare: setup  ## train it with BN and with psBN where filters collapse, and compare them
	@$(VENV)/bin/python scripts/compare.py $(ARGS)

figures: setup-dev  ## draw docs/images from the kept runs of demo-compare
	@$(VENV)/bin/python scripts/figures.py $(ARGS)

docs: setup  ## run the commands in the docs again and update their output
	@$(VENV)/bin/python scripts/transcripts.py $(ARGS)

test: setup-dev  ## run all tests, the fast ones first; ARGS='-k layers'
	@$(VENV)/bin/python -m pytest $(PARALLEL) $(ARGS)

test-fast: setup-dev  ## run the fast tests, some minutes
	@$(VENV)/bin/python -m pytest $(PARALLEL) -m 'not slow' $(ARGS)

torture: setup-dev  ## kills, full disks and bad input, at length; ends with a table of cases and failures
	@PSBN_TORTURE=1 $(VENV)/bin/python -m pytest $(PARALLEL) tests/torture $(ARGS)

lint: setup-dev  ## check style and types
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

format: setup-dev  ## fix and format what ruff can
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

bench: setup  ## measure what psBN and the hooks cost, and the leak of LeakyReLU
	@$(VENV)/bin/python benchmarks/layer_speed.py
	@$(VENV)/bin/python demo/make_dataset.py data/demo
	@$(VENV)/bin/python benchmarks/hook_overhead.py
	@$(VENV)/bin/python benchmarks/leak_share.py

gpu: setup  ## check and measure everything on a GPU; ARGS='--minutes 3 --device cpu' rehearses it
	@$(VENV)/bin/python benchmarks/gpu.py $(ARGS)

evidence: setup-dev  ## test the paper's claims; ARGS=--quick for a smoke run
	@$(foreach study,$(STUDIES),$(VENV)/bin/python benchmarks/evidence/$(study).py $(ARGS) &&) true

zoo: setup-dev  ## the checks and --norm psBN on every config of MMDetection, about an hour
	@$(VENV)/bin/python benchmarks/zoo_data.py $(ARGS)
	@$(VENV)/bin/python benchmarks/zoo.py $(ARGS)
