#!/bin/bash
# One table of speeds on this GPU: every kernel, every product, attention, the whole training step of LLaMA-2-7B; with
# PEERS=1 the PyTorch peers in the same run, and our speed over theirs. `make bench` runs all parts and says how long each
# took; PART="kernels matmul", PART=attention or PART=step runs some of them. FlexAttention's peers are a part of their own,
# PART=flex, since it compiles for minutes: FLEX="16384:2048" some of its cases (tokens:mean length of the documents).
# PART=turns holds causal attention beside cuDNN's in turn, each behind a second of the same products (dev/bench_turns.py).
# PART=step are the steps with a full mask, PART=anchor and PART=anchor64 those with documents. STEPS="4k 32k" some of all
# steps: 4k, 32k, 64k, 4k-1024, 32k-4096, 64k-4096, 64k-16384 (mean length of the documents), 64k-14 and 64k-18 (bytes a
# parameter).
# PART=ring spreads a row over RANKS GPUs (all of this host), by each exchange: LENGTHS="16384 65536 262144" tokens,
# MASKS="full 4096" (mean length of the documents), BACKENDS="ring allgather ulysses"; beyond 65536 tokens a GPU with 8 of
# the 32 layers. Other options of the trainer for all steps: OPTIONS="--portable_attention", OPTIONS=--deterministic.
# An H200 takes, in seconds, with PEERS=1: kernels 10, matmul 220, attention 75, flex 40, 25 and 250 (compiling), the steps 4k
# and 32k 150 together, 64k 230. Where a command may last nine minutes only, PART and STEPS cut it.
# Peers' scripts: the folder PEER_SCRIPTS (attention_peers.py, peer_titan.py).
cd "$(dirname "$0")/.."
build=${BUILD:-build/cuda}
python=${PYTHON:-python3}
scripts=${PEER_SCRIPTS:-../shared/peers}
part=${PART:-kernels matmul attention $([ "$PEERS" = 1 ] && echo flex) step $([ "$STEPS" ] || echo anchor anchor64)}
flex=${FLEX:-65536:4096 65536:16384 16384:2048}
ranks=${RANKS:-$(sh dev/gpus.sh)}
launch= # before our program; on several GPUs, mpirun
echo "$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -1), commit $(git rev-parse --short HEAD 2> /dev/null || echo unknown)"

# ours NAME OPTIONS...: the median of the steps after the third, what the run took of the GPU's memory and, with several
# GPUs, the shares of the step for data that nothing hid and for ranks that were late; sets tf.
ours() {
    name=$1 tf=
    shift
    $launch "${TRAIN_LLAMA:-./train_llama}" -e llama2-7b --device gpu --grad_dtype bf16 --opt_dtype bf16 --master none --steps 8 "$@" $OPTIONS > build/step.log 2>&1 ||
        { echo "| $name | failed: $(tail -1 build/step.log) |"; return; }
    grep '^step' build/step.log | tail -5 | awk -F'|' -v name="$name" '
        { split($5, ms, " "); split($6, tok, " "); split($7, tf, " "); split($8, gib, " ")
          m[NR] = ms[1]; t[NR] = tok[1]; f[NR] = tf[1]; g = gib[1]; s[NR] = $9 }
        END { n = asort_by(m, t, f, s); i = int((n + 1) / 2)
              printf "| %-34s | %7.0f ms | %7.0f tokens/s | %5.1f TF/s | %6.2f GiB |%s\n", name, m[i], t[i], f[i], g,
                     s[i] == "" ? "" : s[i] " |" }
        function asort_by(m, t, f, s,   i, j, x) {
            for (i = 2; i <= NR; i++)
                for (j = i; j > 1 && m[j] < m[j - 1]; j--) {
                    x = m[j]; m[j] = m[j - 1]; m[j - 1] = x
                    x = t[j]; t[j] = t[j - 1]; t[j - 1] = x
                    x = f[j]; f[j] = f[j - 1]; f[j - 1] = x
                    x = s[j]; s[j] = s[j - 1]; s[j - 1] = x
                }
            return NR
        }' | tee build/step.row
    tf=$(awk -F'|' '{ split($5, x, " "); print x[1] }' build/step.row)
    grep -o 'recompute [^|]*' build/step.log | head -1 | sed 's/^/    /'
}
# peer ARGUMENTS...: of peer_titan.py, and the ratio of what `ours` has just measured to it.
peer() {
    [ "$PEERS" = 1 ] || return
    $python ${launch:+-m torch.distributed.run --nproc-per-node $ranks} "$scripts/peer_titan.py" "$@" 2>&1 |
        awk '{ last = $0 } /^(titan|FAILED)/ { row = $0 } END { print row == "" ? last : row }' | tee build/peer.row
    [ -z "$tf" ] || awk -v ours="$tf" '{ for (i = 1; i < NF; i++) if ($i == "model") printf "    ratio %.2f\n", ours / $(i + 1) }' build/peer.row
}
# ratios OURS PEERS: the rows of bench_attention over those of attention_peers.py for the same case.
ratios() {
    awk -F'|' 'FNR == NR { gsub(/^ +| +$/, "", $2); split($3, f, " "); split($4, b, " ")
                           name[++n] = $2; fw[$2] = f[3]; bw[$2] = b[3]; next }
        /S=.* fwd .* bwd / {
            split($0, s, "S="); split(s[2], x, " "); k = x[1] / 1024 "K"
            split($0, word, " "); peer = word[1] (word[1] == "torch" ? " " word[2] : "")
            mean = ""; if (match($0, /mean=[0-9]+/)) mean = substr($0, RSTART + 5, RLENGTH - 5)
            for (i = 1; i <= n; i++)
                if (name[i] == k " causal" && mean == "" || mean != "" && name[i] == k " anchor, mean " mean)
                    printf "| %-22s | %.2f forward, %.2f backward, times %s |\n", name[i], fw[name[i]] / x[5], bw[name[i]] / x[10], peer
        }' "$1" "$2"
}
# cuDNN and FlashAttention-2 beside our kernels, the latter also beside the portable ones: it is written for A100. The
# peers' script goes from case to case on a GPU that comes from products; so do ours, once more, for the ratios.
attention() {
    $build/bench_attention | tee build/attention.txt
    if [ "$PEERS" = 1 ]; then
        $build/bench_attention causal hot | tee build/attention.txt
        $python "$scripts/attention_peers.py" 2>&1 | grep causal | tee build/attention_peers.txt
        ratios build/attention.txt build/attention_peers.txt
    fi
    $build/bench_attention "" portable | tee build/attention.txt
    [ "$PEERS" = 1 ] && grep FA2 build/attention_peers.txt | ratios build/attention.txt -
}
flex() {
    $build/bench_attention anchor | tee build/attention.txt
    [ "$PEERS" = 1 ] || return
    for case in $flex; do
        since=$SECONDS
        $python "$scripts/attention_peers.py" flex ${case%:*} ${case#*:} 2>&1 |
            awk '{ last = $0 } /^flex anchor/ { row = $0 } END { print row == "" ? last : row }' | tee build/attention_peers.txt
        ratios build/attention.txt build/attention_peers.txt
        echo "    $case: $((SECONDS - since)) s"
    done
}
step() {
    case $1 in
        4k) ours "7B, 4 x 4K, full" -c 4096 -b 4 --attention full; peer 4096 32 sdpa 4 ;;
        32k) ours "7B, 32K, full" -c 32768 --attention full; peer 32768 32 sdpa 1 ;;
        64k) ours "7B, 64K, full" -c 65536 --attention full; peer 65536 32 sdpa 1 ;;
        4k-1024) ours "7B, 4 x 4K, anchor, mean 1024" -c 4096 -b 4 --generator_mean 1024; peer 4096 32 flex:1024 4 ;;
        32k-4096) ours "7B, 32K, anchor, mean 4096" -c 32768 --generator_mean 4096; peer 32768 32 flex:4096 1 ;;
        64k-4096) ours "7B, 64K, anchor, mean 4096" -c 65536 --generator_mean 4096; peer 65536 32 flex:4096 1 ;;
        64k-16384) ours "7B, 64K, anchor, mean 16384" -c 65536 --generator_mean 16384; peer 65536 32 flex:16384 1 ;;
        64k-14) ours "7B, 64K, full, 14 bytes a parameter" -c 65536 --attention full --grad_dtype float --master float ;;
        64k-18) ours "7B, 64K, full, 18 bytes a parameter" -c 65536 --attention full --grad_dtype float --opt_dtype float --master float ;;
        *) echo "no such step: $1" ;;
    esac
}

# One row of 7B over all ranks by every exchange; where there is a peer, the ratio is that of the last exchange.
ring() {
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    launch="mpirun --oversubscribe --bind-to none -np $ranks"
    for length in ${LENGTHS:-16384 65536 262144}; do
        for mask in ${MASKS:-full 4096}; do
            layers=$((length > 65536 * ranks ? 8 : 32))
            case $mask in
                full) options="--attention full" ;;
                *) options="--generator_mean $mask" ;;
            esac
            for backend in ${BACKENDS:-ring allgather ulysses}; do
                ours "$length, $mask, $layers layers, $backend" -c $length --layers $layers $options --ring_backend $backend
            done
            [ "$mask" = full ] && peer $length $layers sdpa 1
        done
    done
    launch=
}

for p in $part; do
    echo "== $p"
    began=$SECONDS
    case $p in
        attention) attention ;;
        flex) flex ;;
        turns) $python dev/bench_turns.py --bench $build/bench_attention ${TURNS:-16384 65536} ;;
        step) for s in ${STEPS:-4k 32k 64k}; do step $s; done ;;
        anchor) for s in ${STEPS:-4k-1024 32k-4096}; do step $s; done ;;
        anchor64) for s in ${STEPS:-64k-4096 64k-16384}; do step $s; done ;;
        ring) ring ;;
        *) $build/bench_$p ;;
    esac
    echo "== $p took $((SECONDS - began)) s"
done
