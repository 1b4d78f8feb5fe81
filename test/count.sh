# For the scripts that run tests: adds up what doctest or pytest printed into $log, and shows it when something failed.
passed=0 failed=0 show_log=cat

count() { # $1 title, $2 exit status, $3 (may be missing) $SECONDS at its start
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
    printf '%-44s %4d passed, %d failed%s\n' "$1" "$p" "$f" "${3:+, $((SECONDS - ${3:-0})) s}"
    [ "$f" = 0 ] || $show_log $log
    passed=$((passed + p)) failed=$((failed + f))
}
