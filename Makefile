# engineshed: `make serve` and `make test` are all that is needed; the work is in the command `engineshed`.
SHELL := /bin/bash
PYTHON ?= python3
GPU_PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
HOST ?= 127.0.0.1
PORT ?= 8000
MODEL ?=
RECIPE ?=
TARGET ?=
PRECISION ?=
SOAK ?= 1800
FUZZ ?= 2000
INSTALLED := $(VENV)/.installed

EXPORT_FLAGS := $(if $(RECIPE),--recipe $(RECIPE)) $(if $(TARGET),--target $(TARGET)) $(if $(PRECISION),--precision $(PRECISION))

# A tiny stand-in for the default model: see tests/quick_model.py.
QUICK := build/quick/engines

PEERS := bench/.peers
PEER_TARGETS := $(PEERS)/genai/.installed $(PEERS)/openvino/.installed $(PEERS)/transformers/.installed \
	$(PEERS)/llama/.installed $(PEERS)/llama-server/llama-server

# Clients that the server is tested with, each in a virtual environment of its own.
CLIENTS := openai anthropic google-genai litellm langchain-openai instructor llm aiperf
CLIENT_VENVS := .venv-clients

.PHONY: help serve export test test-quick test-busy check chromium unit e2e test-clients $(CLIENTS:%=test-clients-%) soak page sweep fuzz
.PHONY: bench bench-peers bench-served microbench test-gpu bench-gpu clean
.DEFAULT_GOAL := help

help:  ## show this
	@echo "make serve   [HOST=127.0.0.1] [PORT=8000]   set up, export the default model if need be, serve it"
	@echo "make export  [MODEL=hub-id|folder|file.gguf] [RECIPE=engines/x.toml] [TARGET=cpu] [PRECISION='int4 fp32']"
	@echo "make test    set up, lint, types, and every test on the real model"
	@echo "make check   lint and types          make unit   with tiny models         make e2e   the real model and server"
	@echo "make test-quick  e2e and page over a tiny stand-in for the model, as on a machine ten times as fast"
	@echo "make test-busy   make test beside four processes that never rest"
	@echo "make page    the page at / in a real Chromium, over the real model and server"
	@echo "make test-clients      clients that people use, each installed apart, against the real server"
	@echo "make test-clients-NAME one of: $(CLIENTS)"
	@echo "make soak    [SOAK=1800] seconds of requests, hang-ups, errors and deaths over the default model: memory stays flat, nothing hangs"
	@echo "make bench   latency and throughput of the default model's engines, beside the peers that are installed"
	@echo "make bench-served  the server over HTTP, beside llama.cpp's"
	@echo "make microbench    what Python does around a step"
	@echo "make bench-peers   install the peers under bench/.peers: half an hour, 6 GB; llama.cpp needs a C++ compiler, cmake, ninja"
	@echo "make test-gpu      on a machine with an NVIDIA GPU, by GPU_PYTHON as it is: see docs/gpu.md"
	@echo "make bench-gpu     the engine on the GPU beside transformers' compiled decode, in eight minutes; likewise"
	@echo "make fuzz    [FUZZ=2000] tiny checkpoints with random options: each gives transformers' tokens or is refused (hours)"
	@echo "make sweep   try every causal LM type that transformers knows; writes docs/architectures.md (an hour)"
	@echo "make clean   remove .venv, caches and built engines"

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "engineshed needs Python 3.11 or newer; set PYTHON=")'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[export,test]'
	touch $@

serve: $(INSTALLED)  ## the default model, over HTTP
	@$(BIN)/engineshed export --if-missing
	$(BIN)/engineshed serve --host $(HOST) --port $(PORT) --model smollm2-135m-instruct

export: $(INSTALLED)
	$(BIN)/engineshed export $(EXPORT_FLAGS) $(MODEL)

test: check unit e2e page test-clients

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unit: $(INSTALLED)
	$(BIN)/pytest tests/unit tests/service

soak: $(INSTALLED)
	@$(BIN)/engineshed export --if-missing --precision int4 fp32
	SOAK=$(SOAK) $(BIN)/pytest tests/service/test_soak.py --timeout 7200 --durations=0

e2e: $(INSTALLED)
	$(BIN)/engineshed export --if-missing --recipe tests/data/e2e.toml
	$(BIN)/pytest tests/e2e

test-quick: $(INSTALLED) chromium $(QUICK)/smollm2-135m-instruct/bundle.json
	TEST_ENGINES=$(QUICK) $(BIN)/pytest tests/e2e tests/page

$(QUICK)/smollm2-135m-instruct/bundle.json: tests/quick_model.py | $(INSTALLED)
	$(BIN)/engineshed export --if-missing --recipe tests/data/e2e.toml
	rm -rf $(@D)
	$(BIN)/python -m tests.quick_model $(QUICK)

test-busy: $(INSTALLED)
	@for process in 1 2 3 4; do $(BIN)/python -c 'while True: pass' & busy="$$busy $$!"; done; \
		trap "kill $$busy" EXIT; $(MAKE) test

page: $(INSTALLED) chromium
	$(BIN)/engineshed export --if-missing --recipe tests/data/e2e.toml
	$(BIN)/pytest tests/page

# Debian's Chromium, or the one that CHROMIUM names; root gets it installed.
chromium:
	@command -v $${CHROMIUM:-chromium} >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
		&& apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium >/dev/null; } \
		|| { echo "the tests of the page need Chromium: install it (Debian: apt-get install chromium), or set CHROMIUM= to its path" >&2; exit 1; }

test-clients: $(INSTALLED) $(CLIENTS:%=$(CLIENT_VENVS)/%/.installed)
	@$(BIN)/engineshed export --if-missing
	$(BIN)/python -m tests.clients.run $(CLIENTS)

$(CLIENTS:%=test-clients-%): test-clients-%: $(INSTALLED) $(CLIENT_VENVS)/%/.installed
	@$(BIN)/engineshed export --if-missing
	$(BIN)/python -m tests.clients.run $*

# Without pip, which is another ten seconds for all of them, and compiled only where it is imported.
$(CLIENT_VENVS)/%/.installed: tests/clients/%/requirements.txt | $(INSTALLED)
	$(BIN)/python -m venv --clear --without-pip $(@D)
	$(BIN)/python -m pip --python $(@D)/bin/python install --quiet --no-compile --requirement $<
	touch $@

sweep: $(INSTALLED)
	$(BIN)/python -m tests.sweep

fuzz: $(INSTALLED)
	$(BIN)/python -m tests.fuzz $(FUZZ)

bench: $(INSTALLED)
	@$(BIN)/engineshed export --if-missing --precision int4 fp32
	@mkdir -p build
	$(BIN)/engineshed bench --json build/bench.json --page build/bench.html

bench-served: $(INSTALLED) | $(PEERS)/llama-server/llama-server $(PEERS)/llama/.installed
	@$(BIN)/engineshed export --if-missing
	@mkdir -p build
	$(BIN)/engineshed bench serve --streams 1 8 32 --prompt-tokens 64 --tokens 64 --json build/bench-served.json --page build/bench-served.html \
		--start engineshed='$(BIN)/engineshed serve --port {port} --slots 32 --context 512' \
		--start 'llama.cpp=$(PEERS)/llama-server/llama-server -m $(PEERS)/gguf/Q4_1.gguf --port {port} -np 32 -c 16384'

microbench: $(INSTALLED)
	$(BIN)/pytest tests/unit/test_hot_paths.py --benchmark-enable --benchmark-columns=median,iqr,ops

# By a Python that has torch for CUDA and onnxruntime-gpu; the project itself need not be installed. See docs/gpu.md.
test-gpu:
	$(GPU_PYTHON) -m pytest tests/gpu -c tests/gpu/pytest.ini -p no:cacheprovider

bench-gpu:
	@mkdir -p build
	$(GPU_PYTHON) -m bench.gpu --json build/bench-gpu.json

bench-peers: $(INSTALLED)  ## each in a virtual environment of its own; one that fails does not hold up the others
	$(MAKE) --keep-going $(PEER_TARGETS)

# The model as the peers read it: a Hugging Face folder and the GGUF.
$(PEERS)/model/source.json: | $(INSTALLED)
	$(BIN)/python -m bench.peers.model $(PEERS)/model

$(PEERS)/transformers/.installed: bench/peers/transformers.txt $(PEERS)/model/source.json
	$(BIN)/python -m venv $(@D)
	$(@D)/bin/pip install --quiet --requirement $<
	touch $@

$(PEERS)/genai/.installed: bench/peers/genai.txt $(PEERS)/model/source.json
	$(BIN)/python -m venv $(@D)
	$(@D)/bin/pip install --quiet --requirement $<
	for precision in int4 fp32; do \
		HF_HUB_OFFLINE=1 $(@D)/bin/python -m onnxruntime_genai.models.builder --input $(PEERS)/model --precision $$precision \
			--execution_provider cpu --output $(@D)-$$precision --cache_dir $(PEERS)/cache \
			$$([ $$precision = fp32 ] || echo --extra_options accuracy_level=4 block_size=32 algo_config=k_quant_last) || exit 1; \
	done
	touch $@

$(PEERS)/openvino/.installed: bench/peers/openvino.txt $(PEERS)/model/source.json
	$(BIN)/python -m venv $(@D)
	$(@D)/bin/pip install --quiet --constraint constraints.txt torch
	$(@D)/bin/pip install --quiet --no-deps --requirement $<
	for format in "int4 --group-size 32 --ratio 1.0" int8; do \
		HF_HUB_OFFLINE=1 $(@D)/bin/optimum-cli export openvino --model $(PEERS)/model --task text-generation-with-past \
			--weight-format $$format $(@D)-$${format%% *} || exit 1; \
	done
	touch $@

$(PEERS)/llama/.installed: bench/peers/llama.txt $(PEERS)/model/source.json
	$(BIN)/python -m venv $(@D)
	CMAKE_GENERATOR=Ninja CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" \
		$(@D)/bin/pip install --quiet --no-binary llama-cpp-python --requirement $<
	mkdir -p $(PEERS)/gguf
	cp $(PEERS)/model/model.gguf $(PEERS)/gguf/Q4_1.gguf
	PYTHONPATH=. $(@D)/bin/python -m bench.peers.llama_prepare $(PEERS)/model/model.gguf $(PEERS)/gguf Q4_0 Q8_0
	touch $@

# From the source that the library is built from, so that both are of one version.
$(PEERS)/llama-server/llama-server: bench/peers/llama.txt | $(INSTALLED)
	mkdir -p $(@D)
	$(BIN)/pip download --quiet --no-deps --no-binary llama-cpp-python --dest $(@D) $$(grep ^llama_cpp_python $<)
	tar --extract --gzip --strip-components=1 --directory $(@D) --file $(@D)/llama_cpp_python-*.tar.gz
	cmake -S $(@D)/vendor/llama.cpp -B $(@D)/build -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
		-DBUILD_SHARED_LIBS=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_APP=OFF \
		-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
	cmake --build $(@D)/build --target llama-server
	cp $(@D)/build/bin/llama-server $@

clean:
	rm -rf $(VENV) $(CLIENT_VENVS) .cache .mypy_cache .pytest_cache .ruff_cache build *.egg-info
	find engines -mindepth 1 -maxdepth 1 -type d -exec rm -rf {} +
