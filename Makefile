# Everything a fresh machine with Python >= 3.11 and make needs: `make demo`, `make test`, `make check`.
# The first of these that is new enough makes the environment; to name one: make test PYTHON=python3.12

PYTHON ?= python3 python3.14 python3.13 python3.12 python3.11 python
VENV := .venv
INSTALLED := $(VENV)/.installed

# Two pytest workers with one thread each: more threads than cores is slower than fewer.
test check lint: export OMP_NUM_THREADS = 1

.PHONY: demo test check lint install clean

demo: $(INSTALLED)
	$(VENV)/bin/python tools/demo.py

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal

check: $(INSTALLED)
	$(VENV)/bin/python tools/check.py

lint: $(INSTALLED)
	$(VENV)/bin/python tools/check.py --fast

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@for python in $(PYTHON); do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "$$python -m venv $(VENV)"; exec "$$python" -m venv $(VENV); \
	  fi; \
	done; \
	echo "No Python >= 3.11 among: $(PYTHON)" >&2; \
	echo "Install one, or name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1
	$(VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[cpu,demo,dev]'
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
