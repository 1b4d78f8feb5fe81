#!/bin/sh
# One sequence over all GPUs of several nodes, by mpirun alone. Every node has this folder at the same path.
#   sh scripts/run_nodes.sh hosts.txt -e llama2-7b.bin -i 'data/books_0*.bin' -c 262144 --rope_base 5e7 -o run
# hosts.txt has a line for each node with its number of GPUs: node1 slots=8
[ $# -gt 1 ] || { sed -n '2,4s/^# *//p' "$0"; exit 1; }
hosts=$1 resume=
shift
for argument; do # with a folder for checkpoints, the same command goes on from the newest
    case $argument in -o | -o=* | --out | --out=*) resume=--resume ;; esac
done
# mpirun takes its own variables to the other nodes, the rest by -x alone; the network's must be alike on all. Not
# CUDA_VISIBLE_DEVICES: a rank must see all GPUs of its own node.
# Without hwloc's OpenCL, which may bring PoCL and its LLVM into mpirun: that takes SIGUSR1, which mpirun is to pass on.
export HWLOC_COMPONENTS="${HWLOC_COMPONENTS--opencl}"
network=$(awk 'BEGIN { for (name in ENVIRON) if (name ~ /^(NCCL|UCX)_[A-Za-z0-9_]*$/) print "-x " name }' | sort)
exec mpirun --hostfile "$hosts" --map-by slot --bind-to none -x PATH ${LD_LIBRARY_PATH:+-x LD_LIBRARY_PATH} \
    -x OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}" $network ./train_llama --device gpu $resume "$@"
