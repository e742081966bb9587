"""Imports the command line, then runs programs in copies of itself, which have nothing left to import.

A line of JSON a program comes in: its code, arguments, folder, what its environment has besides, and files for what it
prints. Two lines go out: the number of its process, and its status, as `os.waitpid` has it, when it has ended.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import sys
import traceback
from contextlib import suppress
from typing import NoReturn

import accelerate  # noqa: F401
import diffusers.models.autoencoders.autoencoder_kl  # noqa: F401
import PIL.PngImagePlugin  # noqa: F401

VAES = "diffusers.models.autoencoders.autoencoder_"
for name in (f"{VAES}kl_wan", f"{VAES}oobleck", "av", "soundfile"):
    with suppress(ImportError, OSError):  # not everywhere
        importlib.import_module(name)

from comfyui_patchconv import cli, streaming  # noqa: E402, F401


def run(code: str) -> int:
    """Run `code` as a program; its exit code."""
    try:
        exec(code, {"__name__": "__main__"})
    except SystemExit as asked:
        if asked.code is None or isinstance(asked.code, int):
            return asked.code or 0
        print(asked.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def end(code: int) -> NoReturn:
    """End a copy as a program ends, but for taking apart all that was imported: that takes longer than most of them."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 0xFF)


gc.collect()
gc.freeze()  # copies that look for garbage need not go through it, nor have memory of their own for it
for line in sys.stdin:
    asked = json.loads(line)
    process = os.fork()
    if process == 0:
        os.chdir(asked["folder"])
        os.environ.update(asked["environment"])
        for number, name in enumerate((os.devnull, *asked["prints"])):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
        sys.argv[1:] = asked["arguments"]
        end(run(asked["code"]))
    print(process, flush=True)
    print(os.waitpid(process, 0)[1], flush=True)
