"""The trained model, used as anyone uses it: load the checkpoint, generate."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from open_flamingo import load


class Captioner:
    """Images → captions.

    Args:
        checkpoint: a checkpoint of the training program.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.model, self.image_processor, self.tokenizer = load(checkpoint, "cpu", use_local_files=True)

    @torch.inference_mode()
    def __call__(self, images: Sequence[np.ndarray], description: str, batch_size: int = 20) -> list[str]:
        """One caption for each image, uint8 `(height, width, 3)`, the likeliest word at a time."""
        texts = []
        for start in tqdm(range(0, len(images), batch_size), desc=description):
            batch = [self.image_processor(Image.fromarray(p)) for p in images[start : start + batch_size]]
            vision_x = torch.stack(batch)[:, None, None]  # (B, images, frames, C, H, W)
            prompt = self.tokenizer(["<image>"] * len(batch), return_tensors="pt")
            output = self.model.generate(
                vision_x, prompt["input_ids"], attention_mask=prompt["attention_mask"], max_new_tokens=24, num_beams=1
            )
            new_tokens = output[:, prompt["input_ids"].shape[1] :]
            texts += [text.strip() for text in self.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]
        return texts
