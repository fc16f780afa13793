"""Faults injected into real runs of two processes: numbers, signals, deaths, disks. Nothing is lost.

The tables of docs/reliability.md name these tests; faults of the data are in test_faults_data.py.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from open_flamingo.train.checkpoint import files as checkpoints
from open_flamingo.train.distributed import World
from open_flamingo.train.health import EXIT_STOPPED, Signals, check_finite
from open_flamingo.train.train import main
from open_flamingo.train.watchdog import Watchdog
from tests.conftest import AT_LENGTH, cases, only_at_length
from tests.ranks import Fork, held_port, run_ranks
from tests.tiny import ROOT, assert_same, finished, torchrun

FAULTY = ROOT / "tests" / "faulty.py"
# Small updates, but 8 of them an epoch of two ranks, and 2 epochs.
SMALL = ["--batch_size_laion=2", "--batch_size_mmc4=1"]
LONG = [*SMALL, "--train_num_samples_laion=32", "--train_num_samples_mmc4=16"]
LAST = "checkpoint_1.pt"


def plan(*faults: dict[str, Any], seconds: float = 0.0, **more: Any) -> str:
    return json.dumps({"faults": faults, "seconds_an_update": seconds, **more})


def fault(what: str, kind: str, *rank: int, updates: list[int]) -> dict[str, Any]:
    return {"what": what, "kind": kind, "rank": rank, "updates": updates}


def weights(run: Path, name: str = LAST) -> dict[str, torch.Tensor]:
    return torch.load(run / name, weights_only=True)["model_state_dict"]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str] | Fork | None = None) -> None:
    while not condition():
        assert process is None or process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def updates_done(run: Path) -> int:
    lines = run / "metrics.jsonl"
    return len(lines.read_text().splitlines()) if lines.exists() else 0


def ranks_of(process: subprocess.Popen[str] | Fork) -> dict[int, int]:
    """The process ids of the ranks that the torchrun `process`, or what stands for it, has started."""
    if isinstance(process, Fork):
        return dict(enumerate(process.ranks))
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == process.pid:
                environment = (stat.parent / "environ").read_bytes()
                found[int(re.findall(rb"\0RANK=(\d+)", environment)[0])] = int(stat.parent.name)
        except (OSError, IndexError):
            continue
    return found


def alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.fault(
    "Numbers",
    "A loss that is not finite, of either dataset, on one rank (DDP, FSDP)",
    "all ranks agree before the backward pass: that dataset's part of the update is left out on all of them, the other's stays; counted, and the samples are written to `{run_name}/bad_batches.jsonl`",
    "MMC4: hangs. LAION: every trained weight NaN, saved, exit 0",
)
@pytest.mark.parametrize("strategy", [[], pytest.param(["--fsdp"], marks=only_at_length)], ids=["ddp", "fsdp"])
def test_a_loss_that_is_not_finite_on_one_rank_is_left_out_on_all(
    strategy: list[str], flags: list[str], tmp_path: Path
) -> None:
    """The update is that of the other dataset alone, averaged over the ranks; the samples are named."""
    bad, without = tmp_path / "bad", tmp_path / "without"
    flags = [*flags, *strategy]
    faults = plan(fault("loss", "laion", 1, updates=[2]), fault("loss", "mmc4", 0, updates=[3]))
    output = finished(run_ranks(2, FAULTY, faults, *flags, f"--run_name={bad}"))
    faults = plan(fault("no weight", "laion", 0, 1, updates=[2]), fault("no weight", "mmc4", 0, 1, updates=[3]))
    finished(run_ranks(2, FAULTY, faults, *flags, f"--run_name={without}"))
    for name, weight in weights(without).items():
        torch.testing.assert_close(weights(bad)[name], weight, rtol=0, atol=1e-6, msg=name)

    lines = [json.loads(text) for text in (bad / "bad_batches.jsonl").read_text().splitlines()]
    assert [(line["update"], line["not_finite"]) for line in lines] == [(2, "laion loss"), (3, "mmc4 loss")]
    assert [list(line["samples_by_rank"]) for line in lines] == [["1"], ["0"]]
    laion, mmc4 = (samples for line in lines for samples in line["samples_by_rank"].values())
    assert (len(laion), len(mmc4)) == (4, 2)
    assert all(Path(sample["shard"]).is_file() and sample["key"] for sample in laion + mmc4)
    assert "the laion loss is not finite on rank 1" in output
    logged = [json.loads(text) for text in (bad / "metrics.jsonl").read_text().splitlines()]
    assert [values["bad_batches_laion"] for values in logged] == [0, 1, 1, 1]
    assert [values["loss_mmc4"] is None for values in logged] == [False, False, True, False]


@pytest.mark.fault(
    "Numbers",
    "A gradient norm that is not finite (DDP, FSDP)",
    "the update changes no weight and no moment, on all ranks; counted and recorded",
)
@pytest.mark.parametrize("strategy", [[], ["--fsdp"]], ids=["ddp", "fsdp"])
def test_a_gradient_that_is_not_finite_changes_no_weight(strategy: list[str], flags: list[str], tmp_path: Path) -> None:
    flags = [*flags, *strategy, "--save_steps=1", "--train_num_samples_laion=32", "--train_num_samples_mmc4=16"]
    output = finished(
        run_ranks(
            2,
            FAULTY,
            plan(fault("gradient", "mmc4", 1, updates=[3])),
            *flags,
            f"--run_name={tmp_path}",
            "--num_epochs=1",
        )
    )
    before, after = (
        torch.load(tmp_path / name, weights_only=True) for name in ("epoch_0_step_2.pt", "epoch_0_step_3.pt")
    )
    assert_same(before["model_state_dict"], after["model_state_dict"])
    assert_same(before["optimizer_state_dict"]["state"], after["optimizer_state_dict"]["state"])
    (line,) = map(json.loads, (tmp_path / "bad_batches.jsonl").read_text().splitlines())
    assert (line["update"], line["not_finite"]) == (3, "gradient norm")
    assert {rank: len(samples) for rank, samples in line["samples_by_rank"].items()} == {"0": 6, "1": 6}
    assert "finished" in output
    check_finite_file(tmp_path / "checkpoint_0.pt")


def check_finite_file(path: Path) -> None:
    checkpoint = torch.load(path, weights_only=True)
    tensors = [*checkpoint["model_state_dict"].values()]
    tensors += [value for of in checkpoint["optimizer_state_dict"]["state"].values() for value in of.values()]
    assert all(torch.as_tensor(tensor).isfinite().all() for tensor in tensors)


@pytest.mark.fault("Numbers", "`--max_bad_steps` bad updates in a row", "saves, stops, says so; exit code 1")
def test_too_many_bad_updates_in_a_row_save_and_stop(flags: list[str], tmp_path: Path) -> None:
    faults = plan(fault("loss", "laion", 0, updates=[2, 4, 5, 6, 7]))
    process = run_ranks(2, FAULTY, faults, *flags, *LONG, "--max_bad_steps=3", f"--run_name={tmp_path}")
    output, _ = process.communicate()
    assert process.returncode == 1
    assert "3 updates in a row" in output
    assert "--max_bad_steps" in output
    check_finite_file(tmp_path / "epoch_0_step_6.pt")
    # The same command goes on from there.
    finished(run_ranks(2, FAULTY, plan(), *flags, *LONG, "--max_bad_steps=3", f"--run_name={tmp_path}"))
    assert (tmp_path / LAST).exists()


@pytest.mark.fault(
    "Numbers",
    "Weights or moments that are not finite",
    "are never written: checked before each save; the run ends, naming the first",
    "saved",
)
def test_weights_that_are_not_finite_are_never_written() -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    check_finite(model, optimizer)
    optimizer.state[model.weight]["exp_avg_sq"][0, 1] = float("inf")
    with pytest.raises(ValueError, match="exp_avg_sq of weight"):
        check_finite(model, optimizer)


# ---------------------------------------------------------------------------------------------------------------------
# Signals


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, backbones: list[str], shards: dict[str, str]) -> dict[str, Any]:
    """The last checkpoint of a run of two ranks that nothing disturbs, for those that something does."""
    run = tmp_path_factory.mktemp("whole")
    finished(run_ranks(2, FAULTY, plan(), *disturbed_flags(backbones, shards), f"--run_name={run}"))
    return torch.load(run / LAST, weights_only=True)


def disturbed_flags(backbones: list[str], shards: dict[str, str]) -> list[str]:
    return [
        *backbones,
        *(f"--laion_shards={shards['laion']}", f"--mmc4_shards={shards['mmc4']}", "--mmc4_textsim_threshold=0.24"),
        *(*LONG, "--num_epochs=2", "--workers=1"),
        *("--warmup_steps=2", "--learning_rate=1e-2", "--logging_steps=1"),
    ]


@pytest.fixture
def disturbed(backbones: list[str], shards: dict[str, str], tmp_path: Path) -> list[str]:
    return [*disturbed_flags(backbones, shards), f"--run_name={tmp_path / 'run'}"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_each_signal_is_noted_once(name: str) -> None:
    with Signals() as signals:
        assert signals.received is None
        for number in (signal.Signals[name], signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert signals.received == name


@pytest.mark.fault(
    "Signals",
    "SIGTERM, SIGINT or SIGUSR1 to any rank",
    "the update is finished, all ranks save and end with exit code 75 (under torchrun 1, with 75 in its report); the next start goes on bit for bit",
    "dies",
)
def test_a_signal_to_one_rank_saves_and_the_next_start_goes_on_bit_for_bit(
    disturbed: list[str], whole: dict[str, Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = torchrun(2, FAULTY, plan(seconds=0.1), *disturbed)
    wait_for(lambda: updates_done(run) >= 3, process)
    os.kill(ranks_of(process)[1], signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 1  # torchrun's
    assert re.search(rf"exitcode\s*: {EXIT_STOPPED}", output), output
    assert "SIGTERM: saved after update" in output
    assert list(run.glob("*.pt"))
    finished(run_ranks(2, FAULTY, plan(), *disturbed))
    assert_same(whole, torch.load(run / LAST, weights_only=True))


@pytest.mark.fault("Signals", "A second Ctrl-C", "ends at once, without saving; exit code 130")
def test_one_process_ends_with_the_documented_code_and_a_second_ctrl_c_at_once(
    disturbed: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"

    def start(seconds: float) -> Fork:
        return Fork(FAULTY, plan(seconds=seconds), *disturbed)

    process = start(0.1)
    wait_for(lambda: updates_done(run) >= 1, process)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate()
    assert process.returncode == EXIT_STOPPED, output

    files = sorted(run.glob("*.pt"))
    before = updates_done(run)
    process = start(5)
    wait_for(lambda: updates_done(run) > before, process)
    process.send_signal(signal.SIGINT)
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode == 130, output
    assert "without saving" in output
    assert sorted(run.glob("*.pt")) == files


# ---------------------------------------------------------------------------------------------------------------------
# Deaths


@pytest.mark.fault(
    "Deaths",
    "SIGKILL of a rank",
    "the others end and name it, with the update and shard it was at; `torchrun --max-restarts` goes on bit for bit",
    "epoch repeated",
)
def test_a_killed_rank_is_named_and_torchrun_starts_again_by_itself(
    disturbed: list[str], whole: dict[str, Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = torchrun(2, FAULTY, plan(seconds=0.1), *disturbed, "--save_steps=2", restarts=1)
    wait_for(lambda: updates_done(run) >= 5, process)
    victim = ranks_of(process)[1]
    os.kill(victim, signal.SIGKILL)
    output = finished(process)
    assert re.search(rf"Rank 1 \(\S+, pid {victim}\) died or hung; last reported at update \d+", output), output
    assert "resuming from" in output
    saved = torch.load(run / LAST, weights_only=True)
    assert_same({**whole, "flags": None}, {**saved, "flags": None})  # --save_steps differs


@pytest.mark.fault(
    "Deaths",
    "One rank of several fails with an unexpected error (CUDA out of memory), or its data does",
    "its error is logged with the rank, and its process ends at once: under NCCL, taking the process group down would wait for ranks that wait for this one",
)
def test_an_error_of_one_rank_is_seen_though_the_others_wait_for_it(disturbed: list[str], tmp_path: Path) -> None:
    faults = plan(fault("error", "laion", 1, updates=[3]), collective_end=True)
    process = run_ranks(2, FAULTY, faults, *disturbed, "--dist_timeout=20")
    output, _ = process.communicate()
    assert process.returncode == 1
    assert re.search(r"\[rank 1\] \S+ E CUDA out of memory\nTraceback", output), output
    assert "--dist_timeout" not in output, output  # nobody had to wait for that long
    assert updates_done(tmp_path / "run") == 2


class CountingStore:
    """A store of threads, which counts the requests."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.requests: Counter[str] = Counter()
        self.beats: Counter[str] = Counter()  # by the key of each rank
        self._store = dist.HashStore()
        self._seconds = seconds

    def clone(self) -> CountingStore:
        return self

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def request(*args: Any) -> Any:
            self.requests[name] += 1
            self.beats.update(args[:1] if name == "set" else ())
            time.sleep(self._seconds)
            return getattr(self._store, name)(*args)

        return request


def diagnoses(store: CountingStore, phases: list[int]) -> list[str | None]:
    """What the watchdogs of ranks that have come through so many phases say, all asked at the same time."""
    cpu, ranks = torch.device("cpu"), len(phases)
    with contextlib.ExitStack() as stack:
        watchdogs = []
        for rank, count in enumerate(phases):
            world = World("test", rank, ranks, rank, ranks, cpu, cast(dist.Store, store))
            watchdogs.append(stack.enter_context(Watchdog(world, 60.0, 60.0)))
            for phase in range(count):
                watchdogs[-1].set_phase(f"update {phase}")
        beats = Counter(store.beats)
        while any(store.beats[rank] < beats[rank] + 2 for rank in beats) or len(beats) < ranks:
            beats = beats if len(beats) == ranks else Counter(store.beats)
            time.sleep(0.01)  # until what each has told is what it is at, however busy the machine
        with ThreadPoolExecutor(ranks) as threads:
            return list(threads.map(Watchdog.diagnose, watchdogs))


def test_one_rank_alone_compares_the_others() -> None:
    store = CountingStore()
    said = diagnoses(store, [2, 2, 1, 2])
    assert len(set(said)) == 1
    assert re.fullmatch(r"Rank 2 \(\S+, pid \d+\) is behind; last reported at update 0\.", said[0] or "")
    assert store.requests["add"] == 4  # to settle who compares
    beats = store.requests["set"]
    assert store.requests["get"] <= beats + 2 * 4 + 4  # with each beat rank 0's; all ranks' twice; the verdict by each
    assert diagnoses(CountingStore(), [1, 1]) == [None] * 2


def test_a_rank_says_where_it_was_when_its_time_was_up() -> None:
    """And not where it is once the others, which end first, have made its collective fail."""
    watchdog = Watchdog(World("test", 0, 2, 0, 2, torch.device("cpu"), cast(dist.Store, CountingStore())), 60.0, 0.3)
    records: list[logging.LogRecord] = []
    handler, logger = logging.Handler(), logging.getLogger(Watchdog.__module__)
    handler.emit = records.append  # type: ignore[method-assign]
    logger.addHandler(handler)
    over = threading.Event()

    def diagnose() -> None:
        watchdog.set_phase("ending after an error", limited=False)

    def before_exit() -> None:
        over.set()
        threading.Event().wait()  # this thread stays here: next it would end the process

    watchdog.diagnose, watchdog.before_exit = diagnose, before_exit  # type: ignore[method-assign]
    with watchdog:
        watchdog.set_phase("building the model")
        assert over.wait(30)
    logger.removeHandler(handler)
    assert any("rank 0 has been at building the model for" in record.getMessage() for record in records)


def test_a_slow_store_is_no_dead_rank() -> None:
    assert not any("died" in (said or "") for said in diagnoses(CountingStore(seconds=0.3), [2, 2, 1]))


@pytest.mark.fault(
    "Weights & Biases",
    "The run ends with an error, of this rank or another",
    "W&B and TensorBoard are closed first, within 20 s",
)
@pytest.mark.parametrize(("ranks", "failing"), [pytest.param(1, 0, marks=only_at_length), (2, 1)])
def test_the_last_lines_before_an_error_are_kept(
    ranks: int, failing: int, disturbed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.delenv("WANDB_SERVICE", raising=False)  # another test's
    faults = plan(fault("error", "laion", failing, updates=[4]))
    process = run_ranks(ranks, FAULTY, faults, *disturbed, "--report_to_tensorboard", "--report_to_wandb")
    output, _ = process.communicate()
    assert process.returncode == 1
    assert "CUDA out of memory" in output
    run = tmp_path / "run"
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss_laion")] == [1, 2, 3]
    (history,) = run.glob("wandb/offline-run-*/*.wandb")
    assert history.read_bytes().count(b"data_wait") >= 3


@pytest.mark.fault(
    "Deaths",
    "SIGSTOP of a rank (hangs)",
    "the others name it, with the update and shard it was at, and end, a quarter longer than `--dist_timeout` after they began to wait",
    "hangs",
)
@pytest.mark.parametrize("rank", [pytest.param(0, marks=only_at_length), 1])
def test_a_stopped_rank_ends_the_job_and_is_named_with_its_update_and_shard(
    rank: int, disturbed: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = run_ranks(2, FAULTY, plan(seconds=0.1), *disturbed, "--dist_timeout=5", patience=5)
    wait_for(lambda: updates_done(run) >= 4, process)
    victim = ranks_of(process)[rank]
    os.kill(victim, signal.SIGSTOP)
    output, _ = process.communicate()
    assert process.returncode != 0
    assert re.search(
        rf"Rank {rank} \(\S+, pid {victim}\) died or hung; last reported at update \d+, \S.*\.tar", output
    ), output
    wait_for(lambda: not alive(victim))


@pytest.mark.fault("A loader worker that hangs (SIGSTOP, a read that never returns)")
def test_a_hanging_loader_worker_is_named_by_its_own_rank(disturbed: list[str], tmp_path: Path) -> None:
    """The other rank, which waits for this one, has less to say, and lets it speak first."""
    process = run_ranks(2, FAULTY, plan(), *disturbed, "--dist_timeout=5", "--num_epochs=50", patience=3)
    wait_for(lambda: updates_done(tmp_path / "run") >= 3, process)
    rank = ranks_of(process)[1]
    workers = sorted(int(pid) for pid in Path(f"/proc/{rank}/task/{rank}/children").read_text().split())
    assert len(workers) == 2  # of LAION, and of MMC4
    os.kill(workers[1], signal.SIGSTOP)
    output, _ = process.communicate()
    assert re.search(
        rf"\[rank 1\] \S+ E mmc4 loader worker 0 of rank 1 \(pid {workers[1]}\), .*\.tar .* hangs: it has given nothing for 5 s",
        output,
    ), output
    assert "--dist_timeout" not in output, output
    assert not any(map(alive, workers))


@pytest.mark.fault(
    "Data",
    "A start that takes longer than an update may (a 7B model, a large checkpoint)",
    "has a limit of its own, `--startup_timeout`; saving and the end have none, but a log line per minute",
)
def test_a_start_and_a_save_may_take_longer_than_an_update(disturbed: list[str]) -> None:
    slow = plan(seconds_building=8, seconds_saving=8)
    finished(run_ranks(2, FAULTY, slow, *disturbed, "--dist_timeout=4", "--num_epochs=1", "--save_steps=6"))
    process = run_ranks(2, FAULTY, plan(seconds_building=99), *disturbed, "--startup_timeout=5", "--num_epochs=2")
    output, _ = process.communicate()
    assert process.returncode == 1
    rank_0 = r"Rank 0 \(\S+, pid \d+\) is behind; last reported at building the model"
    assert re.search(
        rf"rank 1 has been at waiting for the models of the other ranks for \d+ s \(--startup_timeout\). {rank_0}",
        output,
    ), output


@pytest.mark.fault("Deaths", "SIGKILL of torchrun", "its ranks save and end")
def test_ranks_whose_torchrun_is_killed_save_and_end(
    disturbed: list[str], whole: dict[str, Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = torchrun(2, FAULTY, plan(seconds=0.1), *disturbed)
    wait_for(lambda: updates_done(run) >= 3, process)
    ranks = ranks_of(process)
    process.kill()
    process.communicate()
    wait_for(lambda: not any(map(alive, ranks.values())))
    assert list(run.glob("*.pt"))
    finished(run_ranks(2, FAULTY, plan(), *disturbed))
    assert_same(whole, torch.load(run / LAST, weights_only=True))


@pytest.mark.fault("Deaths", "Rank 0 stopped, and no launcher that watches", "the others name it and end", "hangs")
def test_without_a_launcher_that_watches_the_other_rank_ends_by_itself(disturbed: list[str], tmp_path: Path) -> None:
    """As under srun and mpirun: rank 0, which keeps the meeting point, is stopped, and rank 1 does not hang."""
    with held_port() as port:
        ranks = []
        for rank in range(2):
            environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
            meet = f"--dist-url=tcp://127.0.0.1:{port}"
            # Half a second per update: so the ranks, which report every second, have heard of each other's.
            command = [FAULTY, plan(seconds=0.5), *disturbed, "--dist_timeout=5", meet]
            ranks.append(Fork(*command, environment=environment))
        wait_for(lambda: updates_done(tmp_path / "run") >= 5, ranks[0])
    ranks[0].send_signal(signal.SIGSTOP)
    output, _ = ranks[1].communicate()
    assert ranks[1].returncode == 1
    assert re.search(rf"Rank 0 \(\S+, pid {ranks[0].pid}\) died or hung; last reported at update \d+", output), output
    ranks[0].kill()
    ranks[0].communicate()


def test_a_line_is_out_before_the_process_is_gone() -> None:
    """What says why a rank ends at once must not be left in a buffer."""
    program = (
        "import logging, os, sys; from open_flamingo.train.report import setup_logging; setup_logging(1); "
        "sys.stderr.reconfigure(line_buffering=False); logging.getLogger('open_flamingo').error('why'); os._exit(1)"
    )
    ended = Fork("-c", program)
    assert "[rank 1]" in ended.communicate()[0]


# ---------------------------------------------------------------------------------------------------------------------
# Disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MB of its own. Skips where one cannot be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    path = folder / "full"
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1):  # to the last byte
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue
    return path


@pytest.mark.fault(
    "Disk",
    "No space while saving, in one file or sharded",
    "`--save_errors stop` ends the run, `warn` trains on; the checkpoints before stay whole",
)
@pytest.mark.parametrize(
    ("errors", "format"),
    [
        ("stop", "file"),
        ("warn", "sharded"),
        pytest.param("warn", "file", marks=only_at_length),
        pytest.param("stop", "sharded", marks=only_at_length),
    ],
)
def test_a_full_disk(errors: str, format: str, flags: list[str], disk: Path) -> None:
    run = disk / "run"
    flags = [*flags, *LONG, "--save_steps=1", f"--checkpoint_format={format}", f"--save_errors={errors}"]
    process = run_ranks(2, FAULTY, plan(seconds=0.2), *flags, f"--run_name={run}")
    wait_for(lambda: updates_done(run) >= 4, process)
    filler = fill(disk)
    _, before = checkpoints.newest_readable(run)  # type: ignore[misc]
    if errors == "warn":
        time.sleep(1.5)
        filler.unlink()
        output = finished(process)
        assert "training goes on" in output
    else:
        output, _ = process.communicate()
        assert process.returncode != 0
        path, state = checkpoints.newest_readable(run)  # type: ignore[misc]
        assert state["step"] >= before["step"]
        filler.unlink()
        assert f"resuming from {path}" in finished(run_ranks(2, FAULTY, plan(), *flags, f"--run_name={run}"))
    assert "could not be written" in output, output
    assert "No space left" in output, output
    assert checkpoints.newest_readable(run)[0].stem == "checkpoint_1"  # type: ignore[index]


@pytest.mark.fault("Disk", "A folder that becomes read-only", "the run ends, and says why")
def test_a_disk_that_becomes_read_only(flags: list[str], disk: Path) -> None:
    run = disk / "run"
    flags = [*flags, *LONG, "--save_steps=1", f"--run_name={run}"]
    process = run_ranks(2, FAULTY, plan(seconds=0.1), *flags)
    wait_for(lambda: updates_done(run) >= 4, process)
    # Over itself, and then read-only: a file system that is in use refuses to become so.
    for options in (["--bind", str(run)], ["-o", "remount,bind,ro"]):
        subprocess.run(["mount", *options, str(run)], check=True)
    try:
        output, _ = process.communicate()
    finally:
        subprocess.run(["umount", "--lazy", str(run)], check=True)
    assert process.returncode != 0
    assert "Read-only file system" in output
    assert checkpoints.newest_readable(run) is not None


@pytest.mark.fault("Disk", "A run folder that vanishes", "the next save makes it again")
def test_a_folder_that_vanishes_is_made_again(flags: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = run_ranks(2, FAULTY, plan(seconds=0.1), *flags, *LONG, f"--run_name={run}")
    wait_for(lambda: updates_done(run) >= 2, process)
    shutil.rmtree(run)
    finished(process)
    assert (run / LAST).exists()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of some 40 kB, written as the program writes it."""
    path = tmp_path_factory.mktemp("saved") / "checkpoint_0.pt"
    tensors = {f"layer {i}": torch.randn(50, 20) for i in range(10)}
    checkpoints.save({"model_state_dict": tensors, "step": 3, "flags": {"lm_path": "x"}}, path)
    return path


@pytest.mark.fault(
    "Disk",
    "The newest checkpoint truncated (200 lengths) or a bit flipped (200 places)",
    "detected by its checksums, and the one before is taken; or harmless",
    "never starts again",
)
@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_every_damage_to_a_checkpoint_is_detected_or_harmless(damage: str, saved: Path, tmp_path: Path) -> None:
    """The newest of two is damaged: the one before is taken, or what is read is what was written."""
    data, original = saved.read_bytes(), torch.load(saved, weights_only=True)
    shutil.copy(saved, tmp_path / "checkpoint_0.pt")
    newest = tmp_path / "checkpoint_1.pt"
    moments = random.Random(damage)
    detected = 0
    directory = data.rindex(b"PK\x01\x02")  # of the zip archive: what is wrong there is seen before any checksum
    for place in [directory, *(moments.randrange(len(data)) for _ in range(cases(200) - 1))]:
        if damage == "truncated":
            newest.write_bytes(data[:place])
        else:
            flipped = bytes([data[place] ^ (1 << moments.randrange(8))])
            newest.write_bytes(data[:place] + flipped + data[place + 1 :])
        path, checkpoint = checkpoints.newest_readable(tmp_path)  # type: ignore[misc]
        assert_same(original, checkpoint)
        detected += path != newest
        del checkpoint
        with contextlib.suppress(ValueError):  # as a `--resume_from_checkpoint`
            checkpoints.fingerprint(newest)
    assert detected == cases(200) if damage == "truncated" else detected > 0.75 * cases(200)


@pytest.mark.fault(
    "Disk", "Any file of a sharded checkpoint truncated, changed or missing", "detected, and the one before is taken"
)
def test_every_damage_to_a_sharded_checkpoint_is_detected(flags: list[str], tmp_path: Path) -> None:
    main([*flags, "--checkpoint_format=sharded", f"--run_name={tmp_path}"])
    newest = tmp_path / "checkpoint_1"
    checkpoints.verify(newest)
    for file in sorted(newest.iterdir()):
        data = file.read_bytes()
        for damaged in (data[: len(data) // 2], data[:100] + bytes([data[100] ^ 4]) + data[101:], None):
            file.write_bytes(damaged) if damaged is not None else file.unlink()
            path, _ = checkpoints.newest_readable(tmp_path)  # type: ignore[misc]
            assert path == tmp_path / "checkpoint_0", file
        file.write_bytes(data)
    assert checkpoints.newest_readable(tmp_path)[0] == newest  # type: ignore[index]


# ---------------------------------------------------------------------------------------------------------------------
# Long runs


def resident(pid: int) -> int:
    """Bytes in memory that are this process's alone, so that pages shared with a parent count once."""
    rollup = (Path("/proc") / str(pid) / "smaps_rollup").read_text()
    return sum(int(kilobytes) for kilobytes in re.findall(r"^Private_\w+:\s+(\d+) kB", rollup, re.MULTILINE)) * 1024


@pytest.mark.fault(
    "Long runs",
    "2,000 updates; 20 epochs",
    "memory of the trainer and its workers is flat; no file, process or thread is left behind",
)
@only_at_length
def test_memory_is_flat_and_nothing_is_left_behind(flags: list[str], tmp_path: Path) -> None:
    """20 epochs, each with a checkpoint, of 2,000 updates at length and of 400 otherwise."""
    run = tmp_path / "run"
    temporary = Path(tempfile.mkdtemp())  # tmp_path is too long for the sockets between processes
    of_epoch, logged_every, settled = (100, 50, 400) if AT_LENGTH else (20, 10, 100)
    flags = [
        *flags,
        "--num_epochs=20",
        "--workers=1",
        f"--logging_steps={logged_every}",
        "--delete_previous_checkpoint",
    ]
    flags += ["--batch_size_laion=1", "--batch_size_mmc4=1", "--mmc4_max_num_images=2"]
    flags += [f"--train_num_samples_laion={of_epoch}", f"--train_num_samples_mmc4={of_epoch}"]
    shared = set(os.listdir("/dev/shm"))
    program = ROOT / "train" / "train.py"
    process = Fork(program, *flags, f"--run_name={run}", environment=os.environ | {"TMPDIR": str(temporary)})
    measured: list[tuple[int, int]] = []  # updates done, bytes of all its processes
    while process.poll() is None:
        updates = logged_every * updates_done(run)
        # Its workers end with each epoch, and itself at the end, also between these lines.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            family = [process.pid, *map(int, children)]
            if updates >= settled and (not measured or updates > measured[-1][0]) and len(family) == 3:
                measured.append((updates, sum(map(resident, family))))
        time.sleep(0.02)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert f"finished: 20 epochs, {20 * of_epoch} updates" in output
    updates, memory = torch.tensor(measured, dtype=torch.float64).T
    assert len(updates) > 20
    slope = (
        ((updates - updates.mean()) * (memory - memory.mean())).sum() / (updates - updates.mean()).square().sum()
    ).item()
    # Less than the images of an update, and a tenth of that where there are enough updates to tell.
    assert slope < (4096 if AT_LENGTH else 30_000), f"{slope:.0f} bytes an update: {measured}"

    assert sorted(path.name for path in run.iterdir()) == ["checkpoint_19.pt", "metrics.jsonl"]
    temporary.rmdir()  # which nothing is left in
    assert set(os.listdir("/dev/shm")) <= shared
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            assert stat.read_text().rpartition(")")[2].split()[3] != str(process.pid)
