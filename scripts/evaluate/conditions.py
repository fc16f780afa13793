"""What is measured: numbers of demonstrations, seeds, and controls; and the prompts of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from open_flamingo.scripts.evaluate.data import Record, random_demonstrations, shuffled_answers
from open_flamingo.scripts.evaluate.prompts import Prompt

if TYPE_CHECKING:  # it imports transformers, which must not be before --offline is read
    from open_flamingo.scripts.evaluate.images import Key

# As they are; all images gray; answers of demonstrations shuffled.
IMAGES, BLANK, SHUFFLED = "images", "blank", "shuffled"
VARIANTS = (IMAGES, BLANK, SHUFFLED)
TEXT_ONLY = 2  # demonstrations without images at 0 shots


@dataclass(frozen=True)
class Condition:
    shots: int
    seed: int
    variant: str = IMAGES

    @property
    def name(self) -> str:
        return f"shots_{self.shots}.seed_{self.seed}.{self.variant}"


def conditions(
    shots: Sequence[int], seeds: int, controls: Sequence[str], control_seeds: int, has_rices: bool
) -> list[Condition]:
    """All of them, in order. RICES chooses the same demonstrations on every seed, so one is enough; but at 0 shots they are random.
    Answers can be shuffled among two demonstrations or more."""
    found = []
    for number in sorted(set(shots)):
        for variant in (IMAGES, *controls):
            if variant == SHUFFLED and number < 2:
                continue
            of_variant = seeds if variant == IMAGES else min(seeds, control_seeds)
            if has_rices and number and variant != SHUFFLED:
                of_variant = min(of_variant, 1)
            found += [Condition(number, seed, variant) for seed in range(of_variant)]
    return found


@dataclass
class Item:
    """One query of a condition."""

    index: int  # in the test records
    images: list[Key]  # in the order of the `<image>` tokens
    input_ids: list[int]
    demonstrations: list[Record] = field(default_factory=list)
    left_out: int = 0  # demonstrations for which the model has no room


Choose = Callable[[int, int, int], Sequence[int]]  # index of the query, number, seed → places in the pool


class PromptBuilder:
    """Builds the prompts of conditions.

    Args:
        max_tokens: of a prompt; the first demonstrations of a longer one are left out.
        rices: chooses by similarity; None for random demonstrations.
    """

    def __init__(
        self,
        test: Sequence[Record],
        pool: Sequence[Record],
        prompt: Prompt,
        tokenizer: Any,
        max_tokens: int | None = None,
        rices: Choose | None = None,
    ) -> None:
        self._test, self._pool, self._prompt, self._tokenizer = test, pool, prompt, tokenizer
        self._max_tokens = max_tokens
        self._rices = rices

    def items(self, condition: Condition) -> Iterator[Item]:
        """In the order of the test records. Raises ValueError where the pool is too small, or a query alone is too long."""
        for index, record in enumerate(self._test):
            yield self._item(index, record, condition)

    def _item(self, index: int, record: Record, condition: Condition) -> Item:
        if condition.shots and self._rices is not None:
            places = self._rices(index, condition.shots, condition.seed)
        else:
            places = random_demonstrations(self._pool, record, condition.shots or TEXT_ONLY, condition.seed)
        shown = [self._pool[place] for place in places]
        answers = [one.answers[0] for one in shown]
        if condition.variant == SHUFFLED:
            answers = shuffled_answers(answers, record, condition.seed)
        has_images = condition.shots > 0
        pairs = list(zip(shown, answers, strict=True))
        ids = self._ids(self._prompt.text(record, pairs, has_images))
        while self._max_tokens and len(ids) > self._max_tokens:
            if not pairs:
                raise ValueError(
                    f"{record.where}: its prompt has {len(ids)} tokens; the language model takes {self._max_tokens} "
                    "beside the answer"
                )
            pairs.pop(0)
            ids = self._ids(self._prompt.text(record, pairs, has_images))
        images: list[Key] = [one.image for one, _ in pairs] if has_images else []
        images.append(record.image)
        if condition.variant == BLANK:
            images = [None] * len(images)
        return Item(index, images, ids, [one for one, _ in pairs], len(shown) - len(pairs))

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text).input_ids)


def batches(items: Sequence[Item], size: int) -> list[list[Item]]:
    """Items of about one length together: the same batches whoever computes them."""
    order = sorted(items, key=lambda item: (len(item.images), len(item.input_ids), item.index))
    # The longest first: what does not fit the memory is known at once.
    return [order[start : start + size] for start in range(0, len(order), size)][::-1]
