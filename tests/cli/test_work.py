"""`leveret work`, `cron`, and what every command says of a wrong word."""

import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone

import pytest

from tests.cli.command import Project, Ran, until
from tests.rabbit.node import Rabbit


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("bogus",), "No such command 'bogus'"),
        (("work", "-q", "emails=0"), "--queue 'emails=0': expected NAME or NAME=CONCURRENCY"),
        (("work", "-q", "emails=many"), "--queue 'emails=many': expected NAME or NAME=CONCURRENCY"),
        (("work", "-q", "emails", "-q", "emails=3"), "--queue 'emails' is given twice"),
        (
            ("work", "-q", "emials"),
            "app 'shop' has no handler for queue 'emials' (queues with handlers: emails, reports, plain); list the handler's module in App(modules=[…])",
        ),
        (("work", "--processes", "0"), "'--processes' / '-p': 0 is not in the range"),
        (("work", "--processes", "two"), "'--processes' / '-p': 'two' is not a valid whole number"),
        (("work", "--grace"), "Option '--grace' requires an argument"),
        (("work", "--concurrency", "0"), "'--concurrency' / '-c': 0 is not in the range"),
        (
            ("work", "--grace=-1"),
            "'--grace': expected a duration of at least 0, such as 90, 90s, 15m, 1h30m or 2d, not '-1'",
        ),
        (
            ("work", "--grace", "nan"),
            "'--grace': expected a duration of at least 0, such as 90, 90s, 15m, 1h30m or 2d, not 'nan'",
        ),
        (("work", "--log-level", "loud"), "'--log-level': 'loud' is not one of"),
        (("work", "shop"), "expected module:app, such as shop:app, not 'shop'"),
        (("work", "shpo:app"), "'shpo:app': no module 'shpo' in "),
        (("work", "shop:ap"), "module shop has no 'ap'; did you mean 'app'?"),
        (("work", "shop:emails"), "'shop:emails' is Queue, not an App"),
        (("work", "shop:SendInvoice"), "'shop:SendInvoice' is a Job class; name the App, such as shop:app"),
        (
            ("cron",),
            "app 'shop' has no enabled schedule; add one with @app.cron(…) and list its module in App(modules=[…])",
        ),
        (("queues", "emails", "--app", "shop:app", "--broker", "memory://"), "an app and --broker can't be combined"),
        (
            ("queues", "emails", "--broker", "rabbit://guest:hunter2@host"),
            "'rabbit://guest:***@host' has no known scheme",
        ),
        (("queues", "emails", "--broker", "memory://"), "memory:// exists only inside the process that opens it"),
        (
            ("queues", "emails.dead", "--broker", "sqlite:///shop.db"),
            "`leveret dead list emails` shows the dead letters of emails",
        ),
        (
            ("queues", "a b", "--broker", "sqlite:///shop.db"),
            "a queue's name must have 1 to 150 characters of [A-Za-z0-9_.-], not 'a b'",
        ),
        (("queues", "emails", "shop:app"), "not 'shop:app'; did you mean --app shop:app?"),
        (("queues", "shop:app", "--broker", "sqlite:///shop.db"), "an app and --broker can't be combined"),
        (
            ("queues", "shop:app", "--app", "shop:app"),
            "the app is given twice: as the argument shop:app and as --app shop:app",
        ),
        (("work", "shop:app", "--app", "shop:app"), "the app is given twice"),
        (("work", "shop:app", "emails"), "Got unexpected extra argument (emails)"),
        (("dead", "list", "emails", "reports"), "Got unexpected extra argument (reports)"),
        (("dead", "list", "shop:app"), "Missing argument 'QUEUE'"),
        (("dead", "show", "emails"), "Missing argument 'ID'"),
        (("publish", "shop:Note"), "Missing argument 'JSON'"),
        (("publish", "shop:app", "shop:Note", "{}", "{}"), "Got unexpected extra argument ({})"),
        (("dead", "list", "emials"), "no queue 'emials' on sqlite:///shop.db; did you mean emails?"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_2(project: Project, arguments: tuple[str, ...], said: str) -> None:
    """Who mistyped must read what, not a traceback of ours; and a script must be able to tell it from a fault that passes."""
    ran = project.run(*arguments)

    assert (ran.code, ran.out) == (2, ""), ran
    assert ran.line.startswith("leveret: ")
    assert said in ran.line
    assert "hunter2" not in ran.line


def test_reload_without_watchfiles_names_an_install_that_works(project: Project) -> None:
    """Leveret isn't in a package index, so `pip install 'leveret[reload]'` would find nothing, or somebody else's package."""
    project.write("watchfiles.py", "raise ImportError")

    ran = project.run("work", "--reload")

    assert (ran.code, ran.line) == (2, "leveret: --reload needs the package watchfiles: pip install watchfiles")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("describe",), ()),
        (("queues",), ()),
        (("queues",), ("plain", "emails")),
        (("queues", "show"), ("plain",)),
        (("queues", "purge"), ("plain", "--yes")),
        (("dead", "list"), ("plain",)),
        (("dead", "replay"), ("plain",)),
        (("dead", "drop"), ("plain", "--yes")),
        (("publish",), ("shop:Note", "{}")),
        (("dead", "show"), ("emails", "no-such-id")),
        (("cron",), ()),
        (("work",), ("-q", "no-such-queue")),
    ],
    ids=" ".join,
)
def test_every_command_takes_the_app_in_the_same_three_ways(
    project: Project, command: tuple[str, ...], words: tuple[str, ...]
) -> None:
    """Whoever learned `work shop:app` types `dead list shop:app emails`, and would be told that shop:app is a wrong queue."""
    project.publish("Note", {}, "--id", "note-1")
    argument = project.run(*command, "shop:app", *words, LEVERET_APP="")
    option = project.run(*command, *words, "--app", "shop:app", LEVERET_APP="")
    variable = project.run(*command, *words, LEVERET_APP="shop:app")

    assert "no app" not in argument.err + option.err
    assert "no broker is set" not in argument.err + option.err
    assert argument.code == option.code == variable.code
    assert argument.err == option.err == variable.err
    assert argument.out.count("\n") == option.out.count("\n") == variable.out.count("\n")


@pytest.mark.parametrize("command", [("work",), ("work", "-p", "2"), ("cron",), ("describe",), ("queues",)])
def test_a_module_that_calls_sys_exit_is_named(project: Project, command: tuple[str, ...]) -> None:
    """A script's last line, or its parser of arguments, would end a worker without a word, with an exit code that means something else."""
    project.write("script.py", "import sys\n\nsys.exit(3)\n")
    project.write(
        "bad.py", "from leveret import App\n\napp = App('bad', broker='sqlite:///bad.db', modules=['script'])\n"
    )

    for app in ("bad:app", "script:app"):
        ran = project.run(*command, LEVERET_APP=app)

        assert ran.code == 2, ran
        assert f"leveret: '{app}': importing " in ran.line
        assert "failed: a module called sys.exit(3) while it was imported" in ran.line
        assert ran.line.endswith(f"({project.folder / 'script.py'}, line 3)")


@pytest.mark.parametrize("command", ["work", "cron", "describe", "queues"])
def test_no_app_or_no_broker_is_one_line_that_lists_the_choices(project: Project, command: str) -> None:
    """A service in production that lost its setting must not fall back on anything."""
    project.write(
        "bare.py",
        "import shop\nfrom leveret import App\napp = App('bare')\napp.handler(shop.note)\napp.cron('* * * * *', shop.Note(), name='n')\n",
    )

    nothing = project.run(command, LEVERET_APP="")
    no_broker = project.run(command, LEVERET_APP="bare:app")

    assert (nothing.code, no_broker.code) == (2, 2)
    assert "LEVERET_APP" in nothing.line
    assert "no broker is set" in no_broker.line
    assert "sqlite:///jobs.db" in no_broker.line


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import nothing_of_the_kind", "importing broken failed: No module named 'nothing_of_the_kind'"),
        ("x = {}['DATABASE_URL']", "importing broken failed: KeyError: 'DATABASE_URL' ("),
        ("def f(:", "SyntaxError"),
        (
            "import shop\nshop.app.cron('61 * * * *', shop.Note(), name='n')",
            "cron expression '61 * * * *': minute must be 0 to 59, *, a list, a range or a step, not '61'",
        ),
        (
            "import shop\nshop.app.cron('1 * * * *', shop.Note(), name='n', tz='Europe/Atlantis')",
            "'Europe/Atlantis' isn't a known IANA time zone",
        ),
        ("from leveret import App\napp = App('a', middleware=[print])", "the middleware"),
        (
            "import shop\napp = shop.app\n@app.handler\nasync def f(job: 'Nothing') -> None: ...",
            "the annotation of 'job' can't be resolved here",
        ),
    ],
)
@pytest.mark.parametrize("command", ["work", "describe"])
def test_an_app_that_fails_to_import_is_one_line_that_says_where(
    project: Project, command: str, source: str, said: str
) -> None:
    """The commonest mistake of all: a setting that is missing on this machine, a typo in a handler."""
    project.write("broken.py", source)

    ran = project.run(command, "broken:app")

    assert ran.code == 2, ran
    assert said in ran.line


def test_a_listed_module_that_fails_to_import_is_one_line_too(project: Project) -> None:
    """The handlers' modules are the user's code as well as the app's."""
    project.write(
        "listed.py", "from leveret import App\napp = App('a', default_broker='sqlite:///a.db', modules=['handlers'])\n"
    )
    project.write("handlers.py", "\n1 / 0\n")

    ran = project.run("work", "listed:app")

    assert ran.code == 2, ran
    assert "ZeroDivisionError" in ran.line
    assert "handlers.py, line 2" in ran.line


def test_at_debug_level_a_wrong_word_comes_with_its_traceback(project: Project) -> None:
    """Where the line doesn't say enough there must be a way to see more."""
    ran = project.run("describe", "shop:ap", LEVERET_LOG="debug")

    assert ran.code == 2
    assert "Traceback" in ran.err
    assert "did you mean 'app'?" in ran.err


def test_work_runs_jobs_and_sigterm_ends_it_with_0(project: Project) -> None:
    """What every deployment does."""
    project.publish("SendInvoice", {"order_id": 7})

    with project.start("work", "--queue", "emails=5", "--grace", "10") as worker:
        worker.wait_for(r"takes jobs from emails \(5 at once\) on")
        project.publish("SendInvoice", {"order_id": 8})
        until(lambda: sum(line.startswith("end") for line in project.said) == 2, lambda: worker.log)
        worker.stop()
    assert "stopped: 2 done" in worker.log


def test_what_a_worker_did_is_told_in_words_at_its_end(project: Project) -> None:
    """`lost` and `notstarted` of a deploy's last line would be taken for lost jobs."""
    for order in range(2):
        project.publish("SendInvoice", {"order_id": order, "seconds": 2.0})

    with project.start("work", "--concurrency", "1", "--queue", "emails") as worker:
        until(lambda: any(line.startswith("start") for line in project.said), lambda: worker.log)
        worker.stop()

    assert "stopped: 1 done, 1 given back\n" in worker.log


def test_a_failure_that_is_retried_is_seen_with_its_traceback(project: Project) -> None:
    """Without a layer that logs, a job that fails again and again would be seen at its burial only, and without the line that failed."""
    project.write(
        "fails.py",
        "from leveret import App\nfrom leveret.middleware import Retries\nimport shop\n"
        "app = App('fails', default_broker='sqlite:///shop.db', middleware=[Retries(base_s=60)])\n\n\n"
        "@app.handler\nasync def note(job: shop.Note) -> None:\n    raise ConnectionError('the mail\\nserver of postgresql://shop:hunter2@db is away')\n",
    )
    job_id = project.publish("Note", {})

    with project.start("work", "fails:app") as worker:
        worker.wait_for("server of")
        worker.stop()

    _, _, record = worker.log.partition("leveret.attempt ")
    line, *below, _, _ = record.splitlines()
    assert re.fullmatch(
        rf"job note {job_id} attempt 1: failed after \S+ ms, retried in \S+ m?s: "
        r"ConnectionError: the mail server of postgresql://shop:\*\*\*@db is away",
        line,
    )
    assert below == [
        "  Traceback (most recent call last):",
        f'    File "{project.folder / "fails.py"}", line 9, in note',
        "      raise ConnectionError('the mail\\nserver of postgresql://shop:***@db is away')",
        "  ConnectionError: the mail",
        "  server of postgresql://shop:***@db is away",
    ]


def test_a_worker_has_neither_click_nor_rich(project: Project) -> None:
    """Each costs megabytes in every worker process; the command hands over to a new interpreter."""
    project.write(
        "spy.py",
        "import sys\nfrom shop import app\nprint('loaded', sorted({'click', 'rich'} & set(sys.modules)), flush=True)\n",
    )

    with project.start("work", "spy:app") as worker:
        assert worker.wait_for(r"loaded (.*)") == ["[]"]
        worker.wait_for("takes jobs from")
        worker.stop()


@pytest.mark.parametrize(
    "command",
    [
        (),
        ("work",),
        ("cron",),
        ("publish",),
        ("describe",),
        ("queues", "show"),
        ("queues", "purge"),
        ("dead", "list"),
        ("dead", "show"),
        ("dead", "replay"),
        ("dead", "drop"),
    ],
)
def test_help_has_an_example(project: Project, command: tuple[str, ...]) -> None:
    """A stranger learns a command by its example."""
    ran = project.run(*command, "--help")

    assert ran.code == 0, ran
    assert re.search(r"Examples?:\n +leveret ", ran.out), ran.out


@pytest.mark.parametrize("command", [(), ("queues",), ("dead",)])
def test_summaries_in_help_are_whole(project: Project, command: tuple[str, ...]) -> None:
    """A list of commands whose lines break off in the middle tells nobody which one to take."""
    _, _, listed = project.run(*command, "--help").out.partition("Commands:\n")

    assert listed
    assert "..." not in listed


def test_the_version_and_the_exit_codes_are_told(project: Project) -> None:
    """A script branches on the code, a bug report begins with the version."""
    assert re.fullmatch(r"leveret \d+\.\d+\.\d+\n", project.run("--version").out)
    for code in ("0 ", "1 ", "2 ", "130"):
        assert re.search(rf"^ +{code}  +\w", project.run("--help").out, re.MULTILINE)


def test_cron_publishes_each_slot_once_and_sigterm_ends_it_with_0(project: Project) -> None:
    """A slot missed or doubled is a report that nobody gets, or gets twice."""
    project.write(
        "every.py",
        "from shop import Note, app\n\n\n@app.cron('* * * * * *')\ndef tick(slot) -> Note:\n    return Note(slot.isoformat())\n",
    )

    with project.start("cron", "every:app") as cron:
        cron.wait_for("schedule tick published", count=3)
        cron.stop()

    ids = re.findall(r"published shop\.tick@(\S+)", cron.log)
    slots = [datetime.fromisoformat(slot) for slot in ids]
    assert slots == [slots[0] + timedelta(seconds=n) for n in range(len(slots))], cron.log
    assert abs((datetime.now(timezone.utc) - slots[-1]).total_seconds()) < 30
    assert project.run("queues", "plain", "--json").json[0]["ready"] == len(slots)


def test_cron_prints_what_its_log_level_says(project: Project) -> None:
    """Who wants less of one process, or all of it, must not have to change the environment of all; the option beats LEVERET_LOG."""
    project.write(
        "every.py",
        "from shop import Note, app, said\n\n\n@app.cron('* * * * * *')\ndef tick() -> Note:\n    said('asked')\n    return Note()\n",
    )

    with project.start("cron", "every:app", "--log-level", "error", LEVERET_LOG="debug") as cron:
        until(lambda: "asked" in project.said, lambda: cron.log)
        cron.stop()

    assert cron.log == ""


def test_cron_stopped_in_the_middle_of_a_slot_lets_it_end(project: Project) -> None:
    """A deploy at nine o'clock must not cost the job of nine o'clock."""
    project.write(
        "slow.py",
        "import time\nfrom shop import Note, app, said\n\n\n@app.cron('* * * * * *')\ndef tick() -> Note:\n"
        "    said('asked')\n    time.sleep(2)\n    return Note()\n",
    )

    with project.start("cron", "slow:app") as cron:
        until(lambda: "asked" in project.said, lambda: cron.log)
        cron.stop()

    assert len(re.findall("published shop.tick@", cron.log)) == 1
    assert project.run("queues", "plain", "--json").json[0]["ready"] == 1


def test_cron_whose_function_hangs_ends_all_the_same(project: Project) -> None:
    """A stop that waits for ever ends in kill -9, for everything else in the container as well."""
    project.write(
        "hang.py",
        "import time\nfrom leveret.process import cron\nfrom shop import Note, app, said\n\ncron.FINISH_S = 1.0\n\n\n"
        "@app.cron('* * * * * *')\ndef tick() -> Note:\n"
        "    said('asked')\n    time.sleep(1000)\n    return Note()\n",
    )

    with project.start("cron", "hang:app") as cron:
        until(lambda: "asked" in project.said, lambda: cron.log)
        cron.send(signal.SIGTERM)
        cron.send(signal.SIGTERM)

        assert cron.end(15) == 1, cron.log
    assert "cut off" in cron.log


def test_a_broker_that_is_away_is_one_line_and_exit_1_in_time(project: Project) -> None:
    """An operator looks while things are down; a command that hangs then tells nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("127.0.0.1", 0)) as refuses:
        says_nothing, refused = silent.getsockname()[1], refuses.getsockname()[1]
        refuses.close()

        def run(port: int, *command: str) -> tuple[int, Ran, float]:
            began = time.monotonic()
            return (
                port,
                project.run(*command, "--broker", f"amqp://guest:hunter2@127.0.0.1:{port}/"),
                time.monotonic() - began,
            )

        with ThreadPoolExecutor() as at_once:  # the first and the last sit out 10 s
            running = [
                at_once.submit(run, says_nothing, "queues", "emails"),
                at_once.submit(run, refused, "queues", "emails"),
                at_once.submit(run, refused, "dead", "list", "emails"),
                at_once.submit(run, refused, "publish", "shop:Note", "{}"),
            ]

    results = [one.result() for one in running]
    starts_s = results[1][2]  # what it takes to start, and to be refused
    for port, ran, took_s in results:
        assert took_s < 18 + starts_s
        assert (ran.code, ran.out) == (1, ""), ran
        assert f"127.0.0.1:{port}" in ran.line
        assert "hunter2" not in ran.err


@pytest.mark.rabbit
@pytest.mark.parametrize("command", [("queues", "emails"), ("work", "-p", "2")])
def test_a_wrong_password_or_vhost_is_one_line_and_exit_2(
    project: Project, rabbit: Rabbit, command: tuple[str, ...]
) -> None:
    """Waiting wouldn't help, so nothing waits; with several workers it is said once."""
    before, at, host = rabbit.url.rpartition("@")
    scheme, _, login = before.partition("://")
    user = login.partition(":")[0]

    password = project.run(*command, LEVERET_BROKER=f"{scheme}://{user}:hunter2{at}{host}")
    vhost = project.run(*command, LEVERET_BROKER=f"{before}{at}{host.partition('/')[0]}/nowhere")

    assert (password.code, vhost.code) == (2, 2), (password, vhost)
    lines = [[line for line in ran.err.splitlines() if line.startswith("leveret: ")] for ran in (password, vhost)]
    assert [len(of_one) for of_one in lines] == [1, 1], (password, vhost)
    assert f"refused the login of user {user!r}" in lines[0][0]
    assert "has no vhost 'nowhere'" in lines[1][0]
    assert "hunter2" not in password.err
