# Few verbs, the same on a desk and in CI. Each sets up what it needs.
PYTHON  ?= python3
# Not from the environment: conda's compilers and tcsh export HOST, and mean the machine's name or kind by it.
HOST     = $(or $(PERCEIVER_HOST),127.0.0.1)
PORT    ?= $(or $(PERCEIVER_PORT),8000)
MODEL   ?= $(or $(PERCEIVER_MODEL_DIR),models/perceiver-cifar100)
# As a word of the shell, spaces and all; in quotes a ~ would stay one.
SPACE   := $() $()
FOLDER   = $(subst $(SPACE),\ ,$(MODEL))
# onnxruntime for the service: gpu where an NVIDIA driver is found, cpu elsewhere. RUNTIME=cpu or RUNTIME=gpu overrides.
RUNTIME ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
# Everything after `make train ARGS=`, `make export ARGS=` and so on goes to the program.
ARGS    ?=

# The pinned onnxruntime has wheels for these versions of Python alone: pyproject.toml's requires-python.
FITTING = @$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 15) else "$(PYTHON) is Python " + sys.version.split()[0] + ", and this needs 3.11 to 3.14: name one, as in make $(MAKECMDGOALS) PYTHON=python3.12")'

DEV   := .venv
SERVE := .venv-serve-$(RUNTIME)

.DEFAULT_GOAL := help
.PHONY: help serve test smoke chaos lint format train export bench clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

serve: $(SERVE)/.installed ## Serve the shipped model on 127.0.0.1:8000 (PORT=, HOST=, MODEL=, RUNTIME=)
	$(SERVE)/bin/python -m service --host $(HOST) --port $(PORT) --model-dir $(FOLDER) $(ARGS)

# Tests run side by side, one a core; those that measure run alone. The order of the files is that of tests/conftest.py;
# the second run collects no other file where none is named.
test: $(DEV)/.installed ## Run every test (about 9 minutes on two cores)
	$(DEV)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --durations 25 -m "not serial" $(ARGS) || [ $$? = 5 ]
	$(DEV)/bin/python -m pytest -m serial $(or $(ARGS),$$(grep -rl --include='test_*.py' pytest.mark.serial tests)) || [ $$? = 5 ]

smoke: $(DEV)/.installed ## Run one test of each promise (at most two minutes)
	$(DEV)/bin/python -m pytest -m smoke $(ARGS)

chaos: $(DEV)/.installed ## Misuse and overload a real service (ARGS="fuzz" or "openapi" for more)
	$(DEV)/bin/python -m tests.chaos $(ARGS)

lint: $(DEV)/.installed ## Check style, types, layers and prose
	$(DEV)/bin/ruff check .
	$(DEV)/bin/ruff format --check .
	$(DEV)/bin/mypy
	$(DEV)/bin/lint-imports
	$(DEV)/bin/python docs/check_prose.py

format: $(DEV)/.installed ## Format the code
	$(DEV)/bin/ruff format .
	$(DEV)/bin/ruff check --fix .

# A stop is no error. The shell waits for the end of what it has started, which Ctrl-C stops with a checkpoint.
train: $(DEV)/.installed ## Train (ARGS="--preset compact --data DIR"; see docs)
	trap : INT; STARTED_BY_MAKE=1 $(DEV)/bin/python -m training $(ARGS) || [ $$? = 3 ]

export: $(DEV)/.installed ## Export a run (ARGS="runs/NAME --out models/NAME")
	$(DEV)/bin/python -m export $(ARGS)

bench: $(DEV)/.installed ## Images a second of the shipped model on this machine
	$(DEV)/bin/python -m benchmarks.engine $(FOLDER) $(ARGS)

clean: ## Remove the environments and caches (no data, no runs)
	rm -rf .venv .venv-serve-* .venv-clients .rivals .mypy_cache .ruff_cache .import_linter_cache .pytest_cache .hypothesis *.egg-info build

# The tests run on onnxruntime-gpu, as production does; without its CUDA libraries it serves on the CPU. A new pip first:
# that of Python 3.11 takes several times as long to read the index.
$(DEV)/.installed: pyproject.toml constraints.txt
	$(FITTING)
	@echo "Installing in $(DEV) (once, some minutes: with torch)"
	$(PYTHON) -m venv --clear $(DEV)
	$(DEV)/bin/python -m pip install --quiet --constraint constraints.txt pip
	$(DEV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[train,dev]'
	touch $@

# Another runtime is refused: pip only warns of an extra that there is not, and installs no onnxruntime.
$(SERVE)/.installed: pyproject.toml constraints.txt constraints-cuda.txt
	$(if $(filter cpu gpu,$(RUNTIME)),,$(error RUNTIME is cpu or gpu, not "$(RUNTIME)"))
	$(FITTING)
	@echo "Installing in $(SERVE) (once, about a minute)"
	$(PYTHON) -m venv --clear $(SERVE)
	$(SERVE)/bin/python -m pip install --quiet --constraint constraints.txt --constraint constraints-cuda.txt --editable '.[$(RUNTIME)]'
	touch $@
