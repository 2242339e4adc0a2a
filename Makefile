# Every command a person types. `make serve` and `make test` work on a fresh machine with CPython 3.11+, pip and make.

PYTHON ?= python3
ENGINE ?= vllm
PORT   ?= 8000
HOST   ?= 127.0.0.1
STORE  ?=
MODEL  ?=

VENV := .venv
RUN  := $(VENV)/bin/python
PIP  := $(RUN) -m pip --disable-pip-version-check
# What an engine needs: no torch and no vLLM for approved answers only or a remote engine.
ENVIRONMENT := $(if $(filter vllm,$(ENGINE)),$(if $(shell command -v nvidia-smi 2>/dev/null),cuda,cpu),core)
# A stamp carries its lock's checksum: a changed lock is installed, an unchanged one costs nothing.
sum   = $(firstword $(shell cksum requirements/$(1).lock))
stamp = $(VENV)/.installed-$(1)-$(call sum,$(1))

.PHONY: help serve install test lint format bench lock docs wheel clean
.DELETE_ON_ERROR:

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

serve: install  ## the server on http://127.0.0.1:8000  [PORT= HOST= STORE= ENGINE=vllm|openai|none MODEL=]
	@exec $(RUN) serve.py --host $(HOST) --port $(PORT) --engine $(ENGINE) \
	  $(if $(STORE),--store $(STORE)) $(if $(MODEL),--model $(MODEL))

install: $(call stamp,$(ENVIRONMENT)) demo  ## the environment the server needs, from the lock

# The demo store's promotions, dated from today.
.PHONY: demo
demo: $(VENV)/bin/python
	@$(RUN) -m bot.demo

$(VENV)/bin/python:
	@echo "== creating $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "needs CPython 3.11 or newer; set PYTHON="; exit 2; }
	@$(PYTHON) -m venv $(VENV)

# --no-deps: the locks are complete, and leave out what vLLM names but does not need (docs/dependencies.md).
# The second line brings what torch itself wants where the registry's build is not the CPU one; nothing elsewhere.
$(VENV)/.installed-core-%: requirements/core.lock $(VENV)/bin/python
	@echo "== installing $(words $(shell grep -v '^#' $<)) packages, about 0.5 GB, half a minute"
	@$(PIP) install --no-deps --quiet -r $<
	@touch $@

$(VENV)/.installed-cpu-%: requirements/cpu.lock $(VENV)/bin/python
	@echo "== installing $(words $(shell grep -v '^#' $<)) packages, about 3.5 GB on disk, two to four minutes"
	@$(PIP) install --no-deps --quiet --progress-bar on -r $<
	@$(PIP) install --quiet $$(grep '^torch==' $<)
	@touch $@ $(call stamp,core)

$(VENV)/.installed-cuda-%: requirements/cuda.lock $(VENV)/bin/python
	@echo "== installing $(words $(shell grep -v '^#' $<)) packages, about 10 GB on disk"
	@$(PIP) install --no-deps --quiet --progress-bar on -r $<
	@touch $@ $(call stamp,core)

$(VENV)/.installed-dev-%: requirements/dev.lock $(VENV)/bin/python
	@echo "== installing $(words $(shell grep -v '^#' $<)) test tools"
	@$(PIP) install --no-deps --quiet -r $<
	@touch $@

# Chromium and the Chinese fonts for the browser tests, tcmalloc for the engine: Debian's, where we may install them.
.PHONY: system
system:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	   ! { command -v chromium && [ -e /usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc ] && ls /usr/lib/*/libtcmalloc_minimal.so.4; } >/dev/null 2>&1; then \
	  echo "== installing chromium, fonts-noto-cjk, libtcmalloc-minimal4"; \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	    chromium fonts-noto-cjk libtcmalloc-minimal4; } >/dev/null || echo "   not possible; browser tests will be skipped"; \
	fi

test: system $(call stamp,cpu) $(call stamp,dev) demo  ## everything CI runs
	@echo "== models for the tests (kept in the per-user cache)"
	@$(RUN) -m bot models fetch smollm2-135m-instruct
	@$(RUN) -m bot models fetch
	@if command -v node >/dev/null; then node --test tests/web/*.test.mjs; else echo "node is missing: frames.test.mjs skipped"; fi
	@$(RUN) -m pytest

lint: $(call stamp,cpu) $(call stamp,dev)  ## ruff, strict typing, the layers
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m pytest tests/test_layers.py

format: $(call stamp,dev)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

bench: $(call stamp,cpu) $(call stamp,dev)  ## the benchmark tables, to bench/results/*.json and the screen
	$(RUN) bench/main.py

.PHONY: default-encoders
default-encoders: $(call stamp,cpu)  ## the encoders' tuning that is shipped, made anew: about three quarters of an hour
	$(RUN) examples/training/tune.py

.PHONY: default-reranker
default-reranker: $(call stamp,cpu)  ## the rerankers and the cross-encoder that are shipped, trained anew: three hours, after the encoders
	$(RUN) examples/training/rerank.py
	$(RUN) examples/training/cross_encode.py

.PHONY: default-gist
default-gist: $(call stamp,cpu)  ## what finds the question in a message, trained anew: ten minutes, after the encoders
	$(RUN) examples/training/gist.py

.PHONY: default-release
default-release: $(call stamp,cpu) demo  ## the release that is shipped, trained anew: minutes on a GPU, hours on two cores
	$(RUN) examples/recipe/make.py --out var/recipe/data
	$(RUN) -m finetune train --config examples/recipe/train.toml --data var/recipe/data --run var/recipe/run
	$(RUN) examples/recipe/release.py --run var/recipe/run

docs: $(call stamp,core)  ## the generated pages
	$(RUN) -m bot settings > docs/settings.md
	$(RUN) -m bot schemas docs

lock: $(VENV)/bin/python  ## resolve the exact pins anew
	$(RUN) requirements/make_lock.py cpu cpu
	$(RUN) requirements/make_lock.py core
	$(RUN) requirements/make_lock.py dev cpu dev train prefer
	$(RUN) requirements/make_lock.py cuda cuda

wheel: $(VENV)/bin/python  ## dist/zhanggui-*.whl
	$(PIP) wheel --no-deps --quiet -w dist .

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
