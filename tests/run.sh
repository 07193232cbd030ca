#!/usr/bin/env bash
# Every check of this repository; arguments go to pytest, with paths from the repository root:
#
#   bash tests/run.sh [ARGUMENTS]         in .venv, which it makes: ruff, mypy, and all but the gpu tests,
#                                         those of Megatron with its newest version too
#   bash tests/run.sh --gpu [ARGUMENTS]   with the python3 at hand, installing nothing: only the gpu tests
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ ${1:-} == --gpu ]]; then
    shift
    exec python3 -m pytest -m gpu "$@"
fi

failed=()

step() {
    printf '\n== %s\n' "$*"
    .venv/bin/python -m "$@" || failed+=("$1")
}

bash examples/environment.sh megatron,hf,deepspeed,cli,test
step ruff check .
step ruff format --check .
step mypy
step mypy examples/deepspeed/pretrain_gpt.py examples/text.py
step pytest "$@"
if (($# == 0)); then
    # The newest tested Megatron wants Python 3.12 for its training loop only.
    newest=.venv/megatron-core-0.19.2
    [[ -d $newest ]] || .venv/bin/python -m pip install -qq --no-deps --target "$newest" \
        --ignore-requires-python --python-version 3.12 --only-binary=:all: megatron-core==0.19.2
    PYTHONPATH=$newest step pytest tests/test_megatron_{install,training,hybrid,logits,fsdp,dropout,recomputation,feed_forward,graphs,checkpoint,refusals,layer_spec}.py
fi
if ((${#failed[@]})); then
    printf '\nfailed: %s\n' "${failed[*]}"
    exit 1
fi
