"""Few-shot evaluation beside the reference's: samples a second of the same questions, in turns, on the same weights.

The reference is run by its own `evaluate_vqa`. What the package on PyPI lacks of it is the adapter between that loop and the model, 30 lines that
prepare a batch and call `generate`; `Adapter` does what its repository's does.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "build" / "reference"

if __name__ == "__main__":
    # Its package comes before ours of the same name, and its modules import each other as top-level modules.
    parts = ("", "open_flamingo/train", "open_flamingo/eval") if "--reference" in sys.argv else ()
    sys.path[:1] = [*(str(REFERENCE / part) for part in parts), str(ROOT)]

QUESTIONS, CONTEXT = 24, 48
BEAMS, NEW_TOKENS, BATCH = 3, 5, 8


def write_data(folder: Path, seed: int = 0) -> None:
    """Photographs' size and smoothness, and questions about them in the layout that the reference reads for TextVQA, and in ours."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    words = "red green blue cat dog car tree house street river man woman child ball table chair".split()  # noqa: SIM905
    for split, number in (("test", QUESTIONS), ("train", CONTEXT)):
        questions, annotations, lines = [], [], []
        for i in range(number):
            name = f"{split}{i}"
            small = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8))
            small.resize((640, 480), Image.Resampling.BICUBIC).save(folder / "images" / f"{name}.jpg", quality=90)
            text = f"what is the {' '.join(rng.choice(words, rng.integers(1, 8)))}?"
            answers = [str(rng.choice(words))] * 10
            number_of = i + 10_000 * (split == "train")
            questions.append({"image_id": name, "question": text, "question_id": number_of})
            of = [{"answer": answer, "answer_id": k} for k, answer in enumerate(answers)]
            annotations.append(
                {"image_id": name, "question_id": number_of, "answers": of, "question_type": "", "answer_type": ""}
            )
            lines.append(json.dumps({"id": name, "image": f"images/{name}.jpg", "question": text, "answers": answers}))
        about = dict.fromkeys(("info", "task_type", "data_type", "data_subtype", "license"), "")
        (folder / f"{split}_questions.json").write_text(json.dumps({"questions": questions, **about}))
        (folder / f"{split}_annotations.json").write_text(json.dumps({"annotations": annotations}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def _timed(function: Callable[[], Any]) -> list[float]:
    start, cpu = time.perf_counter(), time.process_time()
    function()
    return [time.perf_counter() - start, time.process_time() - cpu]


class Reference:
    def __init__(self, folder: Path) -> None:
        import torch

        from benchmarks.backbones import VISION_CONFIG, set_weights, without_weights
        from benchmarks.reference import special_tokens_of, tokens_before_ln_post, vision_config_by_name
        from benchmarks.shapes import Shape
        from open_flamingo import create_model_and_transforms

        assert Path(create_model_and_transforms.__code__.co_filename).is_relative_to(REFERENCE)
        self.folder = folder
        for name, attribute in (
            ("sklearn.metrics", "roc_auc_score"),
            ("ok_vqa_utils", "postprocess_ok_vqa_generation"),
        ):
            stub: Any = types.ModuleType(name)  # of classes and of OK-VQA, which are not measured
            setattr(stub, attribute, None)
            sys.modules[name] = stub
        with without_weights():
            model, image_processor, tokenizer = create_model_and_transforms(
                vision_config_by_name(str(folder / VISION_CONFIG)),
                None,
                str(folder / "language"),
                str(folder / "language"),
                cross_attn_every_n_layers=Shape.read(folder).cross_attn_every_n_layers,
                use_local_files=True,
            )
        special_tokens_of(tokenizer)
        tokens_before_ln_post(model.vision_encoder)
        set_weights(model, folder)
        self.adapter = Adapter(model.eval(), image_processor, tokenizer)
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{tempfile.mkdtemp()}/rendezvous", rank=0, world_size=1
        )

    def functions(self) -> list[Callable[..., Any]]:
        return [self.evaluate]

    def evaluate(self, shots: list[int]) -> list[float]:
        """Seconds, and seconds of CPU."""
        import evaluate

        files = {
            f"textvqa_{split}_{kind}_json_path": str(self.folder / f"{split}_{kind}.json")
            for split in ("train", "test")
            for kind in ("questions", "annotations")
        }
        args = argparse.Namespace(
            model="open_flamingo",
            num_samples=QUESTIONS,
            batch_size=BATCH,
            query_set_size=CONTEXT,
            rices=False,
            rank=0,
            world_size=1,
            textvqa_image_dir_path=str(self.folder / "images"),
            **files,
        )

        def run() -> None:
            for number in shots:
                evaluate.evaluate_vqa(
                    args,
                    self.adapter,
                    num_shots=number,
                    dataset_name="textvqa",
                    num_beams=BEAMS,
                    max_generation_length=NEW_TOKENS,
                )

        os.chdir(tempfile.mkdtemp())  # it writes its predictions here
        return _timed(run)


class Adapter:
    """What its loop asks of a model."""

    def __init__(self, model: Any, image_processor: Any, tokenizer: Any) -> None:
        self.model, self.image_processor, self.tokenizer = model, image_processor, tokenizer
        self.device = "cpu"

    def get_vqa_prompt(self, question: str, answer: str | None = None) -> str:
        return f"<image>Question:{question} Short answer:" + (f"{answer}<|endofchunk|>" if answer is not None else "")

    def get_outputs(
        self, batch_images: Any, batch_text: Any, min_generation_length: int, max_generation_length: int, **beams: Any
    ) -> list[str]:
        import torch

        self.tokenizer.padding_side = "left"
        prompts = self.tokenizer(batch_text, padding="longest", return_tensors="pt")
        most = max(map(len, batch_images))
        rows = [[self.image_processor(image) for image in images] for images in batch_images]
        pictures = torch.zeros(len(rows), most, 1, *rows[0][0].shape)
        for row, images in enumerate(rows):
            pictures[row, : len(images), 0] = torch.stack(images)
        with torch.inference_mode():
            out = self.model.generate(
                pictures,
                prompts["input_ids"],
                prompts["attention_mask"],
                min_new_tokens=min_generation_length,
                max_new_tokens=max_generation_length,
                pad_token_id=self.tokenizer.pad_token_id,
                **beams,
            )
        return self.tokenizer.batch_decode(out[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)


class Ours:
    def __init__(self, folder: Path) -> None:
        from benchmarks.backbones import build, set_weights

        self.folder = folder
        self.model, self.image_processor, self.tokenizer = build(folder, gradient_checkpointing=False)
        set_weights(self.model, folder)
        self.model.eval()

    def functions(self) -> list[Callable[..., Any]]:
        return [self.evaluate]

    def evaluate(self, shots: list[int]) -> list[float]:
        from open_flamingo.scripts.evaluate.conditions import Condition
        from open_flamingo.scripts.evaluate.data import read_records
        from open_flamingo.scripts.evaluate.prompts import PROMPTS, Prompt
        from open_flamingo.scripts.evaluate.results import build_scorer
        from open_flamingo.scripts.evaluate.runner import Evaluator, Settings
        from open_flamingo.train.distributed import World

        def run() -> None:
            test, pool = (read_records(self.folder / f"{split}.jsonl", "vqa", split) for split in ("test", "train"))
            settings = Settings(
                "vqa",
                Prompt.parse(PROMPTS["vqa"], "vqa"),
                Path(tempfile.mkdtemp()),
                batch_size=BATCH,
                max_new_tokens=NEW_TOKENS,
                num_beams=BEAMS,
                workers=2,
            )
            evaluator = Evaluator(self.model, self.image_processor, self.tokenizer, test, pool, settings, World())
            score = build_scorer("vqa", test, (), "simple")
            for number in shots:
                score(evaluator.run(Condition(number, 42)))
            evaluator.close()

        return _timed(run)


def compare(shape: str, shots: list[int], rounds: int, only_ours: bool = False) -> dict[str, list[list[float]]]:
    """Program → (samples a second, samples a second of CPU) of each round; the two take turns."""
    from benchmarks.backbones import write_backbones
    from benchmarks.child import FOLDER, Child
    from benchmarks.reference import install
    from benchmarks.shapes import SHAPES

    folder = FOLDER / f"scoring-{shape}"
    folder.mkdir(parents=True, exist_ok=True)
    write_backbones(folder, SHAPES[shape])
    write_data(folder)
    programs = {}
    if not only_ours:
        install()
        programs["open-flamingo 2.0.1"] = Child("scoring", str(folder), "--reference")
    programs["here"] = Child("scoring", str(folder))
    rates: dict[str, list[list[float]]] = {name: [] for name in programs}
    for number in range(rounds + 1):
        for name, child in programs.items():
            times = child.ask("evaluate", shots=shots if number else shots[:1])  # the first warms up
            if number:
                rates[name].append([QUESTIONS * len(shots) / seconds for seconds in times])
    for child in programs.values():
        child.close()
    return rates


def describe(shape: str, shots: list[int], rates: dict[str, list[list[float]]]) -> str:
    """A table; the second column does not depend on what else the machine does."""
    rows = ["| | samples/s | samples per second of CPU |", "|---|---|---|"]
    medians = {name: [statistics.median(column) for column in zip(*of, strict=True)] for name, of in rates.items()}
    rows += [f"| {name} | {wall:.2f} | {cpu:.2f} |" for name, (wall, cpu) in medians.items()]
    if len(medians) == 2:
        theirs, ours = medians.values()
        rows.append(f"| times as fast | {ours[0] / theirs[0]:.1f} | {ours[1] / theirs[1]:.1f} |")
    text = f"VQA of {QUESTIONS} questions at {', '.join(map(str, shots))} shots, {BEAMS} beams, {NEW_TOKENS} tokens, batches of {BATCH}, shape `{shape}`"
    return "\n".join([f"{text}; medians of {len(next(iter(rates.values())))} turns.", "", *rows])


def main() -> None:
    from benchmarks.child import serve

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--reference", action="store_true")
    args = parser.parse_args()
    serve(lambda: (Reference if args.reference else Ours)(args.folder).functions())


if __name__ == "__main__":
    main()
