# make demo: nine pictures by the embedded model, from nothing but Python. make test: the tests. make check: lint, types.
PYTHON ?= python3
ifeq ($(OS),Windows_NT)
BIN := Scripts
else
BIN := bin
endif

.PHONY: demo test check clean

demo: .venv/demo-installed
	.venv/$(BIN)/python -m vega_edge.demo.sheet demo.png

test: .venv-test/installed
	.venv-test/$(BIN)/python -m pytest

check: .venv-test/installed
	.venv-test/$(BIN)/ruff check .
	.venv-test/$(BIN)/ruff format --check .
	.venv-test/$(BIN)/mypy
	.venv-test/$(BIN)/mypy --python-version 3.12 --platform win32

.venv/demo-installed: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[cpu]"
	@$(PYTHON) -c "open('$@', 'w').close()"

.venv-test/installed: pyproject.toml
	$(PYTHON) -m venv .venv-test
	.venv-test/$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[cpu,openvino,export,test]"
	@$(PYTHON) -c "open('$@', 'w').close()"

clean:
	$(PYTHON) -c "import shutil; [shutil.rmtree(p, True) for p in ('.venv', '.venv-test', 'build')]"
