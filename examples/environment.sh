#!/usr/bin/env bash
# Makes .venv at the repository root and installs ring_sp there, editable, with extras of setup.cfg:
#
#   bash examples/environment.sh [EXTRAS]     EXTRAS: by default megatron,cli,test
#
# Needs Python 3.10 or newer with venv. A second call returns at once, unless setup.cfg has changed.
set -euo pipefail

extras=${1:-megatron,cli,test}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
python=$venv/bin/python
stamp=$venv/ring_sp-$extras

say() { printf 'environment: %s\n' "$*"; }

fail() {
    say "$*" >&2
    exit 1
}

is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null; }

find_python() {
    local name
    for name in python3 python3.{13,12,11,10}; do
        if is_recent "$name"; then
            command -v "$name"
            return
        fi
    done
    fail "needs Python 3.10 or newer; python3 is $(python3 --version 2>&1 || true)." \
        "Install a newer one and put it on PATH."
}

make_venv() {
    local base
    base=$(find_python)
    say "making $venv with $("$base" --version), $base"
    if ! "$base" -m venv "$venv" > /dev/null; then
        rm -rf "$venv"
        fail "$base cannot make a virtual environment: venv or ensurepip is missing." \
            "On Debian or Ubuntu install the package python3-venv, then run this again."
    fi
}

# Torch comes first, as one exact release: a build of it that pip finds on disk is then taken, where
# torch>=2.6 would fetch the newest release and several GB of CUDA.
install() {
    local needs=("setuptools>=64" wheel)
    "$python" -c 'import sys, torch; sys.exit(torch.__version__ < "2.6")' 2> /dev/null ||
        needs=(torch==2.13.0 "${needs[@]}")
    say "installing ${needs[*]}"
    "$python" -m pip install -qq "${needs[@]}"
    say "installing ring_sp[$extras]"
    "$python" -m pip install -qq --no-build-isolation --editable "${root}[$extras]"
}

# The path is part of the state: a copied or moved .venv still points to its first home.
state="$root $(cat "$root"/{setup.cfg,pyproject.toml,examples/environment.sh} | cksum)"
if [[ -f $stamp && $(< "$stamp") == "$state" ]]; then
    exit
fi
[[ -e $venv ]] || make_venv
if ! is_recent "$python" || ! "$python" -m pip --version > /dev/null 2>&1; then
    fail "$venv lacks pip, or Python 3.10 or newer. Delete it and run this again."
fi
install
printf '%s\n' "$state" > "$stamp"
say "ready in $SECONDS s; to use it: . $venv/bin/activate"
