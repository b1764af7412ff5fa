# `make quickstart` and `make test` need Python 3.11 and make, nothing else: whichever comes first creates .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/ready

.PHONY: quickstart test chaos

quickstart: $(READY)
	$(BIN)/python experiments/quickstart.py

test: $(READY)
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

# Kills, full disks, damage and whatever else takes too long for `make test`; needs strace. Its parts take four hours one after the
# other and know nothing of each other: `make -k -j2 chaos` runs two at a time, in two hours (benchmarks/RESULTS.md).
CHAOS := endurance nonfinite long sweep run cluster tracker rewards sharded mirror configurations store
chaos: $(CHAOS:%=chaos-%)

chaos-%: $(READY)
	$(BIN)/python tests/chaos/$*.py

chaos-mirror: $(READY)
	$(BIN)/python tests/chaos/run.py --mirror --kills 12

chaos-sharded: $(READY)
	$(BIN)/python tests/chaos/nonfinite.py --sharded --injections 100

chaos-long: $(READY)
	$(BIN)/pytest -m long

# torch goes first and alone: whatever build of it pip is set up to find here, CPU or CUDA, stays.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install torch==2.13.0
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	touch $@
