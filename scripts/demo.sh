#!/bin/sh
# A small model learns to recall facts at 512 tokens, then at 2048: RoPE base 1000 -> 10000 and a short training.
# Writes demo/ and demo.png; two or three minutes on two cores.
#   SEED=2 sh scripts/demo.sh
set -e
cd "$(dirname "$0")/.."
PYTHON=.venv/bin/python
SEED=${SEED:-1}
rm -rf demo
mkdir demo

RUN="./train_llama"
if command -v mpirun >/dev/null && ! ./train_llama -e tiny --device cpu --steps 1 -c 16 2>/dev/null | grep -q serial; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    RUN="mpirun --oversubscribe -np 2 ./train_llama --device cpu"
fi
score() { # $1 weights, $2 CSV, then options
    $RUN -e "$1" -j demo/test.bin -c 2048 --val_rows 32 --eval "demo/$2" "$3" "$4" | tail -1
    $PYTHON data/recall.py score demo/test.bin "demo/$2"
}

echo "== a corpus of facts and questions"
$PYTHON data/recall.py train demo/short.bin --tokens 6000000 --length 64 511 --seed "$SEED"
$PYTHON data/recall.py train demo/long.bin --tokens 1400000 --length 256 2047 --seed "1$SEED"
$PYTHON data/recall.py test demo/test.bin --rows 32 --context 2048 --seed "2$SEED"

echo "== training from scratch at context 512, documents packed behind one anchor, on 2 ranks"
$RUN -e tiny --tied --layers 2 --channels 64 --heads 2 --ffn 176 --rope_base 1000 --seed "$SEED" -i demo/short.bin \
    -c 512 -b 4 --steps 2920 -l 6e-3 --schedule cosine --warmup 50 --weight_decay 0.01 -o demo/short \
    --log_every 200
SHORT=demo/short/step_00002920/weights.bin
[ -f "$SHORT" ] || { echo "demo.sh: the training was stopped"; exit 1; }
echo "== how far it recalls in rows of 2048, as it is"
score "$SHORT" before.csv --rope_base 1000
echo "== with the RoPE base raised to 10000"
score "$SHORT" base.csv --rope_base 10000

echo "== training on, a little, at context 2048"
$RUN -e "$SHORT" --rope_base 10000 --seed "$SEED" -i demo/long.bin -c 2048 -b 2 --steps 340 -l 2e-3 \
    --schedule cosine --warmup 10 --weight_decay 0.01 -o demo/long --log_every 40
LONG=demo/long/step_00000340/weights.bin
[ -f "$LONG" ] || { echo "demo.sh: the training was stopped"; exit 1; }
score "$LONG" after.csv --rope_base 10000

echo "== a sample: facts, and what the model says to questions about them"
./train_llama -e "$LONG" --prompt 304,21,100,53,280,290,285,257 --generate 1 --temperature 0 -c 64 --vocab_file demo/short.vocab
$PYTHON scripts/plot_demo.py demo demo.png
