# Every target needs Python 3.11 and make, nothing else: whichever comes first creates .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin
READY := .venv/ready

.DEFAULT_GOAL := help
.PHONY: help quickstart check lint types pure versions test docs long rehearse chaos

help:  ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-11s %s\n", $$1, $$2}'

quickstart: $(READY)  ## train the pocket world's generator and print the README's table
	$(BIN)/python experiments/quickstart.py

check: lint types pure  ## lint, types and the tests that train nothing: before each commit

lint: $(READY)  ## style and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(READY)  ## mypy over the package and everything else
	$(BIN)/mypy

pure: $(READY)  ## the tests that neither start Ray nor train
	$(BIN)/pytest -n 2 --dist loadfile -m pure

# build/versions/highest-3.12.txt and so on, for `make pure PYTHON=python3.12 CONSTRAINTS=build/versions/highest-3.12.txt`
PYTHONS := 3.11 3.12 3.13 3.14
VERSIONS := $(foreach python,$(PYTHONS),highest-$(python) lowest-direct-$(python))
versions: $(VERSIONS:%=build/versions/%.txt)  ## resolve the newest and the lowest packages on each Python

build/uv/bin/uv:
	$(PYTHON) -m venv build/uv
	build/uv/bin/pip install -q uv

build/versions/%.txt: pyproject.toml build/uv/bin/uv
	mkdir -p $(@D)
	build/uv/bin/uv pip compile -q --no-annotate --only-binary :all: --python-platform x86_64-manylinux_2_28 \
		--python-version $(lastword $(subst -, ,$*)) --resolution $(patsubst %-$(lastword $(subst -, ,$*)),%,$*) \
		pyproject.toml -o $@

test: lint types  ## all of it but `long`: before each merge
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

docs: $(READY)  ## the documentation's site, in build/site
	$(BIN)/mkdocs build --strict

long: $(READY)  ## the tests that take minutes each
	$(BIN)/pytest -m long

rehearse: $(READY)  ## an SD1.5-shaped pipeline with random weights, through every command: an hour, 20 GB of disk
	$(BIN)/python benchmarks/rehearse.py

# Kills, full disks, damage and whatever else takes too long for `make test`; needs strace. Its parts take four hours
# one after the other and know nothing of each other: `make -k -j2 chaos` runs two at a time, in two hours
# (benchmarks/RESULTS.md).
CHAOS := endurance nonfinite long sweep run cluster tracker rewards sharded mirror configurations store
chaos: $(CHAOS:%=chaos-%)  ## kills, full disks and damage, for hours

chaos-%: $(READY)
	$(BIN)/python tests/chaos/$*.py

chaos-mirror: $(READY)
	$(BIN)/python tests/chaos/run.py --mirror --kills 12

chaos-sharded: $(READY)
	$(BIN)/python tests/chaos/nonfinite.py --sharded --injections 100

chaos-long: long

# torch goes first and alone: whatever build of it pip is set up to find here, CPU or CUDA, stays.
$(READY): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install "$$(grep -m1 '^torch==' $(CONSTRAINTS))"
	$(BIN)/pip install -c $(CONSTRAINTS) -e '.[dev,docs]'
	touch $@
