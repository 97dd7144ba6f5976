"""Accuracy table of any server: items from `evaluate.py --write-items`, answers as JSON lines {"id": ..., "answer": ...}.

    python3 check_answers.py ITEMS.jsonl ANSWERS.jsonl      exit 1 if a required skill is below 99 % or an item has no answer
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from evaluate import failures, table  # noqa: E402


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    items, answers = ([json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()] for path in sys.argv[1:])
    given = {answer["id"]: answer["answer"] for answer in answers}
    right, total, missing, shown = {}, {}, 0, 0
    for item in items:
        name = item["skill"]
        total[name] = total.get(name, 0) + 1
        right.setdefault(name, 0)
        answer = given.get(item["id"])
        missing += answer is None
        if answer == item["expected"]:
            right[name] += 1
        elif shown < 20:
            shown += 1
            print(f"{item['id']}: {item['messages'][-1]['content'][:120]!r}\n    expected {item['expected'][:200]!r}\n    answered {str(answer)[:200]!r}")
    print(table(right, total))
    short = failures(right, total)
    print(f"below 99 %: {', '.join(short)}" if short else "every required skill is at 99 % or above")
    if missing:
        print(f"{missing} items have no answer")
    sys.exit(1 if short or missing or not items else 0)


if __name__ == "__main__":
    main()
