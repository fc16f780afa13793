"""Every flag, given wrong: one line that names the flag, shows what is wrong and says what to type, and exit code 2."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from open_flamingo.train.arguments import build_parser, parse_args
from open_flamingo.train.train import main
from tests.tiny import ROOT, TOKENIZER, write_backbones

WHOLE_FROM_1 = "must be a whole number of at least 1"
WHOLE_FROM_0 = "must be a whole number of at least 0"
FROM_0 = "must be a finite number of at least 0"
NOT_WHOLE_FROM_1 = dict.fromkeys(("0", "-3", "1.5", "many", "", "nan", "1e3"), WHOLE_FROM_1)
NOT_WHOLE_FROM_0 = dict.fromkeys(("-1", "0.5", "few", "", "inf"), WHOLE_FROM_0)
NOT_FROM_0 = dict.fromkeys(("nan", "inf", "-inf", "-1e-4", "fast", "", "1e400"), FROM_0)
NOT_FINITE = dict.fromkeys(("nan", "inf", "high", ""), "must be a finite number")
NO_FOLDER = "cannot be a name on the Hugging Face hub"

# flag: {wrong value: what the line must say beside the flag and the value}. {tmp} is a folder with the files below.
WRONG: dict[str, dict[str, str]] = {
    "--vision_encoder_path": {
        "": "OpenCLIP model name",
        "ViT-L14": "near it: ViT-L-14",
        "{tmp}/gone.json": "no such OpenCLIP model config",
        "{tmp}/not.json": "is not JSON",
        "{tmp}/list.json": "must hold a JSON object",
        "{tmp}/deep.json": "is not JSON",
        "{tmp}/other.json": "has no embed_dim, vision_cfg, text_cfg",
        "local-dir:{tmp}/empty": "open_clip_config.json",
        "hf-hub:": "must be followed by a name",
    },
    "--vision_encoder_pretrained": {
        "": "is empty",
        "{tmp}/gone.pt": "no such file",
        "./gone": "no such file",
        "weights.pt": "no such file",
        "{tmp}/empty": "no such file",
    },
    "--lm_path": {
        "": "is empty",
        "{tmp}/gone": NO_FOLDER,
        "./gone": NO_FOLDER,
        "~/model": "write it out",
        "a/b/c": NO_FOLDER,
        "two words": NO_FOLDER,
        "{tmp}/empty": "has no config.json",
        "{tmp}/config_only": "has no weights",
        "{tmp}/broken": "is not JSON",
    },
    "--tokenizer_path": {"": "is empty", "{tmp}/gone": NO_FOLDER, "{tmp}/empty": "has no tokenizer"},
    "--cross_attn_every_n_layers": NOT_WHOLE_FROM_1,
    "--laion_shards": {
        "": "names no shard",
        "{tmp}/{0..3}.tar": "matches no file",
        "{tmp}/{0..3.tar": "unbalanced braces",
        "{tmp}/empty": "is a folder",
        "{tmp}/*.tar": "matches no file",
        "@{tmp}/gone.txt": "cannot be read",
    },
    "--mmc4_shards": {"::": "names no shard", "{tmp}/gone.tar": "matches no file"},
    "--missing_shards": {"ignore": "choose from"},
    "--val_laion_shards": {"": "names no shard", "{tmp}/gone.tar": "matches no file"},
    "--val_mmc4_shards": {"{tmp}/{0..3}.tar": "matches no file"},
    "--val_samples": NOT_WHOLE_FROM_1,
    "--val_steps": NOT_WHOLE_FROM_0,
    "--val_captions": NOT_WHOLE_FROM_0,
    "--dry_run_ranks": NOT_WHOLE_FROM_1,
    "--dry_run_gpu": {"V100": "choose from"},
    "--preview": NOT_WHOLE_FROM_1,
    "--batch_size_laion": NOT_WHOLE_FROM_1,
    "--batch_size_mmc4": NOT_WHOLE_FROM_1,
    "--train_num_samples_laion": NOT_WHOLE_FROM_1 | {"5000": "The nearest that agree"},
    "--train_num_samples_mmc4": NOT_WHOLE_FROM_1 | {"5000": "The nearest that agree"},
    "--workers": NOT_WHOLE_FROM_0,
    "--mmc4_textsim_threshold": NOT_FINITE,
    "--mmc4_max_num_images": NOT_WHOLE_FROM_1,
    "--mmc4_min_num_images": NOT_WHOLE_FROM_1 | {"7": "more than --mmc4_max_num_images 6"},
    "--max_image_pixels": NOT_WHOLE_FROM_1,
    "--data_lanes": NOT_WHOLE_FROM_1,
    "--shuffle_buffer_laion": NOT_WHOLE_FROM_1,
    "--shuffle_buffer_mmc4": NOT_WHOLE_FROM_1,
    "--num_epochs": NOT_WHOLE_FROM_1,
    "--gradient_accumulation_steps": NOT_WHOLE_FROM_1,
    "--learning_rate": NOT_FROM_0,
    "--lr_scheduler": {"cosin": "choose from", "": "choose from"},
    "--warmup_steps": NOT_WHOLE_FROM_0,
    "--weight_decay": NOT_FROM_0,
    "--loss_multiplier_laion": NOT_FROM_0,
    "--loss_multiplier_mmc4": NOT_FROM_0,
    "--max_bad_steps": NOT_WHOLE_FROM_1,
    "--seed": dict.fromkeys(("-1", "4294967296", "1" * 30, "0.5", "", "random"), "from 0 to 4294967295"),
    "--run_name": {
        "": "is empty",
        " ": "is empty",
        "{tmp}/a_file": "is a file",
        "{tmp}/a_file/run": "which is a file",
        "x" * 300: "File name too long",
    },
    "--resume_from_checkpoint": {
        "": "no such file",
        "{tmp}/gone.pt": "no such file",
        "{tmp}/empty": "a folder with a state.pt in it",
    },
    "--save_steps": NOT_WHOLE_FROM_0,
    "--checkpoint_format": {"files": "choose from", "": "choose from"},
    "--save_errors": {"ignore": "choose from"},
    "--precision": {"bfloat16": "choose from", "": "choose from", "FP16": "choose from"},
    "--dist-url": dict.fromkeys(
        ("", "localhost:1234", "tcp://localhost", "tcp://:1234", "http://a:1", "env", "file://"),
        "tcp://<host of rank 0>:<free port>",
    ),
    "--dist-backend": dict.fromkeys(("", "foo", "cpu:gloo,foo", "gloo,nccl"), "nccl, gloo, mpi or ucc"),
    "--dist_timeout": dict.fromkeys(("0", "-1", "nan", "inf", "10m", "", "1e300"), "seconds, above 0"),
    "--startup_timeout": dict.fromkeys(("0", "-1", "nan", "inf", "10m", "", "1e300"), "seconds, above 0"),
    "--fsdp_sharding_strategy": {"none": "choose from", "": "choose from"},
    "--fsdp_shard_size": NOT_WHOLE_FROM_1 | {"2": "needs --fsdp --fsdp_sharding_strategy hybrid"},
    "--fsdp_frozen": {"keep": "choose from"},
    "--logging_steps": NOT_WHOLE_FROM_1,
    "--wandb_project": {"my/project": "none of", "x" * 129: "at most 128"},
    "--wandb_entity": {"me:you": "none of"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the table names."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "empty").mkdir()
    (folder / "a_file").write_text("")
    (folder / "not.json").write_text("{")
    (folder / "list.json").write_text("[]")
    (folder / "other.json").write_text("{}")
    (folder / "deep.json").write_text("[" * 100_000)
    for name, config in (("config_only", "{}"), ("broken", "not json")):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(config)
    return folder


@pytest.fixture
def refusal(
    shards: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A function: flags, beside two right datasets, → the one line that refuses them."""
    monkeypatch.chdir(tmp_path)

    def refuse(*flags: str, data: bool = True) -> str:
        datasets = [f"--laion_shards={shards['laion']}", f"--mmc4_shards={shards['mmc4']}"] if data else []
        with pytest.raises(SystemExit) as refused:
            parse_args([*datasets, *flags])
        said = capsys.readouterr()
        assert refused.value.code == 2
        assert said.out == ""
        assert said.err.endswith("\n")
        assert len(said.err.splitlines()) == 1, said.err
        return said.err

    return refuse


def flags_with_values() -> set[str]:
    return {action.option_strings[-1] for action in build_parser()._actions if action.nargs != 0}


def test_the_table_has_every_flag_that_takes_a_value() -> None:
    assert set(WRONG) == flags_with_values()


@pytest.mark.fault(
    "Flags",
    "A wrong value of any flag that takes one (not a number, negative, 0, nan, inf, empty, misspelt, no such file)",
    "one line on stderr with the flag, the value and what to type; exit code 2, before torch is imported",
)
@pytest.mark.fault("Flags", "An empty shard string", "as above", "IndexError")
@pytest.mark.fault(
    "Flags",
    "No such OpenCLIP name, config, file of weights; no such model or tokenizer folder, or one without config, weights or vocabulary",
    "as above (names are looked up in OpenCLIP's folder without importing it)",
)
@pytest.mark.fault(
    "Flags",
    "A run folder that is a file, lies in one, has too long a name, or cannot be written to",
    "one line, exit code 2",
)
@pytest.mark.parametrize("flag", WRONG)
def test_wrong_values(flag: str, refusal, folder: Path) -> None:
    for wrong, says in WRONG[flag].items():
        value = wrong.replace("{tmp}", str(folder))
        line = refusal(f"{flag}={value}")
        assert flag in line, line
        # A flag that is refused for what others are is shown beside them, and a file in which something is wrong by its name.
        shown = value if len(value) <= 300 and not value.startswith("local-dir:") else ""
        assert shown in line, line
        assert says in line, line


@pytest.mark.fault(
    "An unknown, misspelt or ambiguous flag, a flag without its value, a value for a flag that takes none, shard patterns that the shell has expanded"
)
def test_flags_that_take_no_value(refusal) -> None:
    for action in build_parser()._actions:
        flag = action.option_strings[-1]
        if action.nargs == 0 and flag != "--help":
            assert f"{flag}: takes no value, got 'False'" in refusal(f"{flag}=False")


@pytest.mark.fault(
    "An unknown, misspelt or ambiguous flag, a flag without its value, a value for a flag that takes none, shard patterns that the shell has expanded"
)
def test_flags_that_lack_their_value(refusal) -> None:
    for flag in flags_with_values():
        assert f"{flag}: needs a value" in refusal(flag)
    assert "--learning_rate=-value" in refusal("--learning_rate", "-1e-4")


@pytest.mark.fault(
    "Flags",
    "An unknown, misspelt or ambiguous flag, a flag without its value, a value for a flag that takes none, shard patterns that the shell has expanded",
    "as above, with the nearest flag",
)
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--lerning_rate=1e-3"], "unknown flag --lerning_rate: did you mean --learning_rate?"),
        (["--batch-size-laion", "3"], "did you mean --batch_size_laion?"),
        (["--dist_url=env://"], "did you mean --dist-url?"),
        (["--zzz"], "unknown flag --zzz: --help lists all flags"),
        (["--laion_shards", "0.tar", "1.tar"], "'1.tar' belongs to no flag: .* in quotes"),
        (["--fsdp", "True"], "'True' belongs to no flag"),
        (["--fsdp", "a -b"], "'a -b' belongs to no flag"),
        (["--loss=3"], "--loss_multiplier_laion, --loss_multiplier_mmc4"),
        (["--un\nknown=3"], r"--un\\nknown"),
    ],
)
def test_what_is_no_flag(flags: list[str], says: str, refusal) -> None:
    assert re.search(says, refusal(*flags))


@pytest.mark.fault(
    "Flags",
    "Flags that do not go together (all loss weights 0, unequal epochs, minimum of images above the maximum, ...)",
    "as above",
)
def test_values_that_do_not_go_together(refusal, shards: dict[str, str]) -> None:
    assert "--loss_multiplier_laion and --loss_multiplier_mmc4 0" in refusal(
        "--loss_multiplier_laion=0", "--loss_multiplier_mmc4=0"
    )
    only_mmc4 = (f"--mmc4_shards={shards['mmc4']}", "--loss_multiplier_mmc4=0")
    assert "--loss_multiplier_mmc4 0" in refusal(*only_mmc4, data=False)
    assert "--laion_shards, --mmc4_shards or both" in refusal(data=False)
    assert "--report_to_wandb" in refusal("--save_checkpoints_to_wandb")
    assert "--checkpoint_format file" in refusal(
        "--report_to_wandb", "--save_checkpoints_to_wandb", "--checkpoint_format=sharded"
    )


@pytest.mark.fault("A run folder that is a file, lies in one, has too long a name, or cannot be written to")
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folders_and_files_without_permission(refusal, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    assert "cannot be written to" in refusal(f"--run_name={closed}/run")
    (tmp_path / "secret.pt").touch(mode=0o000)
    assert "no permission" in refusal(f"--resume_from_checkpoint={tmp_path}/secret.pt")


def test_a_language_model_without_a_tokenizer_asks_for_one(refusal, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "opt"}))
    (model / "model.safetensors").touch()
    line = refusal(f"--lm_path={model}")
    assert "--tokenizer_path (not given, so that of --lm_path)" in line
    assert str(model) in line


@pytest.mark.fault(
    "Flags",
    "What only the libraries know: no such weight tag, weights that do not fit, a hub name that cannot be had, `--cross_attn_every_n_layers` beyond the layers",
    "one line with the flag, exit code 1 (the ranks have met by then)",
)
@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [
        ("--vision_encoder_pretrained", "openia", "neither a file nor an OpenCLIP weight tag of"),
        ("--vision_encoder_pretrained", "{tmp}/not.pt", "do not fit the vision encoder"),
        ("--tokenizer_path", "{tmp}/no_eos", "the tokenizer has no eos_token"),
        ("--lm_path", "no/such-model", "--tokenizer_path (by default that of --lm_path)"),
        ("--cross_attn_every_n_layers", "3", "must be 1 to 2 for this model, not 3"),
    ],
)
def test_what_only_the_backbones_can_tell(
    flag: str, value: str, says: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1: the ranks have met, so it is no longer a matter of one process and its command line."""
    (tmp_path / "not.pt").write_bytes(b"not weights")
    (tmp_path / "no_eos").mkdir()
    for file, old in (("tokenizer.json", ""), ("tokenizer_config.json", '"eos_token": "<|endoftext|>",')):
        (tmp_path / "no_eos" / file).write_text((TOKENIZER / file).read_text().replace(old, ""))
    value = value.replace("{tmp}", str(tmp_path))
    with pytest.raises(SystemExit) as refused:
        main([*flags, f"--run_name={tmp_path / 'run'}", f"{flag}={value}"])
    assert refused.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "cannot build the model" in line]
    for part in (flag.removeprefix("--"), value, says):
        assert part in line


def test_what_is_right_is_not_refused(shards: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values at the edge of those above, and what the reference takes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sharded").mkdir()
    (tmp_path / "sharded" / "state.pt").touch()
    backbones = write_backbones(tmp_path / "backbones")
    right = [
        "--seed=0",
        "--seed=4294967295",
        "--learning_rate=0",
        "--workers=0",
        "--mmc4_textsim_threshold=-1",
        "--loss_multiplier_laion=0",
        "--dist_timeout=0.5",
        "--dist-url=tcp://node-1.cluster:29500",
        "--dist-url=tcp://[fe80::1]:29500",
        "--dist-url=file:///shared/meet",
        "--dist-backend=cpu:gloo,cuda:nccl",
        "--dist-backend=NCCL",
        "--vision_encoder_path=ViT-L/14",
        "--vision_encoder_path=hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
        "--lm_path=gpt2",
        "--lm_path=togethercomputer/RedPajama-INCITE-Base-3B-v1",
        "--run_name=runs/2024/a run; of mine",
        "--wandb_project=mine",  # without --report_to_wandb, as the reference allows
        "--resume_from_checkpoint=sharded",
    ]
    datasets = [f"--laion_shards={shards['laion']}", f"--mmc4_shards={shards['mmc4']}"]
    for flag in right:
        parse_args([*datasets, flag])
    parse_args([*datasets, *backbones])
    args = parse_args([*datasets, "--batch_size_l=64", "--batch_size_m=64", "--wandb_entity="])  # abbreviated
    assert (args.batch_size_laion, args.batch_size_mmc4, args.wandb_entity) == (64, 64, None)


@pytest.mark.fault(
    "A wrong value of any flag that takes one (not a number, negative, 0, nan, inf, empty, misspelt, no such file)"
)
def test_nothing_heavy_is_imported_before_the_flags_are_refused(shards: dict[str, str], tmp_path: Path) -> None:
    """One of each kind, in one new process: the names of OpenCLIP's models too are found without it."""
    flags = [f"{flag}={next(iter(values))}" for flag, values in WRONG.items()]
    program = f"""
import contextlib, io, sys
from open_flamingo.train.train import main
for flag in {[*flags, "--vision_encoder_path=ViT-L14", "--fsdp=1", "--nothing"]!r}:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            main(["--laion_shards={shards["laion"]}", "--mmc4_shards={shards["mmc4"]}", flag])
    except SystemExit as refused:
        assert refused.code == 2, flag
    assert len(said.getvalue().splitlines()) == 1, said.getvalue()
    assert flag.split("=")[0] in said.getvalue(), said.getvalue()
heavy = {{"torch", "transformers", "open_clip", "numpy", "PIL", "webdataset"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
