"""The small world as training data: LAION shards, and MMC4 as it is downloaded, for `convert_mmc4_to_wds.py` to convert."""

import json
import random
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import simplejpeg
import webdataset

from .documents import draw_document
from .progress import Tracker, silent
from .world import TRAINING, Scene, caption, render

JPEG_QUALITY = 90


def write_laion(
    folder: Path, pairs: int, pairs_per_shard: int, track: Tracker | None = None, scenes: Sequence[Scene] = TRAINING
) -> str:
    """Write image–caption pairs; return the brace pattern of the shards."""
    folder.mkdir(parents=True)
    rng = random.Random("laion 0" if scenes is TRAINING else "laion held out")
    pattern = str(folder / "%05d.tar")
    with webdataset.ShardWriter(pattern, maxcount=pairs_per_shard, verbose=0) as writer:
        for number in (track or silent())(range(pairs), pairs, "LAION pairs"):
            scene = rng.choice(scenes)
            image = encode(render(rng, scene))
            writer.write({"__key__": f"{number:08d}", "jpg": image, "txt": caption(scene)})
    return braces(folder, -(-pairs // pairs_per_shard), 5)


def write_mmc4_download(folder: Path, documents: int, track: Tracker | None = None, seed: int = 0) -> tuple[Path, Path]:
    """Write documents as MMC4 publishes them and images as its users download them; return the zip and the image folder."""
    images = folder / "images"
    (images / "0").mkdir(parents=True)
    rng = random.Random(f"mmc4 {seed}")
    archive = folder / "docs_shard_0.zip"
    with zipfile.ZipFile(archive, "w") as file, file.open("docs_shard_0.jsonl", "w") as lines:
        for number in (track or silent())(range(documents), documents, "MMC4 documents"):
            document = draw_document(rng)
            names = [f"{number:06d}_{i}.jpg" for i in range(len(document.images))]
            for name, scene in zip(names, document.images, strict=True):
                (images / "0" / name).write_bytes(encode(render(rng, scene)))
            published = {
                "text_list": document.sentences,
                "image_info": [{"image_name": name} for name in names],
                "similarity_matrix": document.similarity,
            }
            lines.write(json.dumps(published).encode() + b"\n")
    return archive, images


def encode(image: np.ndarray) -> bytes:
    return simplejpeg.encode_jpeg(image, quality=JPEG_QUALITY)


def braces(folder: Path, shards: int, digits: int) -> str:
    """`folder/{00000..00011}.tar`; a single shard is named as it is."""
    first, last = f"{0:0{digits}d}", f"{shards - 1:0{digits}d}"
    return str(folder / (f"{first}.tar" if shards == 1 else f"{{{first}..{last}}}.tar"))
