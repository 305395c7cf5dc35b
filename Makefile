# Builds train_llama and test_llama. Needs GNU make >= 4 and a C++17 compiler; a CUDA toolkit is used when it is found.
# What the machine has is probed by compiling a few lines (scripts/probe.sh), once for a set of flags; the answers and
# all objects are in build/$(config)/. `make` alone prints the menu.
#
#   config=release|debug|sanitize|thread   optimised | -O0 | address and undefined | data races (clang, libomp)
#   CXX= CPPFLAGS= CXXFLAGS= LDFLAGS=      the compiler and flags of your own; they come last on the command line
#   NVCC=      (empty)                     no GPU objects, though a toolkit is there
#   OPENMP=    (empty)                     one thread, though the compiler has OpenMP
#   MPICXX=mpicxx.mpich | (empty)          the MPI whose compiler wrapper this is | no MPI, one process
#   NCCL=      (empty)                     no NCCL: GPUs train alone
#   CUDA_ARCH=all | "80 90a"               GPU architectures; default: the visible GPU's own, else sm_80 and sm_90a
#   BUILD=DIR                              another place for objects
#   V=1                                    show the commands
#
# Three flavours of the same sources. The GPU's kernels (kernels/gpu*.cu) are left out, or compiled by nvcc, or compiled
# by $(CXX) for the stand-in of dev/simt, which runs them on the CPU. The last is made beside each of the others, in
# $(BUILD)/simt. The macro HAVE_GPU (0, 1; 2 for the stand-in) tells train_llama.cu and test_llama.cu which it is.

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
# The thread sanitizer knows nothing of what MPI orders.
ifeq ($(config),thread)
MPICXX :=
else
MPICXX ?= $(or $(firstword $(shell command -v mpicxx 2>/dev/null) \
               $(wildcard /usr/lib64/openmpi/bin/mpicxx /usr/lib64/mpich/bin/mpicxx)),mpicxx)
endif
NCCL ?= 1

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
# (An MPI or NCCL that is installed later is another setting.)
mpi_wrapper := $(if $(MPICXX),$(shell command -v $(MPICXX) 2>/dev/null))
nccl_header := $(wildcard /usr/include/nccl.h $(patsubst %/bin/nvcc,%/include/nccl.h,$(NVCC)))
probe_settings := $(CXX)|$(CPPFLAGS)|$(CXXFLAGS)|$(LDFLAGS)|$(NVCC)|$(NVCCFLAGS)|$(OPENMP)|$(CUDA_ARCH)|$(config)
probe_settings := $(probe_settings)|$(MPICXX) $(mpi_wrapper)|$(NCCL) $(nccl_header)
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
$(BUILD)/probe.mk: export MPICXX := $(MPICXX)
$(BUILD)/probe.mk: export NCCL := $(NCCL)
$(BUILD)/probe.mk: export config := $(config)
$(BUILD)/probe.mk: export SETTINGS := $(probe_settings)
$(BUILD)/probe.mk: export CONFIG_FLAGS := $(flags_$(config))
$(BUILD)/probe.mk: scripts/probe.sh
	@scripts/probe.sh $@

# HAVE_OPENMP, BASE_ARCH, HAVE_MPI, MPI_CFLAGS, MPI_LIBRARIES, MPIRUN, HAVE_CUDA, GPU_CODE, HAVE_NCCL and CUDA_LIBRARIES
# come from the probes. The floating-point flag holds for every file.
common := -std=c++17 $(flags_$(config)) -Wall -Wextra -ffp-contract=off $(BASE_ARCH) \
          $(if $(HAVE_OPENMP),-fopenmp,-Wno-unknown-pragmas)
cxx_flags := $(common) -I.
libraries := -lpcre2-8 -lcrypto -ldl
comma := ,
empty :=
space := $(empty) $(empty)
host_flags := $(subst $(space),$(comma),$(strip $(filter-out -std=c++17,$(common)) $(CXXFLAGS)))
COMPILE = $(CXX) $(cxx_flags) $(tier) $(defines) $(CPPFLAGS) $(CXXFLAGS)
# Kernels on the stand-in are slow enough without -O0 or -O1. `unroll` is for nvcc: g++ does not know it, and clang says
# where it does not follow it.
COMPILE_SIMT = $(CXX) -x c++ $(cxx_flags) -O2 -Wno-unknown-pragmas $(if $(findstring clang,$(CXX)),-Wno-pass-failed) \
               $(defines) $(CPPFLAGS) $(CXXFLAGS)
# 2810: nvcc takes an assignment to an Error for a result that is thrown away; g++ and clang check it rightly. 1675: a
# pragma that is for the host compiler.
COMPILE_CUDA = $(NVCC) -ccbin $(firstword $(CXX)) -std=c++17 -O3 -lineinfo -Xptxas -v,-warn-spills \
               -diag-suppress 2810,1675 $(GPU_CODE) -Xcompiler $(host_flags) -I. $(NVCCFLAGS) $(CPPFLAGS)
LINK = $(CXX) $(common) $(CXXFLAGS)

# ---- what is built of what

# Ranks: one file of each pair. Programs that are never one of many ranks take comm_none.
comm_sources    := kernels/comm_mpi.cpp kernels/comm_none.cpp kernels/gpu_comm_none.cpp
x86_sources     := $(addprefix kernels/cpu/,isa_avx2.cpp isa_avx512.cpp isa_avx512vnni.cpp isa_amx.cpp amx_permitted.cpp)
library_sources := $(filter-out $(comm_sources) $(if $(x86),,$(x86_sources)),\
                                $(wildcard llama_*.cpp io/*.cpp tokenizer/*.cpp kernels/*.cpp kernels/cpu/*.cpp))
gpu_sources     := $(wildcard kernels/gpu*.cu)
simt_sources    := $(wildcard dev/simt/*.cpp)
test_sources    := $(wildcard dev/tests/*.cpp)
object = $(addprefix $(BUILD)/,$(addsuffix .o,$(basename $(1))))
library    := $(call object,$(library_sources))
gpu_real   := $(if $(HAVE_NCCL),$(gpu_sources),$(filter-out %/gpu_comm.cu,$(gpu_sources)) kernels/gpu_comm_none.cpp)
gpu        := $(if $(HAVE_CUDA),$(call object,$(gpu_real)))
comm       := $(call object,kernels/comm_$(if $(HAVE_MPI),mpi,none).cpp)
alone      := $(call object,kernels/comm_none.cpp)
simt       := $(call object,$(addprefix simt/,$(gpu_sources) $(simt_sources)))
# The tiles of AMX have a stand-in as well, for the same programs.
amx_sources := $(if $(x86),$(addprefix kernels/cpu/,isa_amx.cpp isa_choose.cpp amx_permitted.cpp))
amx         := $(call object,$(addprefix simt/,$(amx_sources)))
simt_tests := $(call object,$(filter dev/tests/simt%,$(test_sources)))
gpu_tests  := $(call object,$(filter dev/tests/gpu_%,$(test_sources)))
tests      := $(filter-out $(gpu_tests) $(simt_tests),$(call object,$(test_sources)))
simt_programs := $(programs:%=$(BUILD)/simt/%)

# dev/: tools and benches of the CPU are plain programs; every other .cu is a file of the harness.
tool_names := nf4_dump tokenize logits_dump
harness    := $(call object,$(wildcard dev/harness*.c*) dev/tests/test.cpp)
ops        := $(filter-out $(tool_names) harness%,$(basename $(notdir $(wildcard dev/*.cu))))
cpu_benches := $(filter-out $(tool_names) harness%,$(basename $(notdir $(wildcard dev/*.cpp))))
tools   := $(addprefix $(BUILD)/,$(tool_names))
benches := $(addprefix $(BUILD)/,$(cpu_benches) $(ops))

# Each instruction tier is one file with flags of its own; the rest runs on any processor of the kind.
ifneq (,$(x86))
$(BUILD)/kernels/cpu/isa_avx2.o: tier := -mavx2 -mfma -mf16c -mbmi2
avx512 := -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mbmi2 -mprefer-vector-width=512
$(BUILD)/kernels/cpu/isa_avx512.o: tier := $(avx512)
$(BUILD)/kernels/cpu/isa_avx512vnni.o: tier := $(avx512) -mavx512vnni
$(BUILD)/kernels/cpu/isa_amx.o $(BUILD)/simt/kernels/cpu/isa_amx.o: tier := $(avx512) -mavx512vnni -mavx512vbmi \
                                                                          -mavx512bf16 -mamx-tile -mamx-bf16
endif
$(amx): defines := -DAMX_STANDIN
$(programs:%=$(BUILD)/%.o): defines := -DHAVE_GPU=$(if $(HAVE_CUDA),1,0)
$(programs:%=$(BUILD)/simt/%.o): defines := -DHAVE_GPU=2

# Only these see MPI.
$(BUILD)/kernels/comm_mpi.o: defines := $(MPI_CFLAGS)
$(BUILD)/simt/dev/simt/nccl.o: defines := -DHAVE_MPI=$(if $(HAVE_MPI),1 $(MPI_CFLAGS),0)
$(BUILD)/dev/tests/comm.o: defines := -DMPIRUN='"$(MPIRUN)"'

harness_cu := $(call object,$(wildcard dev/harness*.cu) $(ops:%=dev/%))
cpp_objects := $(call object,$(wildcard dev/*.cpp) $(library_sources) $(comm_sources) $(test_sources))
$(filter-out $(simt_tests),$(cpp_objects)): $(BUILD)/%.o: %.cpp $(BUILD)/probe.mk
	@mkdir -p $(@D)
	@echo '  compile $<'
	$(Q)$(COMPILE) -MMD -MP -c $< -o $@
# train_llama.cu, test_llama.cu and dev/logits_dump.cu see declarations alone: any compiler takes them, and quickly.
$(call object,$(programs) dev/logits_dump): $(BUILD)/%.o: %.cu $(BUILD)/probe.mk
	@mkdir -p $(@D)
	@echo '  compile $<'
	$(Q)$(COMPILE) -MMD -MP -x c++ -c $< -o $@
$(simt_programs:%=%.o): $(BUILD)/simt/%.o: %.cu $(BUILD)/probe.mk
	@mkdir -p $(@D)
	@echo '  compile $< (stand-in)'
	$(Q)$(COMPILE) -MMD -MP -x c++ -c $< -o $@
$(call object,$(gpu_sources:%=simt/%)): $(BUILD)/simt/%.o: %.cu $(BUILD)/probe.mk
	@mkdir -p $(@D)
	@echo '  compile $< (stand-in)'
	$(Q)$(COMPILE_SIMT) -MMD -MP -c $< -o $@
$(call object,$(simt_sources:%=simt/%)): $(BUILD)/simt/%.o: %.cpp $(BUILD)/probe.mk
	@mkdir -p $(@D)
	@echo '  compile $<'
	$(Q)$(COMPILE_SIMT) -MMD -MP -c $< -o $@
$(amx): $(BUILD)/simt/%.o: %.cpp $(BUILD)/probe.mk
	@mkdir -p $(@D)
	@echo '  compile $< (stand-in)'
	$(Q)$(COMPILE) -MMD -MP -c $< -o $@
$(simt_tests): $(BUILD)/%.o: %.cpp $(BUILD)/probe.mk
	@mkdir -p $(@D)
	@echo '  compile $<'
	$(Q)$(COMPILE_SIMT) -MMD -MP -c $< -o $@
ifneq (,$(HAVE_CUDA))
# What ptxas says of each kernel is kept beside the object, for scripts/resources.py.
$(call object,$(filter %.cu,$(gpu_real))) $(harness_cu): $(BUILD)/%.o: %.cu $(BUILD)/probe.mk
	@mkdir -p $(@D)
	@echo '  compile $< (nvcc)'
	$(Q)$(COMPILE_CUDA) -MMD -MP -c $< -o $@ 2>$(@:.o=.ptxas); status=$$?; \
	grep -vE '^ptxas info|^ +[0-9]+ bytes stack frame' $(@:.o=.ptxas) >&2; exit $$status
else
$(harness_cu): $(BUILD)/%.o: %.cu $(BUILD)/probe.mk
	@mkdir -p $(@D)
	@echo '  compile $< (stand-in)'
	$(Q)$(COMPILE_SIMT) -MMD -MP -c $< -o $@
endif

link = $(LINK) $^ $(LDFLAGS) $(libraries)
$(BUILD)/test_llama: $(tests) $(if $(gpu),$(gpu_tests))
$(programs:%=$(BUILD)/%): $(BUILD)/%: $(BUILD)/%.o $(library) $(comm) $(gpu)
	@echo '  link    $@'
	$(Q)$(link) $(MPI_LIBRARIES) $(if $(gpu),$(CUDA_LIBRARIES)) -o $@
$(BUILD)/simt/test_llama: $(tests) $(gpu_tests) $(simt_tests)
$(simt_programs): %: %.o $(filter-out $(call object,$(amx_sources)),$(library)) $(amx) $(comm) $(simt)
	@echo '  link    $@'
	$(Q)$(link) $(MPI_LIBRARIES) -o $@
$(tools) $(cpu_benches:%=$(BUILD)/%): $(BUILD)/%: $(BUILD)/dev/%.o $(library) $(alone)
	@echo '  link    $@'
	$(Q)$(link) -o $@
$(ops:%=$(BUILD)/%): $(BUILD)/%: $(BUILD)/dev/%.o $(harness) $(library) $(alone) $(or $(gpu),$(simt))
	@echo '  link    $@'
	$(Q)$(link) $(if $(gpu),$(CUDA_LIBRARIES),$(MPI_LIBRARIES)) -o $@

# The programs in the root are those of the configuration asked for last. Hard links, since a program finds
# dev/tiny_llama beside itself.
$(programs): %: $(BUILD)/% FORCE
	@[ $< -ef $@ ] || ln -f $< $@ 2>/dev/null || { cp -f $< $@.new && mv -f $@.new $@; }

-include $(wildcard $(patsubst %,$(BUILD)/%*.d,/ io/ tokenizer/ kernels/ kernels/cpu/ dev/ dev/tests/ \
                    simt/ simt/kernels/ simt/kernels/cpu/ simt/dev/simt/))

# ---- goals that are no files

.PHONY: help all tools bench simt test test-peers resources lines clean FORCE
FORCE:

help:
	@echo 'make deps          install what is missing (apt, dnf)'
	@echo 'make train_llama   the trainer: ./train_llama -i data.jsonl -r 16'
	@echo 'make test          every test that needs no Python'
	@echo 'make test-peers    comparisons with PyTorch, PEFT, bitsandbytes, tokenizers (Python, a large download once)'
	@echo 'make tools bench   the programs of dev/: dumps for the comparisons; kernel harnesses (dev/README.md)'
	@echo 'make simt          both programs with the GPU kernels on the CPU, in build/release/simt/'
	@echo 'make all           everything but the tests'"'"' run'
	@echo 'make resources     CUDA_ARCH=all: registers, shared memory, spills of each kernel: dev/results/resources.md'
	@echo 'make lines         lines per file; no file over 1,000 lines, no function over 120, includes where they belong'
	@echo 'make clean         remove build/ and the programs'
	@echo
	@echo 'config=release|debug|sanitize|thread  NVCC= (no CUDA)  OPENMP= (one thread)  CUDA_ARCH=all|"80 90a"'
	@echo 'MPICXX=mpicxx.mpich (an MPI of your choice)  MPICXX= (no MPI)  NCCL= (no NCCL)'

all: $(programs) simt tools bench
tools: $(tools)
bench: $(benches)
simt: $(simt_programs)

# The names of the kernels that ran are for scripts/kernels_tested.sh.
test: $(programs) simt tools
	@rm -f $(BUILD)/simt/kernels.txt
	@scripts/tally.sh ./test_llama 'SIMT_KERNELS=$(BUILD)/simt/kernels.txt SIMT_STREAMS=queues \
	    TRAIN_LLAMA_PROGRAM=$(BUILD)/simt/train_llama $(BUILD)/simt/test_llama gpu_ simt amx/ _bf16 math/losses'

resources: $(gpu)
	@scripts/resources.py $(BUILD)

test-peers:
	+@MAKE='$(MAKE)' scripts/test_peers.sh

lines:
	@scripts/lines.sh

clean:
	rm -rf build $(programs)

endif
