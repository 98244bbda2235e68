PYTHON ?= python3
BIN := .venv/bin
VLLM_BIN := .venv-vllm/bin
CMAKE ?= cmake
WORKERS ?= 2
# Neighbours stay with one worker, which fits their codecs once.
BY_ALL = -n $(WORKERS) --dist worksteal
KERNEL_TESTS ?= $(addprefix tests/test_,ops.py encoding.py attend.py attend_layer.py pools.py refusals.py fuzz_kernels.py fuzz_pools.py)
GPU_TESTS ?= $(addprefix tests/test_,ops.py encoding.py attend.py attend_layer.py pools.py fuzz_pools.py triton.py triton_gpu.py triton_benches.py devices.py vllm_layer.py)
SANITIZERS = $(foreach name,libasan.so libubsan.so libstdc++.so.6,$(shell $(CXX) -print-file-name=$(name)))
THREAD_SANITIZER = $(foreach name,libtsan.so libstdc++.so.6,$(shell $(CXX) -print-file-name=$(name)))
CROSS_CXX ?= aarch64-linux-gnu-g++
# A memset without DC ZVA, in which QEMU 7 does not survive a page fault.
EMULATOR ?= qemu-aarch64 -E GLIBC_TUNABLES=glibc.cpu.name=emag -L /usr/aarch64-linux-gnu
EMULATED = QJL_EMULATED_LIBRARY="$(EMULATOR) -cpu $(1) build/neon/server build/neon/_cpu.so" PYTHONPATH=tests \
	OMP_NUM_THREADS=1 $(BIN)/pytest -p emulation.bridge -n $(WORKERS) -k $(2) $(KERNEL_TESTS)

needs = @command -v $(firstword $(1)) > /dev/null || test -e $(firstword $(1)) || \
	{ echo "make $@ needs $(firstword $(1)): $(2)." >&2; exit 1; }

.PHONY: setup setup-oldest setup-vllm vllm-sources native demo test rehearse test-oldest test-vllm models report gpu
.PHONY: sanitize sanitize-threads emulate clean

setup: .venv/installed

.venv/installed: requirements.lock pyproject.toml CMakeLists.txt $(wildcard csrc/* csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

# The oldest transformers that is supported, beside the packages of the lock.
OLDEST ?= 5.19.0
OLDEST_TESTS ?= $(addprefix tests/test_,compat.py promises.py hf.py architectures.py stored.py)

setup-oldest: build/oldest/$(OLDEST)

build/oldest/$(OLDEST): .venv/installed
	rm -rf build/oldest
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/oldest transformers==$(OLDEST)
	touch $@

# vLLM has an environment of its own: it pins other versions than ours.
setup-vllm: .venv-vllm/installed

.venv-vllm/installed: requirements-vllm.lock pyproject.toml CMakeLists.txt $(wildcard csrc/* csrc/*/*)
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv .venv-vllm
	$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements-vllm.lock
	$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

# Python sources of the releases of vLLM that the plugin knows, for tests/test_vllm_contract.py.
vllm-sources: setup
	$(BIN)/python scripts/vllm_sources.py

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
	OMP_NUM_THREADS=1 $(BIN)/pytest $(BY_ALL)
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/pytest $(BY_ALL) -k triton $(GPU_TESTS)
	$(BIN)/qjl eval smoke

# The parts of `make gpu` at toy size, on a GPU that is pretended: five minutes of the interpreter, too long for `test`.
rehearse: setup
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/pytest $(BY_ALL) -k triton tests/test_gpu_parts.py

# The integration with the oldest transformers.
test-oldest: export PYTHONPATH = $(CURDIR)/build/oldest
test-oldest: setup-oldest
	$(BIN)/python -c "import transformers as it; assert it.__version__ == '$(OLDEST)', it.__version__"
	OMP_NUM_THREADS=1 $(BIN)/pytest $(BY_ALL) $(OLDEST_TESTS)

# Engines with our pages and with vLLM's own, each in a process of its own.
test-vllm: setup-vllm
	OMP_NUM_THREADS=1 $(VLLM_BIN)/pytest -n $(WORKERS) --dist loadscope tests/test_vllm_serving.py

# Every family of models that transformers has, tiny and random; those that the file tells of are not asked again.
models: setup
	OMP_NUM_THREADS=1 $(BIN)/qjl eval models --workers $(WORKERS) --out results/models.jsonl

# All that the report tells of the embedded model, measured from nothing; what is there already is not measured again.
report: setup
	$(BIN)/python scripts/evidence.py
	$(BIN)/python scripts/fill.py
	$(BIN)/qjl report docs/results results --out results/report.html

# What needs a GPU: tests, then measurements, in parts of which a later run leaves out those that are done. No network.
GPU_OPTIONS ?=
gpu:
	$(BIN)/python scripts/gpu.py $(addprefix --tests ,$(GPU_TESTS)) $(GPU_OPTIONS)

# The kernels with AddressSanitizer and UndefinedBehaviorSanitizer, which must be loaded before Python.
sanitize: setup
	$(call needs,$(CMAKE),apt-get install cmake)
	$(call needs,$(CXX),apt-get install g++)
	$(call needs,$(SANITIZERS),it comes with GCC)
	$(CMAKE) -S . -B build/sanitize -DCMAKE_BUILD_TYPE=Release -DQJL_SANITIZE=address,undefined
	$(CMAKE) --build build/sanitize --parallel
	LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	QJL_CPU_LIBRARY=build/sanitize/_cpu.so OMP_NUM_THREADS=1 $(BIN)/pytest -k "not reference" \
	$(KERNEL_TESTS) tests/test_native_library.py

# The kernels with ThreadSanitizer, called from many threads at once; its memory must lie where it expects it.
sanitize-threads: setup
	$(call needs,$(CMAKE),apt-get install cmake)
	$(call needs,$(CXX),apt-get install g++)
	$(call needs,$(THREAD_SANITIZER),it comes with GCC)
	$(call needs,setarch,apt-get install util-linux)
	$(CMAKE) -S . -B build/sanitize-threads -DCMAKE_BUILD_TYPE=Release -DQJL_SANITIZE=thread
	$(CMAKE) --build build/sanitize-threads --parallel
	LD_PRELOAD="$(THREAD_SANITIZER)" TSAN_OPTIONS=suppressions=tests/thread_sanitizer.supp \
	QJL_CPU_LIBRARY=build/sanitize-threads/_cpu.so OMP_NUM_THREADS=1 \
	setarch -R $(BIN)/pytest -k "not reference and not forked" tests/test_threads.py

# The kernels for NEON, run by an emulator under the same tests (tests/emulation): on a processor with no more than
# NEON, then on one with dot products.
emulate: setup
	$(call needs,$(CMAKE),apt-get install cmake)
	$(call needs,$(CROSS_CXX),apt-get install g++-aarch64-linux-gnu)
	$(call needs,$(EMULATOR),apt-get install qemu-user)
	$(CMAKE) -S . -B build/neon -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_COMPILER=$(CROSS_CXX) \
		-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64
	$(CMAKE) --build build/neon --parallel
	$(CROSS_CXX) -std=c++20 -O2 -Wall -Wextra tests/emulation/server.cpp -o build/neon/server
	$(call EMULATED,cortex-a53,neon)
	$(call EMULATED,neoverse-n1,neondot)

clean:
	rm -rf .venv .venv-vllm .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist src/qjl/_cpu.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
