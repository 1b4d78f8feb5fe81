#!/bin/bash
# Runs every test that needs a GPU and closes with "N passed, N failed": the kernels and the model, the same small cases
# under the four tools of compute-sanitizer, the ranks, and the program on the GPU. Arguments: the test program, the
# attention's tests built for racecheck, then the programs that run on 1 to 4 ranks. PART="kernels sanitizers ranks
# program" names what is wanted; JOBS=4, how many of the ranks' programs and the program's tests run side by side. Two
# such scripts beside each other, on a GPU each (CUDA_VISIBLE_DEVICES), want a LOG each, and fewer threads each
# (OMP_NUM_THREADS). LOG (build/test_gpu.log) keeps all that they print, with the times of the cases.
cd "$(dirname "$0")/.."
all=${LOG:-build/test_gpu.log}
log=$all.now
skipped=""
export OMP_WAIT_POLICY=passive # much runs side by side here
rm -f $all $all.*
. test/count.sh
tally() { # as count
    count "$@"
    { echo "== $1"; cat $log; } >> $all
}
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
    "$test" --no-colors --duration > $log 2>&1
    tally "$test" $? $start
fi

# Sanitizers slow a kernel by 10 to 100 times: they take the cases named "(small)", side by side. A finding makes the
# exit status 99. For initcheck the tests leave unset what they else poison (test/gpu.h), and two cases that read it on
# purpose must be found. racecheck does not follow barriers at which one side only arrives (bar.arrive, mbarrier): it
# gets the portable attention built so that both sides wait, and neither Hopper's nor the model with cuBLASLt's products.
if ! wanted sanitizers; then :
elif command -v compute-sanitizer > /dev/null; then
    start=$SECONDS
    runs="memcheck initcheck synccheck racecheck racecheck_attention"
    for run in $runs; do
        program=$test skip=none unset=
        [ $run = initcheck ] && unset=TEST_UNSET=1
        [ $run = racecheck ] && skip='*attention*,*of a model*'
        [ $run = racecheck_attention ] && program=$race
        OMP_NUM_THREADS=$((($(nproc) + 4) / 5)) env $unset compute-sanitizer --tool ${run%_*} --error-exitcode 99 \
            --launch-timeout 0 "$program" --no-colors -tc='*(small)*' -tce="$skip" > $log.$run 2>&1 &
        eval "pid_$run=$!"
    done
    for run in $runs; do
        eval "wait \$pid_$run"
        status=$?
        mv $log.$run $log
        tally "compute-sanitizer, $run" $status $start
    done
    for what in output scratch; do
        start=$SECONDS
        TEST_UNSET=1 compute-sanitizer --tool initcheck --error-exitcode 99 --launch-timeout 0 \
            "$test" --no-colors --no-skip -tc="unset: *$what*" > $log 2>&1
        [ $? = 99 ] && grep -q 'Uninitialized __global__ memory read' $log && grep -q '| *1 passed' $log
        tally "initcheck finds what is unset, $what" $? $start
    done
else
    skipped="$skipped; sanitizers (no compute-sanitizer)"
fi

# Ranks share a GPU where there are fewer, the program's too (TRAIN_SHARE); those tests then leave NCCL out. They and the
# program's run side by side, as many at a time as JOBS says; only what measures the memory that is taken of a GPU runs
# alone.
gpus=$(sh dev/gpus.sh) share=0
[ "$gpus" -ge 4 ] || share=1
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
jobs_most=${JOBS:-4}
titles=() pids=() counted=0
beside() { # $1 title, then the command
    while [ "$(jobs -rp | wc -l)" -ge "$jobs_most" ]; do
        wait -n
        while [ -e $log.$counted.end ]; do count_next; done
    done
    local n=${#titles[@]}
    titles+=("$1")
    shift
    (
        start=$SECONDS
        "$@" > $log.$n 2>&1
        echo "$? $((SECONDS - start))" > $log.$n.ending
        mv $log.$n.ending $log.$n.end
    ) &
    pids+=($!)
}
count_next() { # what was started first and is not counted yet
    local n=$counted status=1 seconds=0
    counted=$((counted + 1))
    [ -e $log.$n.end ] && read -r status seconds < $log.$n.end
    mv $log.$n $log
    rm -f $log.$n.end
    tally "${titles[$n]}" "$status" $((SECONDS - seconds))
}
count_beside() {
    while [ $counted -lt ${#titles[@]} ]; do
        wait "${pids[$counted]}" 2> /dev/null
        count_next
    done
}
on_ranks() { # $1 how many, $2 the program
    export OMP_NUM_THREADS=$((($(nproc) + $1 * jobs_most - 1) / ($1 * jobs_most)))
    $([ "$1" = 1 ] || echo mpirun --oversubscribe --bind-to none -np "$1") "$2" --no-colors --duration
}
case " $parts " in *" ranks "* | *" program "*) echo "ranks and program, $jobs_most at a time:" ;; esac
if wanted ranks; then
    for n in 4 3 2 1; do
        for binary in "$@"; do beside "$binary on $n ranks" on_ranks $n "$binary"; done
    done
    [ $# -gt 0 ] || skipped="$skipped; ranks (no mpicxx)"
fi
[ "$gpus" -ge 4 ] || skipped="$skipped; NCCL between more than $gpus ranks (there are $gpus GPUs)"

program() { # $1 shard (test/conftest.py), then the files
    TRAIN_DEVICE=gpu TRAIN_GPUS=$gpus TRAIN_SHARE=$share SHARD=$1 $PYTHON -m pytest -q -p no:cacheprovider --durations 20 "${@:2}"
}
if ! wanted program; then :
elif $PYTHON -c 'import pytest, numpy' 2> /dev/null; then
    beside "the program, golden vectors and test_rope" program 1/1 test/test_golden.py test/test_rope_program.py \
        test/test_rope_training.py::test_the_control_trains_on_a_gpu_as_on_the_cpu
    for shard in 1 2 3; do beside "the program, part $shard of 3" program $shard/3 test/test_train.py; done
    count_beside
    start=$SECONDS
    program alone test/test_train.py > $log 2>&1
    tally "the program, alone on the GPU" $? $start
else
    skipped="$skipped; the program (no pytest and numpy: sh scripts/install.sh)"
fi
count_beside
[ -z "$skipped" ] || echo "skipped:${skipped#;}"
rm -f $log
echo "$passed passed, $failed failed"
[ "$failed" = 0 ] && [ "$passed" -gt 0 ]
