"""Prints what a ComfyUI server tells its front end, a line of JSON each: `listen.py ADDRESS CLIENT`.

A program of its own because it needs aiohttp, which ComfyUI's Python has and the tests' need not have.
"""

from __future__ import annotations

import asyncio
import sys

import aiohttp  # pyright: ignore[reportMissingImports]


async def listen(address: str, client: str) -> None:
    async with aiohttp.ClientSession() as session, session.ws_connect(f"http://{address}/ws?clientId={client}") as ws:
        async for message in ws:
            if message.type == aiohttp.WSMsgType.TEXT:
                print(message.data, flush=True)


if __name__ == "__main__":
    asyncio.run(listen(*sys.argv[1:]))
