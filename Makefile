# make demo    train a small vision-language model and watch it describe images (needs Python >= 3.11 and make)
# make in-context
#              the same world, with words that mean what the images of the prompt say: accuracy over demonstrations
# make test    the whole test suite
# make test-gpu
#              what only a GPU can show, where there is one
# make test-latest, make test-oldest
#              what depends most on other libraries, on today's newest versions and on the oldest supported ones
# make faults  inject every fault of docs/reliability.md, and print its table with passed or failed; what the test suite tries
#              in a short form (broken data, memory, compiling, sharding) or not at all (benchmarks) at length
# make bench   beside the reference, what a CPU can show; the results replace those of docs/performance.md
# make lint    formatting, rules, types
PYTHON ?= python3
BIN := .venv/bin
# Tests are many small processes: one thread each. Two pytest workers, as the machines that run them have two cores.
# -rs: tests of launchers that are not installed are named; tests/launch/install.sh installs them.
TEST_FLAGS ?= -n 2 --dist loadgroup -rs
# Model, generation, goldens, step, sharding, resume.
VERSION_TESTS := $(wildcard tests/test_model*.py tests/test_lang*.py tests/test_step.py tests/test_optimizer.py \
	tests/test_precision.py tests/test_sharding.py tests/test_distributed.py tests/test_train.py tests/test_dependencies.py)
INSTALL := -m pip install --disable-pip-version-check

.PHONY: demo in-context test test-gpu test-latest test-oldest faults bench lint format clean

demo: .venv/training
	$(BIN)/python -m open_flamingo.scripts.demo

in-context: .venv/training
	$(BIN)/python -m open_flamingo.scripts.in_context

test: .venv/test
	$(BIN)/python -m pytest $(TEST_FLAGS)

test-gpu: .venv/test
	$(BIN)/python -m pytest -rs tests/gpu

test-latest: .venv-latest/bin/python
	$< $(INSTALL) --upgrade --upgrade-strategy eager -e '.[test]'
	$< -m pytest $(TEST_FLAGS) $(VERSION_TESTS)

test-oldest: .venv-oldest/bin/python
	$< $(INSTALL) -c constraints-oldest.txt -e '.[test]'
	$< -m pytest $(TEST_FLAGS) $(VERSION_TESTS)

faults: .venv/test
	OPEN_FLAMINGO_TEST_LENGTH=long $(BIN)/python tests/reliability.py
	OPEN_FLAMINGO_TEST_LENGTH=long $(BIN)/python -m pytest $(TEST_FLAGS) tests/test_launch.py tests/test_precision.py tests/test_sharding.py \
		tests/test_benchmarks.py tests/test_scaling.py tests/test_caption.py tests/test_evaluate.py tests/test_in_context.py

bench: .venv/benchmark
	$(BIN)/python -m benchmarks small
	$(BIN)/python -m benchmarks small --precision amp_bf16
	$(BIN)/python -m benchmarks mid
	$(BIN)/python -m benchmarks mid --precision amp_bf16
	$(BIN)/python -m benchmarks data
	$(BIN)/python -m benchmarks start
	$(BIN)/python -m benchmarks checkpoint

# The types are checked as users see them: `train/` as `open_flamingo.train`.
lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/types/open_flamingo
	ln -sfn $(CURDIR)/open_flamingo/*.py $(CURDIR)/train build/types/open_flamingo/
	cd build/types && MYPYPATH=. $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p open_flamingo

format: .venv/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-latest .venv-oldest build demo-output *.egg-info

%/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $*

.venv/training .venv/test .venv/benchmark: .venv/bin/python setup.py pyproject.toml requirements.txt requirements-training.txt constraints.txt
	$< $(INSTALL) -c constraints.txt -e '.[$(notdir $@)]'
	touch $@
