# `make demo` and `make test` do everything on a fresh machine with Python >= 3.11 and make.

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

.PHONY: demo space test test-all test-avx2 test-browser test-servers quality style docs coverage wheel clean

# An editable install of the package with all its extras; made again when the dependencies change. Python compiles what
# is imported; compiling all of it here takes the better part of a minute.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pgn-peft needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --no-compile --editable '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(RUN) examples/demo.py

# A page to try it in, offline; CONTRIBUTING.md says how its pictures are made.
space: $(VENV)/installed
	$(RUN) examples/space/app.py

# Everything that takes seconds; `test-all` adds what is marked `slow`.
test: $(VENV)/installed
	$(RUN) -m pytest -n auto --dist worksteal -m "not slow"

test-all: $(VENV)/installed
	$(RUN) -m pytest -n auto --dist worksteal

# Forward and backward numbers once more with the kernels of a CPU without AVX-512, which most desktops and laptops have.
NUMBERS := $(addprefix tests/test_, $(addsuffix .py, generator contract forms deep read_out pixel_space mixed_batch \
	weight_addresses texts added_heads head timm versions memory inversion prompter score_head official training))
test-avx2: $(VENV)/installed
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(RUN) -m pytest -n auto --dist worksteal \
		-m "not slow and not shared" $(NUMBERS)

# The page in a real browser: the machine's Chromium, or else Playwright's own.
$(VENV)/browser-installed: $(VENV)/installed
	$(RUN) -m pip install --quiet 'playwright>=1.65'
	command -v chromium || $(RUN) -m playwright install --with-deps chromium
	touch $@

test-browser: $(VENV)/browser-installed
	$(RUN) -m pytest tests/test_space_browser.py

# Real servers, whose requirements exclude this package's, in an environment of their own.
SERVERS := .venv-servers
$(SERVERS)/installed: Makefile
	$(PYTHON) -m venv $(SERVERS)
	$(SERVERS)/bin/python -m pip install --quiet 'infinity-emb[server]==0.0.78' 'transformers<4.49' torch aiohttp pillow 'litserve==0.2.19'
	touch $@

test-servers: $(VENV)/installed $(SERVERS)/installed
	INFINITY=$(SERVERS)/bin/infinity_emb $(RUN) -m pytest tests/test_servers.py

coverage: $(VENV)/installed
	$(RUN) -m pytest --cov --cov-report=term

quality: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

style: $(VENV)/installed
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

$(VENV)/docs-installed: $(VENV)/installed
	$(RUN) -m pip install --quiet --no-compile --editable '.[docs]'
	touch $@

# Builds the documentation into site/, with an API reference from the docstrings.
docs: $(VENV)/docs-installed
	$(RUN) -m mkdocs build --strict

# Builds the wheel into dist/; tests/test_packaging.py imports one from outside the checkout.
wheel: $(VENV)/installed
	$(RUN) -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) $(SERVERS) build dist site outputs demo-output *.egg-info
