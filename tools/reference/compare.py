"""Compares Lockstep with the goldens of float32 transformers.

    python3 compare.py --bin target/release/lockstep [--device cpu|cuda:0] [--models DIR] [--golden FILE] [--only NAME]

Runs `lockstep generate` for every golden, prints the largest log-probability error of the five likeliest tokens, and exits with 1 when an
error exceeds the bound (0.05), a token differs where the float32 margin exceeds the bound, or a weight file is not the golden's.
"""

import argparse
import copy
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BOUND = 0.05


def run(binary, model, ids, tokens, top, device=None, timeout=600):
    """The JSON object that `lockstep generate` prints."""
    with tempfile.NamedTemporaryFile("w", suffix=".ids") as listed:
        given = ",".join(map(str, ids))
        if len(ids) > 1000:  # beyond the shells' and systems' comfort
            listed.write(given)
            listed.flush()
            given = "@" + listed.name
        command = [str(binary), "generate", "--model", str(model), "--token-ids", given, "--logprobs", str(top), "--temperature", "0",
                   "--max-tokens", str(tokens), "--ignore-eos", "--json", *(["--device", device] if device else [])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)[:300]}\nexit code {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1] if done.stdout.strip().startswith("{\"") else done.stdout)


def compare(golden, answer, bound=BOUND):
    """(positions compared, largest error, complaints) of one answer, as long as the greedy prefixes are equal."""
    complaints, worst, compared = [], 0.0, 0
    tokens, positions = answer["tokens"], answer["logprobs"]
    if len(tokens) != len(golden) or len(positions) != len(golden):
        return 0, math.inf, [f"{len(tokens)} tokens and {len(positions)} positions, expected {len(golden)}"]
    for place, (expected, token, given) in enumerate(zip(golden, tokens, positions)):
        values, compared = dict(map(tuple, given)), compared + 1
        lowest = min(values.values()) if values else math.nan
        for token_id, value in expected:
            # An absent id has at most the lowest value given.
            error = abs(values[token_id] - value) if token_id in values else max(0.0, value - lowest) if lowest == lowest else math.nan
            worst = error if not error <= worst else worst
            if not error <= bound:
                complaints.append(f"position {place}, id {token_id}: {values.get(token_id, f'absent, lowest {lowest}')}, expected {value}")
        margin = expected[0][1] - expected[1][1]
        if token != expected[0][0]:
            if margin > bound:
                complaints.append(f"position {place}: token {token}, expected {expected[0][0]} by a margin of {margin:.3f}")
            break
    return compared, worst, complaints


def canaries(golden):
    """The comparator must accept the golden itself and refuse each planted fault."""
    answer = {"tokens": [position[0][0] for position in golden], "logprobs": copy.deepcopy(golden)}
    assert not compare(golden, answer)[2], "the comparator refuses the golden itself"
    sure = max(range(len(golden)), key=lambda i: golden[i][0][1] - golden[i][1][1])
    faults = [copy.deepcopy(answer) for _ in range(4)]
    faults[0]["logprobs"][-1][2][1] += 2 * BOUND
    faults[1]["logprobs"][0][0][1] = math.nan
    faults[2]["tokens"][sure] += 1
    faults[3]["tokens"].pop()
    for number, fault in enumerate(faults):
        assert compare(golden, fault)[2], f"the comparator accepts planted fault {number}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=Path, default=ROOT / "target" / "release" / "lockstep")
    parser.add_argument("--device")
    parser.add_argument("--models", type=Path, default=ROOT / "tests" / "models")
    parser.add_argument("--golden", type=Path, default=ROOT / "tests" / "golden" / "small_models.json")
    parser.add_argument("--only", help="one model's name")
    args = parser.parse_args()
    golden = json.loads(args.golden.read_text())
    names = [name for name in golden["models"] if args.only in (None, name)]
    if not names:
        sys.exit(f"{args.golden} has no model {args.only}")
    canaries(golden["models"][names[0]][0])
    failed, overall = False, 0.0
    for name in names:
        if checksum(args.models / name) != golden["manifest"]["checksums"][name]:
            print(f"{name}: the folder is not the one that the goldens were made from")
            failed = True
            continue
        worst, compared, asked = 0.0, 0, 0
        for prompt, expected in zip(golden["prompts"], golden["models"][name], strict=True):
            answer = run(args.bin, args.models / name, prompt, len(expected), len(expected[0]), args.device)
            count, error, complaints = compare(expected, answer)
            compared, asked, worst = compared + count, asked + len(expected), error if not error <= worst else worst
            failed |= bool(complaints)
            for complaint in complaints[:4]:
                print(f"{name}, prompt of {len(prompt)}: {complaint}")
        overall = worst if not worst <= overall else overall
        print(f"{name}: largest error {worst:.4f} over {compared} of {asked} positions")
    print(f"largest error {overall:.4f}, bound {BOUND}: {'FAILED' if failed else 'passed'}")
    sys.exit(1 if failed else 0)


def checksum(folder):
    from hashlib import sha256

    digest = sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
