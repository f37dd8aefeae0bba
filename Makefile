# make demo   a local cluster with three ranks answers a question about a long text
# make test   style, types, layers, protos with their stubs, and all tests
#
# Both create .venv first (minutes once, nothing after) and need Python >= 3.11; a GPU is optional.
# Another Python or torch: make demo PYTHON=python3.12 TORCH="torch==2.12.1 --index-url https://..."

PYTHON ?= python3
TORCH ?=
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help demo test
help:
	@sed -n 's/^# \{0,1\}//p' Makefile

demo: $(READY)
	$(BIN)/python -m kvcluster.demo

test: $(READY)
	tests/all.sh

$(READY): pyproject.toml deploy/models.txt deploy/environment.sh
	PYTHON="$(PYTHON)" TORCH="$(TORCH)" deploy/environment.sh
	@touch $@
