#!/usr/bin/env bash
# On a machine with a GPU: runs the GPU tests, the references and the benchmark of a bundle that pack.sh made.
#   tools/gpu_bundle/run.sh FOLDER [tests|references|full-size|bench|kernels|profile|sass|sanitize|all]...
# Needs python3 with torch and transformers for the references, compute-sanitizer for `sanitize`, ncu for `profile`, ptxas and
# cuobjdump for `sass`. BATCHES names the batch sizes of `profile`.
set -uo pipefail
cd "$(dirname "$0")/../.."
folder=$(realpath "$1")
shift
[ $# -gt 0 ] || set -- all
out=${OUT:-$folder/out}
mkdir -p "$out"
export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:-}:$(python3 -c 'import nvidia, os
print(":".join(os.path.join(p, d, "lib") for p in nvidia.__path__ for d in os.listdir(p)))' 2>/dev/null)"
# Tests know the checkout they were built in.
checkout=$(cat "$folder/checkout")
[ -e "$checkout" ] || { mkdir -p "$(dirname "$checkout")" && ln -s "$PWD" "$checkout"; }
binary=$(cat "$folder/binary")
[ -e "$binary" ] || { mkdir -p "$(dirname "$binary")" && ln -s "$folder/lockstep" "$binary"; }
full_size=${FULL_SIZE:-/tmp/full_size}
failed=0
section() { echo "=== $1 ($(date +%T))"; }
check() { "$@" || { failed=$((failed + 1)); echo "FAILED: $*"; }; }

nvidia-smi -L
for part in "$@"; do
    [ "$part" = tests ] || [ "$part" = all ] && {
        section tests
        for test in "$folder"/tests/*; do
            echo "--- $(basename "$test")"
            check timeout 300 "$test" --ignored --test-threads=4 --skip compiler --skip benchmark
        done
    }
    [ "$part" = references ] || [ "$part" = all ] && {
        section references
        check python3 tools/reference/compare.py --bin "$folder/lockstep" --device cuda:0
    }
    [ "$part" = bench ] || [ "$part" = full-size ] || [ "$part" = profile ] || [ "$part" = all ] && [ ! -d "$full_size" ] && {
        section "making the full-size model"
        check python3 tools/reference/full_size.py --out "$full_size"
    }
    [ "$part" = bench ] || [ "$part" = all ] && {
        section bench
        check "$folder/lockstep" bench --model "$full_size" --device cuda:0 --json >"$out/bench.json"
        check "$folder/lockstep" bench --compare "$out/bench.json" "$out/bench.json"
    }
    [ "$part" = kernels ] && {
        section kernels
        check env -C "$out" "$folder/kernels" --bench gpu/ >"$out/kernels.txt" 2>&1
        grep -v Benchmarking "$out/kernels.txt"
    }
    [ "$part" = profile ] && {
        section profile
        read -ra batches <<<"${BATCHES:-1 8 64 256}"
        check tools/gpu_bundle/profile.sh "$folder/lockstep" "$full_size" "$out" "${batches[@]}"
    }
    [ "$part" = sass ] && {
        section sass
        check tools/gpu_bundle/sass.py --markdown "$out/sass.md"
    }
    [ "$part" = full-size ] || [ "$part" = all ] && {
        section "full size"
        check "$folder/lockstep" verify --model "$full_size"
        check "$folder/lockstep" verify --batch --model "$full_size"
        check python3 tools/reference/full_size.py --out "$full_size" --check "$folder/lockstep" --device cuda:0
    }
    [ "$part" = sanitize ] && {
        section sanitize
        # A process per test and tool. Left out: the test that plants a fault; and under racecheck the tests that run
        # cuBLASLt, whose own kernels it reports (the same paths are tested with our linear kernel instead), and the
        # comparison of bits, which only repeats the bodies of the other kernel tests and takes more than five minutes.
        planted='a_fault_stops_the_device_and_stays'
        cublaslt='cublaslt_|every_algorithm_|a_choice_by_timing_|prefill::|threads_may_share|keeps_the_contract|agrees_with_transformers_on_the_gpu|can_tell_its_company|answers_as_it_did|bits::'
        for tool in racecheck memcheck initcheck; do
            # Whole models take longest: they start first.
            for test in "$folder"/tests/{batch,small_models,verify,host,kernels}; do
                "$test" --list --ignored 2>/dev/null | sed -n 's/: test$//p' | grep -Ev "$planted|compiler|speed" |
                    if [ "$tool" = racecheck ]; then grep -Ev "$cublaslt"; else cat; fi | sed "s#^#$tool $test #"
            done
        done >"$out/sanitize.list"
        # shellcheck disable=SC2016
        xargs -P "${SANITIZE_JOBS:-8}" -L 1 bash -c '
            log=$(timeout "${SANITIZE_SECONDS:-400}" compute-sanitizer --tool "$0" --report-api-errors no --error-exitcode 9 \
                "$1" --ignored --exact "$2" --test-threads=1 2>&1)
            code=$?
            echo "$0 $(basename "$1") $2: exit $code, $(grep -oE "(ERROR|RACECHECK) SUMMARY.*" <<<"$log" | tail -1)"
        ' <"$out/sanitize.list" | tee "$out/sanitize.txt"
        check test "$(wc -l <"$out/sanitize.list")" -eq "$(grep -cE 'exit 0, (ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards)' "$out/sanitize.txt")"
    }
done
section "$failed failed"
[ "$failed" = 0 ]
