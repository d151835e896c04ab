SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z][a-z-]*:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(VENV)/.stamp: pyproject.toml constraints.txt client/pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[embedded,export,dev]' -e './client[sheet]'
	touch $@

setup: $(VENV)/.stamp  ## make .venv and install everything into it

run: setup  ## export the demo model, serve it, paint one picture into out/, stop
	$(BIN)/python -m demo.run

serve: setup  ## export the demo model and serve it on ports 8000 to 8002
	$(BIN)/python -m demo.run --export-only
	$(BIN)/python -m closeup.server --lora-dir demo/weights/loras

$(VENV)/.engines: $(VENV)/.stamp
	$(BIN)/pip install --quiet -c constraints.txt -e '.[tensorrt-rtx]'
	touch $@

test: setup $(VENV)/.engines  ## every test, no network and no GPU; compiles engines with TensorRT-RTX
	$(BIN)/pytest -n 2 --dist loadfile

engines: setup $(VENV)/.engines  ## export the demo model as TensorRT-RTX plans into out/engines
	$(BIN)/python -m export --model demo/weights/sd --name demo --target tensorrt-rtx \
	    --precision fp16 --sizes 256x384 --max-batch 4 --repository out/engines \
	    --upscaler demo/weights/upscaler.safetensors \
	    --face-detector demo/weights/face_detector.safetensors

lint: setup  ## ruff and mypy --strict, tests included
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	for model in model_repository/generate*/1/model.py; do $(BIN)/mypy $$model || exit 1; done

bench: setup  ## compare with diffusers in PyTorch; prints a table and writes benchmarks/results/
	$(BIN)/python -m benchmarks

likeness: setup  ## compare face passes by likeness; prints a table and writes benchmarks/results/
	$(BIN)/python -m demo.run --export-only
	$(BIN)/python -m benchmarks.likeness

gpu-check: setup  ## compare engines and a served request on the GPU with the CPU, then a short bench-gpu
	@code=0; $(BIN)/python -m benchmarks.gpu_check || code=$$?; \
	if [ $$code -ne 2 ]; then $(BIN)/python -m benchmarks.gpu --quick --out out/bench; fi; \
	exit $$code

bench-gpu: setup  ## time steps and requests of real sizes on the GPU; writes benchmarks/results/
	$(BIN)/python -m benchmarks.gpu

demo-train: setup  ## train the demo model; resumable, hours on two cores
	nice -n 19 $(BIN)/python -m demo.train

tables: setup  ## rewrite the tables and files that are made from the code
	$(BIN)/python -m export.tables
	$(BIN)/python client/generate_fields.py

.PHONY: help setup run serve test engines lint bench likeness gpu-check bench-gpu demo-train tables
