"""The command line of reForge, in a process that reForge has not started."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def read_flags() -> None:
    """Have reForge's modules do as its command line says, such as `--always-cpu`: they read it where they are told to,
    which is before anything that asks for a device is imported."""
    parsing: Any = import_module("ldm_patched.modules.args_parser")
    parsing.args, _ = parsing.parser.parse_known_args()
