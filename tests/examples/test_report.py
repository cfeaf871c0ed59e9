"""Each benchmark writes its own section of the report and keeps those of the others."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from report import write_report


def test_a_section_is_replaced_or_added_and_the_others_stay_as_they_are(tmp_path):
    path = tmp_path / "docs" / "performance.md"
    write_report({"speed": "## Speed\n\n| 1 |", "cascade": "fast"}, path)
    first = path.read_text()
    write_report({"training": "slow"}, path)
    assert path.read_text() == first + "\n<!-- training -->\nslow\n<!-- end of training -->\n"
    write_report({"cascade": r"faster \1"}, path)
    assert path.read_text().startswith(first.replace("fast", r"faster \1"))
    write_report({"training": "slow", "cascade": "fast"}, path)
    write_report({"cascade": "fast"}, path)
    assert path.read_text() == first + "\n<!-- training -->\nslow\n<!-- end of training -->\n"
