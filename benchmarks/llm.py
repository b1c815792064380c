"""How busy the client keeps an endpoint: requests a second of a stub with SLOTS and a latency.

The stub is a process of its own that answers after LATENCY seconds and works on SLOTS requests at
a time, so SLOTS / LATENCY a second is the most it can do. Prints one JSON line.

    python benchmarks/llm.py [--slots 8] [--latency 0.2] [--requests 400] [--workers 8 16]
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time

from pathcli.llm import Client, Message

STUB = """
import asyncio, json, sys
slots, latency = int(sys.argv[1]), float(sys.argv[2])
body = json.dumps({"choices": [{"message": {"content": "ok"}}], "usage": {"total_tokens": 2}})
reply = f"HTTP/1.1 200 OK\\r\\nContent-Length: {len(body)}\\r\\nConnection: close\\r\\n\\r\\n{body}"
async def main():
    free = asyncio.Semaphore(slots)
    async def answer(reader, writer):
        head = (await reader.readuntil(b"\\r\\n\\r\\n")).decode().lower()
        await reader.readexactly(int(head.split("content-length:")[1].split()[0]))
        async with free:
            await asyncio.sleep(latency)
        writer.write(reply.encode())
        await writer.drain()
        writer.close()
    server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=256)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


def main() -> None:
    """Measure and print one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--latency", type=float, default=0.2)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 16])
    given = parser.parse_args()
    command = [sys.executable, "-c", STUB, str(given.slots), str(given.latency)]
    limit = given.slots / given.latency
    found = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as stub:  # noqa: S603
        assert stub.stdout is not None  # noqa: S101
        url = f"http://127.0.0.1:{stub.stdout.readline().strip()}/v1#stub"
        for workers in given.workers:
            client = Client(url, workers=workers)
            talks = ([Message("user", (f"question {i}",))] for i in range(given.requests))
            start, cpu = time.perf_counter(), time.process_time()
            answered = sum(1 for _ in client.ask_all(talks))
            seconds = time.perf_counter() - start
            found[workers] = {
                "requests_per_second": round(answered / seconds, 2),
                "of_its_limit": round(answered / seconds / limit, 3),
                "cpu_ms_a_request": round((time.process_time() - cpu) / answered * 1e3, 2),
            }
        stub.kill()
    line = {
        "benchmark": "llm",
        "slots": given.slots,
        "latency_s": given.latency,
        "limit_per_second": limit,
        "requests": given.requests,
        "by_workers": found,
        "machine": platform.machine(),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
