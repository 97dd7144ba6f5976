#!/usr/bin/env python3
"""How long a request that ends early keeps its pages, in each state: waiting, in prefill, decoding; cancelled by its name or
left by its client. Beside it, `--streams` - 1 others generate.

    lockstep serve --max-running 64 ...
    tools/load/cancel.py --url http://127.0.0.1:8080 --streams 64 --trials 50

The server must allow as many running requests as `--streams` says, and no more: one more waits then. The time is from the
moment before the cancellation is sent or the connection closed to the first answer of /health without the request; the
engine frees pages before it says so. Exit code 1 if the 99th percentile of a state is above `--limit-ms`, where given."""

import argparse
import asyncio
import json
import random
import time

from client import Failed, Server, percentile, run

LETTERS = "abcdefghijklmnopqrstuvwxyz      "


class Background:
    """Streams that generate until they are stopped; one that ends is replaced, and counted."""

    def __init__(self, server, health):
        self.server, self.health, self.ended, self.tasks = server, health, 0, []

    async def _one(self, number):
        rng = random.Random(f"background {number}")
        while True:
            body = {"prompt": [rng.randrange(self.health["vocab_size"]) for _ in range(20)], "temperature": 1.0,
                    "max_tokens": self.health["context_length"] - 20, "ignore_eos": True, "stream": True,
                    "seed": number}
            stream = await self.server.open("POST", "/v1/completions", body)
            try:
                if await stream.head() == 200:
                    while await stream.event() is not None:
                        pass
            finally:
                stream.close()
            self.ended += 1

    async def grow_to(self, count):
        while len(self.tasks) < count:
            self.tasks.append(asyncio.create_task(self._one(len(self.tasks))))
        await until(self.server, lambda health: health["running"] >= count)

    async def shrink_to(self, count):
        while len(self.tasks) > count:
            self.tasks.pop().cancel()
        await until(self.server, lambda health: health["running"] + health["waiting"] <= count)


async def until(server, holds, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        health = await server.health()
        if holds(health):
            return health
    raise Failed(f"the server does not get there: {health}")


async def trial(server, background, state, how, number, prompt_letters):
    """Seconds until the pages are free; None when the request was not in the state any more."""
    rng = random.Random(f"{state} {how} {number}")
    job = f"{state}-{how}-{number}"
    # Text of its own, so that no page of it is known.
    length = 60 if state == "decoding" else prompt_letters
    prompt = "".join(rng.choice(LETTERS) for _ in range(length))
    body = {"job_id": job, "prompt": prompt, "max_tokens": 400, "temperature": 1.0, "seed": number}
    others, ended = len(background.tasks), background.ended
    stream = await server.open("POST", "/execute", body)
    try:
        if state == "decoding":
            await stream.head()
            tokens = 0
            while tokens < 3:
                event = await stream.event()
                if event is None or event[0] in ("end", "error"):
                    return None
                tokens += event[0] == "token"
        else:
            wanted = "waiting" if state == "queued" else "running"
            await until(server, lambda health: health["waiting" if wanted == "waiting" else "running"]
                        == (1 if wanted == "waiting" else others + 1))
        before = await server.health()
        if before["running"] + before["waiting"] != others + 1:
            return None
        start = time.monotonic()
        if how == "cancel":
            status, _ = await server.ask("POST", "/cancel", {"job_id": job})
            if status != 202:
                raise Failed(f"POST /cancel answered {status}")
        else:
            stream.writer.transport.abort()
        await until(server, lambda health: health["running"] + health["waiting"] <= others)
        seconds = time.monotonic() - start
        if background.ended != ended:
            return None
        if how == "cancel":
            return seconds if await is_cancelled(stream, state) else None
        return seconds
    finally:
        stream.close()


async def is_cancelled(stream, state):
    """Whether the stream ends as a cancelled one, and was in that state until then."""
    if stream.status is None:
        await stream.head()
    if stream.status != 200:
        raise Failed(f"a cancelled request was answered with {stream.status}")
    tokens, last = 0, None
    while (event := await stream.event()) is not None:
        tokens, last = tokens + (event[0] == "token"), event
    if last is None or last[0] not in ("end", "error"):
        raise Failed("a cancelled stream ended without a word")
    cancelled = last[0] == "error" and json.loads(last[1])["code"] == "CANCELLED"
    return cancelled and (state == "decoding" or tokens == 0)


async def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--trials", type=int, default=20, help="per state and way")
    parser.add_argument("--limit-ms", type=float)
    arguments = parser.parse_args()
    server = Server(arguments.url)
    health = await server.health()
    # Prompts of /execute have 32768 characters at most; a byte is at most a token.
    prompt_letters = min(32_000, health["context_length"] - 410)
    background, failed = Background(server, health), False
    for state in ["prefill", "decoding", "queued"]:
        others = arguments.streams if state == "queued" else arguments.streams - 1
        await background.grow_to(others)
        for how in ["cancel", "disconnect"]:
            times, attempts = [], 0
            while len(times) < arguments.trials and attempts < 4 * arguments.trials:
                attempts += 1
                seconds = await trial(server, background, state, how, attempts, prompt_letters)
                await until(server, lambda health: health["running"] + health["waiting"] <= others)
                if seconds is not None:
                    times.append(seconds * 1000)
            if not times:
                failed = True
                print(f"{state:9} {how:10}  never caught in this state in {attempts} attempts")
                continue
            p50, p99 = percentile(times, 0.5), percentile(times, 0.99)
            failed |= arguments.limit_ms is not None and p99 > arguments.limit_ms
            print(f"{state:9} {how:10}  p50 {p50:7.1f} ms  p99 {p99:7.1f} ms  {len(times)} times ({attempts} attempts)")
    await background.shrink_to(0)
    await server.idle()
    return 1 if failed else 0


if __name__ == "__main__":
    run(main())
