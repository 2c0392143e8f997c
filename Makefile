# make help lists what there is.
VENV ?= .venv
PYTHON ?= python3
# Installed only where the environment has no torch yet; a CPU build will do.
TORCH ?= torch==2.13.0
# Interpreted and compiled in the tests, which are written for this version; a GPU build of torch has brought its own.
TRITON ?= triton==3.8.0
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
# What CI runs of a test with more cases: this many, each value of each parameter among them; a third of a kernel's where PASSED.
SAMPLE := --sample 12
# The day when all tests of the kernels passed, in CI and where nothing of them has changed since: fewer of them run (tests/passed.py).
PASSED := $(if $(CI),$(shell $(PYTHON) -m tests.passed))
# Interpreted and emulated kernels take many times as long.
SAMPLE_SLOW := --sample 8
BIN := $(VENV)/bin
# Exact versions of all else that is installed, so that every machine gets what was tested together; make lock writes them.
INSTALL := $(BIN)/python -m pip install -q --no-compile -c constraints.txt
PYTEST := $(if $(PASSED),CMOE_KERNELS_UNCHANGED=$(PASSED) )$(BIN)/python -m pytest -n $(JOBS)
VERSIONS := $(BIN)/python -m tools.versions --jobs $(JOBS) --pin "$(TORCH)" --pin "$(TRITON)"
SOURCES := pyproject.toml setup.py $(shell find csrc -type f -not -name '*.pyc')

# Torch and transformers are compiled to bytecode once, not by each of some hundred processes: 6 of the 13 seconds that importing them takes.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install lock test sampled test-triton test-cuda test-full test-latest test-oldest aot records mutants roofline gpu-check gpu-fill lint wheel demo docs doctor bench bench-history bench-report clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(VENV)/.installed  ## .venv with the package (native library where a C++ compiler is) and everything the tests need

# Build isolation would fetch a second torch, so the build runs inside the environment. It runs beside pip, which is busy for as long; what
# it made is found by the last line, which also says why if it failed.
$(VENV)/.installed: export CMOE_WERROR := $(WERROR)
$(VENV)/.installed: $(SOURCES) constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) pip setuptools wheel ninja packaging
	$(BIN)/python -c "import torch" 2>/dev/null || $(INSTALL) "$(TORCH)"
	$(BIN)/python -m tools.versions dev > $(VENV)/dev.txt
	$(ARCHS) $(BIN)/python setup.py -q build_ext --inplace >/dev/null 2>&1 & \
	{ $(BIN)/python -c "import triton" 2>/dev/null || $(INSTALL) "$(TRITON)"; } && $(INSTALL) -r $(VENV)/dev.txt; installed=$$?; wait; exit $$installed
	$(ARCHS) $(INSTALL) --no-build-isolation -e ".[dev]"
	$(BIN)/python -m cmoe_kernels
	@touch $@

# Not after install: where the ranges have left constraints.txt behind, that could not be done.
lock:  ## constraints.txt anew: the newest versions that pyproject.toml's ranges admit, resolved together
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import packaging" 2>/dev/null || $(BIN)/python -m pip install -q packaging
	$(VERSIONS) lock

lint: install  ## ruff, clang-format and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc tests -regex '.*\.\(cpp\|cu\|cuh\|h\)' -exec $(BIN)/clang-format --dry-run -Werror {} +
	$(BIN)/mypy cmoe_kernels unimed

# What CI builds compiles without a warning; by nvcc only where the committed table of what it makes is of other sources, and then for one
# architecture.
test: WERROR := 1
ifdef CI
test: ARCHS = $(if $(shell $(PYTHON) -m benchmarks.inspection.sass --unchanged && echo yes),CMOE_CUDA=0,CMOE_CUDA_ARCHS=90a)
endif

# make test OP=topk_gate: every test with that name in it, on every backend.
ifdef OP
test: install
	$(PYTEST) tests --ignore tests/triton --ignore tests/emulation -k "$(OP)"
	TRITON_INTERPRET=1 $(PYTEST) tests/ops tests/triton -k "triton and $(OP)"
	CMOE_EMULATE_CUDA=1 $(PYTEST) tests/ops tests/emulation -k "(cuda or emulation) and $(OP)"
else
# mypy and clang-format, on one core for a minute, run beside the first tests.
test: install  ## what CI runs: lint and the tests, with what was skipped and why; OP=topk_gate: all tests of one op
	$(MAKE) lint & linted=$$!; $(MAKE) sampled && wait $$linted

sampled: test-triton test-cuda
	$(PYTEST) --dist loadfile --no-loadscope-reorder $(SAMPLE) --ignore tests/triton --ignore tests/emulation
	$(BIN)/python -m tests.passed --write
	$(VERSIONS) latest --sample 90
	$(BIN)/python -m tests.mutants --sample $(if $(PASSED),1,3) --no-control --jobs $(JOBS)
endif

# Two processes, because the first import of Triton decides: kernels interpreted on the CPU (values, bounds, races), and kernels compiled.
test-triton: install  ## the Triton kernels without a GPU: interpreted, then compiled for sm_80 and sm_90
	TRITON_INTERPRET=1 $(PYTEST) $(SAMPLE_SLOW) tests/ops tests/triton -k triton
	$(PYTEST) --dist loadgroup $(SAMPLE_SLOW) tests/triton/test_capture.py tests/triton/test_aot.py

# A process of its own here too: the emulated kernels take the place of the backend "cuda" on the CPU.
test-cuda: install  ## the CUDA kernels without a GPU: emulated on the CPU, and what nvcc makes of them
	CMOE_EMULATE_CUDA=1 $(PYTEST) $(SAMPLE_SLOW) tests/ops tests/emulation -k "cuda or emulation"

records: install  ## every generated record that is stale, anew (CHECK=1: which are; ONLY=aot,sass,roofline,verdicts: those)
	$(BIN)/python -m tools.records --jobs $(JOBS) $(if $(CHECK),--check) $(if $(ONLY),--only $(ONLY))

aot: install  ## all of benchmarks/results/aot.json anew: the Triton kernels compiled for sm_80, sm_90, sm_100 and gfx942
	$(BIN)/python -m benchmarks.inspection.aot --jobs $(JOBS) --write

roofline: install  ## FLOPs, bytes and launches of every op, and what GPUs that are not here would need at least
	$(BIN)/python -m benchmarks.inspection.roofline

# Installs nothing: with the Python, torch and peers found there.
gpu-check:  ## on a machine with a GPU: values, sanitizers, times beside the peers found there, tests; offline, resumable (MINUTES=8 LIBRARY=x.whl)
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu_check $(if $(MINUTES),--minutes $(MINUTES)) $(if $(LIBRARY),--library $(LIBRARY))

gpu-fill:  ## preferred.json, tiles.json and README's status from a result: make gpu-fill FILE=benchmarks/results/gpu-....json
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu_fill $(FILE)

test-latest: install  ## the newest of everything beyond the ranges in .venv-latest: unimed, integrations, README and examples on it
	$(VERSIONS) latest

test-oldest: install  ## the lower end of every range in .venv-oldest: the same tests
	$(VERSIONS) oldest

test-full: lint  ## every case, also those that CI samples
	CMOE_TEST_FULL=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(JOBS) tests/ops tests/triton -k triton
	CMOE_TEST_FULL=1 CMOE_EMULATE_CUDA=1 $(BIN)/python -m pytest -n $(JOBS) tests/ops tests/emulation -k "cuda or emulation"
	CMOE_TEST_FULL=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile
	$(BIN)/python -m tests.mutants --jobs $(JOBS)

mutants: install  ## plant each bug of tests/mutants in a copy of the tree, and see that its tests fail: tests/mutants/verdicts.json
	$(BIN)/python -m tests.mutants --jobs $(JOBS) --write

wheel: install  ## dist/*.whl (cp310-abi3 with its manylinux tag, where a compiler is) and dist/*.tar.gz
	$(BIN)/python -m tools.wheel --outdir dist

demo: install  ## the main job: train a tiny Uni-Med on real CT and MR, evaluate six tasks, write runs/demo/report.html
	$(BIN)/unimed demo

doctor: install  ## what is built, what each op uses here, and why
	$(BIN)/python -m cmoe_kernels

bench: install  ## time every op against its peers (hours; ARGS="--only soft_connector --threads 2"; ARGS=--help explains)
	$(BIN)/python -m benchmarks $(ARGS)

bench-history: install  ## a history of ours, by pytest-benchmark: make bench-history ONLY="soft_connector and T256" (default: the tiny shapes)
	$(BIN)/python -m pytest -q benchmarks/history.py -k "$(or $(ONLY),tiny)" -p no:cacheprovider --benchmark-autosave --benchmark-compare

bench-report: install  ## README's table from benchmarks/results/; `make docs` writes the page of all rows and the plots
	$(BIN)/python -m benchmarks.report

docs: install  ## the API pages, guides and pages of evidence, in build/site; python -m docs.experts writes the table of transformers' families anew
	$(INSTALL) --no-build-isolation -e ".[docs]"
	$(BIN)/python -m docs.pages
	$(BIN)/mkdocs build

clean:  ## everything that the above made, but not runs/
	rm -rf $(VENV) .venv-latest .venv-oldest .venv-sample build dist *.egg-info cmoe_kernels/_C*.so
