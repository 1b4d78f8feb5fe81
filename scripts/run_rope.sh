#!/bin/sh
# The deviation experiment on a model of our own: trains 110M parameters (12 layers, 6 heads of LLaMA-2's size 128) on
# text in context 4096, two books held out, and measures random weights and several checkpoints on the held-out books.
#   make train_llama test_rope && sh scripts/run_rope.sh books.jsonl tokenizer.model
# One GPU. Everything is in rope/: run (checkpoints), result (the last one's figures), random_* and step_*, figures; and,
# with PROTOCOL=1, in some minutes more: paper and paper_random, where as many sequences as the paper's go through all
# of its shifts and lengths (figure 1 of both in paper); weights, what P V and rounded logits have in D; sink_*, sinks
# made by hand, and none (sink_0). What is there already, of the same weights by the same options, is not measured
# again: a stopped run goes on by the same command, and PROTOCOL=1 may follow in a call of its own.
# 1000 updates, or as many as go 8 times through a smaller text: more of them would learn it by heart.
# Otherwise by the environment: FOLDER, MODEL, CONTEXT, BATCH, STEPS, LR, SAVE_EVERY, POINTS (checkpoints to look at),
# ATTENTION (anchor: every row begins with BOS), ROPE_OPTIONS (of the whole experiment), DEVICE; SEQUENCES of the last
# checkpoint, and SWEEP of them for all shifts and bases; as many at the other points and with sinks; SINKS, by what a
# sink raises its key's logit, and SINK_KEY, where one by 6 is made as well.
set -e
cd "$(dirname "$0")/.."
[ $# = 2 ] || { sed -n '2,14s/^# *//p' "$0"; exit 1; }
MODEL=${MODEL:--e 120M --tied --heads 6}
CONTEXT=${CONTEXT:-4096} BATCH=${BATCH:-8} LR=${LR:-1e-3} DEVICE=${DEVICE:-auto}
FOLDER=${FOLDER:-rope} ATTENTION=${ATTENTION:-full}
SEQUENCES=${SEQUENCES:-50} SWEEP=${SWEEP:-8}
PROTOCOL=${PROTOCOL:-0} SINKS=${SINKS-0 2 4 6 8} SINK_KEY=${SINK_KEY:-1000}
PYTHON=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)
for program in train_llama test_rope; do
    [ -x $program ] || { echo "run_rope.sh: no ./$program here: make $program"; exit 1; }
done
mkdir -p "$FOLDER"
began=$(date +%s)
say() { echo "== $(($(date +%s) - began)) s: $*"; }

[ -n "$(ls "$FOLDER"/books_val*.bin 2>/dev/null)" ] ||
    $PYTHON data/prepare.py "$1" -o "$FOLDER/books" --tokenizer "$2" --val_documents 2
tokens=$($PYTHON -c 'import sys; sys.path.insert(0, "data"); from token_file import read_shard
print(sum(len(read_shard(path)["tokens"]) for path in sys.argv[1:]))' "$FOLDER"/books_0*.bin)
update=$((BATCH * CONTEXT)) epochs=8
most=$((epochs * tokens / update)) wanted=${STEPS:-1000}
if [ "$wanted" -gt "$most" ]; then
    small="run_rope.sh: $wanted updates of $update tokens go more than $epochs times through the $tokens tokens of $FOLDER/books_0*.bin"
    enough=$(((wanted * update + epochs - 1) / epochs))
    [ -z "$STEPS$SAVE_EVERY$POINTS" ] && [ "$most" -ge 8 ] ||
        { echo "$small: at most $most do not; $enough tokens would be enough"; exit 1; }
    STEPS=$((most / 8 * 8)) # its eighth, quarter and half are looked at
    echo "$small: $STEPS are made; $enough tokens would be enough"
fi
STEPS=${STEPS:-1000}
SAVE_EVERY=${SAVE_EVERY:-$((STEPS < 8 ? 1 : STEPS / 8))}
POINTS=${POINTS:-$SAVE_EVERY $((2 * SAVE_EVERY)) $((4 * SAVE_EVERY))}
say "training on $((STEPS * update / 1000)) thousand tokens, $tokens in the text"
./train_llama $MODEL -i "$FOLDER/books_0*.bin" -j "$FOLDER/books_val*.bin" -c "$CONTEXT" -b "$BATCH" --steps "$STEPS" \
    -l "$LR" --schedule cosine --warmup $((STEPS / 10)) --attention "$ATTENTION" --device "$DEVICE" --val_rows 8 \
    --val_every "$SAVE_EVERY" --save_every "$SAVE_EVERY" --keep 0 --log_every 25 -o "$FOLDER/run" --resume
LAST=$FOLDER/run/step_$(printf %08d "$STEPS")/weights.bin
[ -f "$LAST" ] || { echo "run_rope.sh: no $LAST: the training was stopped; the same command goes on"; exit 1; }

look() { # $1 weights, $2 folder under $FOLDER/, $3 label, then options
    weights=$1 folder=$FOLDER/$2 label=$3
    shift 3
    set -- --model "$weights" --data "$FOLDER/books_val*.bin" --out "$folder" --label "$label" --sweep "$SWEEP" \
        --device "$DEVICE" --plot=0 "$@"
    if [ "$(cat "$folder/done" 2>/dev/null)" = "$*" ] && [ ! "$weights" -nt "$folder/done" ]; then
        echo "$folder: there already; without $folder/done it is measured again"
        return
    fi
    mkdir -p "$folder"
    rm -f "$folder/done"
    ./test_rope "$@"
    printf "%s\n" "$*" > "$folder/done"
}
# At several points of training a few shifts are enough.
FEW="--experiments shift --shifts 0,100,1000 --variants float:F,bf16:E,bf16:F,bf16:C,bf16:A --sequences $SWEEP"
say "random weights and points of training, $SWEEP sequences each"
set --
for start in kaiming normal; do
    look "$LAST" random_$start "random ($start)" --start $start $FEW
    set -- "$@" "$FOLDER/random_$start"
done
for step in $POINTS; do
    look "$FOLDER/run/step_$(printf %08d "$step")/weights.bin" "step_$step" "step $step" $FEW
    set -- "$@" "$FOLDER/step_$step"
done
say "the whole experiment on the last checkpoint, $SEQUENCES sequences"
look "$LAST" result "step $STEPS" --sequences "$SEQUENCES" --length_variants float:F,bf16:C,bf16:A,bf16:D $ROPE_OPTIONS
if [ "$PROTOCOL" != 0 ]; then
    say "all shifts and lengths of the paper, $SEQUENCES sequences"
    all="--experiments shift,length --sequences $SEQUENCES --sweep 0"
    look "$LAST" paper_random "random (kaiming)" --start kaiming $all --variants bf16:C
    look "$LAST" paper "step $STEPS" $all --variants float:F,bf16:C,bf16:A
    say "P V and the logits apart from RoPE, $SEQUENCES sequences"
    look "$LAST" weights "step $STEPS" --experiments shift --shifts 0 --sequences "$SEQUENCES" --variants \
        bf16:E,bf16:E/weights=bf16,bf16:F,bf16:F/weights=bf16,bf16:C/weights=float,bf16:C,bf16:C/logits=bf16
    say "sinks, $SWEEP sequences each"
    sink() { # $1 by what it raises the logit, $2 folder, then options
        raise=$1 folder=$2
        shift 2
        look "$LAST" "$folder" "step $STEPS" --sink "$raise" --experiments shift,length --shifts 0 --sequences "$SWEEP" \
            --variants float:F,bf16:C "$@"
    }
    for raise in $SINKS; do sink "$raise" "sink_$raise"; done
    [ "$SINK_KEY" -ge "$CONTEXT" ] || sink 6 "sink_6_key_$SINK_KEY" --sink_key "$SINK_KEY"
fi
say "figures"
draw="$PYTHON scripts/plot_rope.py"
if $PYTHON -c 'import matplotlib' 2>/dev/null; then
    $draw "$FOLDER/result"
    $draw "$@" "$FOLDER/result" -o "$FOLDER/figures"
    [ "$PROTOCOL" = 0 ] || $draw "$FOLDER/paper_random" "$FOLDER/paper" -o "$FOLDER/paper"
else
    echo "no figures, no matplotlib: where it is, $draw $FOLDER/result; $draw $* $FOLDER/result -o $FOLDER/figures"
fi
say "done"
