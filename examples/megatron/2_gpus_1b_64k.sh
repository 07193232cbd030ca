#!/usr/bin/env bash
# A 1B GPT, 64k tokens a sequence, one node of 2 GPUs with 80 GB or more; mock data:
#
#   bash examples/megatron/2_gpus_1b_64k.sh [MORE ARGUMENTS]
#
# GPUS=1 before it trains on one. Planned:
#
# Weights      20 layers x 45.1M + 2 x 32,000 x 2,048 = 1.03B. bf16 2 + gradients 4 + Adam 12 / 2
#              ranks = 12 bytes each: 12.4 GB.
# Activations  34 bytes x 32,768 tokens x 2,048 x 20 layers = 46 GB without recomputation; logits
#              6 bytes x 32,768 x 32,000 = 6.3 GB. In all 65 GB a GPU.
# Work         a token: 6 x 0.97B = 5.8 GFLOP + attention 6 x 20 x 2,048 x 65,536 = 16.1 GFLOP; a
#              sequence 1.44 PFLOP. At 560 TFLOP/s a GPU: 1.3 s, 51k tokens/s, 57% of 989 TFLOP/s.
#              Measured, 2x H200: 1.46 s, 44.9k tokens/s, 50%, peak 56.6 GB (RESULTS.md).
# Messages     keys and values of a layer, 32,768 x 2 x 4 x 128 x 2 bytes = 67 MB: 0.2 ms by NVLink
#              under 15 ms of attention.
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
