# Every target sets up what it needs: `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Tests and checks never reach for a network.
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-slow test-tasks nightly install check bench study coverage-table soak fuzz clean help

help:
	@echo "make demo     prune, train, merge, verify and export a small model, a few minutes on two cores"
	@echo "make test     the test suite"
	@echo "make test-slow its long runs: benchmarks, several processes, kills"
	@echo "make test-tasks the tests of eval --tasks; installs lm-evaluation-harness"
	@echo "make nightly  every combination, many more examples, every trace made anew: some hours"
	@echo "make check    lint, format, types, layers"
	@echo "make bench    benchmarks, JSON on stdout"
	@echo "make study    every method at equal parameters and steps, into docs/recovery.md: over an hour"
	@echo "make coverage-table every model type of every task, into docs/models.md: some hours"
	@echo "make soak     a hundred kills of every verb, and the full fuzz: an hour or two"
	@echo "make fuzz     10,000 damaged inputs"
	@echo "make install  only the environment, in $(VENV)"

demo: install
	$(BIN)/spp-fx demo

test: install
	$(BIN)/python -m pytest -n 2 --dist worksteal

# What starts many processes or trains for long; `make test` leaves it out, every submission runs both.
test-slow: install
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "slow and not nightly"

# The tests of `eval --tasks`, which need lm-evaluation-harness; they skip without it.
test-tasks: install
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[tasks]"
	$(BIN)/python -m pytest tests/verbs/test_tasks.py -m "slow or not slow"

# All tests, with forty times the examples of hypothesis and no export of torch used twice; then the fuzz and the soak.
nightly: install
	SPP_FX_NIGHTLY=1 SPP_FX_EXPORT_ALWAYS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "slow or not slow"
	$(MAKE) soak

install: $(READY)

# The pinned torch comes first: left to the resolver, another package's range would choose the build.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# On a quiet machine: the better part of an hour on two cores.
bench: install
	@$(BIN)/python benchmarks/scan.py
	@$(BIN)/python benchmarks/stream.py
	@$(BIN)/python benchmarks/planted.py
	@$(BIN)/python benchmarks/pack.py
	@$(BIN)/python benchmarks/export_sizes.py
	@$(BIN)/python benchmarks/export_large.py
	@$(BIN)/python benchmarks/linear_step.py
	@$(BIN)/python benchmarks/linear_step.py --width 2048 --batch 1024 --rank 4 8 16 32 64 --only lors spp_fused
	@$(BIN)/python benchmarks/model_step.py --repeats 7
	@$(BIN)/python benchmarks/model_step.py --model 110m --tokens 2048
	@$(BIN)/python benchmarks/prune_layers.py
	@$(BIN)/python benchmarks/model_step.py --model 110m --tokens 2048 --seq-len 256 512 1024 2048 --dtype bfloat16 --only lors spp_fused
	@$(BIN)/python benchmarks/graph_overhead.py

# Methods and ablations on real models, about an hour and a quarter on two cores; goes on where it was stopped.
study: install
	@$(BIN)/python benchmarks/study.py

# Goes on where it was stopped; `python -m tests.coverage llama gpt2` probes some types only.
coverage-table: install
	@$(BIN)/python -m tests.coverage --jobs 2

# Each prints JSON and fails on anything broken; the seeds are fixed, so that a failure comes again.
soak: install fuzz
	$(BIN)/python -m tests.soak --kills 100 --seed 0
	$(BIN)/python -m tests.soak --kills 20 --seed 1 --python --verb merge --verb prune --verb export

fuzz: install
	$(BIN)/python -m tests.fuzz --cases 10000

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache build *.egg-info
