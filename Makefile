# `make demo` and `make test` need Python 3.11 or newer and make; each does all its own set-up. `make help` lists the rest.
#
# PYTHON=/path/to/python3   the Python that .venv is made with
# WORKERS=4                 test processes
# On Linux, PyPI's torch (for the tests) brings CUDA libraries of several GB. Without a GPU, spare them with
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test

VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
LLAMA := .llama.cpp
# llama.cpp's source comes in that package's.
LLAMA_VERSION := 0.3.36
WORKERS ?= 2
CHECKED := mlx_sft tests scripts examples benchmarks

# The first of these that is new enough; macOS's own python3 often is not.
RECENT := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$p -c "$(RECENT)" 2>/dev/null && echo $$p && break; done)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo compare-demo demo-dpo test test-fast faults soak fuzz mutants lint fix bench bench-quick bench-report bench-data device-check docs site families gguf-check audit test-lowest wheel dist clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.ready  ## a minute of fine-tuning: train, before and after, export, reload
	@$(BIN)/python examples/demo.py

compare-demo: $(VENV)/.ready  ## which method? Full fine-tuning beside LoRA of three ranks, then every method, on the embedded model: some twenty minutes
	@$(BIN)/python examples/compare.py $(ARGS)

demo-dpo: $(VENV)/.ready  ## two minutes: after that, of two answers the longer one is preferred (DPO)
	@$(BIN)/python examples/demo_preferences.py

test: $(VENV)/.ready-dev  ## run the tests (offline)
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-fast: $(VENV)/.ready-dev  ## the tests marked `fast`, without PyTorch, in under a minute: for the everyday loop
	@MLX_SFT_TESTS_WITHOUT_TORCH=1 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) -m "fast and not neighbours" $(ARGS)

faults: $(VENV)/.ready-dev  ## kill, starve and damage hundreds of runs: some ten minutes (ARGS="--kills 1000 --seed 7")
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.faults $(ARGS)

soak: $(VENV)/.ready-dev  ## 3,000 steps with many resumes: memory, files, threads (ARGS="--steps 600")
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.faults --soak $(ARGS)

fuzz: $(VENV)/.ready-dev  ## 10,000 broken inputs, over every parser (ARGS="--count 100000 --seed 3")
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.fuzz $(ARGS)

mutants: $(VENV)/.ready-dev  ## break the mask's code in small ways: which do the tests not notice? (ARGS="--sample 100 --seed 3")
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python scripts/mutants.py $(ARGS)

lint: $(VENV)/.ready-dev  ## style, types, the one-way flow of imports, docs/reference up to date
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/make_reference.py --check
	$(BIN)/python scripts/make_tables.py --check

families: $(VENV)/.ready-dev  ## every family of models, measured: the table of docs/models.md, some ten minutes (ARGS="qwen3 gpt_oss" for some)
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python scripts/families.py $(ARGS)

gguf-check: $(VENV)/.ready-dev $(LLAMA)/.ready  ## does the real llama.cpp compute what was trained? Built from source: needs a network once, CMake and a C++ compiler
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH=$(LLAMA)/source:$(LLAMA)/packages \
		LLAMA_CPP_LIB_PATH=$(CURDIR)/$(LLAMA)/build/bin $(BIN)/python scripts/gguf_check.py --llama-cpp $(LLAMA)/source/vendor/llama.cpp $(ARGS)

audit: $(VENV)/.ready-dev  ## look every dependency up among the known vulnerabilities (needs the network)
	@$(BIN)/python -m pip install --quiet pip-audit
	@$(BIN)/python -m pip_audit --local --skip-editable

test-lowest: $(LOWEST)/.ready-dev  ## the tests with the oldest dependencies that pyproject.toml allows
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(LOWEST)/bin/python -m pytest -n $(WORKERS) $(ARGS)

fix: $(VENV)/.ready-dev  ## put right what can be put right by itself
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

bench: $(VENV)/.ready-dev  ## our trainer beside its peers and the hardware's limit: hours (ARGS="--cases pairs")
	@$(BIN)/python -m benchmarks.run $(ARGS)
	@$(BIN)/python -m benchmarks.report

bench-quick: $(VENV)/.ready-dev  ## the same on 6 layers and a few short rows: under 10 minutes
	@$(BIN)/python -m benchmarks.run --quick $(ARGS)
	@$(BIN)/python -m benchmarks.report

bench-report: $(VENV)/.ready-dev  ## the tables and plots of docs/performance.md from the newest results
	@$(BIN)/python -m benchmarks.report

device-check: $(VENV)/.ready  ## what this machine's GPU does and how fast: some minutes, a line of JSON a question, and a page device.md
	@$(BIN)/python -m mlx_sft doctor --device --report device.md $(ARGS)

bench-data: $(VENV)/.ready  ## conversations a second, and memory against file size
	@$(BIN)/python benchmarks/data.py $(ARGS)

docs: $(VENV)/.ready-dev  ## write docs/reference, and the tables of docs/, from the code
	$(BIN)/python scripts/make_reference.py
	$(BIN)/python scripts/make_tables.py

site: $(VENV)/.ready-docs  ## the documentation as a site in site/, every link checked
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: $(VENV)/.ready-dev  ## build dist/*.whl
	$(BIN)/python -m hatchling build -t wheel

dist:  ## build what PyPI is given, check it, and use it in a fresh environment (needs the network)
	@.ci/dist

clean:  ## remove .venv, caches and build outputs (runs/ stays)
	rm -rf $(VENV) $(LOWEST) $(LLAMA) build dist site benchmarks/work .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: touched when an installation is whole, so that one cut short is taken up again.
$(VENV)/.made:
	@test -n "$(PYTHON)" && $(PYTHON) -c "$(RECENT)" || { \
		echo "error: this needs Python 3.11 or newer, and found none"; \
		echo "hint: install one (https://www.python.org/downloads, or brew install python), or name it:" \
			"make PYTHON=/path/to/python3"; \
		exit 2; } >&2
	@$(PYTHON) -m venv $(VENV) || { \
		echo "error: $(PYTHON) cannot make a virtual environment" >&2; \
		echo "hint: on Debian and Ubuntu, apt install python3-venv" >&2; exit 2; }
	@touch $@

$(VENV)/.ready: pyproject.toml $(VENV)/.made
	@echo "setting up $(VENV)"
	@$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.ready-dev: pyproject.toml $(VENV)/.made
	@echo "setting up $(VENV) for development"
	@$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $(VENV)/.ready $@

$(VENV)/.ready-docs: pyproject.toml $(VENV)/.made
	@echo "setting up $(VENV) for the documentation"
	@$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $(VENV)/.ready $@

$(LOWEST)/.ready-dev: pyproject.toml scripts/lowest_versions.py $(VENV)/.made
	@echo "setting up $(LOWEST) with the lowest versions"
	@rm -rf $(LOWEST) && $(PYTHON) -m venv $(LOWEST)
	@$(PYTHON) scripts/lowest_versions.py > $(LOWEST)/lowest.txt
	@$(LOWEST)/bin/python -m pip install --quiet --constraint $(LOWEST)/lowest.txt --editable '.[dev]'
	@touch $@

$(LLAMA)/.ready: $(VENV)/.made
	@echo "building llama.cpp from llama-cpp-python $(LLAMA_VERSION)"
	@rm -rf $(LLAMA) && mkdir -p $(LLAMA)/source
	@$(BIN)/python -m pip download --quiet --no-deps --no-binary llama-cpp-python -d $(LLAMA) llama-cpp-python==$(LLAMA_VERSION)
	@tar -xzf $(LLAMA)/*.tar.gz -C $(LLAMA)/source --strip-components 1 && rm $(LLAMA)/*.tar.gz
	@$(BIN)/python -m pip install --quiet --no-deps --target $(LLAMA)/packages diskcache
	@cmake -S $(LLAMA)/source/vendor/llama.cpp -B $(LLAMA)/build -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DGGML_NATIVE=OFF \
		-DGGML_METAL=OFF -DGGML_OPENMP=OFF -DLLAMA_CURL=OFF -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_TESTS=OFF \
		-DLLAMA_BUILD_EXAMPLES=OFF > $(LLAMA)/cmake.log
	@cmake --build $(LLAMA)/build --target llama -j 2 > $(LLAMA)/build.log
	@touch $@
