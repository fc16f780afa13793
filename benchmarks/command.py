"""The command line of `python -m benchmarks`."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import open_flamingo
from benchmarks import curve, gpu, learn, loading, page, recipe, report, saving, scoring, start, steps, trace
from benchmarks.child import FOLDER, ROOT
from benchmarks.shapes import SHAPES


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="This program beside the reference, open-flamingo 2.0.1, in one run. Results go to docs/performance.md, in "
        "the place of the last ones.",
    )
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--only", choices=["ours"], help="without the reference")
    common.add_argument("--document", type=Path, default=report.DOCUMENT, help="where results go")
    common.add_argument("--no-write", action="store_true", help="print results only")

    for name in SHAPES:
        step = commands.add_parser(name, parents=[common], help=f"updates of the shape `{name}` (see shapes.py)")
        step.add_argument("--precision", choices=["fp32", "amp_bf16"], default="fp32", help="on a CPU, ours alone")
        step.add_argument("--rounds", type=int, default=4, help="turns of each program")
        step.add_argument("--steps", type=int, default=1, help="updates a turn")
        step.add_argument("--checkpointing", nargs="+", choices=["reference", "ours"], default=[])
        step.add_argument("--compile", action="store_true", help="ours with --compile")
        step.set_defaults(run=run_steps)

    data = commands.add_parser("data", parents=[common], help="the loaders alone: samples a second")
    data.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of workers to measure")
    data.add_argument("--rounds", type=int, default=3, help="turns of each program")
    data.add_argument("--seconds", type=float, default=2, help="of each measurement")
    data.set_defaults(run=run_data)

    begin = commands.add_parser("start", parents=[common], help="seconds to --help, and to the first update")
    begin.add_argument("--shape", choices=SHAPES, default="small")
    begin.add_argument("--rounds", type=int, default=3, help="turns of each program")
    begin.set_defaults(run=run_start)

    save = commands.add_parser("checkpoint", parents=[common], help="seconds that the loop stands still for a save")
    save.add_argument("--shape", choices=SHAPES, default="small")
    save.add_argument("--precision", choices=["fp32", "amp_bf16"], default="fp32")
    save.add_argument("--rounds", type=int, default=5, help="turns of each program")
    save.set_defaults(run=run_checkpoint)

    scores = commands.add_parser("evaluate", parents=[common], help="few-shot evaluation: samples a second")
    scores.add_argument("--shape", choices=SHAPES, default="small")
    scores.add_argument("--shots", type=int, nargs="+", default=[0, 4, 8])
    scores.add_argument("--rounds", type=int, default=2, help="turns of each program")
    scores.set_defaults(run=run_evaluate)

    curves = commands.add_parser("curve", parents=[common], help="both trained on the same batches: two loss curves")
    curves.add_argument("--updates", type=int, default=300)
    curves.set_defaults(run=run_curve)

    learning = commands.add_parser("learn", help="real backbones on real pictures, until they see: docs/learning.md")
    learning.add_argument(
        "--folder", type=Path, default=FOLDER / "real", help="of backbones and shards; made if missing"
    )
    learning.add_argument("--updates", type=int, default=150)
    learning.add_argument(
        "--gate", type=float, default=1.0, help="where the gates of attention start. 0: as the program"
    )
    learning.add_argument("--document", type=Path, default=report.DOCUMENT.with_name("learning.md"))
    learning.add_argument("--no-write", action="store_true", help="print results only")
    learning.add_argument("flags", nargs="*", help="after --: flags of the program in place of the recommended ones")
    learning.set_defaults(run=run_learn)

    on_gpu = commands.add_parser("gpu", parents=[common], help="all rows of a GPU in under eight minutes")
    on_gpu.add_argument("--budget", type=float, default=460, help="seconds after which nothing is waited for")
    on_gpu.add_argument(
        "--parts", nargs="+", default=[], help="names of parts, or their beginnings: 3b, data, largest, ..."
    )
    on_gpu.set_defaults(run=run_gpu)

    traced = commands.add_parser(
        "trace", help="what an update has a GPU do: kernels, bytes, FLOPs and modelled time, on any machine"
    )
    traced.add_argument("shape", choices=SHAPES)
    traced.add_argument("--precision", choices=["fp32", "amp_bf16"], default=gpu.PRECISION)
    traced.add_argument("--gradient_checkpointing", action="store_true")
    traced.add_argument("--gpu", choices=trace.GPUS, default="H200")
    traced.add_argument("--document", type=Path, default=report.DOCUMENT, help="where results go")
    traced.add_argument("--no-write", action="store_true", help="print results only")
    traced.set_defaults(run=run_trace)

    opened = commands.add_parser("page", help="seconds until the page of a long run is written, and open in Chromium")
    opened.add_argument("--lines", type=int, default=100_000)
    opened.add_argument("--rounds", type=int, default=5)
    opened.add_argument("--document", type=Path, default=report.DOCUMENT, help="where results go")
    opened.add_argument("--no-write", action="store_true", help="print results only")
    opened.set_defaults(run=run_page)

    plan = commands.add_parser("dry_run", help="what --dry_run says of the published recipes: docs/dry_run.md")
    plan.add_argument("--ranks", type=int, default=64)
    plan.add_argument("--gpu", default="H100")
    plan.add_argument("--document", type=Path, default=report.DOCUMENT.with_name("dry_run.md"))
    plan.add_argument("--no-write", action="store_true", help="print results only")
    plan.set_defaults(run=run_dry_run)

    merge = commands.add_parser("merge", help="put the results of another machine's document into docs/performance.md")
    merge.add_argument("other", type=Path)
    merge.set_defaults(run=lambda args: print(*report.merge(args.other), sep="\n"))
    return parser


def run_steps(args: argparse.Namespace) -> None:
    comparison = steps.compare(
        SHAPES[args.what],
        args.precision,
        args.rounds,
        args.steps,
        only_ours=args.only == "ours",
        checkpointing=args.checkpointing,
        compile_ours=args.compile,
    )
    finish(args, f"{args.what} {args.precision}{' compiled' * args.compile}", steps.describe(comparison))


def run_data(args: argparse.Namespace) -> None:
    results = loading.measure(tuple(args.workers), args.rounds, args.seconds, only_ours=args.only == "ours")
    text = loading.describe(results)
    if not args.no_write and (image := loading.plot(results, "data", args.document)):
        text += f"\n\n![rates over workers](images/{image})"
    finish(args, "data", text)


def run_start(args: argparse.Namespace) -> None:
    shape = SHAPES[args.shape]
    finish(args, "start", start.describe(shape, start.measure(shape, args.rounds, args.only == "ours")))


def run_checkpoint(args: argparse.Namespace) -> None:
    shape = SHAPES[args.shape]
    results = saving.measure(shape, args.precision, args.rounds, args.only == "ours")
    finish(args, f"checkpoint {args.shape}", saving.describe(shape, results))


def run_evaluate(args: argparse.Namespace) -> None:
    rates = scoring.compare(args.shape, args.shots, args.rounds, args.only == "ours")
    finish(args, f"evaluate {args.shape}", scoring.describe(args.shape, args.shots, rates))


def run_curve(args: argparse.Namespace) -> None:
    losses = curve.measure(args.updates, args.only == "ours")
    text = curve.describe(losses)
    if not args.no_write and (image := curve.plot(losses, args.document)):
        text += f"\n\n![loss curves](images/{image})"
    finish(args, "curve", text)


def run_learn(args: argparse.Namespace) -> None:
    subprocess.run([sys.executable, "-m", "benchmarks.real", str(args.folder)], cwd=ROOT, check=True)
    rows = learn.measure(args.folder, args.updates, args.flags, args.gate)
    finish(args, "learn", learn.describe(rows, learn.tokens_per_caption(args.folder)))


def run_gpu(args: argparse.Namespace) -> None:
    gpu.run(lambda title, text: finish(args, title, text), args.only == "ours", args.budget, args.parts)


def run_trace(args: argparse.Namespace) -> None:
    shape, recompute = SHAPES[args.shape], args.gradient_checkpointing
    found = trace.trace(shape, args.precision, trace.GPUS[args.gpu], recompute)
    title = f"trace {args.shape} {args.precision} {args.gpu}{' checkpointing' * recompute}"
    finish(args, title, trace.describe(shape.name, args.precision, args.gpu, found))


def run_dry_run(args: argparse.Namespace) -> None:
    for name in ("3b", "4b", "9b"):
        finish(args, f"{name} on {args.ranks} {args.gpu}", recipe.dry_run(SHAPES[name], args.ranks, args.gpu))


def run_page(args: argparse.Namespace) -> None:
    finish(args, "page", page.measure(args.lines, args.rounds))


def finish(args: argparse.Namespace, title: str, text: str) -> None:
    print(f"\n{title}\n\n{text}", flush=True)
    if not args.no_write:
        report.write_section(title.replace(" ", "-"), title, text, args.document)


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    open_flamingo.__path__.append(str(ROOT))  # this checkout's `train`, installed or not
    args.run(args)
