"""Predictions on disk: one file per condition and rank, a line at a time, kept when a run is killed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from open_flamingo.train.atomic import atomic_write

SETTINGS, FOLDER = "settings.json", "predictions"


def fingerprint(path: Path) -> str:
    """What tells a changed file from the old one; of a large one, its size and time alone."""
    stat = path.stat()
    if stat.st_size > 1 << 26:
        return f"{stat.st_size} bytes, {stat.st_mtime_ns}"
    return f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"


def checkpoint_fingerprint(checkpoint: str) -> str:
    """As `fingerprint`, of a checkpoint: of a folder, what weights it has; a name on the hub stands for itself."""
    path = Path(checkpoint)
    if path.is_dir():
        files = [file for pattern in ("*.pt", "*.safetensors", "checkpoint_*/.metadata") for file in path.glob(pattern)]
        listing = [
            (str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files)
        ]
        return f"{len(files)} files, {hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]}"
    return fingerprint(path) if path.exists() else checkpoint


def keep_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Writes what decides a prediction, or compares it with what the folder has. Raises ValueError, naming each difference."""
    path = folder / SETTINGS
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(json.dumps(settings, indent=1).encode())
        return
    saved = json.loads(path.read_text(encoding="utf-8"))
    now = json.loads(json.dumps(settings))
    different = [name for name in {**saved, **now} if saved.get(name) != now.get(name)]
    if different:
        changes = "; ".join(f"{name} was {saved.get(name)!r}, now {now.get(name)!r}" for name in different)
        raise ValueError(
            f"--output_dir {folder} holds predictions of other settings: {changes}. Use the same, or another folder"
        )


def read_predictions(folder: Path, condition: str) -> dict[int, dict[str, Any]]:
    """Index of the test record → its line, of all ranks. A line that was not finished does not count."""
    found: dict[int, dict[str, Any]] = {}
    for path in sorted((folder / FOLDER).glob(f"{condition}.rank*.jsonl")):
        data = path.read_bytes()
        for line in data[: data.rfind(b"\n") + 1].splitlines():
            row = json.loads(line)
            found.setdefault(row["index"], row)
    return found


class PredictionFile:
    """Appends to a rank's file of a condition."""

    def __init__(self, folder: Path, condition: str, rank: int) -> None:
        self._path = folder / FOLDER / f"{condition}.rank{rank}.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.touch()
        data = self._path.read_bytes()
        if (whole := data.rfind(b"\n") + 1) < len(data):  # killed while it wrote a line
            os.truncate(self._path, whole)

    def __enter__(self) -> PredictionFile:
        self._file = open(self._path, "ab")
        return self

    def write(self, rows: Iterable[dict[str, Any]]) -> None:
        self._file.write(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))
        self._file.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()


def write_whole(folder: Path, condition: str, rows: Sequence[dict[str, Any]]) -> None:
    """All predictions of a condition in one file, in the order of the test records."""
    with atomic_write(folder / FOLDER / f"{condition}.jsonl") as file:
        file.write(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))
