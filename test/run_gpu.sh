#!/bin/bash
# Runs every test that needs a GPU and closes with "N passed, N failed": the kernels and the model, the same small cases
# under the four tools of compute-sanitizer, the ranks, and the program on the GPU. Arguments: the test program, the
# attention's tests built for racecheck, then the programs that run on 1 to 4 ranks. All of it takes eight minutes on an
# H200 with 16 cores; PART="kernels sanitizers ranks program" names what is wanted.
cd "$(dirname "$0")/.."
log=build/test_gpu.log
skipped=""
. test/count.sh
show_log="tail -c 6000" # a sanitizer's can be long
test=$1 race=$2
shift 2
parts=${PART:-kernels sanitizers ranks program}
wanted() { # whether the part is; else it counts as skipped
    case " $parts " in *" $1 "*) return 0 ;; esac
    skipped="$skipped; $1 (PART leaves it out)"
    return 1
}

if wanted kernels; then
    start=$SECONDS
    "$test" --no-colors > $log 2>&1
    count "$test" $? $start
fi

# Sanitizers slow a kernel by 10 to 100 times: they take the cases named "(small)", side by side. A finding makes the
# exit status 99. racecheck does not follow barriers at which one side only arrives (bar.arrive, mbarrier): it gets the
# portable attention built so that both sides wait, and not Hopper's.
if ! wanted sanitizers; then :
elif command -v compute-sanitizer > /dev/null; then
    start=$SECONDS
    runs="memcheck initcheck synccheck racecheck racecheck_attention"
    for run in $runs; do
        program=$test skip=none
        [ $run = racecheck ] && skip='*attention*'
        [ $run = racecheck_attention ] && program=$race
        OMP_NUM_THREADS=$((($(nproc) + 4) / 5)) compute-sanitizer --tool ${run%_*} --error-exitcode 99 \
            --launch-timeout 0 "$program" --no-colors -tc='*(small)*' -tce="$skip" > $log.$run 2>&1 &
        eval "pid_$run=$!"
    done
    for run in $runs; do
        eval "wait \$pid_$run"
        status=$?
        mv $log.$run $log
        count "compute-sanitizer, $run" $status $start
    done
else
    skipped="$skipped; sanitizers (no compute-sanitizer)"
fi

# Ranks share a GPU where there are fewer; those tests then leave NCCL out, and the program wants a GPU a rank. One after
# the other: some measure the memory that is taken of a GPU.
gpus=$(nvidia-smi -L 2> /dev/null | wc -l)
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
if wanted ranks; then
    for binary in "$@"; do
        for n in 1 2 3 4; do
            start=$SECONDS
            launch="mpirun --oversubscribe --bind-to none -np $n"
            OMP_NUM_THREADS=$((($(nproc) + n - 1) / n)) $([ $n = 1 ] || echo $launch) "$binary" --no-colors > $log 2>&1
            count "$binary on $n ranks" $? $start
        done
    done
    [ $# -gt 0 ] || skipped="$skipped; ranks (no mpicxx)"
fi
[ "$gpus" -ge 4 ] || skipped="$skipped; NCCL and the program on more than $gpus ranks (there are $gpus GPUs)"

if ! wanted program; then :
elif $PYTHON -c 'import pytest, numpy' 2> /dev/null; then
    start=$SECONDS
    TRAIN_DEVICE=gpu TRAIN_GPUS=$gpus $PYTHON -m pytest -q -p no:cacheprovider test/test_train.py test/test_golden.py \
        test/test_rope_program.py > $log 2>&1
    count "the program on the GPU (pytest)" $? $start
else
    skipped="$skipped; the program (no pytest and numpy: sh scripts/install.sh)"
fi
[ -z "$skipped" ] || echo "skipped:${skipped#;}"
echo "$passed passed, $failed failed"
[ "$failed" = 0 ] && [ "$passed" -gt 0 ]
