#!/usr/bin/env python3
"""A long system prompt and many questions behind it: what share of the prompts' tokens need not be computed again, and
whether the answers are those of a cold cache. Exit code 1 below 95 %, or when an answer differs.

    tools/load/prefix.py --url http://127.0.0.1:8080 --questions 50 --prompt-tokens 4000"""

import argparse
import asyncio
import random
import time

from client import Server, random_tokens, run

LEAST_SHARE = 0.95


async def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--questions", type=int, default=50)
    parser.add_argument("--prompt-tokens", type=int, default=4000, help="or as many as the context allows")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()

    server, rng = Server(arguments.url), random.Random(arguments.seed)
    health = await server.health()
    longest_question = 40
    count = min(arguments.prompt_tokens, health["context_length"] - longest_question - arguments.max_tokens)
    system = random_tokens(rng, count, health)
    questions = [random_tokens(rng, rng.randrange(5, longest_question), health) for _ in range(arguments.questions)]
    # Of this run, so that the server's earlier work counts for nothing.
    run_salt = f"prefix {time.time_ns()}"
    places = asyncio.Semaphore(arguments.at_once)

    async def ask(number, salt):
        body = {"prompt": system + questions[number], "max_tokens": arguments.max_tokens, "temperature": 0.8,
                "seed": number, "logprobs": 5, "ignore_eos": True, "cache_salt": salt}
        async with places:
            return await server.complete(body)

    start = time.monotonic()
    warm = [await ask(0, run_salt)]
    first = time.monotonic() - start
    start = time.monotonic()
    warm += await asyncio.gather(*(ask(number, run_salt) for number in range(1, len(questions))))
    rest = time.monotonic() - start
    start = time.monotonic()
    cold = await asyncio.gather(*(ask(number, f"{run_salt} {number}") for number in range(len(questions))))
    cold_seconds = time.monotonic() - start

    prompts = sum(answer.usage["prompt_tokens"] for answer in warm[1:])
    cached = sum(answer.cached_tokens() for answer in warm[1:])
    different = sum(a.digest() != b.digest() for a, b in zip(warm, cold))
    unexpected = warm[0].cached_tokens() + sum(answer.cached_tokens() for answer in cold)
    share = cached / prompts
    print(f"{count} shared tokens, {len(questions)} questions: the first took {first:.2f} s, the others together {rest:.2f} s "
          f"(with a cold cache all took {cold_seconds:.2f} s)")
    print(f"prefill saved from the second on: {share:.2%} ({cached} of {prompts} tokens; at least {LEAST_SHARE:.0%} is asked for)")
    print(f"{different} of {len(questions)} answers differ from those of a cold cache, which found {unexpected} cached tokens")
    await server.idle()
    return 0 if share >= LEAST_SHARE and different == 0 and unexpected == 0 else 1


if __name__ == "__main__":
    run(main())
