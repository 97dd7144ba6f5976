"""The full-size check: a random model of Qwen2.5-0.5B's shape, and how far Lockstep and transformers in bf16 are from float32.

    python3 full_size.py --out DIR                                 makes the model (seeded, 1 GB)
    python3 full_size.py --out DIR --check BIN [--device cuda:0]   makes it if it is not there, then compares

For prompts of 1, 17, 128, 1000 and 4000 random ids: log-probabilities of the next token by transformers in float32 (no TF32), by transformers in
bf16, and by `lockstep generate`. Errors are over the ids among float32's twenty likeliest that Lockstep reports (where it reports fewer than half
of them, the check fails). Exit 1 if Lockstep's largest or mean error, over all prompts, is larger than that of transformers in bf16.
"""

import argparse
import gc
import math
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch  # noqa: E402

from compare import run  # noqa: E402
from make_small_models import write_model  # noqa: E402

SHAPE = dict(kind="qwen2", hidden=896, heads=14, kv_heads=2, width=64, ffn=4864, layers=24, vocabulary=151936, tied=True,
             theta=1000000.0, scaling=None, rope="old", files=1)
SEED, SPREAD, POSITIONS, TOP = 500, 2.0, 32768, 20
LENGTHS = (1, 17, 128, 1000, 4000)


def prompts(repeats):
    rng = random.Random(50)
    return [[rng.randrange(SHAPE["vocabulary"]) for _ in range(length)] for length in LENGTHS for _ in range(repeats)]


def transformers_scores(folder, asked, dtype, device):
    """Log-probabilities of the token after each prompt, float32 on the CPU."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype).to(device).eval()
    found = []
    with torch.no_grad():
        for prompt in asked:
            logits = model(torch.tensor([prompt], device=device), logits_to_keep=1, use_cache=False).logits[0, -1]
            found.append(torch.log_softmax(logits.float(), -1).cpu())
    spread = logits.float().std().item()
    del model
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
    return found, spread


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the model's folder")
    parser.add_argument("--check", type=Path, metavar="BIN", help="the lockstep binary")
    parser.add_argument("--device", help="lockstep's --device")
    parser.add_argument("--torch-device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=2, help="different prompts per length")
    args = parser.parse_args()
    if not (args.out / "model.safetensors").exists():
        write_model(args.out, SHAPE, SEED, SPREAD, POSITIONS)
        print(f"made {args.out}", flush=True)
    if not args.check:
        return
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    asked = prompts(args.repeats)
    exact, spread = transformers_scores(args.out, asked, torch.float32, args.torch_device)
    rounded, _ = transformers_scores(args.out, asked, torch.bfloat16, args.torch_device)
    print(f"float32 logits spread {spread:.2f}; errors of log-probabilities against float32, over its {TOP} likeliest ids", flush=True)
    print("| prompt | ids | transformers bf16: max | mean | lockstep: max | mean |\n| ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    theirs, ours, failed = [], [], False
    for length in LENGTHS:
        here_theirs, here_ours, wanted = [], [], 0
        for prompt, right, bf16 in zip(asked, exact, rounded, strict=True):
            if len(prompt) != length:
                continue
            answer = run(args.check, args.out, prompt, 1, TOP, args.device)
            given = {token: value for token, value in answer["logprobs"][0]}
            ids = [token for token in right.topk(TOP).indices.tolist() if token in given]
            wanted += TOP
            here_theirs += [abs(bf16[token] - right[token]).item() for token in ids]
            here_ours += [abs(given[token] - right[token].item()) for token in ids]
        if not 2 * len(here_ours) >= wanted or not all(map(math.isfinite, here_ours)):
            print(f"prompts of {length}: lockstep reports {len(here_ours)} of the {wanted} likeliest ids, or a value that is no number")
            failed = True
            continue
        print(f"| {length} | {len(here_ours)} | {max(here_theirs):.4f} | {sum(here_theirs) / len(here_theirs):.4f} | {max(here_ours):.4f} | "
              f"{sum(here_ours) / len(here_ours):.4f} |", flush=True)
        theirs += here_theirs
        ours += here_ours
    if ours:
        print(f"| all | {len(ours)} | {max(theirs):.4f} | {sum(theirs) / len(theirs):.4f} | {max(ours):.4f} | {sum(ours) / len(ours):.4f} |")
        failed |= not (max(ours) <= max(theirs) and sum(ours) <= sum(theirs))
    print("FAILED" if failed or not ours else "passed: lockstep is no further from float32 than transformers in bf16")
    sys.exit(1 if failed or not ours else 0)


if __name__ == "__main__":
    main()
