#!/usr/bin/env bash
# A 7B GPT (of Llama 3 8B's shape) at 1M tokens a sequence on 4 nodes of 8 H200; planned, not run:
#
#   NODES=4 NODE=0 HEAD=host:29500 DATA=prefix TOKENIZER=path bash 32_gpus_7b_1m.sh SCRIPT
#
# SCRIPT is Megatron-LM's pretrain_gpt.py. Tensor 2 x ring 16: 65,536 tokens a ring rank.
#
# Weights      8.0B / 2 tensor ranks: bf16 2 + gradients 4 bytes, Adam 12 / 16: 27 GB a GPU.
# Activations  12 bytes x 32,768 x 4,096 x 32 layers = 51 GB with the MLP recomputed (else 147);
#              logits 6 bytes x 65,536 x 64,128 = 25 GB. In all 103 GB of 141.
# Work         a token: 6 x 7.5B = 45 GFLOP + attention 6 x 32 x 4,096 x 1,048,576 = 825 GFLOP; a
#              sequence 0.91 EFLOP. At 560 TFLOP/s a GPU: 52 s, 20k tokens/s, 56% of 989 TFLOP/s.
# Messages     keys and values of a step, 65,536 x 2 x 4 x 128 x 2 bytes = 134 MB: 2.7 ms at 50 GB/s
#              between nodes under 15 ms of attention; backward 8 under 38 ms. Full recomputation
#              would go round the ring once more: 17 s a sequence.
set -euo pipefail
CUDA_DEVICE_MAX_CONNECTIONS=1 exec torchrun --nnodes "$NODES" --node_rank "$NODE" \
    --nproc_per_node 8 --rdzv_endpoint "$HEAD" -m ring_sp.integrations.megatron "$1" \
    --sequence-parallel-ring 16 --ring-outer 4 --tensor-model-parallel-size 2 --sequence-parallel \
    --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --swiglu \
    --num-attention-heads 32 --group-query-attention --num-query-groups 8 \
    --seq-length 1048576 --max-position-embeddings 1048576 --position-embedding-type rope \
    --rotary-base 50000000 --normalization RMSNorm --disable-bias-linear \
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 \
    --micro-batch-size 1 --global-batch-size 4 --train-iters 1000 --eval-interval 500 \
    --lr 1e-5 --min-lr 1e-6 \
    --lr-decay-style cosine --lr-warmup-iters 50 --bf16 --use-distributed-optimizer \
    --calculate-per-token-loss --no-create-attention-mask-in-dataloader \
    --recompute-granularity selective --recompute-modules mlp \
    --data-path "$DATA" --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER"
