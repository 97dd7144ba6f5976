"""An HTTP/1.1 client for load tools: keeps no more than a connection per request, sees each event as it comes, and can go
away in the middle. Python's standard library only."""

import asyncio
import hashlib
import json
import socket
import time
import urllib.parse

# Seconds after which a server that says nothing is stuck.
PATIENCE = 180


class Failed(Exception):
    """The server did what no server may do; the text says what."""


class Stream:
    """A response as it arrives. `status` and `headers` are known after `head`."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer
        self.status, self.headers = None, {}

    async def _line(self):
        line = await asyncio.wait_for(self.reader.readline(), PATIENCE)
        if not line.endswith(b"\n"):
            raise Failed("the connection was closed in the middle of a response")
        return line.strip().decode()

    async def head(self):
        self.status = int((await self._line()).split()[1])
        while line := await self._line():
            name, _, value = line.partition(":")
            self.headers[name.lower()] = value.strip()
        return self.status

    async def body(self):
        """All of a response, streamed or not."""
        if "content-length" in self.headers:
            return await asyncio.wait_for(self.reader.readexactly(int(self.headers["content-length"])), PATIENCE)
        parts = []
        while (part := await self._chunk()) is not None:
            parts.append(part)
        return b"".join(parts)

    async def _chunk(self):
        size = int(await self._line(), 16)
        data = await asyncio.wait_for(self.reader.readexactly(size + 2), PATIENCE)
        return data[:-2] if size else None

    async def event(self):
        """The next server-sent event as (name, data), or None at the end."""
        while (chunk := await self._chunk()) is not None:
            fields = dict(line.split(": ", 1) for line in chunk.decode().strip().split("\n") if ": " in line)
            if "data" in fields:
                return fields.get("event", ""), fields["data"]
        return None

    def close(self):
        """Goes away, at once and without a word, if the response is not complete."""
        self.writer.close()


class Server:
    """Where to ask."""

    def __init__(self, url):
        parts = urllib.parse.urlsplit(url)
        self.host, self.port = parts.hostname, parts.port or 80

    async def open(self, method, path, body=b"", buffer=None):
        """Sends a request; the response is still to come. `body` is bytes, or what becomes JSON. A small `buffer` (bytes)
        makes the server feel it when the response is not read."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        if buffer:
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            connection.setblocking(False)
            await asyncio.get_running_loop().sock_connect(connection, (self.host, self.port))
            reader, writer = await asyncio.open_connection(sock=connection, limit=1 << 14)
        else:
            reader, writer = await asyncio.open_connection(self.host, self.port)
        head = f"{method} {path} HTTP/1.1\r\nhost: {self.host}\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(data)}\r\nconnection: close\r\n\r\n"
        writer.write(head.encode() + data)
        await writer.drain()
        return Stream(reader, writer)

    async def ask(self, method, path, body=b""):
        """A whole response: its status, and its JSON or None."""
        stream = await self.open(method, path, body)
        try:
            await stream.head()
            data = await stream.body()
        finally:
            stream.close()
        try:
            return stream.status, json.loads(data)
        except ValueError:
            return stream.status, None

    async def health(self):
        status, health = await self.ask("GET", "/health")
        if status != 200:
            raise Failed(f"the server is not healthy: {health}")
        return health

    async def idle(self, seconds=60):
        """Waits until nothing runs or waits; every page of the KV cache must be given back then."""
        end = time.monotonic() + seconds
        while True:
            health = await self.health()
            if (health["running"], health["waiting"], health["kv_pages_held"]) == (0, 0, 0):
                return health
            if time.monotonic() > end:
                raise Failed(f"{health['running']} requests run, {health['waiting']} wait and "
                             f"{health['kv_pages_held']} pages are held, though nobody asks any more")
            await asyncio.sleep(0.05)

    async def complete(self, body):
        """An answer of /v1/completions with log-probabilities, streamed or not, in one form. Waits while the queue is
        full."""
        while True:
            stream = await self.open("POST", "/v1/completions", body)
            try:
                status = await stream.head()
                if status == 429:
                    await stream.body()
                elif status != 200:
                    raise Failed(f"{status}: {(await stream.body()).decode()}")
                elif body.get("stream"):
                    return await self._streamed(stream)
                else:
                    answer = json.loads(await stream.body())
                    return Answer([answer["choices"][0]], answer["usage"])
            finally:
                stream.close()
            await asyncio.sleep(0.1)

    async def _streamed(self, stream):
        choices, usage = [], None
        while (event := await stream.event()) is not None:
            if event[1] == "[DONE]":
                return Answer(choices, usage)
            data = json.loads(event[1])
            if "error" in data:
                raise Failed(f"the stream ended with {data['error']}")
            choices += data["choices"][:1]
            usage = data.get("usage") or usage
        raise Failed("the stream ended without [DONE]")


class Answer:
    """Text, tokens and log-probabilities, and how they were computed."""

    def __init__(self, choices, usage):
        self.text = "".join(choice["text"] for choice in choices)
        lists = [choice["logprobs"] for choice in choices if choice.get("logprobs")]
        self.tokens = [token for part in lists for token in part["tokens"]]
        self.logprobs = [value for part in lists for value in part["token_logprobs"]]
        self.top = [values for part in lists for values in part["top_logprobs"] or []]
        self.reason = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
        self.usage = usage or {}

    def cached_tokens(self):
        return (self.usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)

    def digest(self):
        parts = [self.text, self.tokens, self.logprobs, self.top, self.reason]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def random_tokens(random, count, health):
    return [random.randrange(health["vocab_size"]) for _ in range(count)]


def percentile(values, share):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def run(main):
    """Runs a tool; a failure is one line and exit code 1."""
    try:
        raise SystemExit(asyncio.run(main))
    except (Failed, OSError) as error:
        raise SystemExit(f"FAILED: {error}") from None
