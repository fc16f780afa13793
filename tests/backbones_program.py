"""Under torchrun on two ranks: the second gets its backbones from the first. Each line that rank 0 prints is true, or a fault.

torchrun --nproc-per-node=2 tests/backbones_program.py LM_PATH VISION_CONFIG...
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist

from open_flamingo import create_model_and_transforms
from open_flamingo.train.data.images import image_spec
from open_flamingo.train.distributed import detect_launcher, distributed, gather_objects
from open_flamingo.train.parallel import Sharding, parallelize
from open_flamingo.vision import patch_tokens


def main() -> None:
    lm_path, *configs = sys.argv[1:]
    with distributed(detect_launcher()) as world:
        for config in configs:
            for sharding in (None, Sharding(2, shard_frozen=False)):
                torch.manual_seed(world.rank)
                model, transform, _ = create_model_and_transforms(config, None, lm_path, meta=not world.is_main)
                tensors = [*model.parameters(), *model.buffers()]
                assert all(tensor.is_meta != world.is_main for tensor in tensors)
                parallelize(model, world, sharding)
                tower = model.vision_encoder
                image = torch.randn(1, 3, *tower.image_size, generator=torch.Generator().manual_seed(0))
                with torch.no_grad():
                    tokens = gather_objects(patch_tokens(tower, image))
                assert torch.equal(*tokens), (config, sharding)
                buffers = gather_objects(dict(model.named_buffers()))
                assert buffers[0].keys() == buffers[1].keys()
                assert all(torch.equal(buffers[0][name], buffers[1][name]) for name in buffers[0]), (config, sharding)
                specs = gather_objects(image_spec(transform))
                assert specs[0] == specs[1] is not None
                if world.is_main:
                    print("the same:", Path(config).stem)
        dist.barrier()


if __name__ == "__main__":
    main()
