#!/usr/bin/env bash
# All that is to be known of a GPU, by the python3 that has torch (or $PYTHON): bash benchmarks/on_gpu.sh [FOLDER] …
# See on_gpu.py for the options. Wheels in a folder `wheels` beside the repository's files, or in it, are installed
# first, without a network.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
python="${PYTHON:-python3}"
"$python" -c 'import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 1))' 2>/dev/null || {
    echo "on_gpu.sh: $python has no torch of 2.1 or newer: set PYTHON to one that has." >&2
    exit 2
}
for wheels in "$root/wheels" "$root/benchmarks/wheels"; do
    if compgen -G "$wheels/*.whl" >/dev/null; then
        # No dependencies are looked for: what is there is what was brought, and torch stays as it is.
        "$python" -m pip install --quiet --no-index --no-deps --find-links "$wheels" "$wheels"/*.whl ||
            echo "on_gpu.sh: not all wheels of $wheels could be installed; going on without." >&2
    fi
done
exec "$python" "$root/benchmarks/on_gpu.py" "$@"
