#!/usr/bin/env bash
# A 1B GPT, 64k tokens a sequence, one node of 2 GPUs with 80 GB or more; mock data:
#
#   bash examples/megatron/2_gpus_1b_64k.sh [MORE ARGUMENTS]
#
# GPUS=1 before it trains on one. Planned, and held to it by tests/test_megatron_examples.py:
#
#   ring-sp plan --model llama-8b:layers=20,hidden=2048,heads=16,kv_heads=4,ffn=5632,vocab=32000 \
#       --gpu h200 --gpus 2 --seq 64k --ring 2 --checkpoint none --ff-chunk 0 --loss-chunk 0 \
#       --shard optimizer
#
# Memory       12.4 GB of weights (1.03B x (2 bytes of bf16, 4 of gradient, 12 of Adam / 2 ranks)),
#              39.7 GB of activations (1,210,112 bytes a token x 32,768), 6.6 GB of logits: 58.6 GB.
# Work         6 x 0.97B x 65,536 + 12 x 20 layers x 16 heads x 128 x 2.148e+09 pairs = 1.4 PFLOP
#              a sequence. Step 1.48 s, 44.2k tokens/s, MFU 0.49.
#              Measured, 2x H200: 1.46 s, 44.9k tokens/s, 0.50, peak 56.6 GB (RESULTS.md).
# Messages     67.1 MB at 285 GB/s take 0.24 ms under 7.15 ms of attention.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
gpus=${GPUS:-2}
CUDA_DEVICE_MAX_CONNECTIONS=1 exec torchrun --standalone --nproc_per_node "$gpus" \
    "$here/pretrain.py" --sequence-parallel-ring "$gpus" \
    --num-layers 20 --hidden-size 2048 --ffn-hidden-size 5632 --swiglu \
    --num-attention-heads 16 --group-query-attention --num-query-groups 4 \
    --seq-length 65536 --max-position-embeddings 65536 --position-embedding-type rope \
    --rotary-base 1000000 --normalization RMSNorm --disable-bias-linear \
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 \
    --micro-batch-size 1 --global-batch-size 1 --train-iters 50 --lr 3e-4 --min-lr 3e-5 \
    --lr-decay-style cosine --lr-warmup-iters 10 --bf16 --use-distributed-optimizer \
    --calculate-per-token-loss --mock-data --tokenizer-type NullTokenizer --vocab-size 31999 \
    --transformer-impl local --no-gradient-accumulation-fusion --no-persist-layer-norm \
    --no-masked-softmax-fusion --no-rope-fusion --log-interval 1 --eval-iters 0 \
    --eval-interval 1000 "$@"
