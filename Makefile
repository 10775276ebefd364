# make test | demo | lint | bench each work alone on a fresh clone: they create .venv, install into it and build.
#
#   make PYTHON=python3.12 TORCH="torch==2.12.0 --index-url https://download.pytorch.org/whl/cpu" \
#       TORCHVISION=torchvision==0.27.0 venv
#
# TORCH, TORCHVISION and TRITON count when .venv is created; `make distclean` first to choose again.

PYTHON ?= python3
TORCH ?= torch==2.13.0
# Only the tests need torchvision, and only its Python code. It must fit torch: left empty, timm brings one of its own
# choice, and that its own torch.
TORCHVISION ?= torchvision==0.28.0
# Installed only where torch did not bring a triton of its own.
TRITON ?= triton==3.7.1

VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(shell find csrc -type f \( -name '*.h' -o -name '*.c' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \) 2>/dev/null)
# C++ that is formatted, but not part of the extension.
EMULATOR := $(shell find tests/cuda_emulator -type f \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \) 2>/dev/null)
BENCH_JSON ?= .benchmarks/latest.json
GPU_OUT ?= build/gpu
# How many processes run tests side by side; each takes some files whole.
JOBS ?= 2
PYTEST = $(BIN)/pytest -n $(JOBS) --dist loadfile
# Of make fuzz: how many calls, and which.
N ?= 10000
SEED ?= $(shell od -An -N4 -tu4 /dev/urandom)
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help venv build test test-all test-cuda fuzz sanitize lint format docs docs-check package-test demo bench \
    gpu-build gpu-test gpu-bench clean distclean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 16

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(TORCH)
	$(if $(TORCHVISION),$(BIN)/pip install --no-deps $(TORCHVISION))
	@$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/pip install --no-deps $(TRITON) || \
	    echo "make: no $(TRITON) for this platform; the triton backend will report itself as not available"
	@touch $@

# The package goes in without its extension, which the next rule builds in place: that build is incremental.
$(VENV)/.installed: $(VENV)/.torch pyproject.toml constraints.txt
	$(BIN)/pip install -c constraints.txt setuptools wheel ninja
	VIDATTN_BUILD_EXT=0 $(BIN)/pip install --no-build-isolation -c constraints.txt -e ".[test,dev]"
	@touch $@

$(VENV)/.built: $(VENV)/.installed setup.py $(NATIVE)
	VIDATTN_BUILD_EXT=$${VIDATTN_BUILD_EXT:-1} $(BIN)/python setup.py build_ext --inplace
	@touch $@

venv: $(VENV)/.built ## create .venv, install everything, build the extension
	@$(BIN)/python -c "import torch, vidattn; print('vidattn', vidattn.__version__, 'with torch', torch.__version__)"

build: $(VENV)/.built ## build the extension in place

test: $(VENV)/.built ## run the tests (ARGS="-k window3d" passes arguments to pytest)
	$(PYTEST) $(ARGS)

test-all: $(VENV)/.built ## run the slow sweeps too
	$(PYTEST) -m "" $(ARGS)

test-cuda: $(VENV)/.built ## run all tests of the CUDA kernels on an emulated GPU, the audit of machine code, gpu-test
	$(PYTEST) -m "" tests/test_cuda_*.py tests/test_*_cuda*.py tests/test_gpu_*.py $(ARGS)

fuzz: $(VENV)/.built ## compare N random calls of all functions with float64 (N=10000; SEED= of another run)
	VIDATTN_FUZZ=$(N) $(BIN)/pytest tests/test_fuzz_calls.py -k random --hypothesis-seed=$(strip $(SEED)) $(ARGS)

sanitize: $(VENV)/.installed ## run tests on CPU kernels built with address, undefined-behaviour and thread sanitizers
	$(BIN)/python -m tests.sanitize address
	$(BIN)/python -m tests.sanitize thread

lint: $(VENV)/.installed ## ruff, mypy, clang-format, the schema of the workflows
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy vidattn/
	$(if $(NATIVE),$(BIN)/clang-format --dry-run --Werror $(NATIVE) $(EMULATOR))
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/*.yml

format: $(VENV)/.installed ## let ruff and clang-format rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(NATIVE),$(BIN)/clang-format -i $(NATIVE) $(EMULATOR))

docs: $(VENV)/.installed ## build the documentation as a site: open build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

docs-check: docs ## look at all its pages in a browser: needs Chromium (apt-get install chromium)
	$(BIN)/pip install --quiet -c constraints.txt playwright
	$(BIN)/python -m tests.site_checks build/site

package-test: $(VENV)/.built ## build sdist and wheels, install and use them (ARGS="3.13:2.13.0:triton --cuda" chooses)
	$(BIN)/python -m tests.package_checks $(ARGS)

demo: $(VENV)/.built ## compare reference and accelerated model on a clip (CLIP=, MODEL=, CHECKPOINT=)
	$(BIN)/python -m vidattn.demo $(if $(CLIP),--clip "$(CLIP)") $(if $(MODEL),--model "$(MODEL)") \
	    $(if $(CHECKPOINT),--checkpoint "$(CHECKPOINT)") $(ARGS)

bench: $(VENV)/.built ## compare with eager, SDPA and compiled in 5 minutes (ARGS="--full -k stage1" chooses)
	@mkdir -p $(dir $(BENCH_JSON))
	$(BIN)/pytest benchmarks/ --benchmark-only --benchmark-json=$(BENCH_JSON) $(ARGS)
	@echo "As Markdown, and as a picture: $(BIN)/python -m benchmarks.report $(BENCH_JSON)"

# The three below take $(PYTHON) as it is, with whatever torch and triton it has: no .venv, no network. Each ends within
# 9 minutes and goes on where the last one stopped; results and what was compiled stay in GPU_OUT.
gpu-build: ## compile for the GPU that is here what the next two need, the extension with its CUDA kernels too
	$(PYTHON) -m benchmarks.gpu_test --step build --out $(GPU_OUT) $(ARGS)

gpu-test: ## prove the kernels on the GPU that is here, and time ten cases (ARGS="--step numbers" chooses)
	$(PYTHON) -m benchmarks.gpu_test --out $(GPU_OUT) $(ARGS)

gpu-bench: ## measure the GPU, and time attention on it against all there is
	$(PYTHON) -m benchmarks.gpu_bench --out $(GPU_OUT) $(ARGS)

clean: ## remove what was built (.venv stays)
	rm -rf build dist ./*.egg-info vidattn/_C*.so .benchmarks .pytest_cache .mypy_cache .ruff_cache .hypothesis $(VENV)/.built
	find vidattn kernels tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove .venv too
	rm -rf $(VENV)
