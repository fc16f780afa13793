"""`python -m benchmarks <what>`: this program beside the reference. `python -m benchmarks <what> --help` says more."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import open_flamingo

open_flamingo.__path__.append(str(ROOT))  # this checkout's `train`, installed or not

from benchmarks.command import main

if __name__ == "__main__":
    main()
