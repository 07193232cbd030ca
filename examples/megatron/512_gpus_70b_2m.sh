#!/usr/bin/env bash
# A 70B GPT (Llama 3 70B's shape) at 2M tokens a sequence on 64 nodes of 8 H100; planned, not run:
#
#   NODES=64 NODE=0 HEAD=host:29500 DATA=prefix TOKENIZER=path bash 512_gpus_70b_2m.sh SCRIPT
#
# SCRIPT is Megatron-LM's pretrain_gpt.py. Tensor 8 (a node) x ring 64: 32,768 tokens a ring rank.
# Planned, and held to it by tests/test_megatron_examples.py:
#
#   ring-sp plan --model llama-70b --gpu h100 --gpus 512 --seq 2M --tensor 8 --ring 64 \
#       --checkpoint selective --ff-chunk 0 --loss-chunk 0 --shard optimizer
#
# Memory       54.6 GB of weights (70.55B / 8 tensor ranks x (2 + 4 + 12 / 64 bytes)), 10.8 GB of
#              activations (2,642,432 bytes a token x 32,768 / 8), 4.2 GB of logits: 69.6 GB of 80.
#              Layers are recomputed, but their attention is kept: half of the activations.
# Work         6 x 69.50B x 2,097,152 + 12 x 80 layers x 64 heads x 128 x 2.199e+12 pairs = 874.5 +
#              17,293.8 PFLOP a sequence. Step 76.39 s, 27.5k tokens/s, MFU 0.47; with
#              --no-ring-keep-attention, a ring more, 95.84 s (--checkpoint full).
# Messages     16.8 MB at 45 GB/s take 0.37 ms under 3.80 ms of attention.
set -euo pipefail
CUDA_DEVICE_MAX_CONNECTIONS=1 exec torchrun --nnodes "$NODES" --node_rank "$NODE" \
    --nproc_per_node 8 --rdzv_endpoint "$HEAD" -m ring_sp.integrations.megatron "$1" \
    --sequence-parallel-ring 64 --tensor-model-parallel-size 8 --sequence-parallel \
    --num-layers 80 --hidden-size 8192 --ffn-hidden-size 28672 --swiglu \
    --num-attention-heads 64 --group-query-attention --num-query-groups 8 \
    --seq-length 2097152 --max-position-embeddings 2097152 --position-embedding-type rope \
    --rotary-base 100000000 --normalization RMSNorm --disable-bias-linear \
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 \
    --micro-batch-size 1 --global-batch-size 2 --train-iters 1000 --eval-interval 500 \
    --lr 5e-6 --min-lr 5e-7 \
    --lr-decay-style cosine --lr-warmup-iters 50 --bf16 --use-distributed-optimizer \
    --calculate-per-token-loss --no-create-attention-mask-in-dataloader \
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1 \
    --data-path "$DATA" --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER"
