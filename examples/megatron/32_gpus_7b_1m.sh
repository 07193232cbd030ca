#!/usr/bin/env bash
# A 7B GPT (of Llama 3 8B's shape) at 1M tokens a sequence on 4 nodes of 8 H200; planned, not run:
#
#   NODES=4 NODE=0 HEAD=host:29500 DATA=prefix TOKENIZER=path bash 32_gpus_7b_1m.sh SCRIPT
#
# SCRIPT is Megatron-LM's pretrain_gpt.py. Tensor 2 x ring 16: 65,536 tokens a ring rank.
# Planned, and held to it by tests/test_megatron_examples.py:
#
#   ring-sp plan --model llama-8b --gpu h200 --gpus 32 --seq 1M --tensor 2 --outer 4 --ring 4 \
#       --checkpoint none --ff-chunk 8192 --loss-chunk 0 --shard optimizer
#
# Memory       27.1 GB of weights (8.03B / 2 tensor ranks x (2 + 4 + 12 / 16 bytes)), 47.4 GB of
#              activations (1,446,400 bytes a token x 65,536 / 2; without --ring-ff-chunk 146), 26.3
#              GB of logits: 100.8 GB of 141.
# Work         6 x 7.50B x 1,048,576 + 12 x 32 layers x 32 heads x 128 x 5.498e+11 pairs = 47.2 +
#              864.7 PFLOP a sequence. Step 56.31 s, 18.6k tokens/s, MFU 0.51.
# Messages     134.2 MB at 285 GB/s take 0.47 ms under 28.02 ms of attention, between hosts
#              134.2 MB at 45 GB/s take 2.98 ms under 112.07 ms of attention.
set -euo pipefail
CUDA_DEVICE_MAX_CONNECTIONS=1 exec torchrun --nnodes "$NODES" --node_rank "$NODE" \
    --nproc_per_node 8 --rdzv_endpoint "$HEAD" -m ring_sp.integrations.megatron "$1" \
    --sequence-parallel-ring 16 --ring-outer 4 --ring-ff-chunk 8192 \
    --tensor-model-parallel-size 2 --sequence-parallel \
    --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --swiglu \
    --num-attention-heads 32 --group-query-attention --num-query-groups 8 \
    --seq-length 1048576 --max-position-embeddings 1048576 --position-embedding-type rope \
    --rotary-base 50000000 --normalization RMSNorm --disable-bias-linear \
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 \
    --micro-batch-size 1 --global-batch-size 4 --train-iters 1000 --eval-interval 500 \
    --lr 1e-5 --min-lr 1e-6 \
    --lr-decay-style cosine --lr-warmup-iters 50 --bf16 --use-distributed-optimizer \
    --calculate-per-token-loss --no-create-attention-mask-in-dataloader \
    --data-path "$DATA" --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER"
