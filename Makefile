# Two commands on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow lint docs clean

# Waiting threads sleep rather than spin: on a busy machine spinning makes small models several times slower.
export OMP_WAIT_POLICY := passive

# The main job on the embedded default; 125 steps are one epoch.
demo: $(STAMP)
	$(BIN)/python scripts/train.py --model demo --data demo --bits 4 --r 16 --lr 2e-3 --batch-size 16 --max-steps 125 \
	    --exact-match 200 --out runs/demo --overwrite
	$(BIN)/python scripts/merge.py --run runs/demo --out release/demo --overwrite

# Two processes: a test keeps to one core.
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

# Those that start, kill or measure whole processes, follow long curves or plan many times.
test-slow: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site, into site/. With --quiet warnings are not counted and --strict does nothing. The variable is the theme's own:
# it quiets what it prints about its successor.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# torch comes first, and below what the package takes (up to 2.15): on a machine with a CPU build at hand this range
# takes it, elsewhere the CUDA build. The second line finds it there, and installs no other.
# The constraints are the versions that were tested; they are used where they can be had.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch>=2.8,<2.14"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) runs release site
