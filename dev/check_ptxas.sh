#!/bin/bash
# The Hopper attention must keep its sums in registers and its products in flight: fails when ptxas spills in its kernels
# or says that it makes wgmma one by one (C7508 to C7514). Needs nvcc, no GPU.
cd "$(dirname "$0")/.."
mkdir -p build
nvcc -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a -Xcompiler=-fopenmp -Xptxas -v -I. -c dev/bench_attention.cu \
    -o build/check_ptxas.o > build/check_ptxas.log 2>&1 || { cat build/check_ptxas.log; exit 1; }
kernels=$(grep -c 'Function properties for.*attention_hopper_' build/check_ptxas.log)
spills=$(grep -A1 'Function properties for.*attention_hopper_' build/check_ptxas.log | grep 'bytes stack frame' | grep -vc ' 0 bytes spill stores, 0 bytes spill loads')
serial=$(grep -c 'C75[0-9][0-9]' build/check_ptxas.log)
echo "ptxas: $kernels kernels of the Hopper attention, $spills with spills, $serial warnings of products made one by one"
[ "$kernels" -ge 6 ] && [ "$spills" = 0 ] && [ "$serial" = 0 ]
