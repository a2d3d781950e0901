"""tests/matrix.py: what the table says of a run. Nothing is run here."""

from pathlib import Path

from tests.matrix import Row, page, read

REPORT = """<testsuites><testsuite>
<testcase classname="tests.fault.test_cluster" name="test_the_leader_is_killed"><properties><property name="counts" value="lost 0"/></properties></testcase>
<testcase classname="tests.fault.test_kill" name="test_it[quorum]"><failure message="m">text</failure></testcase>
<testcase classname="tests.fault.test_kill" name="test_it[classic]"><error message="m">text</error></testcase>
<testcase classname="tests.rabbit.test_tls" name="test_tls"><skipped message="no root">text</skipped></testcase>
</testsuite></testsuites>"""


def test_the_table_counts_each_test_once_and_names_what_did_not_pass(tmp_path: Path) -> None:
    """Docs show this table: a failure that it leaves out is a promise that nobody keeps."""
    (tmp_path / "report.xml").write_text(REPORT)
    row = read(tmp_path / "report.xml", Row("4.3.6", "faults", took_s=90))
    lines = list(page([row]))
    assert lines[2] == "| 4.3.6 | faults | 1 | 2 | 1 | 1.5 |"
    assert "- 4.3.6, faults: fault.test_kill.test_it[quorum]" in lines
    assert "- 4.3.6, faults: fault.test_kill.test_it[classic]" in lines
    assert "- 4.3.6, faults: rabbit.test_tls.test_tls: no root" in lines
    assert lines[-1] == "| 4.3.6 | the leader is killed | lost 0 |"
