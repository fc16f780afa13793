"""The tiny frozen language model, which learns in context from words alone.

It reads documents in which things are described: "red circle is a dax. blue square is a wug. red circle is a" → "dax". What it then does
with words, the training program has it do with images.
"""

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Lfm2Config, Lfm2ForCausalLM
from transformers.utils import logging as transformers_logging

from ..demo.backbones import END_OF_TEXT, RESIDUAL_SCALE, fit, train_tokenizer
from ..demo.progress import Tracker, silent
from .documents import END_OF_CHUNK, MAX_SHOTS, Pair, draw_document, in_words

LENGTHS = (0, 1, 4, 9, 12, 14)  # sentences of a text; 0: a description alone, as in a pair
TOKENS = 7  # of a sentence: two for the thing, "is", "a", its word, ".", and the end of the chunk
WORD = 4  # the word's place in it


def pretrain_language_model(
    folder: Path, steps: int, track: Tracker | None = None, batch_size: int = 32, seed: int = 0
) -> float:
    """Train a LFM2 of 2 layers on documents in words and save it, with its tokenizer, in `folder`.

    The first layer is a short convolution: that what stands before a word belongs to it need not be found out. With attention alone this
    takes ten times as many steps. The second is attention. Beside the loss of all tokens there is that of the words that are known,
    which are few among what cannot be foreseen.

    Returns the mean loss, in nats, of the last tenth of its `steps`.
    """
    rng = random.Random(f"language {seed}")
    torch.manual_seed(seed)
    texts = (in_words(draw_document(rng, max(LENGTHS), MAX_SHOTS)) for _ in range(2000))
    tokenizer = train_tokenizer(folder, (text.replace(END_OF_CHUNK, " ") for text in texts))
    # The program adds what is missing of its two tokens, and trains their rows. That chunks end is nothing to learn from images.
    tokenizer.add_special_tokens({"additional_special_tokens": [END_OF_CHUNK]})
    tokenizer.save_pretrained(folder)
    config = Lfm2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        block_auto_adjust_ff_dim=False,
        num_hidden_layers=2,
        layer_types=["conv", "full_attention"],
        conv_L_cache=WORD + 1,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        initializer_range=0.1,
        norm_eps=1e-8,  # see `shrink_residual_stream`
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    model = Lfm2ForCausalLM(config)

    def loss_of_a_batch() -> Tensor:
        length = rng.choice(LENGTHS)
        documents = [draw_document(rng, length or 1, MAX_SHOTS) for _ in range(batch_size)]
        texts = [in_words(document) if length else described(document[0]) for document in documents]
        ids = torch.tensor(tokenizer([f"{END_OF_TEXT}{text}{END_OF_TEXT}" for text in texts])["input_ids"])
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        losses = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
        known = (
            torch.tensor([known_words(document) for document in documents]).flatten()
            if length
            else torch.zeros(0, dtype=torch.bool)
        )
        return losses.mean() + (losses[known].mean() if known.any() else 0)

    loss = fit(model, loss_of_a_batch, steps, 3e-3, "language model", track or silent())
    shrink_residual_stream(model)
    transformers_logging.disable_progress_bar()  # of saving a model this small
    model.save_pretrained(folder)
    return loss


def described(pair: Pair) -> str:
    """What a pair of an image and its description says."""
    return f"{' '.join(pair.thing)}{END_OF_CHUNK}"


def known_words(document: list[Pair]) -> list[bool]:
    """Of each token of a document in words, and the end of the text: is it a word that stood in the document before?"""
    known = [False] * (TOKENS * len(document) + 1)
    for i, pair in enumerate(document):
        known[TOKENS * i + WORD] = pair in document[:i]
    return known


@torch.no_grad()
def shrink_residual_stream(model: Lfm2ForCausalLM) -> None:
    """The same function with a residual stream `RESIDUAL_SCALE` times as large, so that gates that start shut count soon."""
    trunk = model.model
    writers = [trunk.embed_tokens.weight]
    for layer in trunk.layers:
        mixer = layer.self_attn if layer.is_attention_layer else layer.conv
        writers += [mixer.out_proj.weight, layer.feed_forward.w2.weight]
    for weight in writers:
        weight.mul_(RESIDUAL_SCALE)
    trunk.embedding_norm.weight.div_(RESIDUAL_SCALE)  # the head is tied to `embed_tokens`
