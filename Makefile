# make reproduce            the quick profile: train, tabulate, draw (PROFILE=omniglot picks another)
# make status               what is finished, stale, failed or missing, and why (ARGS="--row snca": of these rows)
# make tune                 the search behind a profile's hyper-parameters, the same budget for every objective
# make test                 the whole test suite, smoke profile included, in two processes (JOBS=8: in eight; ARGS="-n0 --pdb": in this one)
# make lab                  read the notebooks in JupyterLab
# make bench                losses, memory, compilation, retrieval against floors, limits and pytorch-metric-learning
# make bench-gpu            a training step rung by rung; losses, cross-entropy and exact search on the device against matrix products (on a CPU: the same, small)
# make setup LOCK=1         the environment in which the committed figures were made, package by package
# make clean                remove what can be built again; `make clean-runs` also removes finished runs

PYTHON  ?= python3
VENV    ?= .venv
PROFILE ?= quick
ARGS    ?=
JOBS    ?= 2
BIN     := $(VENV)/bin
READY   := $(VENV)/.ready

.PHONY: setup reproduce tune status test lab bench bench-gpu export clean clean-runs
.DEFAULT_GOAL := reproduce

setup: $(READY)

# The marker is written last, so an interrupted installation is taken up again.
$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(if $(LOCK),-c constraints.txt) -e ".[reproduce,pretrained,cluster,dev]"
	touch $(READY)

reproduce: $(READY)
	$(BIN)/dml-companion reproduce --profile $(PROFILE) $(ARGS)

tune: $(READY)
	$(BIN)/dml-companion tune --profile $(PROFILE) $(ARGS)

status: $(READY)
	$(BIN)/dml-companion status --profile $(PROFILE) $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

lab: $(READY)
	$(BIN)/jupyter lab nbs

bench: $(READY)
	$(BIN)/python -m benchmarks

bench-gpu: $(READY)
	$(BIN)/python -m benchmarks training device $(ARGS)

# After editing a notebook: tidy what Jupyter wrote, strip outputs, write the package.
export: $(READY)
	$(BIN)/nbdev_clean
	find nbs -name '*.ipynb' -not -path '*/.*' -exec $(BIN)/nbstripout --keep-id {} +
	$(BIN)/nbdev_export

clean:
	rm -rf $(VENV) build dist *.egg-info _proc .pytest_cache .hypothesis .snakemake
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

clean-runs: clean
	rm -rf runs
