# make demo: the main job on real models.  make test: lint, types and tests.  Both make .venv themselves.
.PHONY: demo test lint clean
SHELL := /bin/sh
BIN := .venv/bin

demo: .venv/ready
	$(BIN)/cacheclip demo

test: .venv/ready-test lint
	$(BIN)/python -m pytest

lint: .venv/ready-test
	$(BIN)/ruff check .
	$(BIN)/mypy

.venv/python: tools/find_python.sh
	@python=$$(PYTHON="$(PYTHON)" sh tools/find_python.sh) && echo "making .venv with $$python" && \
	  "$$python" -m venv --clear .venv
	@touch $@

.venv/ready: .venv/python pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	@touch $@

.venv/ready-test: .venv/python pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

clean:
	rm -rf .venv build ./*.egg-info .pytest_cache .mypy_cache .ruff_cache
