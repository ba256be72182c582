# A fresh machine needs Python >= 3.11 and make, nothing else.
#   PYTHON       the interpreter that makes .venv, e.g. make demo PYTHON=python3.12
#   PIP_ARGS     more arguments for pip, e.g. an index that has CPU-only builds of torch
#   SERVE_ARGS   what the demo server is asked, e.g. make serve-demo SERVE_ARGS='--ask "Who was Euler?"'
#   SOAK_MINUTES how long a server is soaked, e.g. make soak SOAK_MINUTES=12 PYTEST_ARGS='-k sidecar'
#   BENCH        what is measured, of `cosched bench --list`, e.g. make bench BENCH='overhead real_model'
#   PYTEST_ARGS  more arguments for pytest, e.g. make test PYTEST_ARGS='-m "not slow" -k replay'

PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
SERVE_ARGS ?=
SOAK_MINUTES ?= 30
BENCH ?= real_model draft_lengths lookup overhead micro_step interface cost_ratio sglang

BIN := .venv/bin
STAMP := .venv/.installed
# One process a core; more than four of them want more memory than a laptop has. Files go to them whole, so
# that what tests of a file share is made once, and in the order of tests/conftest.py, the slow ones first.
PARALLEL := -n auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder
# An SGLang takes one core and 2 GiB; tests of a file share theirs.
SGLANG_PARALLEL := -n auto --maxprocesses=2 --dist=loadfile
PARITY_BIN := .venv-parity/bin
PARITY_STAMP := .venv-parity/.installed
SGLANG_STAMP := .venv-parity/.installed-sglang
SERVE_STAMP := .venv-parity/.installed-cosched
# Other versions of SGLang than the one that is tested all through (tests/sglang/test_versions.py)
VERSIONS := 0.5.20 0.5.21

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo demo-tiny test test-long fuzz chaos soak parity sglang versions serve-venv serve-demo examples wheel lint docs format bench clean

help:  ## Show this list
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile
	@awk '/^#   / { print substr($$0, 2) }' Makefile

define CHECK_PYTHON
@command -v $(PYTHON) >/dev/null 2>&1 || { \
  echo "cosched needs Python >= 3.11, and there is no '$(PYTHON)'. Name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
  echo "cosched needs Python >= 3.11, and '$(PYTHON)' is `$(PYTHON) -V 2>&1`. Name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
endef

venv: $(STAMP)  ## Make .venv and install cosched into it

$(STAMP): pyproject.toml constraints.txt
	$(CHECK_PYTHON)
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv || { \
	  echo "'$(PYTHON) -m venv' failed. On Debian and Ubuntu it is a package of its own: apt install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e '.[dev,docs,realworld,trackers]'
	@touch $@

demo: $(STAMP)  ## Decode with a real chat model: no draft, and three drafts, frozen and learning
	$(BIN)/cosched realworld fetch
	$(BIN)/cosched run -c configs/demo.yaml --overwrite

demo-tiny: $(STAMP)  ## The same in small, with a model of our own making: nothing is downloaded for it
	$(BIN)/cosched run -c configs/quickstart.yaml --overwrite

# A thread limit inherited from the shell would change speeds and, through summation order, last digits.
test: $(STAMP)  ## Run the tests that need neither a GPU nor SGLang
	env -u OMP_NUM_THREADS $(BIN)/pytest $(PARALLEL) -m "not gpu and not sglang and not long" $(PYTEST_ARGS)

test-long: $(STAMP)  ## Run those of them that `make test` leaves out: whole builds, runs, lost processes
	env -u OMP_NUM_THREADS $(BIN)/pytest $(PARALLEL) -m "long and not gpu and not sglang" $(PYTEST_ARGS)

# The tests take a few inputs and moments of these; here are all of them.
fuzz: $(STAMP)  ## Damage configurations, checkpoints, messages and control requests, 10,000 of each
	env -u OMP_NUM_THREADS COSCHED_FUZZ=10000 $(BIN)/pytest tests/test_fuzz_settings.py \
	  tests/test_fuzz_checkpoints.py tests/test_fuzz_wire.py tests/test_fuzz_control.py --timeout=7200 --durations=0 $(PYTEST_ARGS)

chaos: $(STAMP)  ## Kill a run, its trainer or both at 40 random moments, go on each time, and show figures
	env -u OMP_NUM_THREADS COSCHED_CHAOS=40 $(BIN)/pytest tests/test_chaos.py $(PYTEST_ARGS)

# Into a folder of its own, as pip leaves a stranger's package; .venv stays what `make venv` made.
examples: $(STAMP)  ## Install the example plugin from examples/ and run the contract tests on it
	rm -rf build/examples
	$(BIN)/python -m pip install $(PIP_ARGS) --no-deps --target build/examples ./examples/token_recycling
	cd examples/token_recycling && env -u OMP_NUM_THREADS PYTHONPATH=$(abspath build/examples) \
	  $(abspath $(BIN))/pytest $(PYTEST_ARGS)

SGLANG_ON_CPU := cosched/engines/sglang/cpu/requirements.txt

$(PARITY_STAMP): tests/parity/requirements.txt $(SGLANG_ON_CPU) constraints.txt
	$(CHECK_PYTHON)
	$(PYTHON) -m venv .venv-parity
	$(PARITY_BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt torch
	$(PARITY_BIN)/python -m pip install $(PIP_ARGS) --no-deps -r tests/parity/requirements.txt
	@touch $@

parity: $(PARITY_STAMP)  ## Compare the drafters with SpecForge, speculators and SGLang, in .venv-parity
	$(PARITY_BIN)/pytest tests/parity $(PYTEST_ARGS)

$(SGLANG_STAMP): $(PARITY_STAMP) tests/sglang/requirements.txt
	$(PARITY_BIN)/python -m pip install $(PIP_ARGS) --no-deps -r tests/sglang/requirements.txt
	@touch $@

sglang: $(SGLANG_STAMP)  ## Run SGLang itself on the CPU with the tiny world, in .venv-parity
	$(PARITY_BIN)/pytest $(SGLANG_PARALLEL) tests/sglang $(PYTEST_ARGS)

soak: $(SGLANG_STAMP)  ## Ask a real model's server half an hour for all sorts of things, twice, and show figures
	COSCHED_SOAK=$(SOAK_MINUTES) $(PARITY_BIN)/pytest tests/sglang/test_soak.py $(PYTEST_ARGS)

$(SERVE_STAMP): $(SGLANG_STAMP) pyproject.toml
	$(PARITY_BIN)/python -m pip install $(PIP_ARGS) --no-deps -e .
	@touch $@

serve-venv: $(SERVE_STAMP)  ## Make .venv-parity: SGLang, which runs on a CPU there, and cosched

serve-demo: $(SERVE_STAMP)  ## Serve a real chat model on this CPU, ask it one question, and stop
	$(PARITY_BIN)/cosched realworld fetch
	$(PARITY_BIN)/python examples/serve_demo.py $(SERVE_ARGS)

# A folder before the installed package on the search path; their dependencies are the same.
build/sglang-%: | $(SGLANG_STAMP)
	$(PARITY_BIN)/python -m pip install $(PIP_ARGS) --no-deps --target $@ sglang==$*

versions: $(SGLANG_STAMP) | $(VERSIONS:%=build/sglang-%)  ## Run other versions of SGLang, from build/
	$(PARITY_BIN)/pytest tests/sglang/test_versions.py $(PYTEST_ARGS)

# From an empty folder, with nothing but what the wheel has; its dependencies are those of .venv.
wheel: $(STAMP)  ## Build the wheel, and run the quick start with it from an empty folder
	rm -rf build/wheel
	$(BIN)/python -m pip wheel $(PIP_ARGS) --no-deps --wheel-dir build/wheel .
	$(BIN)/python -m pip install $(PIP_ARGS) --no-deps --target build/wheel/installed build/wheel/*.whl
	mkdir build/wheel/empty
	cd build/wheel/empty && export PYTHONPATH=$(abspath build/wheel/installed) && \
	  $(abspath $(BIN))/python -P -m cosched.cli init && \
	  $(abspath $(BIN))/python -P -m cosched.cli run -c configs/quickstart.yaml workload.max_prompts=1

lint: $(STAMP)  ## Check style, types, the direction of imports, and the documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	@$(MAKE) --no-print-directory docs

# --strict counts warnings, which --quiet would hide from it. The variable leaves out Material's notice
# of what will follow MkDocs, which is not about these pages.
docs: $(STAMP)  ## Build the documentation into build/docs; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(STAMP)  ## Sort imports, apply safe fixes, format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) $(SGLANG_STAMP)  ## Measure in less than two hours what matters most; an interrupted one goes on
	$(BIN)/cosched realworld fetch
	$(BIN)/cosched bench $(BENCH)

clean:  ## Remove .venv, .venv-parity, dist and what tools left (models/, runs/ and build/ stay)
	rm -rf .venv .venv-parity dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find cosched drafters losses schedulers tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
