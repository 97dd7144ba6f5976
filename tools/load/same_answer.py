#!/usr/bin/env python3
"""Sends one request many times within random other traffic and counts the different answers: exit code 1 unless all are
equal, tokens and log-probabilities.

    tools/load/same_answer.py --url http://127.0.0.1:8080 --requests 1000 --others 1000

Half of the equal requests are streamed; some share the cache of their prompt, some have a cache salt of their own."""

import argparse
import asyncio
import collections
import random
import time

from client import Failed, Server, random_tokens, run


def watched(health, arguments):
    """The request; the same for the same seed and model."""
    rng = random.Random(f"watched {arguments.seed}")
    count = min(arguments.prompt_tokens, health["context_length"] // 2)
    return {"prompt": random_tokens(rng, count, health), "max_tokens": arguments.max_tokens, "temperature": 0.9,
            "top_p": 0.95, "top_k": 50, "frequency_penalty": 0.2, "seed": arguments.seed, "logprobs": 5,
            "ignore_eos": True}


def other(rng, health, shared):
    """Somebody else's request; some begin like the watched one."""
    room = health["context_length"] // 2
    prompt = random_tokens(rng, rng.randrange(1, min(room, rng.choice([40, 120, 400]))), health)
    if rng.random() < 0.3:
        prompt = shared[:rng.randrange(1, len(shared))] + prompt
    return {"prompt": prompt[:room], "max_tokens": rng.randrange(1, 50), "temperature": rng.choice([0, 0.7, 1.3]),
            "top_p": rng.choice([1, 0.8]), "seed": rng.randrange(1 << 40), "logprobs": rng.choice([0, 3, 20]),
            "ignore_eos": rng.random() < 0.5, "stream": rng.random() < 0.5}


async def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--requests", type=int, default=1000, help="equal requests")
    parser.add_argument("--others", type=int, default=1000, help="other requests")
    parser.add_argument("--at-once", type=int, default=64, help="requests on their way at once, at most")
    parser.add_argument("--prompt-tokens", type=int, default=150)
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()

    server, rng = Server(arguments.url), random.Random(arguments.seed)
    health = await server.health()
    body = watched(health, arguments)
    jobs = [True] * arguments.requests + [False] * arguments.others
    rng.shuffle(jobs)
    digests, cached, gone = collections.Counter(), 0, 0
    places = asyncio.Semaphore(arguments.at_once)

    async def send(number, equal):
        nonlocal cached, gone
        async with places:
            own = random.Random(f"{arguments.seed} {number}")
            # Not all at the same beat.
            await asyncio.sleep(own.random() * 0.05)
            if equal:
                salt = {"cache_salt": f"{arguments.seed} {number}"} if number % 4 == 0 else {}
                stream = {"stream": True, "stream_options": {"include_usage": True}} if number % 2 else {}
                answer = await server.complete(body | salt | stream)
                if len(answer.tokens) != arguments.max_tokens:
                    raise Failed(f"{len(answer.tokens)} tokens came, {arguments.max_tokens} were generated")
                digests[answer.digest()] += 1
                cached += answer.cached_tokens() > 0
            elif own.random() < 0.15:
                # Somebody who goes away.
                stream = await server.open("POST", "/v1/completions", other(own, health, body["prompt"]))
                await asyncio.sleep(own.random() * 0.2)
                stream.close()
                gone += 1
            else:
                await server.complete(other(own, health, body["prompt"]))

    start = time.monotonic()
    await asyncio.gather(*(send(number, equal) for number, equal in enumerate(jobs)))
    await server.idle()
    print(f"{arguments.requests} equal requests ({cached} found some of the prompt cached) among {arguments.others} "
          f"others ({gone} of them left), {time.monotonic() - start:.0f} s: {len(digests)} different answers")
    for digest, count in digests.most_common(20):
        print(f"{digest}  {count}")
    return 0 if len(digests) == 1 and sum(digests.values()) == arguments.requests else 1


if __name__ == "__main__":
    run(main())
