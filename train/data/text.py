"""Text with images in it → token ids.

A text is given as its parts: what stands before the first image, then what follows each one. So parts [a, b, c] are

    a <image> b <|endofchunk|> <image> c <|endofchunk|> {eos}
"""

from itertools import accumulate
from typing import Any

MEDIA_TOKEN = "<image>"
EOC_TOKEN = "<|endofchunk|>"
MAX_CHARACTERS = 1 << 17  # that are looked at of a text; a tokenizer takes a second and 1 GB for a million
LIKELY_CHARACTERS = 6  # per token, that are looked at first of a long text; English has four or five


class TextEncoder:
    """Parts of a text → token ids, cut at `max_tokens`.

    `<image>` and `<|endofchunk|>` that are written out in the data are plain text: they never become the special tokens.

    Raises ValueError where the tokenizer lacks one of these two, padding, or a token for the end of a text.
    """

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.media_token_id = tokenizer.convert_tokens_to_ids(MEDIA_TOKEN)
        self.eoc_token_id = tokenizer.convert_tokens_to_ids(EOC_TOKEN)
        self.pad_token_id = tokenizer.pad_token_id
        for token, token_id in ((MEDIA_TOKEN, self.media_token_id), (EOC_TOKEN, self.eoc_token_id)):
            if token_id is None or token_id == getattr(tokenizer, "unk_token_id", None):
                raise ValueError(f"the tokenizer does not know {token}; create_model_and_transforms adds it")
        for name in ("eos_token", "pad_token"):
            if getattr(tokenizer, name) is None:
                raise ValueError(f"the tokenizer has no {name}")

    def __call__(self, parts: list[str]) -> list[int]:
        """Ids of the text, at most `max_tokens`; a text that is cut has no `<|endofchunk|>` at its end."""
        parts = [part[:MAX_CHARACTERS] for part in parts]
        if any(MEDIA_TOKEN in part or EOC_TOKEN in part for part in parts):
            return self._piece_by_piece(parts)
        chunks = [parts[0], *(f"{MEDIA_TOKEN}{part}{EOC_TOKEN}" for part in parts[1:])]
        chunks[-1] += (EOC_TOKEN if len(parts) == 1 else "") + self.tokenizer.eos_token
        # A tokenizer takes what stands between two special tokens on its own: what comes after `max_tokens` need not be seen.
        likely = LIKELY_CHARACTERS * self.max_tokens
        count = 1 + sum(length < likely for length in accumulate(map(len, chunks)))
        if count < len(chunks):
            ids = self._ids("".join(chunks[:count]) + MEDIA_TOKEN)
            if len(ids) == self.max_tokens:
                return ids
        return self._ids("".join(chunks))

    def _ids(self, text: str) -> list[int]:
        # One call on the text: what a tokenizer makes of a word can depend on what stands before it.
        return list(self.tokenizer(text[:MAX_CHARACTERS], max_length=self.max_tokens, truncation=True).input_ids)

    def _piece_by_piece(self, parts: list[str]) -> list[int]:
        # What the tokenizer puts before a text (BOS, say) and after it.
        whole = list(self.tokenizer("a").input_ids)
        plain = list(self.tokenizer("a", add_special_tokens=False).input_ids)
        at = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
        ids, after = whole[:at], whole[at + len(plain) :]
        for i, part in enumerate(parts):
            if len(ids) >= self.max_tokens:
                break
            if i > 0:
                ids += [self.media_token_id]
            ids += self.tokenizer(part, add_special_tokens=False, split_special_tokens=True).input_ids
            if i > 0 or len(parts) == 1:
                ids += [self.eoc_token_id]
        ids += [self.tokenizer.eos_token_id]
        return ids[: self.max_tokens - len(after)] + after
