"""Under torchrun: prints the buckets, in bytes, that DDP reduces in each of two updates, and how many bytes are trained."""

import sys

import torch
from PIL import Image

from open_flamingo import create_model_and_transforms
from open_flamingo.train.arguments import parse_args
from open_flamingo.train.data.images import normalization
from open_flamingo.train.data.loader import build_loader
from open_flamingo.train.data.options import data_options
from open_flamingo.train.distributed import detect_launcher, distributed
from open_flamingo.train.optimizer import build_optimizer
from open_flamingo.train.parallel import dummy_batch, parallelize, warm_up_ddp
from open_flamingo.train.step import TrainDataset, Trainer, train_step


def main() -> None:
    args = parse_args(sys.argv[1:])
    with distributed(detect_launcher(), args.dist_url) as world:
        model, image_processor, tokenizer = create_model_and_transforms(
            args.vision_encoder_path, args.vision_encoder_pretrained, args.lm_path
        )
        optimizer = build_optimizer(model, 1e-3, 0.1)
        sources = [
            TrainDataset(
                kind,
                1.0,
                build_loader(option, tokenizer, image_processor),
                normalization(image_processor),
                world.device,
            )
            for kind, option in data_options(args, world, None).items()
        ]
        parallel_model = parallelize(model, world)
        buckets: list[int] = []

        def count(state: None, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
            buckets.append(bucket.buffer().nbytes)
            work = torch.distributed.all_reduce(bucket.buffer() / world.world_size, async_op=True)
            return work.get_future().then(lambda future: future.value()[0])

        parallel_model.register_comm_hook(None, count)
        image = image_processor(Image.new("RGB", (64, 64)))
        warm_up_ddp(parallel_model, dummy_batch(image, model.media_token_id, model.eoc_token_id))
        trainer = Trainer(parallel_model, optimizer, sources, accumulation=args.gradient_accumulation_steps)
        for _ in range(2):
            buckets.clear()
            train_step(trainer, 1e-2)
            if world.is_main:
                print("buckets", *buckets)
        if world.is_main:
            print("trained", sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad))
        del parallel_model, trainer


if __name__ == "__main__":
    main()
