"""The program, end to end: real shards, real checkpoints, tiny models."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from open_flamingo.train.checkpoint import files as checkpoint
from open_flamingo.train.checkpoint.saving import HostCopies, start_file
from open_flamingo.train.health import Health, Signals
from open_flamingo.train.optimizer import build_optimizer
from open_flamingo.train.train import main
from open_flamingo.weights import embedding_name, head_name
from tests.ranks import Fork
from tests.sharding_program import small_flamingo
from tests.tiny import ROOT, assert_same


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def said(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


@pytest.fixture
def caplog(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """pytest's, but hearing our loggers, which do not pass their records on to the root."""
    logger = logging.getLogger("open_flamingo")
    import open_flamingo.train.loop as loop

    def listen(rank: int) -> None:
        logger.handlers[:] = [caplog.handler]
        logger.setLevel(logging.INFO)

    monkeypatch.setattr(loop, "setup_logging", listen)
    return caplog


def test_a_run_from_shards_to_checkpoints(
    flags: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    wandb = ["--report_to_wandb", "--save_checkpoints_to_wandb"]
    main([*flags, f"--run_name={run}", "--num_epochs=10", "--report_to_tensorboard", *wandb])

    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, 41))
    for kind in ("laion", "mmc4"):
        losses = [line[f"loss_{kind}"] for line in lines]
        assert sum(losses[-4:]) < 0.985 * sum(losses[:4])
    assert list(run.glob("tensorboard/events.*"))
    assert list(run.glob("wandb/offline-run-*/files/checkpoint_9.pt"))

    assert sorted(path.name for path in run.glob("*.pt")) == sorted(f"checkpoint_{epoch}.pt" for epoch in range(10))
    checkpoint = load(run / "checkpoint_9.pt")
    assert checkpoint["epoch"] == 9
    assert {"model_state_dict", "optimizer_state_dict", "lr_scheduler_state_dict"} <= checkpoint.keys()
    assert not [name for name in checkpoint["model_state_dict"] if name.startswith(("vision_encoder", "module."))]
    text = said(caplog)
    for part in ("trained parameters", "frozen parameters", "laion: 3 shards", "10 epochs of 4 updates"):
        assert part in text


def test_two_runs_with_the_same_flags_are_the_same_bit_for_bit(flags: list[str], tmp_path: Path) -> None:
    for name in ("a", "b"):
        main([*flags, f"--run_name={tmp_path / name}"])
    assert_same(load(tmp_path / "a" / "checkpoint_1.pt"), load(tmp_path / "b" / "checkpoint_1.pt"))


def test_deterministic_kernels_change_nothing_on_a_cpu(flags: list[str], tmp_path: Path) -> None:
    """Every operation of an update has one: torch raises where there is none."""
    for name, more in (("plain", []), ("deterministic", ["--deterministic", "--gradient_checkpointing"])):
        main([*flags, *more, f"--run_name={tmp_path / name}", "--num_epochs=1"])
    plain, deterministic = (load(tmp_path / name / "checkpoint_0.pt") for name in ("plain", "deterministic"))
    assert_same(plain["model_state_dict"], deterministic["model_state_dict"])
    main([*flags, f"--run_name={tmp_path / 'plain'}", "--num_epochs=1"])  # and it is over with the run
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("kind", ["laion", "mmc4"])
def test_one_dataset_alone_trains(kind: str, flags: list[str], tmp_path: Path) -> None:
    other = {"laion": "mmc4", "mmc4": "laion"}[kind]
    alone = [flag for flag in flags if not flag.startswith(f"--{other}_shards")]
    main([*alone, f"--run_name={tmp_path}", "--precision=amp_bf16"])
    assert load(tmp_path / "checkpoint_1.pt")["data"].keys() == {kind}
    assert f"loss_{other}" not in metrics(tmp_path)[-1]


def test_a_run_stopped_anywhere_goes_on_bit_for_bit(
    flags: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    main([*flags, f"--run_name={whole}", "--save_steps=1"])
    # Within an epoch, the newest two are kept: those of updates 6 and 7 of 8.
    assert sorted(path.name for path in whole.glob("epoch_*")) == ["epoch_1_step_6.pt", "epoch_1_step_7.pt"]

    for kept in ("checkpoint_0.pt", "epoch_1_step_6.pt"):
        shutil.rmtree(stopped, ignore_errors=True)
        stopped.mkdir()
        shutil.copy(whole / kept, stopped)
        shutil.copy(whole / "metrics.jsonl", stopped)  # of a run that got further than its newest checkpoint
        main([*flags, f"--run_name={stopped}", "--save_steps=1"])
        assert_same(load(whole / "checkpoint_1.pt"), load(stopped / "checkpoint_1.pt"))
        numbers = ("step", "loss_laion", "loss_mmc4", "grad_norm", "lr")
        assert [[line[name] for name in numbers] for line in metrics(stopped)] == [
            [line[name] for name in numbers] for line in metrics(whole)
        ]

    caplog.clear()
    main([*flags, f"--run_name={stopped}"])
    assert "nothing left to do" in said(caplog)
    main([*flags, f"--run_name={stopped}", "--num_epochs=3"])
    assert load(stopped / "checkpoint_2.pt")["step"] == 12


def test_a_checkpoint_is_written_while_the_training_goes_on(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*flags, "--num_epochs=1", "--save_steps=2"]
    main([*flags, f"--run_name={tmp_path / 'undisturbed'}"])
    further_on = threading.Event()
    save, begin = checkpoint.save, Health.begin

    def slow_save(state: dict[str, Any], path: Path) -> None:
        assert further_on.wait(60), "the training waits for the checkpoint"
        save(state, path)

    def begin_and_tell(health: Health, update: int) -> None:
        begin(health, update)
        if update == 4:
            further_on.set()

    monkeypatch.setattr(checkpoint, "save", slow_save)
    monkeypatch.setattr(Health, "begin", begin_and_tell)
    main([*flags, f"--run_name={tmp_path / 'run'}"])
    for name in ("epoch_0_step_2.pt", "checkpoint_0.pt"):
        ours, theirs = (load(tmp_path / run / name) for run in ("run", "undisturbed"))
        for part in ("model_state_dict", "optimizer_state_dict"):
            assert_same(ours[part], theirs[part])


@pytest.mark.fault("Disk", "The run fails while a checkpoint is being written", "it is written to its end first")
def test_a_checkpoint_that_is_being_written_when_the_run_fails_is_finished(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = threading.Event()
    save, begin = checkpoint.save, Health.begin

    def slow_save(state: dict[str, Any], path: Path) -> None:
        assert failed.wait(60)
        save(state, path)

    def fail_at_three(health: Health, update: int) -> None:
        begin(health, update)
        if update == 3:
            failed.set()
            raise RuntimeError("a fault")

    monkeypatch.setattr(checkpoint, "save", slow_save)
    monkeypatch.setattr(Health, "begin", fail_at_three)
    with pytest.raises(RuntimeError, match="a fault"):
        main([*flags, f"--run_name={tmp_path}", "--save_steps=2"])
    assert load(tmp_path / "epoch_0_step_2.pt")["step"] == 2


@pytest.mark.fault(
    "Disk", "A checkpoint fails while training has gone on", "the run ends with the next update, not at the next save"
)
def test_a_run_that_cannot_save_ends_before_the_next_save(
    flags: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = threading.Event()
    ask_to_stop, begin = Signals.ask_to_stop, Health.begin

    def no_space(state: dict[str, Any], path: Path) -> None:
        raise OSError(f"{path}: No space left on device")

    def ask_and_tell(signals: Signals) -> None:
        ask_to_stop(signals)
        failed.set()

    def begin_after_failure(health: Health, update: int) -> None:
        begin(health, update)
        assert update < 3 or failed.wait(60)

    monkeypatch.setattr(checkpoint, "save", no_space)
    monkeypatch.setattr(Signals, "ask_to_stop", ask_and_tell)
    monkeypatch.setattr(Health, "begin", begin_after_failure)
    with pytest.raises(SystemExit) as exit:
        main(
            [
                *flags,
                f"--run_name={tmp_path}",
                "--save_steps=2",
                "--train_num_samples_laion=80",
                "--train_num_samples_mmc4=40",
            ]
        )
    assert exit.value.code == 1
    assert "epoch_0_step_2.pt: No space left on device. The ones before it are whole" in said(caplog)
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3]


def test_a_tied_matrix_is_stored_once(tmp_path: Path) -> None:
    for tied in (True, False):
        model = small_flamingo("llama", tied)
        start_file(
            HostCopies(0, torch.device("cpu")),
            model,
            build_optimizer(model, 1e-3, 0.1),
            {},
            tmp_path / "checkpoint_0.pt",
        )()
        weights = load(tmp_path / "checkpoint_0.pt")["model_state_dict"]
        matrix, head = weights[embedding_name(model)], weights[head_name(model)]
        assert (matrix.data_ptr() == head.data_ptr()) == tied


def test_a_broken_newest_checkpoint_is_named_and_the_one_before_taken(
    flags: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    main([*flags, f"--run_name={tmp_path}"])
    whole = load(tmp_path / "checkpoint_1.pt")
    for damage in (b"", b"not a checkpoint", (tmp_path / "checkpoint_1.pt").read_bytes()[:-2000]):
        (tmp_path / "checkpoint_1.pt").write_bytes(damage)
        caplog.clear()
        main([*flags, f"--run_name={tmp_path}"])
        assert "checkpoint_1.pt cannot be read" in said(caplog)
        assert_same(load(tmp_path / "checkpoint_1.pt"), whole)

    for path in tmp_path.glob("*.pt"):
        path.write_bytes(b"broken")
    with pytest.raises(SystemExit):  # starting anew would bury what may be repaired
        main([*flags, f"--run_name={tmp_path}"])


def test_delete_previous_checkpoint_keeps_the_newest_alone(flags: list[str], tmp_path: Path) -> None:
    main([*flags, f"--run_name={tmp_path}", "--delete_previous_checkpoint", "--save_steps=1"])
    assert [path.name for path in tmp_path.glob("*.pt")] == ["checkpoint_1.pt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--cross_attn_every_n_layers=2", "--cross_attn_every_n_layers was 1 and is now 2"),
        ("--seed=1", "--seed was 42 and is now 1"),
        ("--data_lanes=8", "--data_lanes was 16 and is now 8"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_the_difference(
    change: str, message: str, flags: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    main([*flags, f"--run_name={tmp_path}", "--num_epochs=1"])
    before = (tmp_path / "checkpoint_0.pt").read_bytes()
    with pytest.raises(SystemExit):
        main([*flags, f"--run_name={tmp_path}", change])
    assert message in said(caplog)
    assert (tmp_path / "checkpoint_0.pt").read_bytes() == before
    if change == "--seed=1":
        main([*flags, f"--run_name={tmp_path}", change, "--allow_changed_flags"])
        assert load(tmp_path / "checkpoint_1.pt")["step"] == 8


@pytest.mark.fault(
    "Data",
    "A shard that appears or goes between two starts of a run",
    "refused, with the number of shards then and now",
)
def test_a_shard_that_appears_between_two_runs_is_refused_as_it_changes_the_order(
    flags: list[str], shards: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "laion"
    folder.mkdir()
    names = [f"{number:02}.tar" for number in range(10)]
    for name in names:
        shutil.copy(shards["laion"].replace("{000000..000002}", "000000"), folder / name)
    (folder / names[4]).rename(tmp_path / "later.tar")
    flags = [*flags, f"--laion_shards={folder}/{{00..09}}.tar", f"--run_name={tmp_path / 'run'}"]
    main([*flags, "--num_epochs=1"])
    assert "--laion_shards: 1 of 10 shards do not exist" in said(caplog)
    (tmp_path / "later.tar").rename(folder / names[4])
    with pytest.raises(SystemExit):
        main(flags)
    assert re.search(r"--laion_shards found 9 shards \(\w+\) and now finds 10 shards", said(caplog))
    main([*flags, "--allow_changed_flags"])
    assert "the data start from their beginning" in said(caplog)
    assert load(tmp_path / "run" / "checkpoint_1.pt")["step"] == 8


def test_weights_start_a_run_and_a_restart_of_it_goes_on_from_its_own(
    flags: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    main([*flags, f"--run_name={tmp_path / 'first'}", "--num_epochs=1"])
    weights = load(tmp_path / "first" / "checkpoint_0.pt")["model_state_dict"]
    released = tmp_path / "released.pt"
    torch.save({f"module.{name}": tensor for name, tensor in weights.items()}, released)

    second = [*flags, f"--run_name={tmp_path / 'second'}", f"--resume_from_checkpoint={released}"]
    main([*second, "--num_epochs=1", "--learning_rate=0"])
    after = load(tmp_path / "second" / "checkpoint_0.pt")
    assert after["step"] == 4
    assert_same(after["model_state_dict"], weights)

    caplog.clear()
    main([*second, "--num_epochs=2", "--learning_rate=0"])
    assert f"resuming from {tmp_path / 'second' / 'checkpoint_0.pt'} after update 4" in said(caplog)


@pytest.mark.parametrize("checkpoint_format", ["file", "sharded"])
def test_a_changed_learning_rate_holds_from_the_resume_on(
    checkpoint_format: str, flags: list[str], tmp_path: Path
) -> None:
    flags = [*flags, f"--run_name={tmp_path}", f"--checkpoint_format={checkpoint_format}", "--lr_scheduler=constant"]
    main([*flags, "--num_epochs=1", "--learning_rate=1e-3"])
    main([*flags, "--learning_rate=1e-5"])
    assert [line["lr"] for line in metrics(tmp_path)] == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3, 1e-5, 1e-5, 1e-5, 1e-5])


def test_a_checkpoint_of_an_earlier_version_goes_on(flags: list[str], tmp_path: Path) -> None:
    whole, old = tmp_path / "whole", tmp_path / "old"
    main([*flags, f"--run_name={whole}", "--save_steps=1"])
    for name in ("checkpoint_0.pt", "epoch_1_step_6.pt"):
        shutil.rmtree(old, ignore_errors=True)
        old.mkdir()
        checkpoint = load(whole / name)
        for key in ("samples_in_epoch", "schedule_unit", "shards"):
            del checkpoint[key]
        torch.save(checkpoint, old / name)
        main([*flags, f"--run_name={old}", "--save_steps=1"])
        assert_same(load(whole / "checkpoint_1.pt"), load(old / "checkpoint_1.pt"))


def test_a_run_goes_back_within_its_folder_and_loses_nothing(
    flags: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = [*flags, "--save_steps=1", "--delete_previous_checkpoint"]
    main([*flags, "--run_name=run", "--num_epochs=1"])
    shutil.copy("run/checkpoint_0.pt", "kept.pt")
    main([*flags, "--run_name=run", "--num_epochs=3"])
    shutil.copy("kept.pt", "run/checkpoint_0.pt")
    further = (tmp_path / "run" / "checkpoint_2.pt").read_bytes()

    back = [*flags, "--run_name=run", "--learning_rate=1e-3"]
    main([*back, "--resume_from_checkpoint=run/checkpoint_0.pt", "--num_epochs=2"])
    assert sorted(path.name for path in Path("run").glob("*.pt")) == ["checkpoint_1.pt"]
    assert [line["step"] for line in metrics(Path("run"))] == list(range(1, 9))
    assert all(line["lr"] <= 1e-3 for line in metrics(Path("run"))[4:])
    assert Path("run/set_aside_1/checkpoint_2.pt").read_bytes() == further
    assert [line["step"] for line in metrics(Path("run/set_aside_1"))] == list(range(1, 13))

    # The same file under other names: the run goes on from its own newest checkpoint.
    for step, name in ((8, tmp_path / "kept.pt"), (12, "./kept.pt")):
        caplog.clear()
        main([*back, f"--resume_from_checkpoint={name}", f"--num_epochs={step // 4 + 1}"])
        assert f"after update {step}" in said(caplog)
    assert [path.name for path in Path("run").glob("set_aside_*")] == ["set_aside_1"]


def test_a_scheduler_of_the_reference_reads_our_checkpoint(flags: list[str], tmp_path: Path) -> None:
    main([*flags, f"--run_name={tmp_path}", "--lr_scheduler=linear"])
    ours = load(tmp_path / "checkpoint_0.pt")
    parameters = [[torch.zeros(1)] * len(group["params"]) for group in ours["optimizer_state_dict"]["param_groups"]]
    optimizer = torch.optim.AdamW([{"params": [torch.zeros_like(p) for p in group]} for group in parameters])
    optimizer.load_state_dict({"state": {}, "param_groups": ours["optimizer_state_dict"]["param_groups"]})
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (8 - step) / 6)
    scheduler.load_state_dict(ours["lr_scheduler_state_dict"])
    rates = []
    for _ in range(4):
        rates += scheduler.get_last_lr()[:1]
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([line["lr"] for line in metrics(tmp_path)[3:-1]])


def test_a_checkpoint_of_the_reference_in_mid_run_goes_on(flags: list[str], tmp_path: Path) -> None:
    """Its optimizer holds moments of the whole embedding matrix, by index; ours of two rows."""
    main([*flags, f"--run_name={tmp_path / 'ours'}"])
    ours = load(tmp_path / "ours" / "checkpoint_0.pt")
    embedding = "lang_encoder.model.decoder.embed_tokens.weight"
    vocabulary, width = ours["model_state_dict"][embedding].shape
    state = {}
    for index, moments in ours["optimizer_state_dict"]["state"].items():
        state[index] = dict(moments)
        if "new_rows" in ours["optimizer_parameter_names"][index]:
            for key in ("exp_avg", "exp_avg_sq"):
                state[index][key] = torch.zeros(vocabulary, width)
                state[index][key][1000:1002] = moments[key]
    reference = {
        "epoch": 0,
        "model_state_dict": {f"module.{name}": tensor for name, tensor in ours["model_state_dict"].items()},
        "optimizer_state_dict": {"state": state, "param_groups": ours["optimizer_state_dict"]["param_groups"]},
        "lr_scheduler_state_dict": {"last_epoch": 4},
    }
    torch.save(reference, tmp_path / "reference.pt")

    main([*flags, f"--run_name={tmp_path / 'on'}", f"--resume_from_checkpoint={tmp_path / 'reference.pt'}"])
    first, whole = metrics(tmp_path / "on")[0], metrics(tmp_path / "ours")
    assert first["step"] == 5
    assert first["lr"] == whole[4]["lr"]
    # Its data start anew, so only the optimizer's momentum can be compared: it is there, and it is ours.
    after = load(tmp_path / "on" / "checkpoint_1.pt")["optimizer_state_dict"]["state"]
    assert all(moments["step"] == 8 for moments in after.values())


def test_broken_shards_among_good_ones_are_counted_and_survived(
    flags: list[str], shards: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "broken.tar"
    broken.write_bytes(Path(shards["laion"].replace("{000000..000002}", "000000")).read_bytes()[:5000])
    with_broken = f"--laion_shards={shards['laion']}::{broken}"
    main([*flags, with_broken, f"--run_name={tmp_path / 'run'}", "--workers=1", "--num_epochs=4"])
    assert sum(metrics(tmp_path / "run")[-1]["errors_laion"].values()) > 0
    assert "laion ERRORS: " in said(caplog)


@pytest.mark.parametrize("workers", [0, 1])
def test_shards_that_yield_nothing_stop_the_run_with_their_name(
    workers: int, flags: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The reference spins forever, or trains zero steps and exits with 0."""
    (tmp_path / "garbage.tar").write_bytes(b"not a tar" * 1000)
    with pytest.raises(SystemExit) as stopped:
        main([*flags, f"--laion_shards={tmp_path}/garbage.tar", f"--run_name={tmp_path}/run", f"--workers={workers}"])
    assert stopped.value.code == 1
    assert "garbage.tar" in said(caplog)


@pytest.mark.fault(
    "Data",
    "The training process fails with an unexpected error (CUDA out of memory)",
    "it ends at once, and its workers with it: what a launcher restarts, it restarts at once",
)
def test_a_run_that_fails_does_not_wait_for_its_workers(flags: list[str], tmp_path: Path) -> None:
    """Python waits for them after an error that nobody caught, and they outlive its SIGTERM by two minutes."""
    program = tmp_path / "program.py"
    program.write_text(
        "import atexit, multiprocessing.util, sys\n"  # who registers last is called first
        "atexit.register(lambda: print(len(multiprocessing.active_children()), 'workers left'))\n"
        "from open_flamingo.train import step, train\n"
        "def compute_loss(*_):\n"
        "    print(len(multiprocessing.active_children()), 'workers')\n"
        "    raise RuntimeError('CUDA out of memory')\n"
        "step.compute_loss = compute_loss\n"
        "train.main(sys.argv[1:])\n"
    )
    with (tmp_path / "errors").open("w") as errors:
        process = Fork(program, *flags, f"--run_name={tmp_path}/run", "--workers=2", stderr=errors)
        output, _ = process.communicate()
    said = (tmp_path / "errors").read_text()
    assert process.returncode == 1, said
    assert said.endswith("CUDA out of memory\n"), said
    assert output.splitlines()[-2:] == ["4 workers", "0 workers left"]


@pytest.mark.fault(
    "Disk", "The last checkpoint cannot be begun, with `--save_errors warn`", "the run ends with an error"
)
def test_a_last_checkpoint_that_cannot_be_begun_is_an_error(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(copies: Any, model: Any, optimizer: Any, state: Any, path: Path) -> Any:
        if path.name == "checkpoint_1.pt":
            raise OSError("no room")
        return start_file(copies, model, optimizer, state, path)

    monkeypatch.setattr("open_flamingo.train.checkpoint.saving.start_file", start)
    with pytest.raises(SystemExit) as ended:
        main([*flags, f"--run_name={tmp_path}", "--save_errors=warn"])
    assert ended.value.code == 1
    assert (tmp_path / "checkpoint_0.pt").exists()


# ------------------------------------------------------------------------------------------------- what is told of the run


def program(flags: list[str], run: Path, **options: Any) -> Fork:
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}  # another test's
    return Fork(ROOT / "train" / "train.py", *flags, f"--run_name={run}", environment=environment, **options)


@pytest.mark.fault("Disk", "The log's disk is full", "training goes on; lines that cannot be written are lost")
def test_a_log_that_cannot_be_written_stops_nothing(flags: list[str], tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:  # whatever is written, its disk is full
        assert program(flags, tmp_path / "run", stdout=full, stderr=full).wait() == 0
    assert len(metrics(tmp_path / "run")) == 8
    assert load(tmp_path / "run" / "checkpoint_1.pt")["step"] == 8


@pytest.fixture
def online(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Flags of a run that tells W&B, by a user who has no key yet, and whose W&B nobody can reach."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    return [*(flag for flag in flags if flag != "--offline"), "--report_to_wandb"]


@pytest.mark.fault("Weights & Biases", "No key", "refused before a model is built")
def test_wandb_without_a_key_is_refused_before_a_model_is_built(online: list[str], tmp_path: Path) -> None:
    given = next(flag for flag in online if flag.startswith("--lm_path=")).partition("=")[2]
    broken = shutil.copytree(given, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"")
    process = program([*online, f"--lm_path={broken}"], tmp_path / "run")
    output, _ = process.communicate()
    assert process.returncode == 1
    assert re.search(r"E cannot start: --report_to_wandb: .*`wandb login`.* WANDB_API_KEY", output), output
    assert "Traceback" not in output


@pytest.mark.fault(
    "Weights & Biases",
    "W&B cannot be reached at the start, which may be a scheduler's",
    "a warning; the run is kept on disk, for `wandb sync`",
)
def test_wandb_that_cannot_be_reached_is_told_later(
    online: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    process = program(online, tmp_path / "run")
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert "W&B cannot be reached" in output
    assert len(metrics(tmp_path / "run")) == 8
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


def child(parent: int, name: str) -> int | None:
    """The process id of the child of `parent` that runs the program `name`."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # gone meanwhile
            pid, command, _, its_parent = re.match(r"(\d+) \((.*)\) (\S+) (\d+)", stat.read_text()).groups()  # type: ignore[union-attr]
            if (int(its_parent), command) == (parent, name):
                return int(pid)
    return None


@pytest.mark.fault("Weights & Biases", "Its process is killed", "warnings; training goes on")
def test_a_wandb_that_dies_does_not_take_the_training_with_it(flags: list[str], tmp_path: Path) -> None:
    process = program([*flags, "--report_to_wandb", "--num_epochs=10"], tmp_path / "run")
    while (service := child(process.pid, "wandb-core")) is None:
        assert process.poll() is None, process.communicate()
    while not (tmp_path / "run" / "metrics.jsonl").exists() or len(metrics(tmp_path / "run")) < 2:
        time.sleep(0.01)
    os.kill(service, signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert "W&B cannot be written to" in output
    assert len(metrics(tmp_path / "run")) == 40
