"""Files and names made to run something: nothing of them runs.

Each hostile file is first shown to be one: read without restraint, it leaves a mark.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from open_flamingo.factory import load_language_model, load_tokenizer, load_vision_encoder
from open_flamingo.train.checkpoint import SHARDED_STATE
from open_flamingo.train.checkpoint import files as checkpoints
from open_flamingo.train.checkpoint.sharded import TensorReader
from open_flamingo.train.data.samples import Counts
from open_flamingo.train.data.shards import expand_shards
from open_flamingo.train.data.tars import read_shard
from open_flamingo.train.sharded import to_file
from open_flamingo.train.train import main
from tests.shards import write_laion
from tests.tiny import ROOT, TOKENIZER


class Hostile:
    """Pickled, it is an order to leave a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.mark}'",)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """The file that appears when hostile code runs."""
    return tmp_path / "mark"


def assert_hostile(mark: Path, read: Callable[[], object]) -> None:
    """Without restraint, `read` runs what it reads."""
    with contextlib.suppress(Exception, CheckpointException):  # what was there is not what was expected, but it has run
        read()
    assert mark.exists()
    mark.unlink()


def save_hostile(path: Path, mark: Path, contents: dict | None = None, zipped: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({**(contents or {}), "more": Hostile(mark)}, path, _use_new_zipfile_serialization=zipped)
    assert_hostile(mark, lambda: torch.load(path, weights_only=False))
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.mark.fault(
    "Hostile files and names",
    "A malicious pickle as `--resume_from_checkpoint`, zip or older format",
    "refused with the file's name, nothing runs",
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_a_checkpoint_to_start_from(
    zipped: bool, flags: list[str], mark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = save_hostile(tmp_path / "hostile.pt", mark, {"model_state_dict": {}}, zipped)
    with pytest.raises(SystemExit) as refused:
        main([*flags, f"--run_name={tmp_path / 'run'}", f"--resume_from_checkpoint={file}"])
    assert refused.value.code == 1
    assert f"{file} cannot be read as a checkpoint" in capsys.readouterr().err
    assert not mark.exists()


@pytest.mark.fault(
    "Hostile files and names",
    "A malicious pickle as newest checkpoint of the run, file or sharded",
    "skipped for the one before, nothing runs; none left: refused",
)
def test_the_newest_checkpoint_of_a_run(
    flags: list[str], mark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("checkpoint_3.pt", "checkpoint_2/state.pt"):
        save_hostile(tmp_path / "run" / name, mark, {"model_state_dict": {}, "flags": {}})
    with pytest.raises(SystemExit) as refused:
        main([*flags, f"--run_name={tmp_path / 'run'}"])
    assert refused.value.code == 1
    assert "none of the checkpoints" in capsys.readouterr().err
    checkpoints.save({"model_state_dict": {}, "step": 7}, tmp_path / "run" / "checkpoint_1.pt")
    found = checkpoints.newest_readable(tmp_path / "run")
    assert found is not None
    assert found[1]["step"] == 7
    assert not mark.exists()


@pytest.mark.fault(
    "Hostile files and names",
    "A sharded checkpoint whose `state.pt`, `.metadata` or an entry is a malicious pickle, or whose entries lie outside its folder (torch's own reader runs the last three but the path)",
    "refused, naming the folder; nothing runs",
)
def test_the_parts_of_a_sharded_checkpoint(mark: Path, tmp_path: Path) -> None:
    tensors = {"model/latents": torch.arange(6.0)}

    def sharded(name: str, contents: dict) -> Path:
        dcp.save(contents, checkpoint_id=tmp_path / name, no_dist=True)
        checkpoints.save({"layout": {}, "optimizer_parameter_names": []}, tmp_path / name / SHARDED_STATE)
        return tmp_path / name

    def change(folder: Path, edit: Callable[[Metadata], object]) -> Path:
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        (folder / ".metadata").write_bytes(pickle.dumps(edit(metadata) or metadata))
        return folder

    def leave_the_folder(metadata: Metadata) -> None:
        for stored in metadata.storage_data.values():
            stored.relative_path = f"../outside/{stored.relative_path}"

    whole = sharded("whole", tensors)
    read = {"model/latents": torch.zeros(6)}
    dcp.load(read, storage_reader=TensorReader(whole), no_dist=True)
    assert torch.equal(read["model/latents"], tensors["model/latents"])

    # An entry that is not a tensor is unpickled when it is asked for, whatever was asked for.
    pickled = sharded("pickled", {"model/latents": Hostile(mark)})
    assert_hostile(mark, lambda: dcp.load({"model/latents": torch.zeros(6)}, checkpoint_id=pickled, no_dist=True))
    described = change(sharded("described", tensors), lambda metadata: Hostile(mark))
    assert_hostile(mark, lambda: dcp.load(dict(tensors), checkpoint_id=described, no_dist=True))
    state = sharded("state", tensors)
    save_hostile(state / SHARDED_STATE, mark)
    for folder, says in {
        pickled: "it asks for .*BytesStorageMetadata",
        described: "it asks for posix.system",
        change(sharded("inside", tensors), leave_the_folder): "is not a file of tensors of this folder",
        state: "cannot be read as a checkpoint",
    }.items():
        with pytest.raises(ValueError, match=says) as refused:
            to_file(folder, tmp_path / "made.pt")
        assert str(folder) in str(refused.value)
        if folder != state:
            with pytest.raises(CheckpointException):  # some versions of torch keep the reason to themselves
                dcp.load(dict(tensors), storage_reader=TensorReader(folder), no_dist=True)
    assert not mark.exists()


# ---------------------------------------------------------------------------------------------------------------------
# Weights of backbones


def value_of(flag: str, flags: list[str]) -> str:
    return next(given.partition("=")[2] for given in flags if given.startswith(f"{flag}="))


@pytest.mark.fault(
    "Hostile files and names",
    "A malicious pickle as vision weights (file, or in a `local-dir:` folder) or as the language model's `pytorch_model.bin`",
    "refused with the flag, nothing runs",
)
@pytest.mark.parametrize("name", ["zip.pt", "old.pt", "pickle.bin"])
def test_weights_of_a_vision_encoder(name: str, backbones: list[str], mark: Path, tmp_path: Path) -> None:
    config = value_of("--vision_encoder_path", backbones)
    weights = torch.load(value_of("--vision_encoder_pretrained", backbones), weights_only=True)
    file = save_hostile(tmp_path / name, mark, weights, zipped=name == "zip.pt")
    with pytest.raises(ValueError, match="clip_vision_encoder_pretrained") as refused:
        load_vision_encoder(config, str(file))
    assert str(file) in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
    assert not mark.exists()


@pytest.mark.fault(
    "A malicious pickle as vision weights (file, or in a `local-dir:` folder) or as the language model's `pytorch_model.bin`"
)
def test_weights_in_a_folder_of_a_vision_encoder(backbones: list[str], mark: Path, tmp_path: Path) -> None:
    config = json.loads(Path(value_of("--vision_encoder_path", backbones)).read_text())
    save_hostile(tmp_path / "tower" / "open_clip_pytorch_model.bin", mark)
    (tmp_path / "tower" / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    with pytest.raises(ValueError, match="clip_vision_encoder_path"):
        load_vision_encoder(f"local-dir:{tmp_path / 'tower'}")
    assert not mark.exists()


@pytest.mark.fault(
    "Hostile files and names", "A TorchScript program as vision weights", "refused, with how to make weights of it"
)
def test_torchscript_is_code(backbones: list[str], tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "program.pt")
    with pytest.raises(ValueError, match="TorchScript program"):
        load_vision_encoder(value_of("--vision_encoder_path", backbones), str(tmp_path / "program.pt"))


@pytest.mark.fault(
    "A malicious pickle as vision weights (file, or in a `local-dir:` folder) or as the language model's `pytorch_model.bin`"
)
def test_weights_of_a_language_model(backbones: list[str], mark: Path, tmp_path: Path) -> None:
    model = load_language_model(value_of("--lm_path", backbones), vocabulary=1)
    model.config.save_pretrained(tmp_path / "lm")
    save_hostile(tmp_path / "lm" / "pytorch_model.bin", mark, dict(model.state_dict()))
    with pytest.raises(ValueError, match="lang_encoder_path") as refused:
        load_language_model(str(tmp_path / "lm"), vocabulary=1)
    assert len(str(refused.value).splitlines()) == 1
    assert not mark.exists()


# ---------------------------------------------------------------------------------------------------------------------
# Models that bring code

CODE = """
import pathlib
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

pathlib.Path({mark!r}).touch()

class OwnConfig(OPTConfig):
    model_type = "own"

class OwnModel(OPTForCausalLM):
    config_class = OwnConfig

class OwnTokenizer(PreTrainedTokenizerFast):
    pass

def generate(*args, **kwargs):
    pass
"""


@pytest.fixture
def own_code(backbones: list[str], mark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a tiny language model that brings its code. Whoever is asked on the terminal says yes."""
    from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.stdin", io.StringIO(100 * "y\n"))
    folder = tmp_path / "own_code"
    OPTForCausalLM(OPTConfig.from_pretrained(value_of("--lm_path", backbones))).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    (folder / "own.py").write_text(CODE.format(mark=str(mark)))
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    edit(folder / "config.json", model_type="own", architectures=["OwnModel"], auto_map=auto_map)
    return folder


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.fault(
    "Hostile files and names",
    "A language model or tokenizer that brings Python code (`auto_map`, `custom_generate`)",
    "refused in one line that says `--trust_remote_code`, never a question on the terminal; where transformers knows the model itself, its own code is used",
)
def test_code_of_a_language_model_runs_only_with_the_flag(
    own_code: Path, flags: list[str], mark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*flags, f"--lm_path={own_code}", f"--run_name={tmp_path / 'run'}", "--num_epochs=1"]
    with pytest.raises(SystemExit) as refused:
        main(flags)
    assert refused.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "cannot build the model" in line]
    assert str(own_code) in line
    assert "pass --trust_remote_code" in line
    with pytest.raises(ValueError, match=r"lang_encoder_path.*pass trust_remote_code=True"):
        load_language_model(str(own_code), vocabulary=1, meta=True)
    assert not mark.exists()

    main([*flags, "--trust_remote_code"])
    assert (tmp_path / "run" / "checkpoint_0.pt").is_file()
    assert mark.exists()


@pytest.mark.fault("A language model or tokenizer that brings Python code (`auto_map`, `custom_generate`)")
def test_code_of_a_tokenizer_runs_only_with_the_flag(own_code: Path, mark: Path) -> None:
    auto_map = {"AutoTokenizer": [None, "own.OwnTokenizer"]}
    edit(own_code / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=auto_map)
    with pytest.raises(ValueError, match=r"tokenizer_path.*pass trust_remote_code=True"):
        load_tokenizer(str(own_code))
    assert not mark.exists()
    load_tokenizer(str(own_code), trust_remote_code=True)
    assert mark.exists()


@pytest.mark.fault("A language model or tokenizer that brings Python code (`auto_map`, `custom_generate`)")
def test_code_for_what_transformers_knows_itself_is_left_alone(own_code: Path, mark: Path) -> None:
    """As in the MPT folders of released OpenFlamingo models, and of a way to generate."""
    edit(own_code / "config.json", model_type="opt", architectures=["OPTForCausalLM"])
    assert type(load_language_model(str(own_code), vocabulary=1)).__module__.startswith("transformers.models.opt")
    (own_code / "custom_generate").mkdir()
    (own_code / "custom_generate" / "generate.py").write_text(CODE.format(mark=str(mark)))
    load_language_model(str(own_code), vocabulary=1)
    assert not mark.exists()
    load_language_model(str(own_code), vocabulary=1, trust_remote_code=True)
    assert mark.exists()


@pytest.mark.fault(
    "Hostile files and names",
    "An OpenCLIP config whose text tower brings Python code",
    "refused, with or without the flag, without the 15 s question that transformers would ask",
)
def test_code_of_an_openclip_text_tower_never_runs(
    own_code: Path, backbones: list[str], mark: Path, tmp_path: Path
) -> None:
    config = json.loads(Path(value_of("--vision_encoder_path", backbones)).read_text())
    weights = open_clip.CLIP(**config).state_dict()
    config["text_cfg"] = {"hf_model_name": str(own_code), "hf_tokenizer_name": str(own_code)}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    torch.save(weights, tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"clip_vision_encoder_path.*custom code"):
        load_vision_encoder(f"local-dir:{tmp_path}")
    load_vision_encoder(str(tmp_path / "open_clip_config.json"))  # without weights, no text tower is made
    assert not mark.exists()


# ---------------------------------------------------------------------------------------------------------------------
# Names

NAMES = [
    "$(touch mark)",
    "`touch mark`",
    "; touch mark",
    "' ; touch mark ; '",
    '" ; touch mark ; "',
    "a b*",
    "&& touch mark #",
]


def recorder(path: Path, record: Path, then: str = "") -> None:
    """A program at `path` that writes its arguments to `record` as a line of JSON."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        f"#!{sys.executable}\nimport json, sys\nopen({str(record)!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n{then}"
    )
    path.chmod(0o755)


@pytest.mark.fault(
    "Hostile files and names",
    "Shard names that are commands (`s3://bucket/$(touch x).tar`, quotes, back-ticks, line breaks), over S3 and http",
    "one argument of `aws` or `curl`, as typed",
)
@pytest.mark.parametrize("name", [*NAMES, "line\nbreak; touch mark"])
def test_shard_names_reach_no_shell(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shard = expand_shards(write_laion(tmp_path / "laion", shards=1, samples=3))[0]
    send = f"sys.stdout.buffer.write(open({shard!r}, 'rb').read())"
    for program in ("aws", "curl"):
        recorder(tmp_path / "bin" / program, tmp_path / "record", send)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    url = f"bucket/{name}.tar"
    for scheme, program in (("s3://", "aws"), ("http://", "curl")):
        (tmp_path / "record").write_text("")
        (expanded,) = expand_shards(f"{scheme}{url}")
        assert len(list(read_shard(expanded, Counts()))) == 3, program
        (arguments,) = map(json.loads, (tmp_path / "record").read_text().splitlines())
        assert f"{scheme}{url}" in arguments
    assert not (tmp_path / "mark").exists()


@pytest.mark.fault(
    "Hostile files and names",
    "Run names and flags that are commands, in train.py and in the SLURM script",
    "a folder of that name; arguments handed on as they are",
)
def test_run_names_reach_no_shell(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = " ".join(NAMES) + "\nline"
    main([*flags, f"--run_name={name}", "--num_epochs=1", "--report_to_tensorboard"])
    assert (tmp_path / name / "checkpoint_0.pt").is_file()
    assert not (tmp_path / "mark").exists()


@pytest.mark.fault("Run names and flags that are commands, in train.py and in the SLURM script")
def test_the_slurm_script_hands_on_every_argument_as_it_is(tmp_path: Path) -> None:
    recorder(tmp_path / "bin" / "srun", tmp_path / "record")
    arguments = [word for name in NAMES for word in ("--run_name", name)]
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "1"}
    subprocess.run(
        ["bash", ROOT / "scripts" / "train.sbatch", "3B", *arguments], cwd=tmp_path, env=environment, check=True
    )
    (recorded,) = map(json.loads, (tmp_path / "record").read_text().splitlines())
    assert recorded[-len(arguments) :] == arguments
    assert not (tmp_path / "mark").exists()
