# Sourced by demo.sh and test.sh: goes to the checkout's root and offers `prepare EXTRA`, which leaves a working .venv
# with that extra of the package installed. It does nothing, and needs no network, when that is already so, or when
# OPUT_PYTHON names a Python to use as it is.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
PY=${OPUT_PYTHON:-.venv/bin/python}

say() { printf '%s\n' "$*" >&2; }

# $1: a Python; true if it is one that the package supports and can make virtual environments.
usable() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

find_python() {
    local name
    for name in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python}; do
        if usable "$name"; then
            echo "$name"
            return
        fi
    done
    say "error: no Python 3.10 to 3.13 with the venv module found (tried ${PYTHON:-python3, python3.10 to 3.13, python});" \
        "install one (on Debian and Ubuntu also the package python3-venv) or name it: PYTHON=/path/to/python bash $0"
    exit 2
}

make_venv() {
    if usable $PY && $PY -m pip --version >/dev/null 2>&1; then
        return
    fi
    local python
    python=$(find_python)
    say "making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
}

# Where there is no NVIDIA GPU, PyTorch's own CPU builds save gigabytes, if that index can be reached.
cpu_index() {
    local url=https://download.pytorch.org/whl/cpu
    if [ "$(uname -s)" = Linux ] && ! nvidia-smi -L >/dev/null 2>&1 && ! $PY -c 'import torch' 2>/dev/null &&
        $PY -c "import urllib.request; urllib.request.urlopen('$url/torch/', timeout=5)" 2>/dev/null; then
        echo "--extra-index-url $url"
    fi
}

# What an installation depends on: the checkout's place, the Python, the package's metadata and the constraints.
fingerprint() {
    { pwd && $PY --version && cat pyproject.toml constraints.txt; } | $PY -c \
        'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

installed() { # $1: an extra; true if the stamp of its last installation is still right
    [ "$(cat ".venv/.installed-$1" 2>/dev/null)" = "$(fingerprint)" ]
}

prepare() { # $1: train or dev; dev includes train
    if [ -n "${OPUT_PYTHON:-}" ]; then
        return
    fi
    make_venv
    if installed "$1" || installed dev; then
        return
    fi
    say "installing oput-dist[$1] into .venv (a few minutes the first time)"
    # DeepSpeed compiles nothing: none of its kernels is used.
    # shellcheck disable=SC2046  # two words, or none
    DS_BUILD_OPS=0 $PY -m pip install --quiet --disable-pip-version-check $(cpu_index) -c constraints.txt -e ".[$1]"
    if [ "$1" = dev ]; then # without its dependency torchvision, whose CUDA build does not fit a CPU build of torch
        $PY -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps timm
    fi
    fingerprint >".venv/.installed-$1"
}

check_compiler() {
    if ! command -v "${CXX:-g++}" >/dev/null && ! command -v clang++ >/dev/null; then
        say "note: no C++ compiler (g++ or clang++) found: $1"
        return 1
    fi
}
