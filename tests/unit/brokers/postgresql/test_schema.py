"""What the files of migrations must be, and what others get to run."""

from pathlib import Path

import pytest

from leveret.brokers.postgresql.schema import Migration, check_name, read, script, shipped
from leveret.errors import ConfigurationError

# A migration that a release has never changes: whoever applied it would be refused. Change the schema by another one. Until its
# release, a migration's text may change, and its checksum here with it.
_CHECKSUMS = {
    "0001_jobs": "25d9314908e4b1414fedafe8f006c8d75f441365f91856d50f486494e08e8098",
    "0002_outbox": "9528ddcec4ed3bda2fbc5fdafe89c3532ec6948d05c175712876d054a49050ad",
    "0003_records": "375346371f8f2a111c20f32dc5ec4d65c5c61d69aa8399efffe19cfcb90ac717",
}


def test_the_text_of_each_migration_is_known() -> None:
    """Databases that have it would be refused for ever, and nobody could tell what they hold."""
    assert {one.name: one.checksum for one in shipped()} == _CHECKSUMS


def test_the_migrations_are_read_in_order_with_their_lowest_readers(tmp_path: Path) -> None:
    """An order of the file system's would make a table's column before the table."""
    (tmp_path / "0002_hint.sql").write_text("-- lowest reader: 1\nALTER TABLE {schema}.jobs ADD hint text;\n")
    (tmp_path / "0001_jobs.sql").write_text("-- lowest reader: 1\nCREATE TABLE {schema}.jobs (seq int);\n")
    (tmp_path / "0003_seq.sql").write_text(
        "-- lowest reader: 3\n-- For claims.\nCREATE INDEX CONCURRENTLY jobs_seq ON {schema}.jobs (seq);\n"
    )

    found = read(tmp_path)

    assert [(one.number, one.name, one.lowest_reader, one.index) for one in found] == [
        (1, "0001_jobs", 1, None),
        (2, "0002_hint", 1, None),
        (3, "0003_seq", 3, "jobs_seq"),
    ]
    assert found[1].statements("shop-1").endswith('ALTER TABLE "shop-1".jobs ADD hint text;\n')


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("1_jobs.sql", "-- lowest reader: 1\nSELECT 1;\n"),
        ("0001_jobs.sql", "SELECT 1;\n"),
        ("0001_jobs.sql", "-- lowest reader: 2\nSELECT 1;\n"),
        ("0002_jobs.sql", "-- lowest reader: 1\nSELECT 1;\n"),
        ("0001_jobs.sql", "-- lowest reader: 1\nSELECT 1;\nCREATE INDEX CONCURRENTLY one ON {schema}.jobs (seq);\n"),
    ],
)
def test_a_file_that_cannot_be_applied_is_refused_when_it_is_read(tmp_path: Path, name: str, text: str) -> None:
    """It would fail halfway through an upgrade, or be left out of it without a word."""
    (tmp_path / name).write_text(text)

    with pytest.raises(ValueError, match=r"000|1_jobs"):
        read(tmp_path)


def test_the_end_of_a_line_does_not_change_a_checksum(tmp_path: Path) -> None:
    """A checkout on Windows would be taken for another text of each migration."""
    (tmp_path / "0001_jobs.sql").write_bytes(b"-- lowest reader: 1\nSELECT 1;\n")
    [unix] = read(tmp_path)
    (tmp_path / "0001_jobs.sql").write_bytes(b"-- lowest reader: 1\r\nSELECT 1;\r\n")

    [windows] = read(tmp_path)

    assert windows.checksum == unix.checksum


@pytest.mark.parametrize("name", ["", "a" * 64, '"', "a.b", "a b", "é", "pg_shop", "1a"])
def test_a_name_that_could_end_its_quotes_is_no_schema(name: str) -> None:
    """The name stands in every statement: a quote in it would be SQL of whoever sets the URL."""
    with pytest.raises(ConfigurationError, match="1 to 63 of A-Z"):
        check_name(name)


@pytest.mark.parametrize("name", ["leveret", "Shop_2", "shop-eu", "_x"])
def test_usual_names_are_schemas(name: str) -> None:
    """Teams have rules for names."""
    check_name(name)


def test_the_sql_for_others_records_a_migration_before_its_statements_and_in_their_transaction() -> None:
    """Run a second time it must fail before it has changed anything."""
    jobs = Migration("0001_jobs", "-- lowest reader: 1\nCREATE TABLE {schema}.jobs ();\n", 1)
    index = Migration(
        "0002_seq", "-- lowest reader: 1\nCREATE INDEX CONCURRENTLY one ON {schema}.jobs (seq);\n", 1, "one"
    )

    parts = script([jobs, index], "shop").split("\n-- 000")

    first, second = parts[1].splitlines(), parts[2].splitlines()
    [recorded] = [line for line in first if line.startswith('INSERT INTO "shop".migrations')]
    assert first[1] == "BEGIN;"
    assert first.index(recorded) < first.index('CREATE TABLE "shop".jobs ();')
    assert first[-1] == "COMMIT;"
    assert "BEGIN;" not in second
    assert second[2] == 'CREATE INDEX CONCURRENTLY one ON "shop".jobs (seq);'
    assert second[3].startswith('INSERT INTO "shop".migrations')
