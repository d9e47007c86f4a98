# make run    set up, then speak test_input.json (MODEL=nano, turbo, ... for real weights; default: the draft voice)
# make test   set up, then run the tests (ARGS="-k schema" is passed to pytest)
# make bench  set up, then measure against upstream's code (MODEL=turbo, ROW=all; ARGS="--repeats 1" is passed on)
# make soak   set up, then run hundreds of jobs through workers that die and a platform that fails (some minutes)
# make image-steps   perform the Dockerfile's steps in a fresh environment, for which no container engine is needed
# make lint   make types   make format   make hooks   make languages   make clean
#
# Set-up happens once, into .venv, and again when a requirement file changes. It needs Python 3.11 or later
# with venv, and a package registry.

VENV ?= .venv
PY := $(VENV)/bin/python
# The first of these that runs and is new enough; some systems have `python3` from before 3.11.
PYTHON ?= $(shell for python in python3 python3.12 python3.13 python3.11 python3.14; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)

# Which torch: PyPI has the CPU build for macOS and only a CUDA build, of several gigabytes, for Linux.
ifeq ($(shell uname -s),Darwin)
PLATFORM ?= macos
else
PLATFORM ?= $(if $(shell command -v nvidia-smi 2>/dev/null),cuda,cpu)
endif
CONSTRAINTS := constraints/$(PLATFORM).txt
TORCH_INDEX_macos :=
TORCH_INDEX_cpu := https://download.pytorch.org/whl/cpu
TORCH_INDEX_cuda := https://download.pytorch.org/whl/cu128
TORCH_INDEX ?= $(TORCH_INDEX_$(PLATFORM))

RUN_FILES := requirements.txt requirements-draft.txt requirements-scripts.txt requirements-upstream.txt \
	constraints/common.txt $(CONSTRAINTS)
DEV_FILES := requirements-dev.txt constraints/common.txt
LANGUAGE_FILES := requirements-languages.txt constraints/common.txt
# A stamp's name holds a checksum of the files it stands for, so that any change of theirs sets up again.
stamp = $(VENV)/.$(1)-$(PLATFORM)-$(firstword $(shell cat $(2) | cksum))
RUN_STAMP := $(call stamp,run,$(RUN_FILES))
DEV_STAMP := $(call stamp,dev,$(RUN_FILES) $(DEV_FILES))
LANGUAGE_STAMP := $(call stamp,languages,$(RUN_FILES) $(LANGUAGE_FILES))

# Quiet, but for the torch download; sources are not compiled here but when first imported, which is less work.
PIP := $(PY) -m pip --disable-pip-version-check --no-input install --no-compile
# Without bytecode every start would cost ten seconds more.
unexport PYTHONDONTWRITEBYTECODE

ifdef MODEL
export MODEL
endif

.PHONY: run test soak bench setup lint format types image-steps hooks languages clean
.DEFAULT_GOAL := run

run: $(RUN_STAMP)
	@$(PY) handler.py

test: $(DEV_STAMP)
	$(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

# Workers, clients and platforms that fail under load, ten thousand jobs from the schema and against it, a batch of
# thousands of rows.
soak: $(DEV_STAMP)
	$(PY) -m pytest -m slow -s tests/test_soak.py tests/jobs/test_jobs_any_input.py tests/scripts/test_submit_batch.py $(ARGS)

# Full-size random weights, written once to .cache (several gigabytes); the figures go to docs/benchmarks.
bench: BENCH_FILE := docs/benchmarks/$(or $(MODEL),turbo)-$(PLATFORM)
bench: $(DEV_STAMP)
	$(PY) scripts/benchmark.py $(or $(ROW),all) --model $(or $(MODEL),turbo) --against upstream \
		--json $(BENCH_FILE)$(if $(ROW),-$(ROW)).json $(if $(ROW),,--plot $(BENCH_FILE).png) $(ARGS)

setup: $(DEV_STAMP)
	@echo "$(VENV) is ready."

lint: $(DEV_STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/hadolint Dockerfile

format: $(DEV_STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: $(DEV_STAMP)
	$(PY) -m mypy

# For a CPU: what differs in the image are torch's build and its CUDA libraries.
image-steps: $(DEV_STAMP)
	$(PY) scripts/image_steps.py --build-arg PLATFORM=cpu --build-arg TORCH_INDEX=$(TORCH_INDEX_cpu) $(ARGS)

hooks: $(DEV_STAMP)
	$(PY) -m pre_commit install

# Preprocessors of Chinese, Japanese and Hebrew, for the multilingual models.
languages: $(LANGUAGE_STAMP)

clean:
	rm -rf $(VENV) out .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment whose interpreter no longer starts (its Python was upgraded, the folder moved) is made anew.
# The last line is the check that pip cannot make: packages installed without their pins import together.
$(RUN_STAMP):
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed; name one with make PYTHON=..." >&2; exit 1; }
	@echo "Setting up $(VENV) for $(PLATFORM), once; this takes a minute or two ..." >&2
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@rm -f $(VENV)/.run-* $(VENV)/.dev-* $(VENV)/.languages-*
	@$(PIP) -q --upgrade 'pip>=25'
	@$(PIP) --no-deps --retries 1 --timeout 15 $(addprefix --extra-index-url ,$(TORCH_INDEX)) -c $(CONSTRAINTS) torch >&2
	@$(PIP) -q -c $(CONSTRAINTS) -r requirements.txt -r requirements-draft.txt -r requirements-scripts.txt
	@$(PIP) -q --no-deps -c $(CONSTRAINTS) -r requirements-upstream.txt
	@$(PY) -c 'from engine import upstream; upstream.chatterbox(); upstream.perth_network("model.encoder")'
	@touch $@

$(DEV_STAMP): $(RUN_STAMP)
	@echo "Adding what tests and checks need ..."
	@$(PIP) -q -c $(CONSTRAINTS) -r requirements-dev.txt
	@rm -f $(VENV)/.dev-* && touch $@

$(LANGUAGE_STAMP): $(RUN_STAMP)
	@$(PIP) -q -c $(CONSTRAINTS) -r requirements-languages.txt
	@rm -f $(VENV)/.languages-* && touch $@
