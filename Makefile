# What a person types. Everything is installed into .venv; nothing else is touched.
PYTHON ?= python3
TEST_PROCESSES ?= 2
# Where the browser can be installed its tests must run; REQUIRE_BROWSER=0 lets them be skipped all the same.
REQUIRE_BROWSER ?= $(shell test "$$(id -u)" = 0 && command -v apt-get >/dev/null && echo 1)
export REQUIRE_BROWSER
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help install quickstart study-risk test bench bench-ppo lint format browser clean

help:
	@echo "make quickstart   ratings -> reward model -> PPO (mean and cvar:0.1) -> report; about 20 minutes on 2 cores"
	@echo "make study-risk   measures of risk at equal KL, three seeds each, after make quickstart; some 2 to 3 hours, resumable"
	@echo "make test         lint and all tests"
	@echo "make bench        the benchmarks behind docs/results.md; trains for hours on 2 cores, resumable"
	@echo "make bench-ppo    a PPO step against TRL 1.12.0, on 2 cores that do nothing else"
	@echo "make lint         ruff"
	@echo "make clean        delete runs/quickstart (results of the quickstart)"

install: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --progress-bar on -c constraints.txt torch
	$(BIN)/pip install --quiet --progress-bar on -c constraints.txt -e '.[quickstart,test]'
	touch $@

quickstart: install
	$(BIN)/python recipes/quickstart.py

study-risk: install
	$(BIN)/python recipes/study_risk.py --document docs/results.md

bench: install
	$(BIN)/python recipes/prepare_data.py
	$(BIN)/pip install --quiet --progress-bar on -c constraints.txt -e '.[quickstart,bench]'
	$(BIN)/python benchmarks/quantile_regression_speed.py
	$(BIN)/python benchmarks/qrm_calibration.py

bench-ppo: install
	$(BIN)/python recipes/prepare_data.py
	$(BIN)/python benchmarks/ppo_step.py

lint: install
	$(BIN)/ruff check --config .ci/ruff.toml .
	$(BIN)/ruff format --config .ci/ruff.toml --check .

format: install
	$(BIN)/ruff format --config .ci/ruff.toml .
	$(BIN)/ruff check --config .ci/ruff.toml --fix .

test: lint browser
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile

# The reports are looked at in a real browser; without one, and without the right to install it, these tests are skipped.
browser:
	@command -v chromium >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null; } || \
		echo "chromium is not installed, which the browser tests need (apt-get install chromium)"

clean:
	rm -rf runs/quickstart
