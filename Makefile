PYTHON ?= python3
BIN := .venv/bin
CMAKE ?= cmake
WORKERS ?= 2
SANITIZED_TESTS ?= tests/test_ops.py tests/test_fuzz_kernels.py tests/test_native_library.py

.PHONY: setup native demo test sanitize clean

setup: .venv/installed

.venv/installed: requirements.lock pyproject.toml CMakeLists.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

# The kernels alone, into the working tree: after a change in csrc/ that `make setup` has not seen.
native:
	$(CMAKE) -S . -B build/native -DCMAKE_BUILD_TYPE=Release
	$(CMAKE) --build build/native --parallel
	$(CMAKE) --install build/native --prefix src

demo: setup
	$(BIN)/qjl demo

test: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS)

# The kernels with AddressSanitizer and UndefinedBehaviorSanitizer, which must be loaded before Python.
sanitize: setup
	$(CMAKE) -S . -B build/sanitize -DCMAKE_BUILD_TYPE=Release -DQJL_SANITIZE=address,undefined
	$(CMAKE) --build build/sanitize --parallel
	LD_PRELOAD="$(foreach name,libasan.so libubsan.so libstdc++.so.6,$(shell $(CXX) -print-file-name=$(name)))" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	QJL_CPU_LIBRARY=build/sanitize/_cpu.so OMP_NUM_THREADS=1 $(BIN)/pytest $(SANITIZED_TESTS)

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist src/qjl/_cpu.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
