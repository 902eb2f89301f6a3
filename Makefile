# make demo   trains a spiking network on handwritten digits, in an environment of its own
# make test   formatting, lint, types and tests
# make test-slow   the exhaustive grids behind the marker "slow"; CI runs them after the rest
# make replay   compares the kernels with those of the merge base; REPLAY_ARGS="--base REV --strict" asks for others
# make golden   writes the renders of tests/golden anew
# CUDA=cuda13 takes CuPy and NVRTC for CUDA 13, where the torch that pip finds is built for it
# PYTHON=python3.12 picks the interpreter, VENV=dir the environment, PYTEST_ARGS="-k lif" the tests.
PYTHON ?= python3
VENV ?= .venv
CUDA ?= cuda12
PYTEST_ARGS ?= -n 2 --dist loadgroup -m "not slow"

run := $(VENV)/bin/python -m
pip := $(run) pip install --disable-pip-version-check -c constraints.txt

# CuPy has no wheels for macOS; elsewhere its NVRTC compiles every CUDA kernel, GPU or not.
ifeq ($(shell uname -s),Darwin)
test_extras := test,examples
else
test_extras := test,examples,$(CUDA)
endif

.PHONY: demo test check test-slow replay golden format clean

demo: $(VENV)/.installed-demo
	$(VENV)/bin/python examples/digits.py

test check: $(VENV)/.installed-test
	$(run) ruff format --check .
	$(run) ruff check .
	$(run) mypy
	$(run) pytest $(PYTEST_ARGS)

test-slow: $(VENV)/.installed-test
	$(run) pytest -n 2 --dist loadgroup -m slow

replay: $(VENV)/.installed-test
	$(VENV)/bin/python benchmarks/replay.py $(REPLAY_ARGS)

golden: $(VENV)/.installed-test
	$(run) tests.test_golden

format: $(VENV)/.installed-test
	$(run) ruff format .
	$(run) ruff check --fix .

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache

# The stamps: installing again only when what is to be installed has changed. All that `demo` needs, `test` has.
$(VENV)/.installed-demo: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(pip) -e ".[examples]"
	@touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt tests/peers.txt | $(VENV)/bin/pip
	$(pip) -e ".[$(test_extras)]"
	$(pip) --no-deps -r tests/peers.txt
	@touch $@ $(VENV)/.installed-demo

# pip, not python: an environment whose making was cut short has the one without the other.
$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and "neuronjit needs Python 3.10 or newer, $(PYTHON) is %d.%d: try make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $(VENV)
