"""The evaluation, condition by condition, on any number of ranks: which batches there are depends on the data alone, the ranks share them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from open_flamingo import Flamingo
from open_flamingo.scripts.evaluate.conditions import Condition, Item, PromptBuilder, batches
from open_flamingo.scripts.evaluate.data import Record
from open_flamingo.scripts.evaluate.images import Images, Latents
from open_flamingo.scripts.evaluate.likelihood import TOLERANCE, ClassNames, can_use_cache, class_log_likelihoods
from open_flamingo.scripts.evaluate.model import max_prompt_tokens, together
from open_flamingo.scripts.evaluate.predictions import PredictionFile, read_predictions, write_whole
from open_flamingo.scripts.evaluate.prompts import Prompt, answer_of
from open_flamingo.scripts.evaluate.rices import features_of, most_similar
from open_flamingo.train.distributed import World, run_on_rank0

log = logging.getLogger(__name__)

SHOWN_CLASSES = 5  # likeliest ones in a line of predictions


@dataclass
class Settings:
    """How predictions are made."""

    task: str
    prompt: Prompt
    output_dir: Path
    classes: Sequence[str] = ()
    batch_size: int = 8
    max_new_tokens: int = 20
    num_beams: int = 3
    length_penalty: float = 0.0
    has_rices: bool = False
    max_kept_images: int = 8192
    workers: int = 4


class Evaluator:
    """Makes the predictions of a model.

    Args:
        model: in eval mode, on the device of `world`.
        test, pool: what is asked, and what demonstrations are taken from.
    """

    def __init__(
        self,
        model: Flamingo,
        image_processor: Callable[..., Tensor],
        tokenizer: Any,
        test: Sequence[Record],
        pool: Sequence[Record],
        settings: Settings,
        world: World,
    ) -> None:
        self._model, self._tokenizer, self._world, self._settings = model, tokenizer, world, settings
        self._test = test
        where = {record.image: record.where for record in (*pool, *test)}
        self._images = Images(image_processor, settings.workers, where)
        self.latents = Latents(model, self._images, world.device, settings.max_kept_images)
        self._names: ClassNames | None = None
        # Whether names or beams go on from one prompt's cache; known after the first.
        self._uses_cache: bool | None = None
        answer_tokens = settings.max_new_tokens
        if settings.task == "classify":
            self._names = ClassNames(settings.classes, tokenizer, world.device)
            answer_tokens = self._names.ids.shape[1]
        rices = None
        if settings.has_rices:
            of_pool = features_of(model, self._images, pool, world, "--context")
            of_test = features_of(model, self._images, test, world, "--data")

            def rices(index: int, number: int, seed: int) -> list[int]:
                return most_similar(of_test[index], of_pool, pool, test[index], number)

        max_tokens = max_prompt_tokens(model, answer_tokens)
        self.builder = PromptBuilder(test, pool, settings.prompt, tokenizer, max_tokens, rices)

    def close(self) -> None:
        self._images.close()
        self._model.uncache_media()

    @torch.inference_mode()
    def run(self, condition: Condition) -> list[dict[str, Any]]:
        """The predictions of a condition, in the order of the test records; those that are on disk are not made again.

        Every rank must call this, and gets all of them.
        """
        folder, name = self._settings.output_dir, condition.name
        with ExitStack() as stack:
            with together():  # unfinished lines are off before anyone reads
                file = stack.enter_context(PredictionFile(folder, name, self._world.rank))
            done = run_on_rank0(read_predictions, folder, name)
            with together():  # all ranks have written, or all know what went wrong on one
                if len(done) < len(self._test):
                    self._add(file, condition, done)
        found = run_on_rank0(self._read_whole, name)
        if len(found) < len(self._test):
            raise ValueError(f"{folder}: predictions of {name} are missing; do all ranks see the same --output_dir?")
        return found

    def _add(self, file: PredictionFile, condition: Condition, done: Mapping[int, Any]) -> None:
        """Writes this rank's share of the predictions that are not `done`."""
        every = batches(list(self.builder.items(condition)), self._settings.batch_size)
        # A batch is made whole, as in a run that was never stopped: rounding depends on its shape.
        left = [batch for batch in every if any(item.index not in done for item in batch)]
        self._check_cache(every[-1])
        mine = left[self._world.rank :: self._world.world_size]
        for batch, rows in self._predictions(mine, condition.name):
            file.write([row for item, row in zip(batch, rows, strict=True) if item.index not in done])

    def _read_whole(self, name: str) -> list[dict[str, Any]]:
        found = read_predictions(self._settings.output_dir, name)
        rows = [found[index] for index in sorted(found)]
        write_whole(self._settings.output_dir, name, rows)
        return rows

    def _predictions(self, mine: Sequence[list[Item]], name: str) -> Iterator[tuple[list[Item], list[dict[str, Any]]]]:
        for number, batch in enumerate(tqdm(mine, desc=name, unit="batch", disable=not self._world.is_main)):
            if number + 1 < len(mine):
                self.latents.prefetch([item.images for item in batch])  # those of this one come first
                self.latents.prefetch([item.images for item in mine[number + 1]])
            answers = self._classify(batch) if self._settings.task == "classify" else self._generate(batch)
            rows = []
            for item, answer in zip(batch, answers, strict=True):
                record = self._test[item.index]
                row = {"index": item.index, "id": record.id, **answer, "truth": list(record.answers)}
                row["demonstrations"] = [one.id for one in item.demonstrations]
                rows.append(row | ({"left_out": item.left_out} if item.left_out else {}))
            yield batch, rows

    def _inputs(self, batch: Sequence[Item]) -> tuple[Tensor, Tensor]:
        """Token ids and mask [B, T], padded on the left; the model has the images."""
        longest = max(len(item.input_ids) for item in batch)
        ids = torch.full((len(batch), longest), self._tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, item in enumerate(batch):
            ids[row, longest - len(item.input_ids) :] = torch.tensor(item.input_ids)
            mask[row, longest - len(item.input_ids) :] = 1
        rows = [item.images for item in batch]
        self._model.cache_latents(self.latents.batch(rows), [len(images) for images in rows])
        return ids.to(self._world.device), mask.to(self._world.device)

    def _generate(self, batch: Sequence[Item]) -> list[dict[str, Any]]:
        ids, mask = self._inputs(batch)
        out = self._beam_search(ids, mask, bool(self._uses_cache))
        texts = self._tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        return [{"prediction": answer_of(self._settings.task, text)} for text in texts]

    def _beam_search(self, ids: Tensor, mask: Tensor, beams_share_prompt: bool, **more: Any) -> Any:
        settings = self._settings
        options: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens, "num_beams": settings.num_beams}
        if settings.num_beams > 1:  # a length penalty is of beams alone
            options["length_penalty"] = settings.length_penalty
        options |= {"beams_share_prompt": beams_share_prompt, "do_sample": False, **more}
        return self._model.generate(None, ids, mask, **options)

    def _after_prompt(self, ids: Tensor, mask: Tensor, beams_share_prompt: bool) -> Tensor:
        """The log likelihoods of the first new token, float32 [B · beams, V]."""
        first = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
        return self._beam_search(ids, mask, beams_share_prompt, **first).logits[0].float().log_softmax(-1)

    def _check_cache(self, batch: Sequence[Item]) -> None:
        """Tries, once, whether this language model gives the same where names or beams go on from the cache of one prompt."""
        if self._uses_cache is not None:
            return
        ids, mask = self._inputs(batch[:2])
        if self._names is not None:
            few = ClassNames(self._settings.classes[:4], self._tokenizer, self._world.device)
            self._uses_cache = can_use_cache(self._model, ids, mask, few)
        elif self._settings.num_beams > 1:
            self._uses_cache = self._can_share_prompt(ids, mask)

    def _can_share_prompt(self, ids: Tensor, mask: Tensor) -> bool:
        # Of the tokens that beam search chooses from: those that are all but impossible differ by rounding.
        plain, tokens = self._after_prompt(ids, mask, False).topk(2 * self._settings.num_beams)
        try:
            difference = (self._after_prompt(ids, mask, True).gather(-1, tokens) - plain).abs().max()
        except Exception as error:  # of the model's own code: anything
            log.warning("each beam computes its own prompt: with one cache, %s: %s", type(error).__name__, error)
            return False
        if difference < TOLERANCE[next(self._model.lang_encoder.parameters()).dtype]:
            return True
        log.warning("each beam computes its own prompt: with one cache, they differ by %.3g nats", difference)
        return False

    def _classify(self, batch: Sequence[Item]) -> list[dict[str, Any]]:
        assert self._names is not None
        ids, mask = self._inputs(batch)
        scores = class_log_likelihoods(self._model, ids, mask, self._names, bool(self._uses_cache))
        shares = scores.softmax(-1)
        rows = []
        for of, share in zip(scores.tolist(), shares.tolist(), strict=True):
            order = sorted(range(len(of)), key=lambda i: (-of[i], i))
            likeliest = {self._settings.classes[i]: round(of[i], 6) for i in order[:SHOWN_CLASSES]}
            row: dict[str, Any] = {"prediction": self._settings.classes[order[0]], "log_likelihoods": likeliest}
            # As the reference: the second name of two is the positive one.
            rows.append(row | ({"score": share[1]} if len(of) == 2 else {}))
        return rows
