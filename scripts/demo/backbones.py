"""The two backbones that the demo freezes: a tiny vision tower and a tiny language model, both pretrained on the small world.

Neither sees a held-out combination. They are saved as any OpenCLIP tower and any Hugging Face model are, so `train/train.py` loads
them with its ordinary flags.
"""

import json
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from .documents import draw_document
from .progress import Tracker, silent
from .world import TRAINING, caption, render

VISION_CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 96, "patch_size": 16, "width": 64, "layers": 2, "head_width": 32, "pool_type": "avg"},
    "text_cfg": {"context_length": 8, "vocab_size": 8, "width": 32, "heads": 1, "layers": 1},  # OpenCLIP asks for one
}
# Frozen weights add up their outputs in a stream that gated cross-attention adds to. Gates start at 0 and move by at most the
# learning rate an update: the smaller that stream, the fewer updates until what the gates let in counts.
RESIDUAL_SCALE = 0.1
END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(folder: Path, texts: Iterable[str] | None = None, seed: int = 0) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `texts` (the world's, if None), saved in `folder`. Every word is one token, as there are few."""
    rng = random.Random(f"tokenizer {seed}")
    texts = (draw_text(rng) for _ in range(2000)) if texts is None else texts
    tokenizer = Tokenizer(models.BPE())
    # The space before a text's first word makes "<image>at" the same word as "… at".
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
    fast.save_pretrained(folder)
    return fast


def draw_text(rng: random.Random) -> str:
    """What the language model reads: a caption, or a document without its images."""
    if rng.random() < 0.6:
        return caption(rng.choice(TRAINING))
    return " ".join(draw_document(rng).sentences)


def pretrain_language_model(
    folder: Path, steps: int, track: Tracker | None = None, batch_size: int = 32, seed: int = 0
) -> float:
    """Train a GPT-2 of 2 layers on the world's text and save it, with its tokenizer, in `folder`.

    Returns the mean loss, in nats a token, of the last tenth of its `steps`.
    """
    rng = random.Random(f"language {seed}")
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(folder, seed=seed)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=256,
        n_embd=64,
        n_layer=2,
        n_head=2,
        n_inner=128,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        layer_norm_epsilon=1e-8,  # the scaled stream has a variance of about 1e-4
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = GPT2LMHeadModel(config)

    def loss_of_a_batch() -> Tensor:
        texts = [END_OF_TEXT + draw_text(rng) + END_OF_TEXT for _ in range(batch_size)]
        ids = [torch.tensor(row) for row in tokenizer(texts)["input_ids"]]
        inputs = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.eos_token_id)
        labels = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100)
        return F.cross_entropy(model(input_ids=inputs).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    loss = fit(model, loss_of_a_batch, steps, 3e-3, "language model", track or silent())
    _scale_residual_stream(model, RESIDUAL_SCALE)
    transformers_logging.disable_progress_bar()  # of saving a model this small
    model.save_pretrained(folder)
    return loss


@torch.no_grad()
def _scale_residual_stream(model: GPT2LMHeadModel, scale: float) -> None:
    """The same function with a residual stream `scale` times as large: what writes to it shrinks, layer norms undo it."""
    trunk = model.transformer
    writers = [trunk.wte.weight, trunk.wpe.weight]
    for layer in trunk.h:
        for projection in (layer.attn.c_proj, layer.mlp.c_proj):
            writers += [projection.weight, projection.bias]
    for weight in writers:
        weight.mul_(scale)
    for weight in (trunk.ln_f.weight, trunk.ln_f.bias):  # the head is tied to `wte`
        weight.div_(scale)


def pretrain_vision_tower(
    config_path: Path,
    weights_path: Path,
    steps: int,
    num_images: int,
    track: Tracker | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> float:
    """Train an OpenCLIP ViT to caption: the mean of its patch tokens must tell every word of the caption, all at once.

    This is the parallel prediction of CapPa (https://arxiv.org/abs/2306.07915) with the smallest of decoders, one linear map,
    so what the patch tokens know is easy to read. (Contrastive pretraining learns the same, but needs minutes more.)

    Writes the tower's OpenCLIP config and weights. Returns the mean loss of the last tenth of its `steps`.
    """
    rng = random.Random(f"vision {seed}")
    torch.manual_seed(seed)
    clip = CLIP(VISION_CONFIG["embed_dim"], VISION_CONFIG["vision_cfg"], VISION_CONFIG["text_cfg"])
    tower = clip.visual
    _start_positions(tower)

    track = track or silent()
    scenes = [rng.choice(TRAINING) for _ in range(num_images)]
    inputs = torch.stack(
        [tower_input(torch.from_numpy(render(rng, scene))) for scene in track(scenes, num_images, "images")]
    )
    captions = [caption(scene).split() for scene in scenes]
    words = sorted({word for text in captions for word in text})
    targets = torch.tensor([[words.index(word) for word in text] for text in captions])
    length = targets.shape[1]
    head = nn.Linear(VISION_CONFIG["embed_dim"], length * len(words))

    def loss_of_a_batch() -> Tensor:
        rows = torch.randint(num_images, (batch_size,))
        flip = torch.rand(batch_size, 1, 1, 1) < 0.5  # as in training
        images = inputs[rows]
        images = normalize(torch.where(flip, images.flip(-1), images))
        return F.cross_entropy(head(tower(images)).view(-1, len(words)), targets[rows].flatten())

    loss = fit(nn.ModuleList([tower, head]), loss_of_a_batch, steps, 3e-3, "vision tower", track)
    config_path.write_text(json.dumps(VISION_CONFIG, indent=2), encoding="utf-8")
    torch.save({f"visual.{name}": tensor for name, tensor in tower.state_dict().items()}, weights_path)
    return loss


@torch.no_grad()
def _start_positions(tower: nn.Module) -> None:
    """Position embeddings as large as the patches', and alike within a row and within a column.

    OpenCLIP's start at a norm of 1; beside these patches that is so little that the tower takes minutes to tell top from bottom.
    """
    count, width = tower.positional_embedding.shape
    side = int((count - 1) ** 0.5)
    grid = (torch.randn(side, 1, width) + torch.randn(1, side, width)) * 0.7
    tower.positional_embedding[1:] = grid.flatten(0, 1)


def tower_input(image: Tensor) -> Tensor:
    """uint8 [height, width, 3] → uint8 [3, size, size], as training resizes."""
    size = VISION_CONFIG["vision_cfg"]["image_size"]
    image = image.permute(2, 0, 1)[None].float()
    return F.interpolate(image, (size, size), mode="bicubic", antialias=True).round().clamp(0, 255).to(torch.uint8)[0]


def normalize(images: Tensor) -> Tensor:
    """uint8 [B, 3, height, width] → float, with CLIP's mean and standard deviation."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    return (images.float() / 255 - mean) / std


def fit(
    model: nn.Module,
    loss_of_a_batch: Callable[[], Tensor],
    steps: int,
    learning_rate: float,
    description: str,
    track: Tracker,
) -> float:
    """AdamW with a linear warm-up and a cosine to 0. Returns the mean loss of the last tenth of the steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.03, total_iters=30)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - 30))
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], [30])
    model.train()
    losses: list[float] = []
    for _ in track(range(steps), steps, description):
        loss = loss_of_a_batch()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        track.note = f"loss {mean(losses[-50:]):.3f}"
    return mean(losses[-max(1, steps // 10) :])


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
