"""Each program runs in a process of its own, is built once, and then does what it is asked to, in turns with the other."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "benchmarks"
"""Where everything that is made here lies."""


class ChildFailed(RuntimeError):
    """Says what the child's last words were. `program`: which it was."""

    def __init__(self, program: str, what: str, words: str) -> None:
        super().__init__(f"{program}, asked for {what}:\n{words}")
        self.program = program


class Child:
    """A program that answers. `ask("steps", count=3)` calls its function `steps`, and returns what that returns.

    Args:
        program: a file in this folder that ends in `serve`.
        arguments: of its command line.
        environment: beside this process's.
    """

    deadline: ClassVar[float] = math.inf
    """Of all children: the `time.monotonic` after which none is waited for."""

    def __init__(self, program: str, *arguments: str, environment: dict[str, str] | None = None) -> None:
        FOLDER.mkdir(parents=True, exist_ok=True)
        self.name = program
        self.log = FOLDER / f"{program}-{os.getpid()}.log"
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(ROOT / "benchmarks" / f"{program}.py"), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | (environment or {}),
            )

    def ask(self, what: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps([what, arguments]) + "\n")
            self._process.stdin.flush()
            patience = None if self.deadline == math.inf else max(0.0, self.deadline - time.monotonic())
            if not wait([self._process.stdout], patience):  # type: ignore[list-item]
                self._process.kill()
                raise ChildFailed(self.name, what, "out of time")
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self.close()
            raise ChildFailed(self.name, what, self.log.read_text(errors="replace")[-3000:])
        with (FOLDER / "answers.jsonl").open(
            "a"
        ) as file:  # at once: the machine may be taken away before a part is whole
            file.write(
                json.dumps({"program": self.name, "asked": [what, arguments], "answer": json.loads(answer)}) + "\n"
            )
        return json.loads(answer)

    def close(self) -> None:
        """Ends the program, and waits until it has ended."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(build: Callable[[], list[Callable[..., Any]]]) -> None:
    """The child's side: builds what answers, and answers until nobody asks any more. What else is printed goes to the log."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    functions = {function.__name__: function for function in build()}
    for line in sys.stdin:
        what, arguments = json.loads(line)
        answers.write(json.dumps(functions[what](**arguments)) + "\n")
        answers.flush()
