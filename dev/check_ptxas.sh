#!/bin/bash
# The Hopper attention must keep its sums in registers and its products in flight: fails when ptxas spills in its
# kernels, or in those of the ladders that lead to them, or says that it makes wgmma one by one (C7508 to C7514). Needs
# nvcc, no GPU. With cuobjdump and nvdisasm on the PATH or in .venv (pip install nvidia-cuda-cuobjdump
# nvidia-cuda-nvdisasm), also when the machine code of one of the trainer's Hopper kernels has no HGMMA, or has HMMA, the
# older product, or local memory (LDL, STL).
cd "$(dirname "$0")/.."
mkdir -p build
log=build/check_ptxas.log
compile() { # $1 folder, $2 name
    nvcc -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a -Xcompiler=-fopenmp -Xptxas -v -I. -c $1/$2.cu \
        -o build/check_$2.o > build/check_$2.log 2>&1 || { cat build/check_$2.log; return 1; }
}
compile dev bench_attention &
compile dev/cuda attention_hopper && compile dev/cuda attention_backward || exit 1
wait $! || exit 1
cat build/check_{bench_attention,attention_hopper,attention_backward}.log > $log
ours='Function properties for .*(attention_hopper_|version[2-6]|roles)'
kernels=$(grep -cE "$ours" $log)
spills=$(grep -A1 -E "$ours" $log | grep 'bytes stack frame' | grep -vc ' 0 bytes spill stores, 0 bytes spill loads')
serial=$(grep -c 'C75[0-9][0-9]' $log)
echo "ptxas: $kernels kernels for Hopper, $spills with spills, $serial warnings of products made one by one"
[ "$kernels" -ge 31 ] && [ "$spills" = 0 ] && [ "$serial" = 0 ] || exit 1

for tools in .venv/lib/python3*/site-packages/nvidia/*/bin; do PATH=$PATH:$PWD/$tools; done
if ! command -v cuobjdump > /dev/null || ! command -v nvdisasm > /dev/null; then
    echo "sass: no cuobjdump or no nvdisasm here, the machine code is not looked at"
    exit 0
fi
cuobjdump -sass build/check_bench_attention.o > build/check_ptxas.sass || exit 1
awk '/Function :/ {
         kernel = ""
         if ($0 ~ /attention_hopper_(forward|backward)_kernel/) {
             kernel = ($0 ~ /forward/ ? "forward" : "backward") " D=" ($0 ~ /ILi64E/ ? 64 : 128) \
                      ($0 ~ /ILi[0-9]+ELb1E/ ? " in pairs" : "") ($0 ~ /ELb[01]ELb1E/ ? " in turns" : "")
             order[++n] = kernel
         }
         next
     }
     kernel == "" { next }
     / HGMMA\./ { hgmma[kernel]++ }
     / HMMA\./ { hmma[kernel]++ }
     / (LDL|STL)[. ]/ { local_memory[kernel]++ }
     END {
         for (i = 1; i <= n; i++) {
             k = order[i]
             printf "sass: %-22s %3d HGMMA, %d HMMA, %d accesses of local memory\n", k, hgmma[k], hmma[k], local_memory[k]
             wrong += hgmma[k] == 0 || hmma[k] > 0 || local_memory[k] > 0
         }
         if (n != 8) print "sass: 8 kernels of the Hopper attention are expected, not " n
         exit wrong > 0 || n != 8
     }' build/check_ptxas.sass
