#!/bin/bash
# One sequence over all GPUs of several nodes, under Slurm. Submit it again and it goes on from the newest checkpoint.
# On nodes of 4 GPUs: sbatch --ntasks-per-node=4 --gpus-per-node=4 ...
#   sbatch --nodes=2 scripts/run_slurm.sh -e llama2-7b.bin -i 'data/books_0*.bin' -c 262144 --rope_base 5e7 -o run
#SBATCH --job-name=train_llama
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --signal=USR1@300
# A rank takes the GPU of its number on the node and maps the memory of the others: it must see all of them
# (--gpu-bind=none), and its threads want more than one core (--cpu-bind=none). All ranks get this script's environment, whatever sbatch was told (--export=ALL). SIGUSR1, five
# minutes before the time is over, saves and leaves.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
resume=
for argument; do # without a folder for checkpoints there is nothing to go on from
    case $argument in -o | -o=* | --out | --out=*) resume=--resume ;; esac
done
exec srun --mpi=pmix --export=ALL --gpu-bind=none --cpu-bind=none --kill-on-bad-exit=1 ./train_llama --device gpu $resume "$@"
