# make demo: the bundled model on the bundled picture; installs the core only, no torch.
# make test: everything installed, all tests. make lint: style and types.
# make test-core: the tests that need the core only, in an environment without the rest.
# make browser: the page that runs the model in a browser, in examples/browser/dist; needs Node.js.
PYTHON ?= python3

.PHONY: demo test test-core lint format browser clean

demo: .venv-demo/installed
	.venv-demo/bin/vit-reciprocam demo

test: .venv/installed
	.venv/bin/pytest

test-core: .venv-core/installed
	.venv-core/bin/pytest --core-only

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: .venv/installed
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

browser: examples/browser/node_modules/.package-lock.json
	cd examples/browser && npm run build

examples/browser/node_modules/.package-lock.json: examples/browser/package-lock.json
	cd examples/browser && npm ci --no-audit --no-fund

.venv-demo/installed: pyproject.toml
	$(PYTHON) -m venv .venv-demo
	.venv-demo/bin/pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

.venv-core/installed: pyproject.toml
	$(PYTHON) -m venv .venv-core
	.venv-core/bin/pip install --quiet --disable-pip-version-check --editable . pytest
	touch $@

clean:
	rm -rf .venv .venv-core .venv-demo .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
	rm -rf examples/browser/node_modules examples/browser/dist
