"""Greedy accuracy of the demo model on unseen items, by skill, with transformers.

    python3 evaluate.py --model DIR [--items 500] [--seed 1] [--device cpu|cuda] [--out RESULTS.json]
    python3 evaluate.py --write-items FILE.jsonl [--items 500]     the items alone, for another server (see check_answers.py)
    python3 evaluate.py --card README.md --results RESULTS.json    puts the accuracy table into the model card
"""

import argparse
import json
import platform
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import generate  # noqa: E402

TABLE_BEGIN, TABLE_END = "<!-- accuracy: begin (written by evaluate.py --card) -->", "<!-- accuracy: end -->"


def test_items(count, seed):
    """Items as dictionaries: id, skill, messages, expected, seed."""
    return [
        {"id": f"{name}-{i}", "skill": name, "messages": [{"role": "user", "content": item.user}], "expected": item.answer, "seed": seed,
         "max_tokens": len(item.answer.encode()) + 8}
        for name in generate.SKILLS
        for i, item in enumerate(generate.exam(name, "test", seed, count))
    ]


def table(right, total):
    lines = ["| skill | items | exact answers | accuracy | required |", "| --- | ---: | ---: | ---: | --- |"]
    for name in total:
        required = "99 %" if name in generate.REQUIRED else ""
        lines.append(f"| {name} | {total[name]} | {right[name]} | {100 * right[name] / total[name]:.1f} % | {required} |")
    return "\n".join(lines)


def failures(right, total):
    return [name for name in generate.REQUIRED if name in total and right[name] < 0.99 * total[name]]


def evaluate(model_folder, count=500, seed=1, device="cpu", batch=250, show=3):
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model_folder))
    model = AutoModelForCausalLM.from_pretrained(str(model_folder), dtype=torch.bfloat16 if device != "cpu" else torch.float32).to(device).eval()
    items = test_items(count, seed)
    right, total, wrong = {}, {}, []
    for name in generate.SKILLS:
        mine = sorted((item for item in items if item["skill"] == name), key=lambda item: len(item["messages"][0]["content"]))
        right[name], total[name] = 0, len(mine)
        for start in range(0, len(mine), batch):
            chunk = mine[start:start + batch]
            prompts = [tokenizer.apply_chat_template(item["messages"], tokenize=False, add_generation_prompt=True) for item in chunk]
            ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
            longest = max(map(len, ids))
            tokens = torch.tensor([[generate.END_OF_TEXT] * (longest - len(row)) + row for row in ids], device=device)
            seen = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=device)
            with torch.no_grad():
                out = model.generate(input_ids=tokens, attention_mask=seen, do_sample=False, max_new_tokens=max(i["max_tokens"] for i in chunk),
                                     eos_token_id=[generate.IM_END, generate.END_OF_TEXT], pad_token_id=generate.END_OF_TEXT)
            for item, row in zip(chunk, out[:, longest:].tolist()):
                end = next((i for i, token in enumerate(row) if token in (generate.IM_END, generate.END_OF_TEXT)), len(row))
                answer = tokenizer.decode(row[:end], skip_special_tokens=False)
                if answer == item["expected"]:
                    right[name] += 1
                else:
                    wrong.append((name, item["messages"][0]["content"], item["expected"], answer))
        print(f"{name}: {right[name]} of {total[name]}", flush=True)
        for _, question, expected, answer in [entry for entry in wrong if entry[0] == name][:show]:
            print(f"    {question[:200]!r}\n        expected {expected[:360]!r}\n        answered {answer[:360]!r}", flush=True)
    print(table(right, total), flush=True)
    short = failures(right, total)
    print("below 99 %: " + ", ".join(short) if short else "every required skill is at 99 % or above", flush=True)
    name = torch.cuda.get_device_name() if device != "cpu" else "CPU"
    return {"right": right, "total": total, "seed": seed, "device": name, "dtype": str(model.dtype), "torch": torch.__version__,
            "transformers": transformers.__version__, "python": platform.python_version()}


def write_card(card, results):
    found = json.loads(Path(results).read_text())
    test = found.get("test", found)
    text = Path(card).read_text(encoding="utf-8")
    begin, end = text.index(TABLE_BEGIN), text.index(TABLE_END)
    lines = [TABLE_BEGIN, "", table(test["right"], test["total"]), "",
             f"Greedy, {test['dtype'].removeprefix('torch.')} with transformers {test['transformers']} and torch {test['torch']} on {test['device']}; "
             f"item seed {test['seed']}."]
    if "steps" in found:
        size = 2 * found["weights"] / 1e6
        lines += ["", f"{found['weights']} weights ({size:.2f} MB in bf16). {'Last training call' if found['resumed'] else 'Training'}: {found['steps']} steps, "
                  f"{found['tokens'] / 1e6:.0f} million tokens, {found['seconds']:.0f} s on {found['device']}, seed {found['seed']}."]
    Path(card).write_text(text[:begin] + "\n".join([*lines, "", ""]) + text[end:], encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--items", type=int, default=500, help="items per skill")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--write-items", type=Path)
    parser.add_argument("--card", type=Path)
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    if args.write_items:
        with open(args.write_items, "w", encoding="utf-8") as out:
            for item in test_items(args.items, args.seed):
                out.write(json.dumps(item, ensure_ascii=False) + "\n")
    elif args.card:
        write_card(args.card, args.results)
    elif args.model:
        found = evaluate(args.model, args.items, args.seed, args.device)
        if args.out:
            args.out.write_text(json.dumps(found, indent=2) + "\n")
        sys.exit(1 if failures(found["right"], found["total"]) else 0)
    else:
        parser.error("give --model, --write-items or --card")


if __name__ == "__main__":
    main()
