#!/bin/bash
# Runs every test that needs no GPU and closes with "N passed, N failed". Arguments: the test binaries that run on one
# process, "--ranks", those that run on 1 to 4 MPI ranks. The log of a failing part is printed whole.
cd "$(dirname "$0")/.."
log=build/test.log
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 # MPI keeps memory to the end
export OMP_WAIT_POLICY=passive # the ranks and threads of a test share few cores
passed=0 failed=0 skipped=""

count() { # $1 title, $2 exit status; adds the numbers that doctest or pytest printed into the log
    local p f
    if grep -q '^\[doctest\] test cases' $log; then
        p=$(sed -n 's/.*test cases: *[0-9]* *| *\([0-9]*\) passed.*/\1/p' $log | tail -1)
        f=$(sed -n 's/.*| *\([0-9]*\) failed.*/\1/p' <(grep 'test cases' $log) | tail -1)
    else
        p=$(grep -oE '[0-9]+ passed' $log | tail -1 | cut -d' ' -f1)
        f=$(grep -oE '[0-9]+ (failed|error)' $log | tail -1 | cut -d' ' -f1)
    fi
    p=${p:-0} f=${f:-0}
    if [ "$2" != 0 ] && [ "$f" = 0 ]; then f=1; fi
    printf '%-44s %4d passed, %d failed\n' "$1" "$p" "$f"
    [ "$f" = 0 ] || cat $log
    passed=$((passed + p)) failed=$((failed + f))
}

ranks=""
for binary in "$@"; do
    if [ "$binary" = --ranks ]; then ranks=1; continue; fi
    if [ -z "$ranks" ]; then
        "$binary" --no-colors > $log 2>&1
        count "$binary" $?
        continue
    fi
    for n in 1 2 3 4; do
        launch="mpirun --oversubscribe --allow-run-as-root --bind-to none -np $n"
        OMP_NUM_THREADS=1 $([ $n = 1 ] || echo $launch) "$binary" --no-colors > $log 2>&1
        count "$binary on $n ranks" $?
    done
done
[ -n "$ranks" ] || skipped="$skipped; MPI ranks (no mpicxx)"

if [ -x .venv/bin/pytest ]; then
    OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 .venv/bin/pytest -q -p no:cacheprovider test > $log 2>&1
    count "the program and its scripts (pytest)" $?
else
    skipped="$skipped; scripts (no .venv: sh scripts/install.sh)"
fi
skipped="$skipped; GPU tests (make test-gpu)"
echo "skipped:${skipped#;}"
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
