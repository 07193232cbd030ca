#!/usr/bin/env bash
# A 70B GPT (Llama 3 70B's shape) at 2M tokens a sequence on 64 nodes of 8 H100; planned, not run:
#
#   NODES=64 NODE=0 HEAD=host:29500 DATA=prefix TOKENIZER=path bash 512_gpus_70b_2m.sh SCRIPT
#
# SCRIPT is Megatron-LM's pretrain_gpt.py. Tensor 8 (a node) x ring 64: 32,768 tokens a ring rank.
#
# Weights      70.6B / 8 tensor ranks: bf16 2 + gradients 4 bytes, Adam 12 / 64: 55 GB a GPU.
# Activations  12 bytes x 4,096 x 8,192 x 80 layers = 32 GB with the MLP recomputed: 90 GB with
#              logits, too much for 80. With full recomputation 2 x 4,096 x 8,192 x 80 = 5.4 GB and
#              one layer's 1.1 GB: 65 GB, and the ring's forward runs twice. On H200 leave it out.
# Work         a token: 6 x 69.5B = 0.42 TFLOP + attention 6 x 80 x 8,192 x 2,097,152 = 8.25 TFLOP;
#              a sequence 18.2 EFLOP, 24.2 with recomputation. At 560 TFLOP/s a GPU: 84 s, 25k
#              tokens/s, 43% of 989 TFLOP/s (63 s, 33k, 57% without).
# Messages     keys and values of a step, 32,768 x 2 x 128 x 2 bytes = 17 MB: 0.34 ms at 50 GB/s
#              under 3.9 ms of attention; backward 1 under 10 ms.
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
