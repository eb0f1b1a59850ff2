# On a fresh machine with Python 3.11–3.13 and make: `make demo` and `make test` set up .venv themselves.
PYTHON ?= python3
BIN := .venv/bin

# Of the local Ray head that `make head` starts and `make submit` uses.
PORT ?= 6379
DASHBOARD ?= 8265
CPUS ?= 4

.PHONY: setup demo test check slow head submit lock clean

setup: .venv/ready

# The stamp is newer than the lock, or everything is installed again; a second call costs nothing.
.venv/ready: requirements.lock pyproject.toml hatch_build.py data_loaders/native/rows.c
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 to 3.13 is needed; call make PYTHON=…" if not (3, 11) <= sys.version_info < (3, 14) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv: some minutes and 6 GB, once"
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: setup
	$(BIN)/python -m jobs.demo folder=build/demo

test: setup check
	$(BIN)/python -m pytest -q -m "not slow" -n 2 --no-loadscope-reorder

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

slow: setup
	$(BIN)/python -m pytest -q -m slow

# A Ray head on this machine, until Ctrl-C. It listens on the loopback only, and to those who hold the token. (Ray would
# turn 127.0.0.1 into the address of the network.)
head: setup
	@umask 077; RAY_AUTH_MODE=token $(BIN)/ray get-auth-token --generate > /dev/null
	PATH="$(CURDIR)/$(BIN):$$PATH" RAY_AUTH_MODE=token $(BIN)/ray start --head --block --disable-usage-stats \
	  --node-ip-address=127.0.1.1 --port=$(PORT) --dashboard-host=127.0.0.1 --dashboard-port=$(DASHBOARD) --num-cpus=$(CPUS)

# Runs a job there, in a copy of this folder without what .gitignore names: make submit JOB="jobs.train CONFIG folder=/whole/path"
submit: setup
	RAY_AUTH_MODE=token $(BIN)/ray job submit --address=http://127.0.0.1:$(DASHBOARD) --working-dir=. -- python -m $(JOB)

lock:
	uv pip compile pyproject.toml --group dev --universal --python-version 3.11 --generate-hashes --no-header \
	  --no-emit-index-url --no-emit-find-links --upgrade -o requirements.lock

clean:
	rm -rf build
