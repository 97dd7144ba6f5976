"""Writes tests/golden/small_models.json: what float32 transformers says about the models of tests/models.

    python3 make_goldens.py [--models ../../tests/models] [--out ../../tests/golden/small_models.json]

For each model and each prompt of token ids: 12 greedy tokens and, at each, the five likeliest ids with natural-log probabilities. Every
position is a fresh forward pass over the whole sequence, without a cache. The margin of a position is the difference of its first two values.
"""

import argparse
import hashlib
import json
import platform
import random
from pathlib import Path

import safetensors
import torch
import transformers
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = (1, 17, 60, 130, 200)
TOKENS, TOP = 12, 5


def prompts():
    """Ids below 500, which every model has; the same prompts for every model."""
    rng = random.Random(20)
    return [[rng.randrange(500) for _ in range(length)] for length in LENGTHS]


def checksum(folder):
    """SHA-256 over the config and the weight files, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def load(folder, dtype):
    model, report = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, output_loading_info=True, attn_implementation="eager")
    loose = {key: list(value) for key, value in report.items() if value}
    assert not loose, f"{folder}: {loose}"
    written = json.loads((folder / "config.json").read_text())
    rope = written.get("rope_parameters") or {"rope_type": "default", **(written.get("rope_scaling") or {}), "rope_theta": written["rope_theta"]}
    taken = model.config.rope_parameters
    assert all(taken[key] == value for key, value in rope.items()), f"{folder}: transformers reads {taken}, written was {rope}"
    return model.eval()


@torch.no_grad()
def greedy(model, prompt):
    """[[[id, log-probability] x 5] x 12]"""
    ids, found = list(prompt), []
    for _ in range(TOKENS):
        scores = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1].float(), -1)
        values, top = scores.topk(TOP)
        found.append([[i, round(v, 4)] for i, v in zip(top.tolist(), values.tolist())])
        ids.append(top[0].item())
    return found


@torch.no_grad()
def along(model, prompt, golden):
    """Largest difference of `model` from a golden along its own tokens: how much a bf16 run of transformers differs."""
    ids = prompt + [position[0][0] for position in golden]
    scores = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
    return max(abs(scores[len(prompt) - 1 + i, token].item() - value) for i, position in enumerate(golden) for token, value in position)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=ROOT / "tests" / "models")
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "golden" / "small_models.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    asked, models, sums = prompts(), {}, {}
    for folder in sorted(path for path in args.models.iterdir() if (path / "config.json").exists()):
        exact, rounded = load(folder, torch.float32), load(folder, torch.bfloat16)
        models[folder.name] = [greedy(exact, prompt) for prompt in asked]
        sums[folder.name] = checksum(folder)
        margins = sorted(position[0][1] - position[1][1] for answer in models[folder.name] for position in answer)
        with torch.no_grad():
            spread = exact(torch.tensor([asked[-1]])).logits.std().item()
        worst = max(along(rounded, prompt, answer) for prompt, answer in zip(asked, models[folder.name]))
        different = len({position[0][0] for answer in models[folder.name] for position in answer})
        print(f"{folder.name}: logits spread {spread:.2f}, margins below 0.05: {sum(m < 0.05 for m in margins)} of {len(margins)}, median "
              f"{margins[len(margins) // 2]:.2f}, {different} different tokens, transformers in bf16 differs by at most {worst:.4f}")
    manifest = {
        "command": "python3 tools/reference/make_goldens.py",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
                     "safetensors": safetensors.__version__},
        "arithmetic": "float32 on a CPU, eager attention, no cache",
        "values": "per model and prompt: 12 positions of the five likeliest [id, natural-log probability], rounded to 4 decimals",
        "checksums": sums,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)

    def short(value):
        return json.dumps(value, separators=(",", ":"))

    lines = []
    for name, answers in models.items():
        lines.append(f"{short(name)}:[\n" + ",\n".join(short(answer) for answer in answers) + "\n]")
    text = ('{"manifest":' + json.dumps(manifest, indent=1) + ',\n"prompts":[\n' + ",\n".join(short(prompt) for prompt in asked)
            + '\n],\n"models":{\n' + ",\n".join(lines) + "\n}}\n")
    json.loads(text)
    args.out.write_text(text)
    print(f"{args.out}: {len(text)} bytes")


if __name__ == "__main__":
    main()
