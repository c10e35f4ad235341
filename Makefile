# Every target makes and reuses a virtual environment of its own; nothing else needs installing.
PYTHON ?= python3
# The newest Python that is here, in the path or among pyenv's; nothing where there is none.
NEWEST_PYTHON ?= $(shell for python in python3.13 $${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.13.*/bin/python; do \
	$$python -c '' 2>/dev/null && echo $$python && break; done)
SMOKE_PYTHON ?= $(or $(NEWEST_PYTHON),$(PYTHON))
VENV ?= .venv
MODEL ?= smollm2-135m-instruct
PORT ?= 8000
GRPC_PORT ?= 50051
ARGS ?=
# The processors that `make dist` makes wheels for, with the CPU kernels in them.
MACHINES ?= x86_64 aarch64
LIBRARY_TESTS ?= tests/mixtral_jax/kernels tests/mixtral_jax/model tests/mixtral_jax/step \
	tests/mixtral_jax/checkpoint tests/mixtral_jax/tokenization tests/mixtral_jax/test_*.py tests/convert

BIN := $(VENV)/bin
CHECKPOINT := checkpoints/$(MODEL)
SOURCES := mixtral_jax convert serving tests benchmarks
PROTOC := $(BIN)/python -m grpc_tools.protoc -I. serving/proto/inference.proto serving/proto/group.proto \
	serving/proto/texts.proto

.DEFAULT_GOAL := help
.PHONY: help install serve chat quick test newest soak check format proto docs dist smoke bench \
	plan-matrix settings-table training-matrix notebooks clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  Variables: PYTHON NEWEST_PYTHON SMOKE_PYTHON VENV MODEL PORT GRPC_PORT ARGS   (make serve MODEL=... PORT=8080)"

install: $(VENV)/.installed ## Install into .venv (PYTHON= chooses the interpreter)

serve: install $(CHECKPOINT)/config.json ## Fetch, convert and serve MODEL over HTTP and gRPC
	@$(BIN)/mixtral-jax serve --model $(CHECKPOINT) --port $(PORT) --grpc-port $(GRPC_PORT) $(ARGS)

chat: install $(CHECKPOINT)/config.json ## Talk to MODEL in the terminal
	@$(BIN)/mixtral-jax chat --model $(CHECKPOINT) $(ARGS)

quick: $(VENV)/.tested ## Formatting, lint, types and the fast tests, a few minutes
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 -m "not slow" --ignore tests/end_to_end $(ARGS)

test: $(VENV)/.tested ## Run all tests, the slow ones too (ARGS='-m "not slow"' leaves them out)
	$(BIN)/python -m pytest -n 2 --durations 60 $(ARGS)

newest: ## Run the fast tests of the library on Python 3.13 with the newest jax, if that Python is here
	@if [ -z "$(NEWEST_PYTHON)" ]; then echo "no Python 3.13 here: make newest does nothing"; else \
		$(MAKE) --no-print-directory library-tests VENV=.venv-newest PYTHON=$(NEWEST_PYTHON); fi

library-tests: $(VENV)/.library
	$(BIN)/python -m pytest -n 2 -m "not slow" $(LIBRARY_TESTS) $(ARGS)

soak: $(VENV)/.tested ## Run all tests and those that CI has no time for, an hour or more
	MIXTRAL_JAX_SOAK=1 $(BIN)/python -m pytest -n 2 --durations 20 $(ARGS)

check: docs ## Formatting, lint, types, generated stubs, notebooks without outputs, the pages of docs/
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	@rm -rf build/proto && mkdir -p build/proto
	$(PROTOC) --python_out=build/proto --pyi_out=build/proto --grpc_python_out=build/proto
	@for stub in build/proto/serving/proto/*; do \
		diff -q $$stub serving/proto/ || { echo "stale stubs: run make proto"; exit 1; }; done
	$(BIN)/nbstripout --verify notebooks/*.ipynb

format: $(VENV)/.tested ## Format the code and strip the notebooks
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/nbstripout notebooks/*.ipynb

proto: $(VENV)/.tested ## Generate the gRPC stubs from serving/proto/*.proto
	$(PROTOC) --python_out=. --pyi_out=. --grpc_python_out=.

docs: $(VENV)/.tested ## Build the pages of docs/ into build/docs; a dead link or a warning fails
	@rm -rf build/commands && mkdir -p build/commands
	$(BIN)/python -m typer mixtral_jax.cli.main utils docs --name mixtral-jax --output build/commands/all.md
	@sed -e 1d -e 's/^##/###/' build/commands/all.md > build/commands/mixtral-jax.md
	COLUMNS=96 TERM=dumb TYPER_USE_RICH=0 $(BIN)/python -m serving --help > build/commands/serving.txt
	COLUMNS=96 TERM=dumb TYPER_USE_RICH=0 $(BIN)/python -m serving.gateway --help > build/commands/serving.gateway.txt
	$(BIN)/zensical build --strict --clean

dist: $(VENV)/.tested ## Build the source distribution, and a wheel for each of MACHINES, into dist/
	rm -rf dist build/sdist && mkdir -p build/sdist
	PIP_CONSTRAINT= $(BIN)/python -m build --sdist --outdir dist .
	tar -xzf dist/*.tar.gz -C build/sdist --strip-components 1
	@set -e; for machine in $(MACHINES); do \
		library=$(CURDIR)/build/kernels/$$machine-linux.so; \
		$(BIN)/python -m mixtral_jax.kernels.cpu.prebuilt $$machine-linux $$library; \
		rm -rf build/sdist/build; \
		PIP_CONSTRAINT= MIXTRAL_JAX_WHEEL_LIBRARY=$$library \
			MIXTRAL_JAX_WHEEL_PLATFORM=manylinux_2_17_$$machine.manylinux2014_$$machine \
			$(BIN)/python -m build --wheel --outdir dist build/sdist; \
		$(BIN)/auditwheel show dist/*_$$machine.whl | tee /dev/stderr | grep -q manylinux_2_17; done

smoke: MACHINES = $(shell uname -m)
smoke: dist ## Install the wheel into an empty environment elsewhere and use it there (SMOKE_PYTHON=)
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
		$(SMOKE_PYTHON) -m venv "$$folder/venv" && \
		"$$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
			-c constraints.txt dist/*_$(MACHINES).whl && \
		cp tests/repository/smoke.py "$$folder" && cd "$$folder" && \
		env -u PYTHONPATH -u CXX PATH="$$folder/venv/bin" JAX_PLATFORMS=cpu \
			MIXTRAL_JAX_CACHE="$$folder/cache" venv/bin/python -P smoke.py

bench: $(VENV)/.tested checkpoints/smollm2-135m-instruct-int8/config.json ## Measure the engine and write the table of speeds in docs/numbers.md; peers must be installed
	$(BIN)/python -m benchmarks.speed_table $(ARGS)

checkpoints/smollm2-135m-instruct-int8/config.json: | install
	$(BIN)/mixtral-jax convert smollm2-135m-instruct checkpoints/smollm2-135m-instruct-int8 --dtype int8

plan-matrix: $(VENV)/.tested ## Compile full-size models, served and trained, and write the tables of memory in docs/numbers.md
	$(BIN)/python -m benchmarks.plan_matrix $(ARGS)
	$(BIN)/python -m benchmarks.training_matrix

settings-table: $(VENV)/.tested ## Write the table of the settings that serve chooses by chip, into docs/numbers.md
	$(BIN)/python -m benchmarks.settings_table $(ARGS)

training-matrix: $(VENV)/.tested ## The second half of plan-matrix: the training steps alone (ARGS=--help)
	$(BIN)/python -m benchmarks.training_matrix $(ARGS)

notebooks: $(VENV)/.tested ## Execute the notebooks on this machine
	$(BIN)/python -m pytest tests/end_to_end/test_notebooks.py $(ARGS)

clean: ## Remove what was built here; checkpoints and caches stay
	rm -rf build dist *.egg-info $(VENV) .venv-newest

$(CHECKPOINT)/config.json: | install
	$(BIN)/mixtral-jax convert $(MODEL) $(CHECKPOINT)

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	@# Older ones neither resume a download nor say how far it is.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1' -c constraints.txt

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing into $(VENV), a few minutes the first time"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all]'
	@touch $@

$(VENV)/.tested: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing into $(VENV) with what the tests need, a few minutes the first time"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@ $(VENV)/.installed

$(VENV)/.library: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing into $(VENV) with what the library's tests need, a few minutes the first time"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e '.[test-library]'
	@touch $@
