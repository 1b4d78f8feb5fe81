#!/bin/bash
# Runs every test that needs a GPU and closes with "N passed, N failed": the kernels and the model, the same small cases
# under the four tools of compute-sanitizer, and the program on the GPU. Argument: the test program.
cd "$(dirname "$0")/.."
log=build/test_gpu.log
passed=0 failed=0 skipped=""
seconds() { date +%s; }

count() { # $1 title, $2 exit status, $3 start; adds the numbers that doctest or pytest printed into the log
    local p f
    p=$(grep -oE '[0-9]+ passed' $log | tail -1 | cut -d' ' -f1)
    f=$(grep -oE '[0-9]+ (failed|error)' $log | tail -1 | cut -d' ' -f1)
    if grep -q '^\[doctest\] test cases' $log; then
        p=$(sed -n 's/.*test cases: *[0-9]* *| *\([0-9]*\) passed.*/\1/p' $log | tail -1)
        f=$(grep 'test cases' $log | sed -n 's/.*| *\([0-9]*\) failed.*/\1/p' | tail -1)
    fi
    p=${p:-0} f=${f:-0}
    if [ "$2" != 0 ] && [ "$f" = 0 ]; then f=1; fi
    printf '%-52s %4d passed, %d failed, %4d s\n' "$1" "$p" "$f" $(($(seconds) - $3))
    [ "$f" = 0 ] || tail -c 6000 $log
    passed=$((passed + p)) failed=$((failed + f))
}

start=$(seconds)
"$1" --no-colors > $log 2>&1
count "$1" $? $start

# Sanitizers slow a kernel by 10 to 100 times: they take the cases named "(small)", the four side by side. A finding
# makes the exit status 99.
if command -v compute-sanitizer > /dev/null; then
    start=$(seconds)
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
    start=$(seconds)
    TRAIN_DEVICE=gpu $PYTHON -m pytest -q -p no:cacheprovider test/test_train.py test/test_golden.py > $log 2>&1
    count "the program on the GPU (pytest)" $? $start
else
    skipped="$skipped; the program (no pytest and numpy: sh scripts/install.sh)"
fi
[ -z "$skipped" ] || echo "skipped:${skipped#;}"
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
