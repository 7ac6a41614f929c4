#!/usr/bin/env bash
# Runs a command in N processes of this machine that train together, each with its lines on stderr marked by its number:
#   scripts/launch_local.sh 2 .venv/bin/rlhf-jax train configs/demo.toml
# On a machine with several GPUs each process gets its own. Ends with the exit code of the process that failed first, or
# 0. A signal is passed to all of them.
set -uo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: scripts/launch_local.sh N COMMAND..." >&2
    exit 2
fi
count=$1
shift
# A port that the system has just given, and that is free again.
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export RLHF_JAX_COORDINATOR=127.0.0.1:$port RLHF_JAX_PROCESSES=$count
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)

processes=()
for ((i = 0; i < count; i++)); do
    if ((gpus >= count)); then
        each=$((gpus / count))
        export CUDA_VISIBLE_DEVICES=$(seq -s, $((i * each)) $((i * each + each - 1)))
    fi
    RLHF_JAX_PROCESS_ID=$i "$@" 2> >(sed -u "s/^/[$i] /" >&2) &
    processes+=($!)
done
for signal in TERM INT USR1; do
    trap "kill -$signal ${processes[*]} 2>/dev/null" "$signal"
done

code=0
left=$count
while ((left)); do
    wait -n -p ended "${processes[@]}"
    status=$?
    [[ -n ${ended:-} ]] || continue # a signal has come
    left=$((left - 1))
    if ((status && !code)); then
        code=$status
        for i in "${!processes[@]}"; do
            if [[ ${processes[i]} == "$ended" ]]; then
                echo "launch_local.sh: process $i of $count ended first, with exit code $status" >&2
            fi
        done
    fi
    for i in "${!processes[@]}"; do
        if [[ ${processes[i]} == "$ended" ]]; then unset "processes[i]"; fi
    done
done
exit "$code"
