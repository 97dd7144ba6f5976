#!/usr/bin/env bash
# On a machine with a GPU: what each kernel of a decode step takes, by ncu, as a table for each batch size.
#   tools/gpu_bundle/profile.sh LOCKSTEP MODEL OUT [BATCH]...        (default: 1 8 64 256)
# Writes OUT/ncu_bN.csv, OUT/bench_bN.json (the same step without ncu) and OUT/profile_bN.md. Clocks and caches are left as
# they are. CONTEXT (128) and LAUNCHES (1200), how many kernels are profiled, may be set.
set -euo pipefail
here=$(dirname "$(realpath "$0")")
lockstep=$1 model=$2 out=$3
shift 3
[ $# -gt 0 ] || set -- 1 8 64 256
mkdir -p "$out"

wanted=(
    gpu__time_duration.sum
    dram__bytes_read.sum dram__bytes_write.sum
    lts__t_bytes.sum lts__throughput.avg.pct_of_peak_sustained_elapsed
    sm__inst_executed_pipe_tensor_op_hmma.sum
    smsp__inst_executed_op_local_ld.sum smsp__inst_executed_op_local_st.sum
    l1tex__t_bytes_pipe_lsu_mem_local_op_ld.sum l1tex__t_bytes_pipe_lsu_mem_local_op_st.sum
    sm__warps_active.avg.pct_of_peak_sustained_active
    launch__registers_per_thread launch__shared_mem_per_block_static launch__shared_mem_per_block_dynamic
)
# One name that this ncu does not know would end it. What `launch__` names is no counter, and in no list.
known=$(ncu --query-metrics 2>/dev/null || true)
metrics=
for metric in "${wanted[@]}"; do
    if [[ $metric == launch__* || -z $known ]] || grep -qw -- "${metric%%.*}" <<<"$known"; then
        metrics+=${metrics:+,}$metric
    else
        echo "left out: this ncu does not know $metric" >&2
    fi
done

for batch in "$@"; do
    options=(--model "$model" --device cuda:0 --only decode --batch "$batch" --context "${CONTEXT:-128}")
    "$lockstep" bench "${options[@]}" --runs 3 --tokens 64 --json >"$out/bench_b$batch.json"
    # The program says where its timed run begins: before it are choices, self-tests, warming up and recording, in it the
    # steps of the prompts, which differ from those that follow.
    ncu --profile-from-start off --clock-control none --cache-control none --print-units base --metrics "$metrics" \
        --launch-count "${LAUNCHES:-1200}" --csv \
        "$lockstep" bench "${options[@]}" --runs 1 --tokens 12 >"$out/ncu_b$batch.csv"
    {
        echo "# Decode step, batch $batch, context ${CONTEXT:-128}"
        echo
        grep -m 1 '^device ' "$out/ncu_b$batch.csv" || true
        echo
        python3 "$here/profile.py" "$out/ncu_b$batch.csv" --bench "$out/bench_b$batch.json" --batch "$batch"
    } | tee "$out/profile_b$batch.md"
done
