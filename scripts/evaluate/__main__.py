"""`open-flamingo-evaluate CHECKPOINT --task … --data test.jsonl --context train.jsonl`: few-shot scores, alone or under torchrun."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_flamingo.scripts.evaluate.conditions import BLANK, SHUFFLED, TEXT_ONLY, Condition, conditions
from open_flamingo.scripts.evaluate.data import TASKS, Record, check_images, read_records, subset
from open_flamingo.scripts.evaluate.metrics import check_caption_scorer
from open_flamingo.scripts.evaluate.model import MODEL_FLAGS, together
from open_flamingo.scripts.evaluate.predictions import checkpoint_fingerprint, fingerprint, keep_settings
from open_flamingo.scripts.evaluate.prompts import Prompt, default_prompt
from open_flamingo.train.arguments import finite_float, non_negative_int, positive_int

log = logging.getLogger("open_flamingo.evaluate")

NEW_TOKENS = {"caption": 20, "vqa": 5, "classify": 0}
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+", re.ASCII)


# fmt: off
def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="open-flamingo-evaluate",
        description="Few-shot scores of a checkpoint, as the OpenFlamingo paper measures them. Start it again to go on after a stop; under "
        "torchrun the ranks share the work.",
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT",
        help="of this program or of the reference: a file, the folder of a run or a saved model, or a name on the Hugging Face hub")
    add("--task", choices=TASKS, required=True)
    add("--data", type=Path, required=True, help="JSONL of the test set: image and caption(s), question and answers, or label")
    add("--context", type=Path, required=True, help="JSONL that demonstrations are taken from: training data")
    add("--image_dir", type=Path, help="what images in both files are relative to (default: the file's folder)")
    add("--output_dir", type=Path, default=Path("evaluation"), help="for results.json, results.html and predictions (default: %(default)s)")

    add = parser.add_argument_group("few-shot").add_argument
    add("--shots", type=non_negative_int, nargs="+", default=[0, 4, 8, 16, 32],
        help="demonstrations per prompt; at 0, the text of two is shown without their images (default: 0 4 8 16 32)")
    add("--seeds", type=positive_int, default=3, help="random choices of demonstrations (default: %(default)s)")
    add("--demonstrations", choices=["random", "rices"], default="random",
        help="rices: those whose images are like the query's, by the vision encoder's features (default: %(default)s)")
    add("--context_size", type=non_negative_int,
        help="size of the random subset of --context that demonstrations are taken from; 0: all (default: 2048, as in the paper; with rices 0)")
    add("--samples", type=non_negative_int, default=0, help="size of the random subset of --data that is evaluated; 0: all (default: %(default)s)")
    add("--controls", nargs="*", choices=[BLANK, SHUFFLED], default=[BLANK, SHUFFLED],
        help="also score with blank images, and with the demonstrations' answers shuffled (default: both)")
    add("--control_seeds", type=positive_int, default=1, help="seeds of the controls (default: %(default)s)")
    add("--prompt", help="a demonstration, such as '<image>Output:{caption}<|endofchunk|>', with {question}, {text} and, last, {caption}, "
        "{answer} or {label}. Default: the paper's")
    add("--classes", nargs="+", help="class names; of two, the second is the positive one. Default: those in --data and --context, sorted")

    add = parser.add_argument_group("generation").add_argument
    add("--num_beams", type=positive_int, default=3, help="default: %(default)s")
    add("--max_new_tokens", type=positive_int, help="default: 20 for captions, 5 for answers")
    add("--length_penalty", type=finite_float, default=0.0, help="of beams (default: %(default)s)")
    add("--caption_tokenizer", choices=["ptb", "simple"], default="ptb",
        help="ptb: the official scorers' own, which needs Java. simple: near it, without Java and METEOR (default: %(default)s)")

    add = parser.add_argument_group("model, if the checkpoint does not record it").add_argument
    add("--vision_encoder_path")
    add("--vision_encoder_pretrained")
    add("--lm_path")
    add("--tokenizer_path")
    add("--cross_attn_every_n_layers", type=positive_int)
    add("--offline", action="store_true", help="no hub downloads")
    add("--cache_dir", help="where downloads are kept")
    add("--trust_remote_code", action="store_true", help="run the Python code that a language model brings")

    add = parser.add_argument_group("speed and memory").add_argument
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="default: %(default)s")
    add("--batch_size", type=positive_int, default=8, help="prompts per rank at once (default: %(default)s)")
    add("--workers", type=positive_int, default=4, help="threads that read images (default: %(default)s)")
    add("--kept_images", type=positive_int, default=8192,
        help="encoded images that a rank keeps on its device, to encode each once: 256 KB each for ViT-L in float32 (default: %(default)s)")
    return parser
# fmt: on


@dataclass
class Plan:
    """What is to be done, checked as far as it can be without the model."""

    test: list[Record]
    pool: list[Record]
    prompt: Prompt
    classes: list[str]
    conditions: list[Condition]
    notes: list[str]
    decisive: dict[str, Any]  # what decides a prediction, beside its condition


def make_plan(args: argparse.Namespace) -> Plan:
    """Raises ValueError or OSError, naming the flag and what to do."""
    if not Path(args.checkpoint).exists() and not HUB_NAME.fullmatch(args.checkpoint):
        raise ValueError(
            f"CHECKPOINT: there is no {args.checkpoint!r}: give a file, a folder, or a name on the Hugging Face hub"
        )
    if args.output_dir.exists() and not args.output_dir.is_dir():
        raise ValueError(f"--output_dir: {args.output_dir} is a file: name a folder")
    if args.task == "caption":
        check_caption_scorer(args.caption_tokenizer)
    test = read_records(args.data, args.task, "--data", args.image_dir)
    pool = read_records(args.context, args.task, "--context", args.image_dir)
    prompt = Prompt.parse(args.prompt or default_prompt(args.task, test + pool), args.task)
    classes = []
    if args.task == "classify":
        found = sorted({record.answers[0] for record in test + pool})
        classes = list(args.classes or found)
        if unknown := sorted(set(found) - set(classes)):
            raise ValueError(f"--classes: the label {unknown[0]!r} of --data or --context is not among them")
        if len(set(classes)) < 2 or len(set(classes)) < len(classes):
            raise ValueError("--classes: give at least two names, each once")
    elif args.classes:
        raise ValueError(f"--classes belongs to --task classify, not to {args.task}")
    has_rices = args.demonstrations == "rices"
    test = subset(test, args.samples, "samples")
    size = args.context_size if args.context_size is not None else (0 if has_rices else 2048)
    pool = subset(pool, size, "context")
    check_images(test, "--data", args.data)
    check_images(pool, "--context", args.context)
    check_pool(test, pool, args.shots)
    notes = []
    if args.task == "caption" and args.caption_tokenizer == "simple":
        notes.append(
            "Captions were not split by the official PTB tokenizer, which needs Java: scores are near the official ones."
        )
    if args.task == "caption" and len(test) == 1:
        notes.append("CIDEr of a single sample is always 0: it weighs words by how rare they are among the samples.")
    same = ("task", "demonstrations", "num_beams", "length_penalty", "dtype", *MODEL_FLAGS)
    decisive = {name: getattr(args, name) for name in same} | {
        "checkpoint": f"{Path(args.checkpoint).name}, {checkpoint_fingerprint(args.checkpoint)}",
        "data": fingerprint(args.data),
        "context": fingerprint(args.context),
        "image_dir": None if args.image_dir is None else str(args.image_dir.resolve()),
        "samples": len(test),
        "context_size": len(pool),
        "prompt": prompt.template,
        "max_new_tokens": args.max_new_tokens or NEW_TOKENS[args.task],
        "classes": classes,
    }
    todo = conditions(args.shots, args.seeds, args.controls, args.control_seeds, has_rices)
    return Plan(test, pool, prompt, classes, todo, notes, decisive)


def check_pool(test: Sequence[Record], pool: Sequence[Record], shots: Sequence[int]) -> None:
    """Raises ValueError if some query would have too few demonstrations: none may have its own image."""
    same = Counter(record.image for record in pool)
    others = len(pool) - max(same[record.image] for record in test)
    needed = max(number or TEXT_ONLY for number in shots)
    if others < needed:
        raise ValueError(
            f"--context has {others} other images, which is too few for {needed} demonstrations: give fewer --shots, a larger "
            "--context or another --context_size"
        )


def load_model(args: argparse.Namespace, device: Any) -> Any:
    """As `open_flamingo.load`, with flags in its errors."""
    import torch

    from open_flamingo import load

    try:
        return load(
            args.checkpoint,
            device=device,
            dtype=getattr(torch, args.dtype),
            use_local_files=args.offline,
            cache_dir=args.cache_dir,
            trust_remote_code=args.trust_remote_code,
            **{name: getattr(args, name) for name in MODEL_FLAGS},
        )
    except (ValueError, OSError) as error:  # these name arguments, which are flags here
        names = "|".join((*MODEL_FLAGS, "trust_remote_code"))
        raise ValueError(re.sub(rf"(?<![\w-])({names})\b(=True|=…)?", r"--\1", str(error))) from error


def run(args: argparse.Namespace, plan: Plan, world: Any) -> None:
    """Predictions and scores of all conditions. Every rank must call this. Raises ValueError, OSError or RuntimeError."""
    from open_flamingo.scripts.evaluate.results import PAGE, RESULTS, build_scorer, table, write_results
    from open_flamingo.scripts.evaluate.runner import Evaluator, Settings
    from open_flamingo.train.distributed import run_on_rank0

    run_on_rank0(keep_settings, args.output_dir, plan.decisive)
    with together():
        model, image_processor, tokenizer = load_model(args, world.device)
    settings = Settings(
        task=args.task,
        prompt=plan.prompt,
        output_dir=args.output_dir,
        classes=plan.classes,
        batch_size=args.batch_size,
        max_new_tokens=plan.decisive["max_new_tokens"],
        num_beams=args.num_beams,
        length_penalty=args.length_penalty,
        has_rices=args.demonstrations == "rices",
        max_kept_images=args.kept_images,
        workers=args.workers,
    )
    evaluator = Evaluator(model.eval(), image_processor, tokenizer, plan.test, plan.pool, settings, world)
    score = build_scorer(args.task, plan.test, plan.classes, args.caption_tokenizer) if world.is_main else None
    predictions, scores = {}, {}
    try:
        for condition in plan.conditions:
            predictions[condition] = evaluator.run(condition)
            if score is not None:
                scores[condition] = score(predictions[condition])
                metric, value = next(iter(scores[condition].items()))
                log.info("%s: %s %.2f", condition.name, metric, value)
    finally:
        evaluator.close()
    if world.is_main:
        results = write_results(args.output_dir, plan.decisive, plan.test, scores, predictions, plan.notes)
        print(table(results))
        print(f"wrote {args.output_dir / RESULTS}, {args.output_dir / PAGE} and each prediction")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line. Raises SystemExit, with a message, where it cannot be done."""
    parser = build_parser()
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads read images
    if args.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported, which nothing above does
    from open_flamingo.train.distributed import World, detect_launcher, distributed, raise_on_all_ranks
    from open_flamingo.train.errors import UserError
    from open_flamingo.train.lock import run_lock

    world = World()
    try:
        world = detect_launcher()
        plan = make_plan(args)
        with distributed(world) as world, ExitStack() as stack:
            with raise_on_all_ranks():
                if world.is_main:
                    stack.enter_context(run_lock(args.output_dir))
            run(args, plan, world)
    except (ValueError, OSError, UserError, ImportError) as error:
        sys.exit(f"error: {f'rank {world.rank}: ' if world.world_size > 1 else ''}{error}")


if __name__ == "__main__":
    main()
