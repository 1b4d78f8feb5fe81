// train_llama with one difference, as a control for the study of bf16 (scripts/rope_training.py): in a bf16 network,
// RoPE and attention are computed in fp32. What a mask gains with this cannot be the repair of a bf16 attention.
//
//     make train_fp32_attention && ./train_fp32_attention ...         options as train_llama's; one rank
//
// It is the trainer's own source, in which five names mean the functions of fp32_attention.h.
#include "fp32_attention.h"

#define attention_tiles fp32::attention_tiles
#define rope_forward fp32::rope_forward
#define rope_backward fp32::rope_backward
#define ring_attention_forward fp32::ring_attention_forward
#define ring_attention_backward fp32::ring_attention_backward
#include "../train_llama.cu"
