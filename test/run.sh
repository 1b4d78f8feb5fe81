#!/bin/bash
# Runs every test that needs no GPU and closes with "N passed, N failed". Arguments: the test binaries that run on one
# process, "--ranks", those that run on 1 to 4 MPI ranks. The log of a failing part is printed whole.
cd "$(dirname "$0")/.."
log=build/test.log
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 # MPI keeps memory to the end
export OMP_WAIT_POLICY=passive # the ranks and threads of a test share few cores
skipped=""
. test/count.sh

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
