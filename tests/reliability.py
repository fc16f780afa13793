"""`make faults`: runs the tests that docs/reliability.md names, and prints its table row by row, with passed or failed.

python tests/reliability.py [WORDS]      only the rows that contain all of these words
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs" / "reliability.md"


def rows() -> list[tuple[str, str, list[str]]]:
    """Of each row: the fault, what happens here, the tests."""
    found = []
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if not line.startswith("|") or cells[0] == "fault" or set(cells[0]) <= {"-", "|"}:
            continue
        tests, file = [], ""
        for name in re.findall(r"`([^`]*(?:\.py|::)[^`]*)`", cells[-1].partition("(")[0]):
            name = re.sub(r"\[.*\]$", "", name)
            file, _, test = name.partition("::") if name.startswith("tests/") else (file, "", name.lstrip(":"))
            tests.append(f"{file}::{test}" if test else file)
        found.append((cells[0], cells[1], tests))
    return found


def run(tests: list[str]) -> dict[str, list[str]]:
    """The outcomes of the cases of each test: passed, failed, skipped."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", f"--junit-xml={report}", *tests]
        subprocess.run(command, cwd=ROOT)
        cases = ElementTree.parse(report).iter("testcase")
        outcomes: dict[str, list[str]] = {}
        for case in cases:
            name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name', '').partition('[')[0]}"
            kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
            outcome = "failed" if kinds & {"failure", "error"} else "skipped" if kinds else "passed"
            for test in (name, name.partition("::")[0]):
                outcomes.setdefault(test, []).append(outcome)
    return outcomes


def main(words: list[str]) -> int:
    chosen = [row for row in rows() if all(word in " ".join((row[0], row[1], *row[2])) for word in words)]
    outcomes = run(sorted({test for _, _, tests in chosen for test in tests}))
    bad = 0
    print()
    for fault, here, tests in chosen:
        cases = [outcome for test in tests for outcome in outcomes.get(test, ["not found"])]
        passed = cases.count("passed")
        verdict = "passed" if passed == len(cases) else ", ".join(sorted({*cases} - {"passed"}))
        bad += verdict not in ("passed", "skipped")
        print(f"{verdict:>9}  {passed:>3}/{len(cases):<3} {fault}: {here}")
    print(f"\n{len(chosen)} faults, {bad} of them not survived")
    return bad > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
