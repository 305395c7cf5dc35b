# Builds train_llama and test_llama. Needs GNU make >= 4 and a C++17 compiler; a CUDA toolkit is used when it is found.
# What the machine has is probed by compiling a few lines (scripts/probe.sh), once for a set of flags; the answers and
# all objects are in build/$(config)/. `make` alone prints the menu.
#
#   config=release|debug|sanitize|thread   optimised | -O0 | address and undefined | data races (clang, libomp)
#   CXX= CPPFLAGS= CXXFLAGS= LDFLAGS=      the compiler and flags of your own; they come last on the command line
#   NVCC=      (empty)                     CPU only, though a toolkit is there
#   OPENMP=    (empty)                     one thread, though the compiler has OpenMP
#   CUDA_ARCH=all | "80 90a"               GPU architectures; default: the visible GPU's own, else sm_80 and sm_90a
#   BUILD=DIR                              another place for objects
#   V=1                                    show the commands

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:
MAKEFLAGS += --no-builtin-rules
ifeq ($(MAKELEVEL),0)
MAKEFLAGS += -j$(shell nproc 2>/dev/null || echo 2)
endif

# V=1 shows the commands.
Q := $(if $(filter 1,$(V)),,@)
config ?= release
BUILD ?= build/$(config)
ifeq ($(origin CXX),default)
CXX := $(if $(filter thread,$(config)),clang++,g++)
endif
NVCC ?= $(firstword $(shell command -v nvcc 2>/dev/null) $(wildcard /usr/local/cuda/bin/nvcc))
OPENMP ?= 1

# ---- `make deps ...`: install first, then a second make sees what is there

ifneq (,$(filter deps,$(MAKECMDGOALS)))
after_deps := $(filter-out deps,$(MAKECMDGOALS))
.PHONY: deps $(after_deps)
deps:
	@scripts/deps.sh
$(firstword $(after_deps)): deps
	@$(MAKE) --no-print-directory $(after_deps)
$(wordlist 2,$(words $(after_deps)),$(after_deps)): $(firstword $(after_deps)) ;
else

# ---- flags

flags_release  := -O3
flags_debug    := -O0 -g -DTRAIN_LLAMA_DEBUG
flags_sanitize := -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
flags_thread   := -O1 -g -fno-omit-frame-pointer -fsanitize=thread
ifndef flags_$(config)
$(error config=$(config): use release, debug, sanitize or thread)
endif
x86 := $(filter x86_64-%,$(shell $(CXX) -dumpmachine 2>/dev/null))

programs := train_llama test_llama
goals := $(or $(MAKECMDGOALS),help)
ifneq (,$(filter-out help lines clean test-peers,$(goals)))
include $(BUILD)/probe.mk
# The probes answer for these very settings; any other and they are made again, and with them every object.
probe_settings := $(CXX)|$(CPPFLAGS)|$(CXXFLAGS)|$(LDFLAGS)|$(NVCC)|$(NVCCFLAGS)|$(OPENMP)|$(CUDA_ARCH)|$(config)
ifneq ($(probe_settings),$(PROBED))
$(BUILD)/probe.mk: FORCE
endif
endif

$(BUILD)/probe.mk: export CXX := $(CXX)
$(BUILD)/probe.mk: export CPPFLAGS := $(CPPFLAGS)
$(BUILD)/probe.mk: export CXXFLAGS := $(CXXFLAGS)
$(BUILD)/probe.mk: export LDFLAGS := $(LDFLAGS)
$(BUILD)/probe.mk: export NVCC := $(NVCC)
$(BUILD)/probe.mk: export NVCCFLAGS := $(NVCCFLAGS)
$(BUILD)/probe.mk: export OPENMP := $(OPENMP)
$(BUILD)/probe.mk: export CUDA_ARCH := $(CUDA_ARCH)
$(BUILD)/probe.mk: export config := $(config)
$(BUILD)/probe.mk: export CONFIG_FLAGS := $(flags_$(config))
$(BUILD)/probe.mk: scripts/probe.sh
	@scripts/probe.sh $@

# HAVE_OPENMP, BASE_ARCH, ARCH_CODE and GPU_CODE come from the probes. The floating-point flag holds for every file.
common := -std=c++17 $(flags_$(config)) -Wall -Wextra -ffp-contract=off $(BASE_ARCH) \
          $(if $(HAVE_OPENMP),-fopenmp,-Wno-unknown-pragmas)
cxx_flags := $(common) -I.
libraries := -lpcre2-8 -lcrypto
comma := ,
empty :=
space := $(empty) $(empty)
ifneq (,$(NVCC))
host_flags := $(subst $(space),$(comma),$(strip $(filter-out -std=c++17,$(common)) $(CXXFLAGS)))
# 2810: nvcc takes an assignment to an Error for a result that is thrown away; g++ and clang check it rightly. 1675: a
# pragma that is for the host compiler.
COMPILE_CU = $(NVCC) -ccbin $(firstword $(CXX)) -std=c++17 -O3 -lineinfo -Xptxas -warn-spills -diag-suppress 2810,1675 \
             $(GPU_CODE) -Xcompiler $(host_flags) -I. $(NVCCFLAGS) $(CPPFLAGS)
LINK = $(NVCC) -ccbin $(firstword $(CXX)) $(GPU_CODE) -Xcompiler $(host_flags)
link_flags = $(addprefix -Xlinker ,$(subst -Wl$(comma),,$(filter -Wl%,$(LDFLAGS)))) $(filter-out -Wl%,$(LDFLAGS))
else
COMPILE_CU = $(CXX) -x c++ $(cxx_flags) $(CPPFLAGS) $(CXXFLAGS)
LINK = $(CXX) $(common) $(CXXFLAGS)
link_flags = $(LDFLAGS)
endif

# ---- what is built of what

library_sources := $(wildcard llama_*.cpp io/*.cpp tokenizer/*.cpp kernels/*.cpp kernels/cpu/*.cpp)
test_sources    := $(wildcard dev/tests/*.cpp)
library := $(library_sources:%.cpp=$(BUILD)/%.o)
tests   := $(test_sources:%.cpp=$(BUILD)/%.o)
dev_programs := $(basename $(notdir $(wildcard dev/*.cpp dev/*.cu)))
tool_names   := nf4_dump tokenize logits_dump
tools   := $(addprefix $(BUILD)/,$(filter $(tool_names),$(dev_programs)))
benches := $(addprefix $(BUILD)/,$(filter-out $(tool_names),$(dev_programs)))

# Each instruction tier is one file with flags of its own; the rest runs on any processor of the kind.
ifneq (,$(x86))
$(BUILD)/kernels/cpu/isa_avx2.o: tier := -mavx2 -mfma -mf16c -mbmi2
$(BUILD)/kernels/cpu/isa_avx512.o: tier := -mavx512f -mavx512bw -mavx512dq -mavx512vl \
                                           -mavx2 -mfma -mf16c -mbmi2 -mprefer-vector-width=512
endif

cxx_sources := $(library_sources) $(test_sources) $(wildcard dev/*.cpp)
cuda_sources := $(wildcard *.cu dev/*.cu)
$(cxx_sources:%.cpp=$(BUILD)/%.o): $(BUILD)/%.o: %.cpp $(BUILD)/probe.mk
	@mkdir -p $(@D)
	@echo '  compile $<'
	$(Q)$(CXX) $(cxx_flags) $(tier) $(CPPFLAGS) $(CXXFLAGS) -MMD -MP -c $< -o $@
$(cuda_sources:%.cu=$(BUILD)/%.o): $(BUILD)/%.o: %.cu $(BUILD)/probe.mk
	@mkdir -p $(@D)
	@echo '  compile $<'
	$(Q)$(COMPILE_CU) -MMD -MP -c $< -o $@

$(BUILD)/test_llama: $(tests)
$(programs:%=$(BUILD)/%): $(BUILD)/%: $(BUILD)/%.o $(library)
	@echo '  link    $@'
	$(Q)$(LINK) $^ $(link_flags) $(libraries) -o $@
$(tools) $(benches): $(BUILD)/%: $(BUILD)/dev/%.o $(library)
	@echo '  link    $@'
	$(Q)$(LINK) $^ $(link_flags) $(libraries) -o $@

# The programs in the root are those of the configuration asked for last. Hard links, since a program finds
# dev/tiny_llama beside itself.
$(programs): %: $(BUILD)/% FORCE
	@[ $< -ef $@ ] || ln -f $< $@ 2>/dev/null || { cp -f $< $@.new && mv -f $@.new $@; }

-include $(wildcard $(BUILD)/*.d $(BUILD)/io/*.d $(BUILD)/tokenizer/*.d $(BUILD)/kernels/*.d $(BUILD)/kernels/cpu/*.d \
                    $(BUILD)/dev/*.d $(BUILD)/dev/tests/*.d)

# ---- goals that are no files

.PHONY: help all tools bench test test-peers lines clean FORCE
FORCE:

help:
	@echo 'make deps          install what is missing (apt, dnf)'
	@echo 'make train_llama   the trainer: ./train_llama -i data.jsonl -r 16'
	@echo 'make test          every test that needs no Python'
	@echo 'make test-peers    comparisons with PyTorch, PEFT, bitsandbytes, tokenizers (Python, a large download once)'
	@echo 'make tools bench   the programs of dev/: dumps for the comparisons; kernel harnesses'
	@echo 'make all           everything but the tests'"'"' run'
	@echo 'make lines         lines per file; no file over 1,000 lines, no function over 120, includes where they belong'
	@echo 'make clean         remove build/ and the programs'
	@echo
	@echo 'config=release|debug|sanitize|thread  NVCC= (no CUDA)  OPENMP= (one thread)  CUDA_ARCH=all|"80 90a"'

all: $(programs) tools bench
tools: $(tools)
bench: $(benches)

test: $(programs) tools
	@scripts/tally.sh ./test_llama

test-peers:
	+@MAKE='$(MAKE)' scripts/test_peers.sh

lines:
	@scripts/lines.sh

clean:
	rm -rf build $(programs)

endif
