"""`leveret describe` as a command; what it says is tested in tests/unit/cli/test_describe.py."""

from tests.cli.command import Project


def test_describe_prints_text_or_one_json_document(project: Project) -> None:
    """People read the one, a pipeline compares the other."""
    text = project.run("describe")
    record = project.run("describe", "shop:app", "--json", LEVERET_APP="").json

    assert text.code == 0, text
    assert text.out.startswith("app shop on sqlite:///shop.db (durable, ")
    assert (
        "chain    Retries(Rule(ValueError, bury=True), max_attempts=4, base_s=1, cap_s=600) → Timeout(300) → shop.send_invoice\n"
        in text.out
    )
    assert [handler["handler"] for handler in record["handlers"]] == [
        "shop.send_invoice",
        "shop.write_report",
        "shop.note",
    ]
    assert not (project.folder / "shop.db").exists()
