"""docs/reliability.md says what the tests show."""

from __future__ import annotations

from tests import reliability


def test_the_table_of_faults_is_that_of_the_tests() -> None:
    assert reliability.document() == reliability.DOCUMENT.read_text(encoding="utf-8"), (
        "run `python tests/reliability.py --write`"
    )
    for name, fault in reliability.faults().items():
        assert fault.section, f"no test says what happens at {name!r}"
