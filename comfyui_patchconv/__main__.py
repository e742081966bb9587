"""`python -m comfyui_patchconv`: the command line `patchconv`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
