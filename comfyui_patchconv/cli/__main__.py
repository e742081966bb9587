"""`python -m comfyui_patchconv.cli`: the command line, for programs that start a module by its name."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
