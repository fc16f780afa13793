"""Texts that are longer than what is used of them: only their beginning is tokenized, and nothing of it may differ."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from open_flamingo.train.data.text import EOC_TOKEN, MEDIA_TOKEN, TextEncoder
from tests.data_tools import tokenizer

WORDS = [
    "a",
    "picture",
    "of",
    "some",
    "dogs",
    "that",
    "run,",
    "(2)",
    "straßen",
    "naïve",
    "東京の写真",
    "\U0001f9a9",
    "http://example.org/x?y=1",
    "e.g.",
    "end.",
    "\n\t",
    "",
    "Now",
]
SPECIAL = [MEDIA_TOKEN, EOC_TOKEN, "<s>", "</s>", "<unk>", "<PAD>"]


def unigram() -> Any:
    """As SentencePiece's: a mark at the first word, which what stands before it decides on; BOS in front."""
    result = Tokenizer(models.Unigram())
    result.normalizer = normalizers.NFKC()
    result.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    result.decoder = decoders.Metaspace(prepend_scheme="first")
    result.train_from_iterator(
        WORDS * 3, trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>")
    )
    result.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", result.token_to_id("<s>"))]
    )
    return result


def word_piece() -> Any:
    """As BERT's: a token at each end of a text, which stays where it is cut."""
    result = Tokenizer(models.WordPiece(unk_token="<unk>"))
    result.normalizer = normalizers.BertNormalizer()
    result.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    result.train_from_iterator(WORDS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL))
    ends = [(token, result.token_to_id(token)) for token in ("<s>", "</s>")]
    result.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return result


def wrapped(backend: Any) -> Any:
    result = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<PAD>"
    )
    result.add_special_tokens({"additional_special_tokens": [EOC_TOKEN, MEDIA_TOKEN]})
    return result


@pytest.mark.parametrize("kind", ["byte-level BPE", "Unigram", "WordPiece"])
def test_only_the_beginning_of_a_long_text_is_tokenized(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used = {
        "byte-level BPE": tokenizer,
        "Unigram": lambda: wrapped(unigram()),
        "WordPiece": lambda: wrapped(word_piece()),
    }[kind]()
    rng = random.Random(0)
    seen: list[int] = []
    saved = 0
    monkeypatch.setattr(
        TextEncoder,
        "_ids",
        lambda self, text, original=TextEncoder._ids: seen.append(len(text)) or original(self, text),
    )
    for _ in range(300):
        parts = [" ".join(rng.choices(WORDS, k=rng.choice([0, 1, 5, 30, 80]))) for _ in range(rng.randint(1, 12))]
        chunks = EOC_TOKEN.join(MEDIA_TOKEN + part for part in parts[1:])
        whole = f"{parts[0]}{chunks}{EOC_TOKEN}{used.eos_token}"
        for length in (8, 32, 256):
            seen.clear()
            expected = used(whole, max_length=length, truncation=True).input_ids
            assert TextEncoder(used, length)(parts) == expected, (parts, length)
            saved += max(seen) < len(whole)
    assert saved > 100, "or the whole text was looked at"


def test_a_tokenizer_without_an_end_of_text_is_refused_at_once() -> None:
    used = wrapped(word_piece())
    used.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        TextEncoder(used, 8)
