"""`video`: folders of frames, or video files, with a caption each → N frames sampled evenly, and the caption after the last."""

from __future__ import annotations

import io
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_flamingo.scripts.convert.documents import Documents
from open_flamingo.scripts.convert.engine import Skip
from open_flamingo.scripts.convert.pairs import images_of
from open_flamingo.scripts.convert.tables import choose

VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov")
VIDEO_FIELDS = ("video", "path", "file_name")


@dataclass
class Video(Documents):
    """Of a folder, each folder of frames `a/` and video file `a.mp4` in it with the caption `a.txt`; or a table of them."""

    frames: int = 6
    noun = entry = "video"

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"frames": self.frames}

    def entries(self, folder: str) -> list[str]:
        return videos_of(folder)

    def parts(self, record: dict[str, Any], folder: Path, counts: Counter[str]) -> list[str | bytes]:
        name = choose(record, self.image_field, VIDEO_FIELDS, "no_video", "--image_field")
        root = os.path.abspath(folder)
        video = Path(os.path.normpath(os.path.join(root, str(name))))
        if os.path.commonpath([root, video]) != root:
            raise Skip("outside_image_dir", f"{name} is not in {root}: say where videos may be with --image_dir")
        if list(record) == ["video"]:  # of a folder
            text = video.with_suffix(".txt") if video.is_file() else video.with_name(f"{video.name}.txt")
            if not text.exists():
                raise Skip("no_caption", f"{text} does not exist")
            record = record | {"caption": text.read_text(encoding="utf-8")}
            caption = choose(record, None, ("caption",), "no_caption", "--caption_field").strip()
        else:
            caption = self.caption(record)
        parts: list[str | bytes] = []
        if video.is_dir():
            names = images_of(str(video))
            for i in evenly(len(names), self.frames):
                parts += self.image(names[i], video, counts)
        elif video.exists():
            parts += decoded_frames(video, self.frames)
        else:
            raise Skip("missing_video", f"{video} does not exist: is --image_dir right?")
        return [*parts, caption]


def evenly(total: int, wanted: int) -> list[int]:
    """The middle of each of `wanted` equal parts of `total` frames; all of them where there are fewer."""
    wanted = min(total, wanted)
    return [(2 * i + 1) * total // (2 * wanted) for i in range(wanted)]


def videos_of(folder: str) -> list[str]:
    """Names of folders and video files, sorted."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() or e.name.lower().endswith(VIDEO_SUFFIXES))


def decoded_frames(video: Path, wanted: int) -> list[bytes]:
    """JPEGs of frames, evenly over a video. Raises ValueError where PyAV is not installed."""
    try:
        import av
    except ImportError as error:
        raise RuntimeError(
            f"{video}: reading video files needs PyAV: pip install av. Or give folders of frames"
        ) from error
    frames: list[bytes] = []
    try:
        with av.open(str(video)) as container:  # twice: what a header says of the number of frames is often wrong
            total = sum(1 for _ in container.decode(video=0))
        chosen = set(evenly(total, wanted))
        with av.open(str(video)) as container:
            for i, frame in enumerate(container.decode(video=0)):
                if i in chosen:
                    buffer = io.BytesIO()
                    frame.to_image().save(buffer, format="JPEG", quality=95)
                    frames.append(buffer.getvalue())
    except Exception as error:  # a broken video can raise anything
        raise Skip("bad_video", f"{video} cannot be decoded: {error}") from error
    return frames
