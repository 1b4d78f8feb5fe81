#!/bin/bash
# Runs every test that needs a GPU and closes with "N passed, N failed": the kernels and the model, the same small cases
# under the four tools of compute-sanitizer, and the program on the GPU. Arguments: the test program, and the attention's
# tests built for racecheck.
cd "$(dirname "$0")/.."
log=build/test_gpu.log
skipped=""
. test/count.sh
show_log="tail -c 6000" # a sanitizer's can be long

start=$SECONDS
"$1" --no-colors > $log 2>&1
count "$1" $? $start

# Sanitizers slow a kernel by 10 to 100 times: they take the cases named "(small)", side by side. A finding makes the
# exit status 99. racecheck does not follow barriers at which one side only arrives (bar.arrive, mbarrier): it gets the
# portable attention built so that both sides wait, and not Hopper's.
if command -v compute-sanitizer > /dev/null; then
    start=$SECONDS
    runs="memcheck initcheck synccheck racecheck racecheck_attention"
    for run in $runs; do
        program=$1 skip=none
        [ $run = racecheck ] && skip='*attention*'
        [ $run = racecheck_attention ] && program=$2
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

if $PYTHON -c 'import pytest, numpy' 2> /dev/null; then
    start=$SECONDS
    TRAIN_DEVICE=gpu $PYTHON -m pytest -q -p no:cacheprovider test/test_train.py test/test_golden.py \
        test/test_rope_program.py > $log 2>&1
    count "the program on the GPU (pytest)" $? $start
else
    skipped="$skipped; the program (no pytest and numpy: sh scripts/install.sh)"
fi
[ -z "$skipped" ] || echo "skipped:${skipped#;}"
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
