# tcpobs: `make help` lists what can be made.

PYTHON3 ?= python3
OLD_KERNEL := 5.10
VENV := .venv
PYTHON := $(VENV)/bin/python
MACHINE := $(shell uname -m)
MACHINES := x86_64 aarch64
# The wheels' targets, as zig names them; the first of this machine's is the one to run here.
TARGETS := x86_64-linux-gnu.2.17 x86_64-linux-musl aarch64-linux-gnu.2.17 aarch64-linux-musl
HERE := $(firstword $(filter $(MACHINE)-linux-gnu%,$(TARGETS)))
PACKAGE := python/tcpobs
OBJECTS := $(PACKAGE)/_objects

.PHONY: help build wheel demo check test test-all test-release test-vm check-kernels vm bench vmlinux clean
.DELETE_ON_ERROR:
.SECONDARY:
# apt and pip take one at a time; what can be parallel is, in packaging/libbpf/Makefile.
.NOTPARALLEL:

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' $(MAKEFILE_LIST) | while IFS='	' read -r name does; do \
		printf '  make %-13s %s\n' "$$name" "$$does"; done

# ---- what the machine needs

build/debian-%.stamp: packaging/debian-%.txt
	@packaging/install-debian $<
	@mkdir -p $(@D) && touch $@

# pip before 25.1 knows no dependency groups, so it comes first.
$(VENV)/build.stamp: pyproject.toml build/debian-build.stamp
	@test -x $(PYTHON) || $(PYTHON3) -m venv $(VENV)
	@$(PYTHON) -m pip install --quiet --upgrade 'pip>=25.1'
	@$(PYTHON) -m pip install --quiet --group build
	@touch $@

$(VENV)/dev.stamp: $(VENV)/build.stamp build/debian-test.stamp
	@$(PYTHON) -m pip install --quiet --group dev
	@touch $@

# ---- libbpf

build/source.stamp: packaging/libbpf/sources packaging/libbpf/fetch build/debian-build.stamp
	@echo "fetching the sources of libbpf"
	@packaging/libbpf/fetch build/source
	@mkdir -p build/include && ln -sfn ../source/libbpf/src build/include/bpf
	@touch $@

build/libbpf/%/libbpf.so.1: build/source.stamp $(VENV)/build.stamp packaging/libbpf/Makefile packaging/libbpf/config.h
	@echo "building libbpf for $*"
	@rm -rf build/libbpf/$*
	@$(MAKE) --no-print-directory -j$(shell nproc) -f packaging/libbpf/Makefile TARGET=$* VENV=$(VENV)
	@touch $@

$(PACKAGE)/_lib/libbpf.so.1: build/libbpf/$(HERE)/libbpf.so.1
	@mkdir -p $(@D) && cp $< $@

# ---- the BPF objects: compiled once for each architecture, with BTF and without DWARF

CLANG := $(PYTHON) -m ziglang clang
BPF_CFLAGS := -target bpf -mcpu=v3 -O2 -g -Wall -Wextra -Werror -Wno-unused-parameter \
	-fdebug-compilation-dir=. -Ibuild/include
ARCH_x86_64 := x86
ARCH_aarch64 := arm64
PROGRAMS := $(patsubst bpf/%.bpf.c,%,$(wildcard bpf/*.bpf.c))

define objects_of
$(OBJECTS)/$(1)/%.bpf.o: bpf/%.bpf.c $$(wildcard bpf/*.h) vmlinux/$(1)/vmlinux.h Makefile build/source.stamp \
		$(PACKAGE)/_lib/libbpf.so.1
	@echo "compiling $$* for $(1)"
	@mkdir -p build/objects/$(1) $$(@D)
	@$$(CLANG) $$(BPF_CFLAGS) -D__TARGET_ARCH_$(ARCH_$(1)) -Ivmlinux/$(1) -c $$< -o build/objects/$(1)/$$*.bpf.o
	@PYTHONPATH=python $$(PYTHON) -m tcpobs.libbpf.strip build/objects/$(1)/$$*.bpf.o $$@
endef
$(foreach machine,$(MACHINES),$(eval $(call objects_of,$(machine))))

ALL_OBJECTS := $(foreach machine,$(MACHINES),$(PROGRAMS:%=$(OBJECTS)/$(machine)/%.bpf.o))

# The source goes along: for --ebpf, and for those who read before they run.
SOURCES := $(wildcard bpf/*.[ch]) bpf/LICENSE
$(OBJECTS)/source: $(SOURCES)
	@rm -rf $@ && mkdir -p $@ && cp $(SOURCES) $@

# And libbpf's headers, for the programs that argdist makes; of their 190 KB of comments whose they are.
HEADERS := bpf_core_read.h bpf_endian.h bpf_helper_defs.h bpf_helpers.h bpf_tracing.h usdt.bpf.h
$(OBJECTS)/include: build/source.stamp packaging/include/linux/errno.h Makefile
	@rm -rf $@ && mkdir -p $@/bpf $@/linux
	@cp build/source/libbpf/LICENSE build/source/libbpf/LICENSE.BSD-2-Clause $@/bpf
	@for header in $(HEADERS); do perl -0pe 's{(/\*.*?\*/)}{my $$c = $$1; $$c =~ /SPDX|Copyright/ ? $$c : ""}ges' \
		build/include/bpf/$$header | cat -s >$@/bpf/$$header; done
	@cp packaging/include/linux/errno.h $@/linux
	@touch $@

# ---- tcpobs itself

build: $(VENV)/bin/tcpobs ## .venv/bin/tcpobs, ready to run

$(VENV)/bin/tcpobs: $(PACKAGE)/_lib/libbpf.so.1 $(ALL_OBJECTS) $(OBJECTS)/source $(OBJECTS)/include pyproject.toml \
		$(VENV)/build.stamp
	@$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

# The version is in the wheel's name, so a stamp stands for it.
build/wheel-%.stamp: build/libbpf/%/libbpf.so.1 $(ALL_OBJECTS) $(OBJECTS)/source $(OBJECTS)/include \
		$(shell find python -name '*.py') packaging/wheel.py packaging/libbpf/NOTICE pyproject.toml README.md
	@rm -f dist/*$(if $(findstring musl,$*),musl,many)linux*$(firstword $(subst -, ,$*)).whl
	@TCPOBS_TARGET=$* $(PYTHON) -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	@touch $@

wheel: $(TARGETS:%=build/wheel-%.stamp) build/dependencies.stamp ## the four wheels, into dist/
	@test $$(ls dist/*.whl | wc -l) = $(words $(TARGETS)) || { rm -f build/wheel-*.stamp; \
		echo "dist/ was changed: run it again" >&2; exit 1; }
	@ls -l dist/*.whl | awk '{ print $$5, $$9 }'

# What they depend on, for any Python that they are for.
build/dependencies.stamp: pyproject.toml $(VENV)/build.stamp
	@rm -rf build/dependencies
	@$(PYTHON) -m pip download --quiet --no-deps --python-version 3.9 --only-binary=:all: --dest build/dependencies \
		--group dependencies
	@touch $@

# The wheel in an environment of its own, as a user has it.
build/installed.stamp: build/wheel-$(HERE).stamp build/dependencies.stamp
	@rm -rf build/installed && $(PYTHON3) -m venv build/installed
	@build/installed/bin/pip install --quiet --no-index --find-links build/dependencies \
		dist/tcpobs-*manylinux*_$(MACHINE).whl
	@touch $@

demo: build/installed.stamp ## build and install the wheel, then watch real sessions with it
	@packaging/demo build/installed/bin

check: $(VENV)/dev.stamp $(VENV)/bin/tcpobs ## ruff, mypy, clang-format
	@$(VENV)/bin/ruff check --quiet .
	@$(VENV)/bin/ruff format --quiet --check .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/clang-format --dry-run --Werror bpf/*.[ch] bench/*.c tests/*/*.c tests/live/argdist/*.c

PYTEST := $(VENV)/bin/pytest --quiet
# On all CPUs; but for the tests that trace TCP: each would see what the others do.
PARALLEL := $(PYTEST) --numprocesses=auto --dist=loadscope

test: $(VENV)/dev.stamp build/installed.stamp check build/debian-vm.stamp ## checks and tests all of tcpobs: here, and on one old kernel in a VM
	@$(PARALLEL) tests/unit tests/wheel -m 'not release'
	@$(PYTEST) --numprocesses=4 tests/live -m native
	@$(PYTEST) tests/live -m 'not native and not many'
	@PYTHONPATH=tests $(PYTHON) -m vm.matrix $(OLD_KERNEL)

test-all: wheel test-release test-vm ## what `make test` leaves out: the four wheels, a container, all kernels, BCC

test-release: $(VENV)/dev.stamp $(VENV)/bin/tcpobs wheel build/debian-podman.stamp
	@$(PARALLEL) tests/wheel -m release
	@$(PYTEST) tests/podman

test-vm: $(VENV)/dev.stamp $(VENV)/bin/tcpobs wheel build/debian-vm.stamp ## the live tests on other kernels, in VMs [KERNEL=6.1]
	@PYTHONPATH=tests $(PYTHON) -m vm.matrix $(KERNEL)

check-kernels: $(VENV)/build.stamp ## whether docs/kernels.md is about this code
	@PYTHONPATH=tests $(PYTHON) -m vm.tested

vm: $(VENV)/dev.stamp $(VENV)/bin/tcpobs build/debian-vm.stamp ## a command on another kernel: KERNEL=6.1 CMD='...'
	@PYTHONPATH=tests $(PYTHON) -m vm.machine "$(KERNEL)" '$(subst ','\'',$(CMD))'

bench: $(VENV)/dev.stamp $(VENV)/bin/tcpobs build/installed.stamp build/debian-vm.stamp ## against libbpf-tools and BCC, into bench/results.md
	@PYTHONPATH=tests $(PYTHON) bench/bench.py

# ---- kernel types

vmlinux: build/source.stamp $(VENV)/build.stamp ## vmlinux/*/vmlinux.h anew, from Debian's kernel
	@vmlinux/make $(PYTHON)

clean: ## remove what was built
	@rm -rf build dist $(PACKAGE)/_lib $(OBJECTS) $(VENV)
