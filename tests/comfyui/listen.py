"""Prints what a ComfyUI server tells its front end, a line of JSON each: `listen.py ADDRESS CLIENT`. A preview is
`{"type": "preview", "data": …}` with the image file in base64.

A program of its own because it needs aiohttp, which ComfyUI's Python has and the tests' need not have.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys

import aiohttp  # pyright: ignore[reportMissingImports]

PREVIEW = (1).to_bytes(4, "big")
"""What ComfyUI's binary messages with a preview begin with."""


async def listen(address: str, client: str) -> None:
    async with aiohttp.ClientSession() as session, session.ws_connect(f"http://{address}/ws?clientId={client}") as ws:
        async for message in ws:
            if message.type == aiohttp.WSMsgType.TEXT:
                print(message.data, flush=True)
            elif message.type == aiohttp.WSMsgType.BINARY and message.data[:4] == PREVIEW:
                image = base64.b64encode(message.data[8:]).decode()  # behind its format
                print(json.dumps({"type": "preview", "data": image}), flush=True)


if __name__ == "__main__":
    asyncio.run(listen(*sys.argv[1:]))
