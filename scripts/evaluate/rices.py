"""RICES, retrieval of in-context examples (Yang et al. 2022): demonstrations whose images are like the query's.

Similarity is the cosine of the vision encoder's pooled features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from open_flamingo import Flamingo
from open_flamingo.scripts.evaluate.data import Record
from open_flamingo.scripts.evaluate.images import ENCODED_AT_ONCE, Images
from open_flamingo.scripts.evaluate.model import together
from open_flamingo.train.distributed import World, gather_objects


@torch.no_grad()
def pooled_features(model: Flamingo, images: Tensor) -> Tensor:
    """Images [M, 3, height, width] → float32 [M, D] of length 1: what the tower pools, or the mean of its patch tokens."""
    tower: Any = model.vision_encoder
    features = tower(images.to(next(tower.parameters()).dtype))
    if isinstance(features, (tuple, list)):  # (pooled, tokens)
        features = features[0]
    if features.ndim == 4:
        features = features.flatten(2).transpose(1, 2)
    if features.ndim == 3:
        features = features.mean(1)
    return F.normalize(features.float(), dim=-1)


def features_of(model: Flamingo, images: Images, records: Sequence[Record], world: World, what: str) -> Tensor:
    """float32 [number of records, D] on the CPU; the ranks share the work. Every rank must call this."""
    keys = list(dict.fromkeys(record.image for record in records))  # a VQA image has several questions
    mine = keys[world.rank :: world.world_size]
    parts = []
    starts = range(0, len(mine), ENCODED_AT_ONCE)
    with together():
        for start in tqdm(starts, desc=f"features of {what}", unit="batch", disable=not world.is_main):
            images.prefetch(mine[start : start + 2 * ENCODED_AT_ONCE])
            batch = images.take(mine[start : start + ENCODED_AT_ONCE])
            parts.append(pooled_features(model, batch.to(world.device)).cpu())
    # In one tensor: rows of a batch, each pickled by itself, would each take the whole batch along.
    of_ranks = gather_objects(torch.cat(parts) if parts else torch.empty(0))
    everyone: dict[Any, Tensor] = {}
    for rank, features in enumerate(of_ranks):
        everyone |= zip(keys[rank :: world.world_size], features, strict=True)
    return torch.stack([everyone[record.image] for record in records])


def most_similar(query: Tensor, features: Tensor, pool: Sequence[Record], record: Record, number: int) -> list[int]:
    """Places in `pool` of the `number` images most like the query's, without itself: the most similar last, next to the query.

    `query` [D] and `features` [number in the pool, D] are of length 1. Raises ValueError if the pool is too small.
    """
    similarity = features @ query
    chosen: list[int] = []
    most = min(len(pool), number + 32)  # the pool is large, and a sort of all of it slow
    while True:
        threshold = similarity.topk(most).values[-1]
        near = (similarity >= threshold).nonzero().flatten()
        # Ties, as of questions about one image, in the order of the pool.
        order = near[similarity[near].argsort(descending=True, stable=True)].tolist()
        chosen = [place for place in order if pool[place].image != record.image][:number]
        if len(chosen) == number or most == len(pool):
            break
        most = min(len(pool), 4 * most)
    if len(chosen) < number:
        raise ValueError(f"--context has {len(chosen)} other images, which is too few for {number} demonstrations")
    return chosen[::-1]
