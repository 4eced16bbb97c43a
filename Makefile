# make demo: nine pictures by the embedded model, from nothing but Python. make test: the tests. make check: lint, types.
# make test-full: what make test skips because it takes long (tests/full.py), such as the five models at full size, random
# weights, and shallow ones of their widths with every combination of export options; 24 GB of memory, 60 GB of disk, hours.
# make test-interop: exports by optimum-onnx open here and ours there, in an environment of its own. make test-gpu: on an
# NVIDIA GPU, in an environment of its own, .venv-gpu, which is also that of vega-edge bench gpu; what else can run there,
# such as tensorrt, is installed into it. make test-oldest, make test-newest: with the oldest versions that pyproject.toml allows,
# and with the newest. make pins: moves the versions that all the others install (docs/environments.md).
ifeq ($(OS),Windows_NT)
PYTHON ?= python
BIN := Scripts
else
PYTHON ?= python3
BIN := bin
endif

# Each is made by its name in pins/environment.py, which does nothing where it is ready.
ENVIRONMENTS := env-demo env-test env-oldest env-newest env-interop env-gpu env-pins
# A file at a time in each process: what its tests share is made once. Each may take a gigabyte or two. A process that
# crashes, or is ended because a test hangs, ends the run: a new one would only begin the same test again.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile --max-worker-restart 0

.PHONY: demo test test-full test-interop test-gpu test-oldest test-newest check pins clean $(ENVIRONMENTS)

$(ENVIRONMENTS): env-%:
	@$(PYTHON) pins/environment.py $*

demo: env-demo
	.venv/$(BIN)/python -m vega_edge.demo.sheet demo.png

test: env-test
	.venv-test/$(BIN)/python -m pytest $(PARALLEL)

# What needs torch is skipped here: exports have one version of torch and diffusers.
test-oldest: env-oldest
	.venv-oldest/$(BIN)/python -m pytest $(PARALLEL)

test-newest: env-newest
	.venv-newest/$(BIN)/python -m pytest $(PARALLEL)

test-full: export VEGA_EDGE_FULL_BUNDLES := $(CURDIR)/build/full-size
test-full: env-test
	.venv-test/$(BIN)/python -m vega_edge.bench.full_size -o benchmarks/results/full-size.json
	.venv-test/$(BIN)/python -m pytest --timeout 0 -o faulthandler_timeout=0 tests/test_full_engines.py tests/test_real_width.py tests/test_gpu_kit.py tests/test_parity_pictures.py "tests/test_trt_build.py::test_every_graph_of_the_other_embedded_models_is_built"

test-gpu: env-gpu
	.venv-gpu/$(BIN)/python -m pytest tests/test_gpu.py tests/test_gpu_plans.py tests/test_engines.py

test-interop: export VEGA_EDGE_OPTIMUM_PYTHON := $(CURDIR)/.venv-interop/$(BIN)/python
test-interop: env-test env-interop
	.venv-test/$(BIN)/python -m pytest --timeout 0 -o faulthandler_timeout=0 tests/test_interop.py

# mypy does not follow an editable install, so it reads a copy; once for the oldest Python, once for Windows.
# The benchmarks are not installed, so they are copied too.
check: env-test
	.venv-test/$(BIN)/ruff check .
	.venv-test/$(BIN)/ruff format --check .
	.venv-test/$(BIN)/mypy pins/environment.py pins/remake.py
	$(PYTHON) -c "import shutil; shutil.rmtree('build/types', True)"
	.venv-test/$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --target build/types .
	cd build/types && ../../.venv-test/$(BIN)/mypy --config-file ../../pyproject.toml --python-version 3.10 -p vega_edge
	cd build/types && ../../.venv-test/$(BIN)/mypy --config-file ../../pyproject.toml --platform win32 -p vega_edge
	$(PYTHON) -c "import shutil; shutil.copytree('benchmarks', 'build/types/vega_edge/benchmarks')"
	cd build/types && ../../.venv-test/$(BIN)/mypy --config-file ../../pyproject.toml -p vega_edge.benchmarks

# KEEP=--keep moves only what pyproject.toml no longer allows.
pins: env-pins
	.venv-pins/$(BIN)/python pins/remake.py $(KEEP)

clean:
	@$(PYTHON) pins/environment.py clean
