# make demo    run the GRPO demo on this machine's CPU
# make test    run the tests that need no GPU; make test-all adds the slow ones
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python

# One thread per rank: vLLM's CPU engine is ten times slower with two on two cores.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export VLLM_NO_USAGE_STATS ?= 1

.PHONY: install demo test test-all test-gpu lint lock-cpu lock-gpu clean

install: $(VENV)/.cpu

# torch brings its own dependencies; everything else exactly as locked. Without --no-deps pip would
# add CUDA builds of torchvision and torchaudio, which break a CPU torch.
$(VENV)/.cpu $(VENV)/.gpu: $(VENV)/.%: requirements/%.txt setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
	  sys.exit(0 if (3, 11) <= v < (3, 13) else f"Python 3.11 or 3.12 is needed, {sys.executable} is {v[0]}.{v[1]}; make PYTHON=python3.12 ...")'
	@command -v lscpu >/dev/null || { echo "lscpu is needed by vLLM on CPU (package util-linux)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet "$$(grep '^torch==' requirements/$*.txt)"
	$(PY) -m pip install --quiet --no-deps -r requirements/$*.txt
	$(PY) -m pip install --quiet --no-deps -e .
	@touch $@

demo: install
	$(PY) examples/megatron/demo.py

test: install
	$(PY) -m pytest -m "not gpu and not slow"

test-all: install
	$(PY) -m pytest -m "not gpu"

test-gpu: $(VENV)/.gpu
	$(PY) -m pytest -m gpu

lint: install
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

lock-cpu lock-gpu: lock-%:
	$(PYTHON) requirements/lock.py $*

clean:
	rm -rf $(VENV) outputs build *.egg-info
