"""Tables as Markdown."""

from metaembed.evaluation.tables import markdown_table


def test_a_table_has_a_header_a_separator_and_a_line_for_each_row():
    table = markdown_table(["budget", "nDCG"], iter([[(1, 1), 0.5], ["all", None]]))
    assert table == "| budget | nDCG |\n|---|---|\n| (1, 1) | 0.5 |\n| all | None |"
    assert markdown_table(["nothing"], []) == "| nothing |\n|---|"
