"""Asks a server that speaks OpenAI's chat API the items of `evaluate.py --write-items`, greedily, and writes what `check_answers.py` reads.

    python3 ask_server.py ITEMS.jsonl ANSWERS.jsonl --url http://127.0.0.1:8080[,URL...] [--skills a,b] [--limit N] [--workers W] [--seconds S]

Several URLs share the items. --limit is per skill, and skills take turns, so that a run that --seconds ends has asked all of them alike.
Standard library only, Python 3.11 or later. Exits with 1 when a request failed or nothing was asked.
"""

import argparse
import http.client
import json
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path


def chosen(items, skills, limit):
    """Up to `limit` items of each skill, one of each in turn."""
    by_skill = {}
    for item in items:
        if not skills or item["skill"] in skills:
            by_skill.setdefault(item["skill"], []).append(item)
    unknown = set(skills) - set(by_skill)
    if unknown:
        sys.exit(f"no items of {', '.join(sorted(unknown))}")
    lists = [mine[:limit] for mine in by_skill.values()]
    return [mine[i] for i in range(max(map(len, lists), default=0)) for mine in lists if i < len(mine)]


def ask(url, item, timeout):
    body = {"messages": item["messages"], "temperature": 0, "max_tokens": item["max_tokens"]}
    request = urllib.request.Request(url.rstrip("/") + "/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            return json.load(reply)["choices"][0]["message"]["content"]
    except urllib.error.HTTPError as error:
        raise OSError(f"{error.code}: {error.read()[:300].decode(errors='replace')}") from error


class Run:
    """Items on their way to answers, shared by the workers."""

    def __init__(self, items, out, seconds):
        self.items, self.out, self.lock = items, out, threading.Lock()
        self.next, self.answered, self.right, self.errors = 0, 0, 0, []
        self.begun = self.told = time.monotonic()
        self.end = self.begun + seconds

    def take(self):
        with self.lock:
            # A server that fails every request is not asked for ever.
            if self.next == len(self.items) or time.monotonic() >= self.end or len(self.errors) >= 10:
                return None
            self.next += 1
            return self.items[self.next - 1]

    def work(self, url, timeout):
        while item := self.take():
            try:
                answer = ask(url, item, timeout)
            except (OSError, http.client.HTTPException, ValueError, LookupError) as error:
                with self.lock:
                    self.errors.append(f"{item['id']} at {url}: {error}")
                continue
            with self.lock:
                self.out.write(json.dumps({"id": item["id"], "answer": answer}, ensure_ascii=False) + "\n")
                self.out.flush()
                self.answered += 1
                self.right += answer == item["expected"]
                if time.monotonic() >= self.told + 10:
                    self.told = time.monotonic()
                    print(self.line(), flush=True)

    def line(self):
        return f"{self.answered} of {len(self.items)} answered, {self.right} right, {time.monotonic() - self.begun:.0f} s"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("items", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="one or several, separated by commas")
    parser.add_argument("--skills", default="", help="separated by commas; all without it")
    parser.add_argument("--limit", type=int, help="items per skill")
    parser.add_argument("--workers", type=int, default=1, help="requests in flight per URL")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after these no further item is asked")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one answer")
    args = parser.parse_args()
    items = [json.loads(line) for line in args.items.read_text(encoding="utf-8").splitlines() if line.strip()]
    items = chosen(items, [skill for skill in args.skills.split(",") if skill], args.limit)
    with open(args.answers, "w", encoding="utf-8") as out:
        run = Run(items, out, args.seconds)
        threads = [
            threading.Thread(target=run.work, args=(url, args.timeout), daemon=True) for url in args.url.split(",") for _ in range(args.workers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    print(run.line(), flush=True)
    for error in run.errors[:5]:
        print(error, file=sys.stderr)
    if run.next < len(items) and not run.errors:
        print(f"stopped after {args.seconds:.0f} s: asked {run.next} of {len(items)}")
    sys.exit(1 if run.errors or not run.answered else 0)


if __name__ == "__main__":
    main()
