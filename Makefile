# make demo | make test | make lint | make format | make bench | make clean
#
# Everything runs in .venv, made on first use. An existing environment that has torch can be named instead:
#   make demo PYTHON=/path/to/python

VENV := .venv
TORCH := torch==2.13.0
ifdef PYTHON
  RUN := $(PYTHON)
  READY := build/.ready
else
  RUN := $(VENV)/bin/python
  READY := $(VENV)/.ready
endif
CLANG_FORMAT := $(RUN) -c 'from clang_format import clang_format; clang_format()'
PIP := $(RUN) -m pip --disable-pip-version-check -q
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h')

.PHONY: setup demo test lint format bench clean
setup: $(READY)

# torch comes first and pinned: the extension is compiled against it, without build isolation.
$(VENV)/.ready: pyproject.toml setup.py Makefile $(SOURCES)
	test -x $(RUN) || python3 -m venv $(VENV)
	$(PIP) install $(TORCH) setuptools wheel ninja pybind11 "numpy<2.4"
	$(PIP) install --no-build-isolation -e ".[test,lint]"
	# their declared needs would bring another torch
	$(PIP) install --no-deps torchvision==0.28.0 timm==1.0.31
	$(PIP) install huggingface_hub safetensors pyyaml
	touch $@

build/.ready: pyproject.toml setup.py Makefile $(SOURCES)
	$(RUN) -c "import torch" || { echo "$(RUN) has no torch; drop PYTHON= to let make set an environment up"; exit 1; }
	$(PIP) install setuptools wheel ninja pybind11
	$(PIP) install --no-build-isolation -e ".[rich,pictures]"
	mkdir -p build && touch $@

demo: $(READY)
	$(RUN) examples/demo.py

test: $(READY)
	$(RUN) -m pytest

bench: $(READY)
	$(RUN) -m pytest benches/blocks.py
	$(RUN) benches/model.py

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(CLANG_FORMAT) --dry-run -Werror $(SOURCES)
	$(RUN) -m mypy

format: $(READY)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(CLANG_FORMAT) -i $(SOURCES)

clean:
	rm -rf build dist *.egg-info resnet_fused/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
