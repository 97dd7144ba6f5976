#!/usr/bin/env bash
# Builds everything that a machine with a GPU but without Rust needs, into one folder:
#   tools/gpu_bundle/pack.sh [FOLDER]        (default: target/gpu_bundle)
# Copy the checkout and that folder there and call tools/gpu_bundle/run.sh FOLDER from the checkout.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-target/gpu_bundle}
mkdir -p "$folder/tests"
rm -f "$folder"/tests/*

cargo build --release
cargo bench --bench kernels --no-run
target=$(cargo metadata --format-version 1 --no-deps | python3 -c 'import json,sys; print(json.load(sys.stdin)["target_directory"])')
strip -o "$folder/lockstep" "$target/release/lockstep"
bench=$(cargo bench --bench kernels --no-run --message-format=json 2>/dev/null |
    python3 -c 'import json,sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and message["target"]["name"] == "kernels": print(message["executable"])')
strip -o "$folder/kernels" "$bench"

# Test executables that have tests of a GPU in them.
cargo test --workspace --no-run --message-format=json 2>/dev/null | python3 -c 'import json,sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and message["profile"]["test"]: print(message["target"]["name"], message["executable"])' |
    while read -r name executable; do
        # Not through a pipe: a reader that has seen enough would end the writer, and that counts as failure here.
        # The tests of a macro crate need the compiler's own libraries to start; they know no GPU.
        ignored=$("$executable" --list --ignored 2>/dev/null) || [[ $name == *_macros ]]
        if [[ $ignored == *': test'* ]] && grep -q 'needs a GPU' "$executable"; then
            strip -o "$folder/tests/$name" "$executable"
        fi
    done
pwd >"$folder/checkout"
# Where whole-system tests look for the program.
echo "$target/debug/lockstep" >"$folder/binary"
git rev-parse HEAD >"$folder/commit"
ls -la "$folder" "$folder/tests"
