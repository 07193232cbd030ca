#!/usr/bin/env bash
# Pretrain one small GPT four ways, and see that the losses are the same:
#
#   bash examples/quickstart.sh
#
# Needs Python 3.10 or newer and nothing else: it makes .venv and installs there what is missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash examples/environment.sh megatron,cli,test
# Megatron warns on every rank that apex and TransformerEngine are not there.
export PYTHONWARNINGS=ignore OMP_NUM_THREADS=1

train() {
    local name=$1 ranks=$2
    shift 2
    printf '\n== %s\n' "$name"
    .venv/bin/python -m torch.distributed.run --standalone --nproc_per_node "$ranks" \
        examples/pretrain_gpt.py --train-iters 40 --eval-interval 40 "$@"
}

train "one process" 1 --loss-log runs/one.json
train "ring 4" 4 --sequence-parallel-ring 4 --loss-log runs/ring.json
train "tensor 2 x ring 2" 4 --tensor-model-parallel-size 2 --sequence-parallel-ring 2 \
    --loss-log runs/tensor_ring.json
train "data 2 x ring 2" 4 --sequence-parallel-ring 2 --loss-log runs/data_ring.json

printf '\n== the four side by side\n'
.venv/bin/python examples/report.py runs/curves.png "one process=runs/one.json" \
    "ring 4=runs/ring.json" "tensor 2 x ring 2=runs/tensor_ring.json" \
    "data 2 x ring 2=runs/data_ring.json"
.venv/bin/python examples/who_holds_what.py runs/who_holds_what.png
