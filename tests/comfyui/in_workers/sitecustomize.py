"""Python imports this as it starts: workers of a server need what `launch.py` does for the server itself."""

import sys
from pathlib import Path

if any(Path(one).parts[-2:] == ("devices", "worker_script.py") for one in sys.orig_argv):
    sys.path.append(str(Path(__file__).parents[1]))
    from launch import prepare  # pyright: ignore[reportMissingImports]

    prepare()
