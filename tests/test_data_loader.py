"""Batches: the same for any number of ranks and workers, and after stopping anywhere."""

from __future__ import annotations

import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from open_flamingo.train.data.labels import laion_labels, mmc4_labels
from open_flamingo.train.data.loader import Batch, build_loader
from open_flamingo.train.data.options import DataOptions, resolve_lanes, resolve_workers
from open_flamingo.train.data.workers import LoaderState
from tests.data_tools import EOC, MEDIA, PAD, image_processor, loader, rows, same, tokenizer
from tests.shards import synthetic_document, write_laion, write_mmc4, write_tar

SHAPES = [(1, 0), (1, 2), (2, 1), (2, 2)]  # ranks, workers
GLOBAL_BATCH = 4


@pytest.fixture(scope="module")
def patterns(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("shards")
    return {"laion": write_laion(folder, shards=3, samples=5), "mmc4": write_mmc4(folder, shards=3, documents=5)}


def run(
    kind: str,
    shards: Any,
    shape: tuple[int, int],
    batches: int,
    state: LoaderState | None = None,
    global_batch: int = GLOBAL_BATCH,
    **options: Any,
) -> tuple[list[Any], LoaderState, list[list[Batch]]]:
    """All rows of `batches` global batches in the order of the run, the state after them, and each rank's batches."""
    ranks, workers = shape
    options = {"lanes": 8, "shuffle_buffer": 3, **options, "workers": workers, "batch_size": global_batch // ranks}
    first = state.samples if state else 0
    per_rank = []
    for rank in range(ranks):
        with loader(kind, shards, state, rank=rank, world_size=ranks, **options) as its_batches:
            per_rank.append(list(islice(its_batches, batches)))
    in_order = []
    for i in range(first, first + batches * global_batch):
        # Sample i of the run belongs to rank i mod ranks, which has its samples in order.
        batch, within = divmod(i - first, global_batch)
        rank = i % ranks
        row = len([j for j in range(first + batch * global_batch, i) if j % ranks == rank])
        in_order.append((rank, batch, row))
        assert within < global_batch
    taken = [[rows(batch) for batch in its] for its in per_rank]
    cursors = {lane: cursor for its in per_rank for lane, cursor in its[-1].cursors.items()}
    assert {its[-1].samples for its in per_rank} == {first + batches * global_batch}
    after = LoaderState(per_rank[0][-1].samples, cursors)
    return [taken[rank][batch][row] for rank, batch, row in in_order], after, per_rank


@pytest.mark.parametrize("resampled", [False, True])
@pytest.mark.parametrize("kind", ["laion", "mmc4"])
def test_every_shape_gives_the_same_samples(patterns: dict[str, str], kind: str, resampled: bool) -> None:
    """Images included; with fewer shards than lanes, a batch that is no multiple of the lanes, and several passes."""
    expected, state, _ = run(kind, patterns[kind], SHAPES[0], 9, resampled=resampled)
    for shape in SHAPES[1:]:
        result, its_state, _ = run(kind, patterns[kind], shape, 9, resampled=resampled)
        assert same(result, expected), shape
        assert its_state == state, shape


@pytest.mark.parametrize("kind", ["laion", "mmc4"])
@pytest.mark.parametrize(
    ("stopped", "resumed"), [((1, 0), (2, 2)), ((2, 2), (1, 0)), ((2, 1), (1, 2)), ((1, 2), (2, 1))]
)
def test_a_run_resumes_on_another_shape(
    patterns: dict[str, str], kind: str, stopped: tuple[int, int], resumed: tuple[int, int]
) -> None:
    # 12 lanes and batches of 4: the place in the round of lanes follows from the number of samples.
    options = {"lanes": 12, "resampled": stopped == (2, 1)}
    expected, end, _ = run(kind, patterns[kind], (1, 0), 9, **options)
    for batches in (1, 4):
        before, state, _ = run(kind, patterns[kind], stopped, batches, **options)
        state = LoaderState.from_json(json.loads(json.dumps(state.to_json())))
        after, its_end, _ = run(kind, patterns[kind], resumed, 9 - batches, state, **options)
        assert same(before + after, expected)
        assert its_end == end


def test_the_batch_may_change_on_resume(patterns: dict[str, str]) -> None:
    """Then a batch begins with any worker, and with any rank."""
    expected, _, _ = run("laion", patterns["laion"], (1, 0), 9, global_batch=4)
    before, state, _ = run("laion", patterns["laion"], (1, 0), 2, global_batch=3)
    for shape in SHAPES[1:]:
        after, _, _ = run("laion", patterns["laion"], shape, 4, state, global_batch=4)
        assert same(before + after, expected[:22]), shape


def test_what_was_dropped_is_counted_the_same_everywhere(patterns: dict[str, str]) -> None:
    totals = []
    for shape in SHAPES:
        _, _, per_rank = run("mmc4", patterns["mmc4"], shape, 9)
        totals.append(sum((batch.dropped for its in per_rank for batch in its), Counter()))
    assert totals[0]["single_image"] > 0
    assert all(total == totals[0] for total in totals)


def test_a_pass_gives_every_sample_once(tmp_path: Path) -> None:
    pattern = write_laion(tmp_path, shards=8, samples=4)
    passed, _, _ = run("laion", pattern, (2, 2), 8, lanes=4)  # four lanes, each with two shards of four
    keys = [row[0] for row in passed]
    assert len(set(keys)) == 32
    again, _, _ = run("laion", pattern, (2, 2), 16, lanes=4)
    assert sorted(row[0] for row in again[32:]) == sorted(keys)
    assert [row[0] for row in again[32:]] != keys


def test_seeds_differ_and_flips_are_one_an_image(patterns: dict[str, str]) -> None:
    one, _, _ = run("laion", patterns["laion"], (1, 0), 15)
    other, _, _ = run("laion", patterns["laion"], (1, 0), 15, seed=43)
    assert [row[0] for row in one] != [row[0] for row in other]
    pictures: dict[str, list[torch.Tensor]] = {}
    for key, _, _, images in one:
        pictures.setdefault(key, []).append(images[0])
    mirrored = 0
    for same_picture in pictures.values():
        for image in same_picture[1:]:
            equal = torch.equal(image, same_picture[0])
            assert equal or torch.equal(image.flip(-1), same_picture[0])
            mirrored += not equal
    assert 10 < mirrored < 35, "of 45"
    documents, _, _ = run("mmc4", patterns["mmc4"], (1, 0), 15)
    first = {}
    patterns_of_flips = set()
    for key, _, _, images in documents:
        before = first.setdefault(key, images)
        if len(images) > 1:
            patterns_of_flips.add(tuple(torch.equal(a, b) for a, b in zip(images, before, strict=True)))
    assert any(len(set(flips)) == 2 for flips in patterns_of_flips), "pictures of one document flip apart"


def test_a_batch_is_what_it_says(patterns: dict[str, str]) -> None:
    for kind in ("laion", "mmc4"):
        _, _, per_rank = run(kind, patterns[kind], (1, 2), 3)
        for batch in per_rank[0]:
            assert batch.images.dtype == torch.uint8
            assert batch.images.shape == (4, max(batch.image_counts), 3, 32, 32)
            assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
            assert batch.input_ids.shape == batch.labels.shape
            assert (batch.input_ids != PAD).sum(1).max() == batch.input_ids.shape[1], "padded to the longest"
            if kind == "laion":
                expected = laion_labels(batch.input_ids, MEDIA, PAD)
            else:
                expected = mmc4_labels(batch.input_ids, MEDIA, EOC, PAD)
            assert torch.equal(batch.labels, expected)
            assert all(".tar#" in key for key in batch.keys)
            assert set(batch.cursors) == set(range(8))


def test_synthetic_documents_mix_with_others(tmp_path: Path) -> None:
    import numpy as np

    write_mmc4(tmp_path, shards=1, documents=4)
    rng = np.random.default_rng(0)
    documents = [(f"{i}.json", json.dumps(synthetic_document(rng, 2, i)).encode()) for i in range(4)]
    write_tar(tmp_path / "gpt.tar", documents)
    shards = tuple(str(path) for path in sorted(tmp_path.iterdir()))
    taken, _, _ = run("mmc4", shards, (1, 0), 6, lanes=2)
    assert {row[0].rsplit("/", 1)[1].split("#")[0] for row in taken} == {"gpt.tar", "mmc4-000000.tar"}


# ----------------------------------------------------------------------------------------------------- ranks, workers, lanes


def test_default_lanes() -> None:
    assert [resolve_lanes(None, 1, workers) for workers in (0, 1, 16, 17)] == [16, 16, 16, 17]
    assert resolve_lanes(None, 64, 4) == 256
    assert resolve_lanes(None, 3, 1) == 24, "three ranks divide no power of two"
    for ranks in range(1, 40):
        for workers in range(9):
            lanes = resolve_lanes(None, ranks, workers)
            assert lanes % (ranks * max(1, workers)) == 0
            assert max(16, ranks * workers) <= lanes < 2 * max(16, ranks * max(1, workers)) + 16


def test_shapes_that_do_not_divide_the_lanes_are_refused_with_those_that_do() -> None:
    assert resolve_lanes(24, 2, 3) == 24
    with pytest.raises(ValueError, match=r"24 data lanes .* 5 ranks: use one of \[1, 2, 3, 4, 6, 8, 12, 24\] ranks"):
        resolve_lanes(24, 5, 1)
    with pytest.raises(
        ValueError, match=r"2 ranks × 5 workers: with 2 ranks, use one of \[1, 2, 3, 4, 6, 12\] workers"
    ):
        resolve_lanes(24, 2, 5)
    with pytest.raises(ValueError, match="16 data lanes"):
        resolve_lanes(16, 3, 2)


def test_workers_that_do_not_divide_the_batch_are_lowered(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert resolve_workers(4, 8, 2) == 4
        assert resolve_workers(0, 8, 2) == 0
        assert not caplog.records
        assert resolve_workers(3, 8, 2) == 2
        assert "2 loader workers per rank instead of 3: a batch of 8" in caplog.text
    assert resolve_workers(6, 7, 1) == 1
    assert resolve_workers(6, 12, 2, lanes=16) == 4
    assert resolve_workers(6, 12, 2, lanes=2) == 1


def test_options_that_do_not_fit_are_refused(patterns: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="must divide the 16 lanes"):
        loader("laion", patterns["laion"], workers=3, lanes=16, batch_size=3)
    with pytest.raises(ValueError, match="the state is of 1 lanes, the run has 8"):
        loader("laion", patterns["laion"], LoaderState(4, {0: (0, 4)}), lanes=8)
    with pytest.raises(ValueError, match="no laion shards"):
        loader("laion", "")
    with pytest.raises(ValueError, match="kind is"):
        loader("coco", patterns["laion"])
    bare = type(tokenizer()).from_pretrained(Path(__file__).parent / "golden" / "common" / "tokenizer_base")
    with pytest.raises(ValueError, match="the tokenizer does not know <image>"):
        build_loader(DataOptions("laion", patterns["laion"], 4), bare, image_processor(32))


# ------------------------------------------------------------------------------------------------------------- processes


def test_the_trainings_random_numbers_are_left_alone(patterns: dict[str, str]) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with loader("laion", patterns["laion"], workers=2) as batches:
        next(batches)
    assert torch.equal(torch.rand(3), expected)


def test_closing_stops_the_workers(patterns: dict[str, str]) -> None:
    import multiprocessing

    before = set(multiprocessing.active_children())
    batches = loader("laion", patterns["laion"], workers=2)
    next(batches)
    started = set(multiprocessing.active_children()) - before
    assert len(started) == 2
    batches.close()
    batches.close()
    assert not set(multiprocessing.active_children()) & started


def test_workers_outlive_the_signals_that_a_job_gets(patterns: dict[str, str]) -> None:
    """SLURM sends them to every process; the training process still wants batches, to reach the end of its step."""
    import multiprocessing

    before = set(multiprocessing.active_children())
    with loader("laion", patterns["laion"], workers=2) as batches:
        next(batches)
        started = [child for child in multiprocessing.active_children() if child not in before]
        for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM):
            for child in started:
                assert child.pid is not None
                os.kill(child.pid, number)
        assert len(list(islice(batches, 10))) == 10
        assert all(child.is_alive() for child in started)


def test_the_dataset_can_be_sent_to_a_fresh_process(patterns: dict[str, str]) -> None:
    """Python 3.14 starts workers so."""
    batches = loader("mmc4", patterns["mmc4"])
    dataset = pickle.loads(pickle.dumps(batches.dataset))
    (expected,), (result,) = (list(islice(one.parts(0), 1)) for one in (batches.dataset, dataset))
    assert [sample.key for sample in result.samples] == [sample.key for sample in expected.samples]
    for one, other in zip(result.samples, expected.samples, strict=True):
        assert np.array_equal(one.images, other.images)


@pytest.mark.fault("Data", "The training process is killed", "its workers end by themselves")
def test_a_training_process_that_is_killed_takes_its_workers_with_it(patterns: dict[str, str]) -> None:
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import multiprocessing
from tests.data_tools import loader
batches = loader("laion", {patterns["laion"]!r}, workers=2)
next(batches)
print(*[child.pid for child in multiprocessing.active_children()], flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        workers = [int(pid) for pid in process.stdout.readline().split()]
        process.kill()
    assert len(workers) == 2
    while any(_running(pid) for pid in workers):
        time.sleep(0.2)


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
