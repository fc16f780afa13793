"""The command line of `python -m benchmarks`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks import report, steps
from benchmarks.shapes import SHAPES


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--only", choices=["ours"], help="without the reference")
    common.add_argument("--no-write", action="store_true", help="print the result, but leave docs/performance.md alone")

    for name in SHAPES:
        step = commands.add_parser(name, parents=[common], help=f"updates of the shape {name}")
        step.add_argument("--precision", choices=["fp32", "amp_bf16"], default="fp32")
        step.add_argument("--rounds", type=int, default=5, help="turns of each program")
        step.add_argument("--steps", type=int, default=2, help="updates a turn")
        step.add_argument("--gradient_checkpointing", action="store_true")
        step.add_argument("--compile", action="store_true", help="ours with --compile")
        step.set_defaults(run=run_steps)
    return parser


def run_steps(args: argparse.Namespace) -> None:
    comparison = steps.compare(
        SHAPES[args.what],
        args.precision,
        args.rounds,
        args.steps,
        only_ours=args.only == "ours",
        gradient_checkpointing=args.gradient_checkpointing,
        compile_ours=args.compile,
    )
    text = steps.describe(comparison)
    finish(args, f"{args.what} {args.precision}{' compiled' if args.compile else ''}", text)


def finish(args: argparse.Namespace, title: str, text: str) -> None:
    print(text)
    if not args.no_write:
        report.write_section(title.replace(" ", "-"), title, text)


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    args.run(args)
