#!/bin/sh
# How many GPUs a program sees here.
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    echo "$CUDA_VISIBLE_DEVICES" | tr , '\n' | grep -c .
else
    nvidia-smi -L 2> /dev/null | grep -c '^GPU '
fi
