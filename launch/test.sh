#!/usr/bin/env bash
# Makes .venv, installs, checks style and types, and runs all tests. Arguments go to pytest: bash launch/test.sh -k lamb
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

check_compiler "the tests of compiled code need one (on Debian and Ubuntu the package g++)" || exit 2
prepare dev
$PY -m ruff check .
$PY -m ruff format --check .
$PY -m mypy
exec $PY -m pytest "$@"
