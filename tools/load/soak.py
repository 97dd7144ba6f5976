#!/usr/bin/env python3
"""Hundreds of concurrent clients, good, bad and slow, for some minutes. Checks that no stream is stuck, that no token is
lost, that every refused request was answered, that equal requests got equal answers, that every page comes back in the end
and (with --pid, on Linux) that the server's resident size does not grow. Exit code 1 when one of these fails.

    tools/load/soak.py --url http://127.0.0.1:8080 --clients 300 --minutes 10 --pid PID"""

import argparse
import asyncio
import collections
import json
import random
import time

import client
from client import Answer, Failed, Server, percentile, random_tokens, run

# Bodies that are refused at once, and with which status.
REFUSED = [
    ("/v1/chat/completions", b'{"messages": [', 400),
    ("/v1/chat/completions", b"", 400),
    ("/v1/completions", {"prompt": "x", "max_tokens": 1 << 31}, 400),
    ("/v1/completions", {"prompt": "x", "temperature": "hot"}, 400),
    ("/v1/completions", {"prompt": []}, 400),
    ("/v1/completions", {"prompt": "x", "model": "no such model"}, 404),
    ("/execute", {"job_id": "x", "prompt": "x", "max_tokens": 0}, 400),
    ("/cancel", {}, 400),
    ("/no/such/path", {}, 404),
]


class Soak:
    def __init__(self, server, health, arguments):
        self.server, self.health, self.arguments = server, health, arguments
        self.counts, self.faults = collections.Counter(), collections.Counter()
        self.answers, self.sizes, self.first_event = {}, [], []
        self.begin = time.monotonic()
        self.end = self.begin + arguments.minutes * 60

    def fault(self, what, detail=""):
        self.faults[what] += 1
        if self.faults[what] <= 5:
            print(f"{what}: {detail}", flush=True)

    def request(self, rng):
        """One of a few hundred different requests, so that many are equal."""
        number = rng.randrange(self.arguments.different)
        own = random.Random(f"request {number}")
        prompt = random_tokens(own, own.choice([3, 20, 70, 140, 260]), self.health)
        return number, {
            "prompt": prompt, "max_tokens": own.randrange(1, 60), "temperature": own.choice([0, 0.8, 1.2]),
            "seed": number, "logprobs": own.choice([0, 2, 20]), "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True},
        }

    async def client(self, number):
        rng = random.Random(f"client {number}")
        while time.monotonic() < self.end:
            act = rng.choices([self.whole, self.leave, self.cancel, self.slow, self.refused], [60, 12, 10, 8, 10])[0]
            try:
                await act(rng)
            except asyncio.TimeoutError:
                self.fault("stuck", f"{act.__name__}: nothing came for {client.PATIENCE} s")
            except (Failed, ConnectionError, asyncio.IncompleteReadError, ValueError, KeyError) as error:
                self.fault("broken", f"{act.__name__}: {type(error).__name__} {error}")
                await asyncio.sleep(0.5)

    async def read(self, stream, pause=None):
        """An answer's events; whether it was refused for lack of a place."""
        start = time.monotonic()
        status = await stream.head()
        if status == 429:
            await stream.body()
            self.counts["queue full, answered 429"] += 1
            return None
        if status != 200:
            raise Failed(f"{status}: {await stream.body()}")
        choices, usage = [], None
        while (event := await stream.event()) is not None:
            if not choices:
                self.first_event.append(time.monotonic() - start)
            if event[1] == "[DONE]":
                return Answer(choices, usage)
            data = json.loads(event[1])
            if "error" in data:
                if pause and data["error"].get("code") == "SLOW_READER":
                    self.counts["slow readers that were ended"] += 1
                    return None
                raise Failed(f"the stream ended with {data['error']}")
            choices += data["choices"][:1]
            usage = data.get("usage") or usage
            if pause:
                await asyncio.sleep(pause)
        raise Failed("the stream ended without [DONE]")

    def compare(self, number, body, answer):
        if len(answer.tokens) != body["max_tokens"] or answer.usage.get("completion_tokens") != body["max_tokens"]:
            self.fault("tokens lost", f"{len(answer.tokens)} of {body['max_tokens']} came, usage {answer.usage}")
        digest = answer.digest()
        if self.answers.setdefault(number, digest) != digest:
            self.fault("another answer", f"request {number}: {digest} after {self.answers[number]}")

    async def whole(self, rng, pause=None):
        number, body = self.request(rng)
        stream = await self.server.open("POST", "/v1/completions", body, buffer=2048 if pause else None)
        try:
            answer = await self.read(stream, pause)
        finally:
            stream.close()
        if answer is None:
            await asyncio.sleep(0.2 + rng.random())
            return
        self.counts["whole answers"] += 1
        self.compare(number, body, answer)

    async def slow(self, rng):
        await self.whole(rng, pause=rng.choice([0.02, 0.1, 0.5]))
        self.counts["slow readers"] += 1

    async def leave(self, rng):
        stream = await self.server.open("POST", "/v1/completions", self.request(rng)[1])
        try:
            # At any time: before the first token, or behind some.
            if rng.random() < 0.5:
                await asyncio.sleep(rng.random())
            elif await stream.head() == 200:
                for _ in range(rng.randrange(1, 8)):
                    if await stream.event() is None:
                        break
        finally:
            stream.close()
        self.counts["left"] += 1

    async def cancel(self, rng):
        job = f"job {rng.randrange(1 << 40)}"
        body = {"job_id": job, "prompt": "x" * rng.randrange(1, 300), "max_tokens": 300, "temperature": 1.0, "seed": 1}
        stream = await self.server.open("POST", "/execute", body)
        try:
            await asyncio.sleep(rng.random() * rng.choice([0.1, 2]))
            if (await self.server.ask("POST", "/cancel", {"job_id": job}))[0] != 202:
                raise Failed("POST /cancel did not answer 202")
            if await stream.head() == 429:
                await stream.body()
                self.counts["queue full, answered 429"] += 1
                return
            last = None
            while (event := await stream.event()) is not None:
                last = event
            if last is None or last[0] not in ("end", "error"):
                raise Failed(f"a cancelled stream ended with {last}")
            self.counts["cancelled" if last[0] == "error" else "ended before they were cancelled"] += 1
        finally:
            stream.close()

    async def refused(self, rng):
        path, body, expected = rng.choice(REFUSED)
        status, answer = await self.server.ask("POST", path, body)
        # A full server says so first, whatever the request.
        if status not in (expected, 429) or not answer:
            self.fault("refused otherwise", f"{path} {body}: {status} {answer}")
        self.counts["bad requests, answered"] += 1

    def resident(self):
        """MiB."""
        with open(f"/proc/{self.arguments.pid}/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) / 1024

    async def watch(self):
        said = self.begin
        while time.monotonic() < self.end:
            await asyncio.sleep(1)
            if self.arguments.pid:
                self.sizes.append((time.monotonic() - self.begin, self.resident()))
            if time.monotonic() - said > 30:
                said = time.monotonic()
                health = await self.server.health()
                size = f", {self.sizes[-1][1]:.0f} MiB" if self.sizes else ""
                print(f"{said - self.begin:5.0f} s  {health['running']} running, {health['waiting']} waiting, "
                      f"{health['kv_pages_held']} pages held, {health['preemptions']} preemptions{size}  "
                      f"{dict(self.counts)}", flush=True)

    def growth(self):
        """First and last minute's median resident size, in MiB; the first seconds, in which memory is touched for the
        first time, do not count where there are minutes."""
        length = min(60, self.arguments.minutes * 60 / 4)
        begin = 5 if length > 20 else 0
        first = [size for at, size in self.sizes if begin <= at < begin + length]
        last = [size for at, size in self.sizes if at >= self.sizes[-1][0] - length]
        return percentile(first, 0.5), percentile(last, 0.5)


async def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--clients", type=int, default=300)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--different", type=int, default=200, help="different requests")
    parser.add_argument("--pid", type=int, help="of the server, on this machine")
    parser.add_argument("--patience", type=float, default=300, help="seconds after which a silent stream is stuck")
    parser.add_argument("--growth", type=float, default=0.05, help="share by which the resident size may grow")
    arguments = parser.parse_args()
    client.PATIENCE = arguments.patience
    server = Server(arguments.url)
    soak = Soak(server, await server.health(), arguments)
    clients = asyncio.gather(*(soak.client(number) for number in range(arguments.clients)))
    await asyncio.gather(clients, soak.watch())
    try:
        health = await server.idle()
        print(f"in the end no request runs or waits and {health['kv_pages_held']} pages are held")
    except Failed as failed:
        soak.fault("pages leaked", failed)
    print(f"{arguments.clients} clients, {arguments.minutes:g} minutes: {dict(soak.counts)}")
    print(f"{len(soak.answers)} different requests had one answer each" if not soak.faults["another answer"] else "")
    if soak.first_event:
        print(f"first event after p50 {percentile(soak.first_event, 0.5):.2f} s, p99 {percentile(soak.first_event, 0.99):.2f} s")
    if soak.sizes:
        first, last = soak.growth()
        print(f"resident size: {first:.0f} MiB in the first minute, {last:.0f} MiB in the last")
        if last > first * (1 + arguments.growth):
            soak.fault("memory grows", f"by {last - first:.0f} MiB")
    print(f"faults: {dict(soak.faults) or 'none'}")
    return 1 if soak.faults else 0


if __name__ == "__main__":
    run(main())
