#!/usr/bin/env bash
# Makes .venv, installs, checks style and types, and runs all tests. Arguments go to pytest: bash launch/test.sh -k lamb
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

check_compiler "the tests of compiled code need one (on Debian and Ubuntu the package g++)" || exit 2
prepare dev
status=0 # what fails first does not hide what fails later
$PY -m ruff check . || status=1
$PY -m ruff format --check . || status=1
$PY -m mypy || status=1
$PY -m pytest "$@" || status=1
exit $status
