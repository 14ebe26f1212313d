#!/usr/bin/env bash
# Makes .venv, installs, checks style and types, and runs all tests. Arguments go to pytest: bash launch/test.sh -k lamb
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

# Processes that take one test file after the other, since ranks that wait for each other leave cores idle; then, alone,
# what measures time. pytest's 5 says that nothing was selected, which is a mistake only if it is so both times.
run_tests() {
    local shared=0 alone=0 processes
    processes=$($PY -c 'import os; print(min(4, os.cpu_count() or 1))')
    $PY -m pytest -m "not alone" -n "$processes" --dist loadfile --no-loadscope-reorder "$@" || shared=$?
    $PY -m pytest -m alone "$@" -n 0 || alone=$?
    [[ "$shared $alone" =~ ^(0 [05]|5 0)$ ]]
}

# Hundreds of processes import the same sources: where Python may not keep what it compiled, each compiles all anew.
unset PYTHONDONTWRITEBYTECODE
check_compiler "the tests of compiled code need one (on Debian and Ubuntu the package g++)" || exit 2
prepare dev
status=0 # what fails first does not hide what fails later
$PY -m ruff check . || status=1
$PY -m ruff format --check . || status=1
$PY -m mypy || status=1
run_tests "$@" || status=1
exit $status
