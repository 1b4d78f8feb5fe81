# make               this help
# make train_llama   the trainer, with MPI if it is there, else for one rank
# make test_rope     the deviation experiment of RoPE in bf16 (README: "Does bf16 break RoPE?")
# make train_fp32_attention   its control: the trainer with RoPE and attention in fp32
# make demo          installs what is missing, trains a small model, extends its context, draws demo.png
# make test          installs what is missing, runs every test that needs no GPU (make test SAN=1: under ASan, UBSan)
# make test-gpu      the tests that need a GPU (some of them: PART="kernels sanitizers ranks program")
# make bench         speed of the layers and of the whole step on this machine, PEERS=1 beside PyTorch's
# make lint          include graph, layout, whitespace
# make format        clang-format over the sources
# make docs          writes the option table into README.md
# make deps          installs compiler, MPI, doctest (apt, when root) and the Python packages (.venv)
# make clean
#
# With nvcc on the PATH the GPU's layers are built in (CUDA=0 leaves them out), for the GPU of this machine or, when it
# has none, for A100 and H100 (GPU_ARCH="80 90a") and as PTX, which the drivers of later ones compile at the start.
# MPI=0 leaves MPI aside, ARCH=x86-64-v3 is another CPU than this machine's, SAN=1 builds with sanitizers. With OPT=0 all
# but the trainer itself compiles sooner, to see that it does.

.PHONY: help demo test test-gpu bench lint format docs deps clean
help:
	@sed -n 's/^# \{0,1\}//p' Makefile | sed '/^$$/q'

ARCH ?= native
CXX  ?= g++
NVCC := $(shell command -v nvcc 2>/dev/null)
CUDA ?= $(if $(SAN),0,$(if $(NVCC),1,0))
MPICXX := $(shell command -v mpicxx 2>/dev/null)
MPI    ?= $(if $(MPICXX),1,0)
BUILD  := build$(if $(SAN),/san)$(if $(filter 1,$(CUDA)),/cuda)$(if $(OPT),/O$(OPT))
PROGRAM := $(if $(SAN),$(BUILD)/)train_llama
PYTHON := $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)

comma      := ,
HOST_FLAGS := -march=$(ARCH) -fopenmp -fno-math-errno
CXXFLAGS   := -std=c++20 $(HOST_FLAGS) -Wall -Wextra -Wno-restrict -I. $(if $(SAN),-g -fsanitize=address$(comma)undefined -fno-omit-frame-pointer)
COMPILE    := $(CXX) $(CXXFLAGS) -x c++
ifeq ($(CUDA),1)
# wgmma and setmaxnreg want 90a instead of 90, by -gencode: -arch=sm_90a would also run a pass for plain sm_90.
GPU_HERE := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d . | grep -xE '[0-9]+' | sort -u)
ifneq ($(or $(GPU_HERE),$(GPU_ARCH)),)
GPU_ARCH ?= $(GPU_HERE)
else
GPU_ARCH := 80 90a
GPU_PTX  := 80
endif
override GPU_ARCH := $(patsubst 90,90a,$(GPU_ARCH))
GENCODE  := $(foreach a,$(GPU_ARCH),-gencode=arch=compute_$(a)$(comma)code=sm_$(a)) $(foreach a,$(GPU_PTX),-gencode=arch=compute_$(a)$(comma)code=compute_$(a))
NVCCFLAGS := -std=c++20 $(GENCODE) -t 0 -lineinfo -I. $(foreach f,$(HOST_FLAGS),-Xcompiler=$(f))
COMPILE  := nvcc $(NVCCFLAGS) -x cu
CUDA_LIBS := -lcublasLt
endif
ifeq ($(MPI),1)
COMM      := core/comm_mpi.cpp
MPI_FLAGS := $(shell $(MPICXX) --showme:compile 2>/dev/null || $(MPICXX) -compile_info 2>/dev/null | cut -d' ' -f2-)
MPI_LIBS  := $(shell $(MPICXX) --showme:link 2>/dev/null || $(MPICXX) -link_info 2>/dev/null | cut -d' ' -f2-)
else
COMM := core/comm_serial.cpp
endif
ifeq ($(CUDA),1)
# GPUs of one host copy from each other without NCCL; those of several hosts need it.
CUDA_HOME := $(patsubst %/bin/nvcc,%,$(realpath $(NVCC)))
NCCL ?= $(if $(filter 1,$(MPI)),$(if $(wildcard /usr/include/nccl.h $(CUDA_HOME)/include/nccl.h),1,0),0)
GPU_COMM := $(BUILD)/comm_gpu.o $(BUILD)/$(if $(filter 1,$(NCCL)),comm_nccl.o,comm_no_nccl.o)
CUDA_LIBS += $(if $(filter 1,$(NCCL)),-lnccl)
endif
HEADERS := attention_anchor.cuh rope.cuh $(wildcard layers/*.cuh core/*.h)
TEST_HEADERS := $(wildcard test/*.h test/*.cuh)

$(PROGRAM): $(BUILD)/train_llama.o $(BUILD)/comm.o $(GPU_COMM) build/flavour
	$(if $(filter 1,$(CUDA)),nvcc -Xcompiler=-fopenmp,$(CXX) $(CXXFLAGS)) $(filter %.o,$^) -o $@ $(MPI_LIBS) $(CUDA_LIBS)
	@echo "$@: $(if $(filter 1,$(CUDA)),CPU and GPU (sm_$(subst $() ,$(comma) sm_,$(strip $(GPU_ARCH)))$(if $(GPU_PTX),$(comma) PTX for later ones)),CPU), $(if $(filter 1,$(MPI)),ranks by MPI$(if $(filter 0,$(NCCL)),$(comma) no NCCL found: GPUs of one host),no MPI found: one rank)"
# The program has one name, so it is linked again when the build's kind changes.
build/flavour: FORCE
	@mkdir -p build && echo "$(BUILD) $(GENCODE) $(GPU_COMM)" | cmp -s - $@ || echo "$(BUILD) $(GENCODE) $(GPU_COMM)" > $@
FORCE:
$(BUILD)/train_llama.o: train_llama.cu $(HEADERS) Makefile | $(BUILD)
	$(COMPILE) -O$(if $(SAN),1,3) -c $< -o $@
$(BUILD)/comm.o: $(COMM) $(HEADERS) Makefile | $(BUILD)
	$(CXX) $(CXXFLAGS) -O2 $(MPI_FLAGS) -c $< -o $@
$(BUILD)/comm_gpu.o $(BUILD)/comm_nccl.o $(BUILD)/comm_no_nccl.o: $(BUILD)/%.o: core/%.cu $(HEADERS) Makefile | $(BUILD)
	nvcc $(NVCCFLAGS) -O2 -c $< -o $@
$(BUILD)/comm_serial.o: core/comm_serial.cpp core/comm.h core/types.h | $(BUILD)
	$(CXX) $(CXXFLAGS) -O2 -c $< -o $@
$(BUILD):
	mkdir -p $@

# The trainer once more, under an experiment (test_rope) and with fp32 attention (a control); one process, on one GPU or
# the CPU.
TEST_ROPE := $(if $(SAN),$(BUILD)/)test_rope
CONTROL   := $(if $(SAN),$(BUILD)/)train_fp32_attention
$(TEST_ROPE): $(BUILD)/test_rope.o
$(CONTROL): $(BUILD)/train_fp32_attention.o
$(TEST_ROPE) $(CONTROL): $(BUILD)/comm_serial.o $(GPU_COMM) build/flavour
	$(if $(filter 1,$(CUDA)),nvcc -Xcompiler=-fopenmp,$(CXX) $(CXXFLAGS)) $(filter %.o,$^) -o $@ $(CUDA_LIBS)
$(BUILD)/test_rope.o $(BUILD)/train_fp32_attention.o: $(BUILD)/%.o: test/%.cu train_llama.cu $(HEADERS) $(TEST_HEADERS) Makefile | $(BUILD)
	$(COMPILE) -O$(or $(OPT),$(if $(SAN),1,3)) -c $< -o $@

# A test file is a binary's part: those in RANK_TESTS are programs of their own and run under mpirun.
RANK_TESTS := $(patsubst test/%.cpp,$(BUILD)/%,$(wildcard test/test_comm.cpp test/test_ring.cpp test/test_model_ranks.cpp))
# Those in OWN_TESTS are too, on one process: their names are those of other files, too.
OWN_TESTS  := $(patsubst test/%.cpp,$(BUILD)/%,$(wildcard test/test_rope_experiment.cpp test/test_fp32_attention.cpp))
UNIT_TESTS := $(filter-out $(RANK_TESTS) $(OWN_TESTS),$(patsubst test/%.cpp,$(BUILD)/%,$(wildcard test/test_*.cpp)))
$(BUILD)/test_%.o: test/test_%.cpp train_llama.cu $(HEADERS) $(TEST_HEADERS) | $(BUILD)
	$(CXX) $(CXXFLAGS) -O$(if $(SAN),1,2) -c $< -o $@
$(BUILD)/test_main.o: test/main.cpp | $(BUILD)
	$(CXX) $(CXXFLAGS) -O1 -c $< -o $@
$(BUILD)/test_cpu: $(UNIT_TESTS:=.o) $(BUILD)/test_main.o $(BUILD)/comm_serial.o
	$(CXX) $(CXXFLAGS) $^ -o $@
$(BUILD)/test_comm: $(BUILD)/test_checkpoint.o $(BUILD)/test_main.o
$(OWN_TESTS): %: %.o $(BUILD)/test_main.o $(BUILD)/comm_serial.o
	$(CXX) $(CXXFLAGS) $^ -o $@
$(RANK_TESTS): %: %.o $(BUILD)/comm.o
	$(CXX) $(CXXFLAGS) $^ -o $@ $(MPI_LIBS)

deps:
	@sh scripts/install.sh
test: deps
	@$(MAKE) --no-print-directory test-run
.PHONY: test-run
test-run: $(PROGRAM) $(TEST_ROPE) $(CONTROL) $(BUILD)/test_cpu $(OWN_TESTS) $(if $(filter 1,$(MPI)),$(RANK_TESTS))
	@SAN=$(SAN) TRAIN_LLAMA=$(abspath $(PROGRAM)) TEST_ROPE=$(abspath $(TEST_ROPE)) CONTROL=$(abspath $(CONTROL)) \
	    test/run.sh $(BUILD)/test_cpu $(OWN_TESTS) $(if $(filter 1,$(MPI)),--ranks $(RANK_TESTS))

# The tests of the GPU are a program of their own, built from test/gpu_*.cu, but for those that run on several ranks.
GPU_RANK_TESTS := $(patsubst test/%.cu,$(BUILD)/%,$(wildcard test/gpu_comm.cu test/gpu_ring.cu test/gpu_model_ranks.cu))
GPU_TESTS := $(filter-out $(GPU_RANK_TESTS:=.o),$(patsubst test/%.cu,$(BUILD)/%.o,$(wildcard test/gpu_*.cu)))
$(BUILD)/gpu_%.o: test/gpu_%.cu train_llama.cu $(HEADERS) $(TEST_HEADERS) | $(BUILD)
	nvcc $(NVCCFLAGS) -O$(or $(OPT),2) -c $< -o $@
$(BUILD)/test_gpu: $(GPU_TESTS) $(BUILD)/test_main.o $(BUILD)/comm_serial.o $(GPU_COMM)
	nvcc -Xcompiler=-fopenmp $^ -o $@ $(CUDA_LIBS)
# For racecheck, which does not follow barriers at which one side only arrives.
$(BUILD)/race_attention.o: test/gpu_attention.cu $(HEADERS) $(TEST_HEADERS) | $(BUILD)
	nvcc $(NVCCFLAGS) -O$(or $(OPT),2) -DRACECHECK -c $< -o $@
$(BUILD)/test_race: $(BUILD)/race_attention.o $(BUILD)/test_main.o $(BUILD)/comm_serial.o $(GPU_COMM)
	nvcc -Xcompiler=-fopenmp $^ -o $@ $(CUDA_LIBS)
$(GPU_RANK_TESTS): %: %.o $(BUILD)/comm.o $(GPU_COMM)
	nvcc -Xcompiler=-fopenmp $^ -o $@ $(MPI_LIBS) $(CUDA_LIBS)
test-gpu: deps
	@$(MAKE) --no-print-directory test-gpu-run
.PHONY: test-gpu-run
test-gpu-run: $(PROGRAM) $(TEST_ROPE) $(CONTROL) $(BUILD)/test_gpu $(BUILD)/test_race $(if $(filter 1,$(MPI)),$(GPU_RANK_TESTS))
	@TRAIN_LLAMA=$(abspath $(PROGRAM)) TEST_ROPE=$(abspath $(TEST_ROPE)) CONTROL=$(abspath $(CONTROL)) PYTHON=$(PYTHON) \
	    test/run_gpu.sh $(BUILD)/test_gpu $(BUILD)/test_race $(if $(filter 1,$(MPI)),$(GPU_RANK_TESTS))
BENCHES := $(patsubst dev/%.cu,$(BUILD)/%,$(wildcard dev/bench_*.cu))
$(BENCHES): $(BUILD)/%: dev/%.cu $(wildcard dev/*.h) $(HEADERS) $(BUILD)/comm_serial.o $(GPU_COMM) | $(BUILD)
	nvcc $(NVCCFLAGS) -O$(or $(OPT),3) $< $(BUILD)/comm_serial.o $(GPU_COMM) -o $@ $(CUDA_LIBS)
ifeq ($(CUDA),1)
bench: $(PROGRAM) $(BENCHES)
	@BUILD=$(BUILD) PYTHON=$(PYTHON) dev/bench.sh
else
bench: $(BUILD)/bench_cpu
	$(BUILD)/bench_cpu
endif
$(BUILD)/bench_cpu: dev/bench_cpu.cpp $(HEADERS) $(BUILD)/comm_serial.o | $(BUILD)
	@ldconfig -p | grep -q libopenblas || echo "bench_cpu compares with OpenBLAS: apt install libopenblas-dev"
	$(CXX) $(CXXFLAGS) -O3 $< $(BUILD)/comm_serial.o -o $@ -lopenblas

demo: deps
	@$(MAKE) --no-print-directory train_llama
	@sh scripts/demo.sh

lint:
	@$(PYTHON) dev/lint.py
format:
	clang-format -i train_llama.cu $(HEADERS) $(wildcard core/*.cpp core/*.cu test/*.cpp test/*.h test/*.cu test/*.cuh dev/*.cpp dev/*.h dev/*.cu dev/cuda/*.h dev/cuda/*.cu)
docs: train_llama
	@$(PYTHON) dev/docs.py
clean:
	rm -rf build train_llama test_rope train_fp32_attention
