#!/bin/bash
# One table of speeds on this GPU: every kernel, every product, attention, the whole training step of LLaMA-2-7B; with
# PEERS=1 the PyTorch peers in the same run. `make bench` runs all parts; PART="step" or PART="kernels matmul" some of
# them, each a few minutes. Peers' scripts: the folder PEER_SCRIPTS (attention_peers.py, peer_titan.py).
cd "$(dirname "$0")/.."
build=${BUILD:-build/cuda}
python=${PYTHON:-python3}
scripts=${PEER_SCRIPTS:-../shared/peers}
part=${PART:-kernels matmul attention step}
echo "$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -1), commit $(git rev-parse --short HEAD 2> /dev/null || echo unknown)"

# step NAME OPTIONS...: the median of the steps after the third, and what the run took of the GPU's memory.
step() {
    name=$1
    shift
    ./train_llama -e llama2-7b --device gpu --grad_dtype bf16 --opt_dtype bf16 --master none --steps 9 "$@" > build/step.log 2>&1 ||
        { echo "| $name | failed: $(tail -1 build/step.log) |"; return; }
    grep '^step' build/step.log | tail -6 | awk -F'|' -v name="$name" '
        { split($5, ms, " "); split($6, tok, " "); split($7, tf, " "); split($8, gib, " ")
          m[NR] = ms[1]; t[NR] = tok[1]; f[NR] = tf[1]; g = gib[1] }
        END { n = asort_by(m, t, f); i = int((n + 1) / 2)
              printf "| %-34s | %7.0f ms | %7.0f tokens/s | %5.1f TF/s | %6.2f GiB |\n", name, m[i], t[i], f[i], g }
        function asort_by(m, t, f,   i, j, x) {
            for (i = 2; i <= NR; i++)
                for (j = i; j > 1 && m[j] < m[j - 1]; j--) {
                    x = m[j]; m[j] = m[j - 1]; m[j - 1] = x
                    x = t[j]; t[j] = t[j - 1]; t[j - 1] = x
                    x = f[j]; f[j] = f[j - 1]; f[j - 1] = x
                }
            return NR
        }'
    grep -o 'recompute [^|]*' build/step.log | head -1 | sed 's/^/    /'
}

for p in $part; do
    echo "== $p"
    case $p in
        kernels | matmul | attention) $build/bench_$p ;;
        step)
            step "7B, 4 x 4K, full" -c 4096 -b 4 --attention full
            step "7B, 32K, full" -c 32768 --attention full
            step "7B, 64K, full" -c 65536 --attention full
            step "7B, 64K, anchor, mean 4096" -c 65536 --attention anchor --generator_mean 4096
            step "7B, 64K, anchor, mean 16384" -c 65536 --attention anchor --generator_mean 16384
            ;;
    esac
done
if [ "$PEERS" = 1 ]; then
    echo "== peers"
    for args in "65536 32 flex:4096 1" "4096 32 sdpa 4" "32768 32 sdpa 1" "65536 32 sdpa 1"; do
        case " ${PEER_STEPS:-4096 32768 65536} " in *" ${args%% *} "*) $python "$scripts/peer_titan.py" $args 2>&1 | tail -1 ;; esac
    done
    [ "${PEER_ATTENTION:-1}" = 0 ] || for args in "" "flex 65536 4096" "flex 65536 16384" "flex 16384 2048"; do
        $python "$scripts/attention_peers.py" $args 2>&1 | grep -v Warning
    done
fi
