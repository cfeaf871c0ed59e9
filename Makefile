# Two commands do everything from nothing: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-floor lint backbones benchmark benchmark-encode benchmark-training clean

quickstart: $(VENV)/.ready
	$(BIN)/python examples/quickstart.py $(ARGS)

test: $(VENV)/.ready
	$(BIN)/python -m pytest $(ARGS)

backbones: $(VENV)/.ready
	$(BIN)/python benchmarks/backbones.py $(ARGS)

benchmark-encode: $(VENV)/.ready
	$(BIN)/python benchmarks/encode.py $(ARGS)

benchmark-training: $(VENV)/.ready
	$(BIN)/python benchmarks/training.py $(ARGS)

# After `make quickstart`, whose model it uses.
benchmark: $(VENV)/.ready
	$(BIN)/python benchmarks/scoring.py $(ARGS)

# The tests on the lowest versions that setup.py states.
test-floor: $(VENV)-floor/.ready
	$(VENV)-floor/bin/python -m pytest $(ARGS)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p $(VENV)/src && ln -sfn $(CURDIR) $(VENV)/src/metaembed  # mypy wants a package's name, whatever the clone's is
	cd $(VENV)/src && $(abspath $(BIN))/mypy --config-file metaembed/pyproject.toml metaembed/__init__.py metaembed/*_metaembed.py

# torch and torchvision first and together, so that both come from the same place.
$(VENV)/.ready: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch torchvision
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

$(VENV)-floor/.ready: setup.py
	$(PYTHON) -m venv $(VENV)-floor
	sed -n 's/^ *"\([A-Za-z_-]*\)>=\([0-9.]*\)".*/\1==\2/p' setup.py > $(VENV)-floor/floor.txt
	$(VENV)-floor/bin/python -m pip install --quiet --requirement $(VENV)-floor/floor.txt
	$(VENV)-floor/bin/python -m pip install --quiet --constraint $(VENV)-floor/floor.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-floor outputs build *.egg-info
