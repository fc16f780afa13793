"""Converts MMC4 to WebDataset shards: `open-flamingo-convert mmc4` under its older name, with the same flags.

    python scripts/convert_mmc4_to_wds.py --output_dir shards --zip_files '/data/mmc4/docs_shard_{0..23098}.zip' \\
        --image_dir /data/mmc4/images --workers 16
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: use this checkout, installed or not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    import open_flamingo

    open_flamingo.__path__.append(sys.path[0])

from open_flamingo.scripts.convert.__main__ import main_mmc4 as main

if __name__ == "__main__":
    main()
