#!/bin/bash
# The Hopper attention must keep its sums in registers and its products in flight: fails when ptxas spills in its
# kernels, or in those of the ladder that leads to them, or says that it makes wgmma one by one (C7508 to C7514). Needs
# nvcc, no GPU.
cd "$(dirname "$0")/.."
mkdir -p build
log=build/check_ptxas.log
: > $log
for file in dev/bench_attention.cu dev/cuda/attention_hopper.cu; do
    nvcc -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a -Xcompiler=-fopenmp -Xptxas -v -I. -c $file \
        -o build/check_ptxas.o >> $log 2>&1 || { cat $log; exit 1; }
done
ours='Function properties for .*(attention_hopper_|version[56]|roles)'
kernels=$(grep -cE "$ours" $log)
spills=$(grep -A1 -E "$ours" $log | grep 'bytes stack frame' | grep -vc ' 0 bytes spill stores, 0 bytes spill loads')
serial=$(grep -c 'C75[0-9][0-9]' $log)
echo "ptxas: $kernels kernels for Hopper, $spills with spills, $serial warnings of products made one by one"
[ "$kernels" -ge 16 ] && [ "$spills" = 0 ] && [ "$serial" = 0 ]
