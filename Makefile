# Two commands: `make run` and `make test`. Everything they install stays in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Extra arguments for installing torch, such as an index of CPU builds: make run TORCH_ARGS="..."
TORCH_ARGS ?=
ARGS ?=

LOCKS := qgrid/envs/main.txt
DEV_LOCK := qgrid/envs/dev.txt
SYSTEM := chromium:chromium slurmctld:slurmctld,slurm-client,munge,slurm-wlm-basic-plugins slurmd:slurmd
RECIPES := $(wildcard qgrid/envs/*.toml)
export TORCH_ARGS
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Its Python may be gone or another one since, or `venv` was interrupted: all of it is made anew then.
ifeq ($(shell $(BIN)/python -c 'import pip' 2>/dev/null && echo whole),)
$(shell rm -f $(BIN)/python $(VENV)/main.stamp $(VENV)/dev.stamp)
endif

.PHONY: run test test-gpu test-system environments lint bench model clean help

help:  ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/'

run: $(VENV)/main.stamp  ## install if needed, run the default grid, print where the result is
	@$(BIN)/python -m qgrid +sweeps=demo $(ARGS)

test: $(VENV)/dev.stamp lint environments  ## all checks and tests
	@for each in $(SYSTEM); do PATH="$$PATH:/usr/sbin" command -v $${each%%:*} >/dev/null || \
		echo "note: $${each%%:*} is missing, so its tests skip; run 'make test-system'"; done
	$(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart=0 $(ARGS)

test-gpu: $(VENV)/dev.stamp  ## the CUDA paths, on a machine with a GPU
	$(BIN)/python -m pytest -m gpu $(ARGS)

# Some runtimes cannot share the main environment; each is built once for its lock, outside the checkout.
environments: $(VENV)/main.stamp  ## the environments of these runtimes (`python -m qgrid setup`)
	@for each in $(RECIPES); do $(BIN)/python -m qgrid setup $$(basename $$each .toml) || exit 1; done

lint: $(VENV)/dev.stamp  ## ruff and mypy, strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/dev.stamp  ## benchmarks; they print and assert nothing
	@for each in tests/benchmarks/bench_*.py; do echo "== $$each"; $(BIN)/python $$each || exit 1; done

model: $(VENV)/main.stamp  ## train the embedded model again, with its tokenizer and slices (hours)
	$(BIN)/python -m qgrid.demo.train

# Programs that tests use, each with the Debian packages that bring it. The cluster of the tests is
# brought up by them and needs no rights; what the packages start by themselves is in its way nowhere.
test-system:  ## Debian packages that the tests use: a browser, Slurm
	@wanted=; for each in $(SYSTEM); do PATH="$$PATH:/usr/sbin" command -v $${each%%:*} >/dev/null || \
		wanted="$$wanted $$(echo $${each#*:} | tr , ' ')"; done; \
	[ -z "$$wanted" ] || { apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $$wanted >/dev/null; }

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "qgrid needs Python 3.11 or later; $(PYTHON) is older. Try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	@$(PYTHON) -m venv --clear $(VENV) || \
		{ rm -rf $(VENV); echo "$(PYTHON) cannot make a virtual environment. On Debian: apt-get install python3-venv"; exit 2; }

# Other CMAKE_ARGS than last time install another wheel; without any, that of last time stays.
ifneq ($(CMAKE_ARGS),)
.PHONY: always
$(VENV)/cmake.txt: always | $(VENV)/bin/python
	@echo '$(CMAKE_ARGS)' | cmp -s - $@ || echo '$(CMAKE_ARGS)' > $@
$(VENV)/main.stamp: $(VENV)/cmake.txt
endif

# torch goes first: a later requirement must find it and not choose another build. Packages that come
# as sources are built meanwhile, once for a machine (qgrid/envs/wheels.py); without a compiler what
# needs them is `unsupported`, and the rest works. `compat`: a folder called `qgrid` in the working
# directory, such as a clone seen from above, does not hide the package.
$(VENV)/main.stamp: $(LOCKS) pyproject.toml qgrid/envs/wheels.py | $(VENV)/bin/python
	@echo "installing into $(VENV): some minutes ..."
	@CMAKE_ARGS="$$(cat $(VENV)/cmake.txt 2>/dev/null)" \
		$(BIN)/python -m qgrid.envs.wheels > $(VENV)/wheels.txt & \
	$(BIN)/python -m qgrid.envs.wheels --rest > $(VENV)/requirements.txt; \
	$(BIN)/python -m pip install -q $(TORCH_ARGS) $$(grep '^torch==' $(LOCKS)) && \
	$(BIN)/python -m pip install -q -r $(VENV)/requirements.txt && \
	$(BIN)/python -m pip install -q --no-deps --config-settings editable_mode=compat -e . ; \
	status=$$?; wait; exit $$status
	@while read -r folder; do $(BIN)/python -m pip install -q --no-deps --force-reinstall "$$folder"/*.whl || exit 1; done < $(VENV)/wheels.txt
	@touch $@

$(VENV)/dev.stamp: $(VENV)/main.stamp $(DEV_LOCK)
	$(BIN)/python -m pip install -q -r $(DEV_LOCK)
	@touch $@

clean:  ## remove the environment, keep outputs
	rm -rf $(VENV) build dist *.egg-info
