# make demo: the whole way on a photograph.  make test: everything that CI runs.  make quick: its tests but the slow.
# make lint: style and types.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
WEIGHTS = training/weights/misf-small.safetensors
SAMPLES = runtime/samples

.PHONY: demo test quick lint clean

$(VENV)/.export: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,export]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(VENV)/.export $@

demo: $(VENV)/.export
	mkdir -p demo
	$(BIN)/misf-export --checkpoint $(WEIGHTS) -o demo/misf-small.onnx
	$(BIN)/misf-export --checkpoint $(WEIGHTS) --fp16 -o demo/misf-small_fp16.onnx
	$(BIN)/misf-verify demo/misf-small.onnx --checkpoint $(WEIGHTS)
	$(BIN)/misf-verify demo/misf-small_fp16.onnx --checkpoint $(WEIGHTS)
	@if $(BIN)/python -c "from importlib.util import find_spec as f; exit(not (f('tensorrt') or f('tensorrt_rtx')))"; \
	then $(BIN)/misf-build demo/misf-small_fp16.onnx --no-plugin --fp16 -o demo/misf-small_fp16.plan; \
	else echo "no TensorRT and no TensorRT for RTX here, so no engine is built"; fi
	$(BIN)/misf-run demo/misf-small_fp16.onnx $(SAMPLES)/astronaut.jpg $(SAMPLES)/masks/astronaut.png \
	    -o demo/astronaut_inpainted.png --concat --force
	@echo "before, hole, after:" && ls $(CURDIR)/demo/*_concat.png

test: $(VENV)/.dev lint
	$(BIN)/python -m pytest

quick: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/types/misf
	for folder in training export plugins runtime; do ln -sfn ../../../$$folder build/types/misf/$$folder; done
	cd build/types && MYPYPATH=. $(abspath $(BIN))/mypy --config-file ../../pyproject.toml -p misf

clean:
	rm -rf build demo runs $(VENV) *.egg-info
