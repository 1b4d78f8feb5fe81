#!/bin/bash
# Runs every test that needs a GPU and closes with "N passed, N failed": the kernels and the model, the same small cases
# under the four tools of compute-sanitizer, and the program on the GPU. Argument: the test program.
cd "$(dirname "$0")/.."
log=build/test_gpu.log
skipped=""
. test/count.sh
show_log="tail -c 6000" # a sanitizer's can be long

start=$SECONDS
"$1" --no-colors > $log 2>&1
count "$1" $? $start

# Sanitizers slow a kernel by 10 to 100 times: they take the cases named "(small)", the four side by side. A finding
# makes the exit status 99.
if command -v compute-sanitizer > /dev/null; then
    start=$SECONDS
    for tool in memcheck racecheck initcheck synccheck; do
        OMP_NUM_THREADS=$((($(nproc) + 3) / 4)) compute-sanitizer --tool $tool --error-exitcode 99 --launch-timeout 0 \
            "$1" --no-colors -tc='*(small)*' > $log.$tool 2>&1 &
        eval "pid_$tool=$!"
    done
    for tool in memcheck racecheck initcheck synccheck; do
        eval "wait \$pid_$tool"
        status=$?
        mv $log.$tool $log
        count "compute-sanitizer, $tool" $status $start
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
