"""Under torchrun: two updates in each of `RUNS`. Each rank writes a digest of its weights and the sum of the losses, as lines of
json, into a file of its own in the folder that is the first argument. In fp16, rank 1's first loss overflows."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from open_flamingo import create_model_and_transforms
from open_flamingo.train.arguments import parse_args
from open_flamingo.train.data.images import normalization
from open_flamingo.train.data.loader import build_loader
from open_flamingo.train.data.options import data_options
from open_flamingo.train.distributed import World, detect_launcher, distributed
from open_flamingo.train.optimizer import build_optimizer
from open_flamingo.train.parallel import Sharding, compile_blocks, dummy_batch, full_tensor, parallelize, warm_up_ddp
from open_flamingo.train.precision import LossScaler, cast_frozen_weights
from open_flamingo.train.step import TrainDataset, Trainer, train_step
from tests.conftest import AT_LENGTH

# (precision, how it is spread, compiled or not). Compiling takes most of the time.
RUNS = (
    ("fp32", "ddp", False),
    ("amp_bf16", "ddp", False),
    ("amp_bf16", "full", False),
    ("amp_bf16", "full, gathered in bfloat16", False),
    ("bf16", "ddp", False),
    ("bf16", "full", False),
    ("fp16", "ddp", False),
    ("fp16", "hybrid", False),
    ("fp16", "full, gathered in float16", False),
    ("fp16", "full", True),
)
if AT_LENGTH:
    RUNS += (
        ("fp32", "ddp", True),
        ("fp32", "full", True),
        ("amp_bf16", "ddp", True),
        ("fp16", "full", False),
    )
# `hybrid`: a mesh of two dimensions, of two groups of one rank.
SHARDINGS = {
    "ddp": None,
    "full": Sharding(2),
    "full, gathered in bfloat16": Sharding(2, gather_dtype=torch.bfloat16),
    "full, gathered in float16": Sharding(2, gather_dtype=torch.float16),
    "hybrid": Sharding(1),
}


def main() -> None:
    args = parse_args(sys.argv[2:])
    with distributed(detect_launcher(), args.dist_url) as world:
        with (Path(sys.argv[1]) / f"{world.rank}.jsonl").open("w") as file:
            for run in RUNS:
                file.write(f"{json.dumps(train(args, world, *run))}\n")


def compile_quickly(module: nn.Module, **options: Any) -> None:
    """Dynamo does its part as with any backend; this one leaves the minutes of a C++ compiler out."""
    compile_module(module, backend="eager", **options)


compile_module = nn.Module.compile


def train(args, world: World, precision: str, way: str, compiled: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    model, image_processor, tokenizer = create_model_and_transforms(
        args.vision_encoder_path,
        args.vision_encoder_pretrained,
        args.lm_path,
        gradient_checkpointing=compiled,
    )
    model.perceiver.layers = model.perceiver.layers[:2]  # Dynamo traces each layer
    cast_frozen_weights(model, precision)
    parallel_model = parallelize(model, world, SHARDINGS[way])
    optimizer = build_optimizer(model, 1e-3, 0.1)
    scaler = LossScaler(world.device) if precision == "fp16" else None
    sources = [
        TrainDataset(
            name, 1.0, build_loader(option, tokenizer, image_processor), normalization(image_processor), world.device
        )
        for name, option in data_options(args, world, None).items()
    ]
    image = image_processor(Image.new("RGB", (64, 64)))
    warm_up_ddp(parallel_model, dummy_batch(image, model.media_token_id, model.eoc_token_id), precision)
    if compiled:
        compile_blocks(model)

    trainer = Trainer(parallel_model, optimizer, sources, precision, scaler=scaler)
    before = digest(model)
    for update in range(2):
        overflows = update == 0 and precision == "fp16"
        sources[0].weight = float("inf") if overflows and world.rank == 1 else 1.0
        norm = train_step(trainer, 1e-2)
        assert (digest(model) == before) == overflows, (precision, update, norm)
        before = digest(model)
    line = {"run": [precision, way, compiled], "rank": world.rank, "weights": before, "loss": sources[0].loss}
    if scaler is not None:
        line["scaling"] = scaler.state_dict()
    return line


def digest(model: nn.Module) -> str:
    weights = [full_tensor(p).float().numpy().tobytes() for p in model.parameters() if p.requires_grad]
    return hashlib.sha256(b"".join(weights)).hexdigest()


if __name__ == "__main__":
    nn.Module.compile = compile_quickly
    main()
