#!/usr/bin/env python3
"""A request with n choices against n requests with the seeds that its receipt names: every choice must be the one request's
answer, tokens and log-probabilities. Exit code 1 when one differs, or when two seeds give one answer.

    tools/load/choices.py --url http://127.0.0.1:8080 --choices 4 --requests 20"""

import argparse
import asyncio
import random

from client import Failed, Server, random_tokens, run


async def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--choices", type=int, default=4)
    parser.add_argument("--requests", type=int, default=20, help="all at once")
    parser.add_argument("--prompt-tokens", type=int, default=150)
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()

    server, rng = Server(arguments.url), random.Random(arguments.seed)
    health = await server.health()

    async def ask(body):
        status, answer = await server.ask("POST", "/v1/completions", body)
        if status != 200:
            raise Failed(f"{status}: {answer}")
        return answer

    async def compare(number):
        body = {"prompt": prompts[number], "max_tokens": arguments.max_tokens, "temperature": 1.0, "seed": number,
                "logprobs": 5, "ignore_eos": True}
        together = await ask(body | {"n": arguments.choices})
        wrong = 0
        for choice in together["lockstep"]["choices"]:
            alone = await ask(body | {"seed": choice["seed"]})
            own, other = together["choices"][choice["index"]], alone["choices"][0]
            same = choice["digest"] == alone["lockstep"]["digest"]
            same &= (own["text"], own["logprobs"]) == (other["text"], other["logprobs"])
            wrong += not same
        return wrong, len({choice["digest"] for choice in together["lockstep"]["choices"]})

    prompts = [random_tokens(rng, arguments.prompt_tokens, health) for _ in range(arguments.requests)]
    outcomes = await asyncio.gather(*(compare(number) for number in range(arguments.requests)))
    wrong, different = sum(outcome[0] for outcome in outcomes), sum(outcome[1] for outcome in outcomes)
    total = arguments.choices * arguments.requests
    print(f"{arguments.requests} requests of {arguments.choices} choices: {wrong} of {total} choices differ from a request "
          f"with that seed; {different} different answers in all")
    return 0 if wrong == 0 and different > arguments.requests else 1


if __name__ == "__main__":
    run(main())
