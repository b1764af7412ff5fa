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

# Kills, full disks, damage and whatever else takes too long for `make test`: hours (benchmarks/RESULTS.md); needs strace.
chaos: $(READY)
	$(BIN)/python tests/chaos/store.py
	$(BIN)/python tests/chaos/run.py
	$(BIN)/python tests/chaos/run.py --mirror
	$(BIN)/python tests/chaos/nonfinite.py
	$(BIN)/python tests/chaos/nonfinite.py --sharded --injections 100
	$(BIN)/python tests/chaos/configurations.py
	$(BIN)/python tests/chaos/tracker.py
	$(BIN)/python tests/chaos/endurance.py
	$(BIN)/python tests/chaos/rewards.py
	$(BIN)/python tests/chaos/cluster.py
	$(BIN)/python tests/chaos/sweep.py
	$(BIN)/pytest -m long

# torch goes first and alone: whatever build of it pip is set up to find here, CPU or CUDA, stays.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install torch==2.13.0
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	touch $@
