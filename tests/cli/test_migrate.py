"""`leveret migrate` where no database is needed; tests/postgres has the others."""

from tests.cli.command import Project


def test_brokers_that_need_no_migrations_say_so(project: Project) -> None:
    """One line in the deployment of every app must do, whatever its broker."""
    line = "needs no migrations: leveret makes what it needs"

    for url, shown in (
        ("sqlite:///shop.db", "sqlite:///shop.db"),
        ("memory://", "memory://"),
        ("amqp://shop:hunter2@nowhere.invalid/", "amqp://shop:***@nowhere.invalid/"),
    ):
        for arguments in (("--url", url), ("--url", url, "--check")):
            ran = project.run("migrate", *arguments)
            assert (ran.code, ran.out, ran.err) == (0, f"the broker {shown} {line}\n", ""), ran
    assert not (project.folder / "shop.db").exists()


def test_the_app_names_its_broker(project: Project) -> None:
    """Who deploys knows the app, and not always its URL."""
    by_word = project.run("migrate", "shop:app", LEVERET_APP="")
    by_option = project.run("migrate", "--app", "shop:app", LEVERET_APP="")
    by_environment = project.run("migrate", LEVERET_APP="shop:app")

    assert by_word.out == by_option.out == by_environment.out
    assert by_word.out.startswith("the broker sqlite:///shop.db needs no migrations"), by_word


def test_nothing_but_sql_is_printed_as_sql(project: Project) -> None:
    """The output goes to a file that another tool runs."""
    ran = project.run("migrate", "--sql")

    assert (ran.code, ran.out) == (0, "")
    assert ran.line.startswith("the broker sqlite:///shop.db needs no migrations")


def test_wrong_usage_is_one_line(project: Project) -> None:
    """A script that sets both must not migrate the one that it didn't mean."""
    both = project.run("migrate", "shop:app", "--url", "sqlite:///x.db")
    two = project.run("migrate", "--check", "--sql")
    none = project.run("migrate", LEVERET_APP="")
    unknown = project.run("migrate", "--url", "postgres-ql://shop:hunter2@db/shop")

    assert (both.code, two.code, none.code, unknown.code) == (2, 2, 2, 2)
    assert "an app and --url can't be combined" in both.line
    assert "--check and --sql can't be combined" in two.line
    assert "no broker is set" in none.line
    assert "hunter2" not in unknown.line


def test_a_wrong_url_of_postgresql_is_one_line_before_anything_is_sent(project: Project) -> None:
    """A password with an @ would be looked up as a part of the host, and printed."""
    ran = project.run("migrate", "--url", "postgresql://shop:hun@ter2@db.invalid/shop")

    assert ran.code == 2
    assert "%40" in ran.line
    assert "ter2" not in ran.line
