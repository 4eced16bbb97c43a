# make demo: nine pictures by the embedded model, from nothing but Python. make test: the tests. make check: lint, types.
# make test-full: the five models at full size, random weights, and shallow ones of their widths in every combination of
# export options; 24 GB of memory, 60 GB of disk, hours. make test-interop:
# exports by optimum-onnx open here and ours there, in an environment of its own. make test-gpu: on an NVIDIA GPU, in an
# environment of its own, .venv-gpu, which is also that of vega-edge bench gpu; what else can run there, such as
# tensorrt, is installed into it.
ifeq ($(OS),Windows_NT)
PYTHON ?= python
BIN := Scripts
else
PYTHON ?= python3
BIN := bin
endif

.PHONY: demo test test-full test-interop test-gpu check clean

demo: .venv/demo-installed
	.venv/$(BIN)/python -m vega_edge.demo.sheet demo.png

# A file at a time in each process: what its tests share is made once. Each may take a gigabyte or two. A process that
# crashes, or is ended because a test hangs, ends the run: a new one would only begin the same test again.
test: .venv-test/installed
	.venv-test/$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --max-worker-restart 0

test-full: export VEGA_EDGE_FULL_BUNDLES := $(CURDIR)/build/full-size
test-full: .venv-test/installed
	.venv-test/$(BIN)/python -m vega_edge.bench.full_size -o benchmarks/results/full-size.json
	.venv-test/$(BIN)/python -m pytest --timeout 0 -o faulthandler_timeout=0 tests/test_full_engines.py tests/test_real_width.py tests/test_gpu_kit.py

test-gpu: .venv-gpu/installed
	.venv-gpu/$(BIN)/python -m pytest tests/test_gpu.py tests/test_gpu_plans.py tests/test_engines.py

test-interop: export VEGA_EDGE_OPTIMUM_PYTHON := $(CURDIR)/.venv-interop/$(BIN)/python
test-interop: .venv-test/installed
	.venv-test/$(BIN)/python -m tests.make_interop .venv-interop
	.venv-test/$(BIN)/python -m pytest --timeout 0 -o faulthandler_timeout=0 tests/test_interop.py

# mypy does not follow an editable install, so it reads a copy; once for the oldest Python, once for Windows.
check: .venv-test/installed
	.venv-test/$(BIN)/ruff check .
	.venv-test/$(BIN)/ruff format --check .
	$(PYTHON) -c "import shutil; shutil.rmtree('build/types', True)"
	.venv-test/$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/types .
	cd build/types && ../../.venv-test/$(BIN)/mypy --config-file ../../pyproject.toml --python-version 3.10 -p vega_edge
	cd build/types && ../../.venv-test/$(BIN)/mypy --config-file ../../pyproject.toml --platform win32 -p vega_edge

.venv/demo-installed: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[cpu]"
	@$(PYTHON) -c "open('$@', 'w').close()"

.venv-test/installed: pyproject.toml
	$(PYTHON) -m venv .venv-test
	.venv-test/$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[cpu,openvino,tensorrt-rtx,serve,export,test]"
	@# the reference of the web UI's samplers: its one file of them is read alone, not what the package needs for training
	.venv-test/$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps k-diffusion==0.1.1.post1
	@$(PYTHON) -c "open('$@', 'w').close()"

# The extra `export` compares what it exports on onnxruntime, and onnxruntime-gpu has files of the same names: both go, and
# the one for GPUs comes back, which has the CPU's provider too.
.venv-gpu/installed: pyproject.toml
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[cuda,tensorrt-rtx,serve,export,test]"
	.venv-gpu/$(BIN)/python -m pip uninstall --quiet --yes onnxruntime onnxruntime-gpu
	.venv-gpu/$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[cuda]"
	@$(PYTHON) -c "open('$@', 'w').close()"

clean:
	$(PYTHON) -c "import shutil; [shutil.rmtree(p, True) for p in ('.venv', '.venv-test', '.venv-gpu', '.venv-interop', 'build')]"
