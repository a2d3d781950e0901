"""README.md and docs/: every block of Python runs, every command is typed, every link leads somewhere."""

import ast
import asyncio
import inspect
import os
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import click
import msgspec
import pytest

import leveret
from leveret import Settings
from leveret.brokers.rabbitmq import RabbitSettings
from leveret.cli.main import cli, main
from leveret.settings import Environment
from tests.conftest import StartNode
from tests.examples.markdown import BLOCKS, PAGES, PYTHON, ROOT, SHOP, Block
from tests.rabbit.node import Rabbit

RUN = [block for block in PYTHON if not block.comment]
TESTS = [block for block in RUN if "def test_" in block.text]
PROGRAMS = [block for block in RUN if block not in TESTS]
EXCERPTS = [block for block in PYTHON if block.comment.startswith("excerpt of: ")]
COMMANDS = [block for block in BLOCKS if block.language == "sh"]
README = ROOT / "README.md"
SCRIPTS = sysconfig.get_path("scripts")


def _ids(block: Block) -> str:
    return block.name


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A folder with the README's shop.py in it."""
    (tmp_path / "shop.py").write_text(SHOP.text, encoding="utf-8")
    return tmp_path


def environment(**changes: str) -> dict[str, str]:
    """What a reader's shell has: the environment's commands, and no setting of leveret's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LEVERET_", "PYTEST_"))}
    return {**kept, "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}", "PYTHONUNBUFFERED": "1", **changes}


def typed(command: str, folder: Path, **changes: str) -> str:
    """Type `command`, which must end with 0; return what it printed. A worker is told to stop once it has worked, or has nothing to do."""
    argv = shlex.split(command, comments=True)
    process = subprocess.Popen(
        argv,
        cwd=folder,
        env=environment(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    output = ""
    try:
        if command.startswith("leveret work"):
            assert process.stdout is not None
            output = process.stdout.readline()  # the one job of shop.py
            process.send_signal(signal.SIGTERM)
        rest, log = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 0, f"{command}\n{output}{rest}{log}"
    return output + rest


def test_every_block_of_python_is_accounted_for() -> None:
    """A block with a mistyped comment would be run by nobody."""
    assert len(PYTHON) == len(RUN) + len(EXCERPTS) + 1
    assert len(PYTHON) > 6


def test_the_first_program_is_whole_and_fits_on_a_screen() -> None:
    """It is what a stranger copies."""
    assert PYTHON[0] is SHOP
    assert len(SHOP.text.splitlines()) <= 25


def test_the_first_program_does_what_the_readme_says(shop: Path) -> None:
    """A stranger's first minute."""
    assert re.fullmatch(r"job [0-9a-f-]{36} is confirmed\n", typed("python shop.py", shop))
    assert typed("leveret work shop:app", shop) == "invoice 7 goes to a@example.org, at attempt 2\n"
    assert '"ready": 0' in typed("leveret queues --app shop:app --json", shop)


@pytest.mark.parametrize("block", PROGRAMS, ids=_ids)
async def test_a_block_runs(block: Block, shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code in a README that doesn't run teaches something wrong."""
    monkeypatch.chdir(shop)
    monkeypatch.syspath_prepend(str(shop))
    monkeypatch.delitem(sys.modules, "shop", raising=False)
    monkeypatch.delenv("LEVERET_BROKER", raising=False)
    namespace: dict[str, object] = {"__name__": "a_block"}
    code = compile(block.text, block.name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    awaited = eval(code, namespace)  # what reads `async with` at the top of a block does so in a program's own main()
    if inspect.iscoroutine(awaited):
        await asyncio.wait_for(awaited, 30)
    app = namespace["app"]
    assert isinstance(app, leveret.App)
    app.handlers()  # what a worker would refuse is refused here
    sys.modules.pop("shop", None)


def test_blocks_are_the_modules_that_the_readme_calls_them(shop: Path) -> None:
    """Who splits an app as shown must not end with a worker that doesn't know its handlers, or a cron process without schedules."""
    (shop / "shop.py").write_text(
        SHOP.text.replace('App("shop", ', 'App("shop", modules=["pages", "digests"], '), encoding="utf-8"
    )
    for module, job in (("pages", 'name="page.fetch"'), ("digests", 'name="digest.send"')):
        [block] = [block for block in PROGRAMS if job in block.text]
        (shop / f"{module}.py").write_text(block.text, encoding="utf-8")

    described = msgspec.json.decode(typed("leveret describe shop:app --json", shop))

    assert {handler["job"] for handler in described["handlers"]} == {"invoice.send", "page.fetch", "digest.send"}
    assert [schedule["name"] for schedule in described["schedules"]] == ["morning", "digest.us"]


def _on_rabbitmq(block: Block) -> bool:
    return '"leveret_rabbitmq"' in block.text


@pytest.mark.parametrize(
    "block",
    [pytest.param(block, marks=pytest.mark.rabbit) if _on_rabbitmq(block) else block for block in TESTS],
    ids=_ids,
)
def test_a_block_of_tests_passes(block: Block, shop: Path, request: pytest.FixtureRequest) -> None:
    """It is how users begin to test."""
    tests, url = block.text.count("def test_"), ""
    if _on_rabbitmq(block):
        rabbit: Rabbit = request.getfixturevalue("rabbit")
        tests, url = 2 * tests, rabbit.url
    (shop / "test_shop.py").write_text(block.text, encoding="utf-8")
    assert f"{tests} passed" in _pytest(shop, LEVERET_TEST_AMQP=url)


def test_all_blocks_of_tests_pass_in_one_folder(shop: Path) -> None:
    """A block that changed the app of all would fail the tests of another, as the file's order decides."""
    together = [block for block in TESTS if not _on_rabbitmq(block)]
    for number, block in enumerate(together):
        (shop / f"test_{number}.py").write_text(block.text, encoding="utf-8")
    assert len(together) > 1
    assert f"{sum(block.text.count('def test_') for block in together)} passed" in _pytest(shop)


def _pytest(folder: Path, **changes: str) -> str:
    """Run pytest as a user does who copied the README's set-up, with every warning an error; return what it printed."""
    [setup] = [block.text for block in BLOCKS if block.language == "toml" and "pytest" in block.text]
    (folder / "pyproject.toml").write_text(setup, encoding="utf-8")
    ended = subprocess.run(
        [SCRIPTS + "/pytest", "-q", "-W", "error"],
        check=False,
        cwd=folder,
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "Warning" not in ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.parametrize("block", EXCERPTS, ids=_ids)
def test_an_excerpt_stands_in_its_example(block: Block) -> None:
    """`make examples` runs the example, so what the README shows of it is true."""
    source = (ROOT / block.comment.removeprefix("excerpt of: ")).read_text(encoding="utf-8")
    at = 0
    for line in filter(str.strip, block.text.splitlines()):
        found = source.find(f"{line}\n", at)
        assert found >= 0, line
        at = found


@pytest.mark.parametrize("block", COMMANDS, ids=_ids)
def test_commands_can_be_typed(block: Block, shop: Path) -> None:
    """A command that a README only imagines costs every reader a minute. `rabbitmqctl` has a test of its own."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    typed("python shop.py", shop)  # a queue to look at
    for line in block.text.splitlines():
        tool, _, rest = line.partition(" ")
        if tool == "make":
            assert re.search(rf"^{rest.split()[0]}:", makefile, re.MULTILINE), line
        elif tool != "rabbitmqctl":
            assert tool in {"python", "leveret"}, line
            if "work" in line:
                typed("python shop.py", shop)  # a job for each worker
            typed(line, shop)


def _command(words: list[str]) -> click.Command:
    command: click.Command = cli
    for word in words:
        assert isinstance(command, click.Group), words
        assert word in command.commands, words
        command = command.commands[word]
    return command


def test_commands_within_sentences_exist() -> None:
    """A command was renamed, the page wasn't."""
    found = 0
    for page in PAGES:
        for text in re.findall(r"`leveret ([^`]+)`", page.read_text(encoding="utf-8")):
            words = text.split()
            names = [
                word
                for word in words[: 2 if words[0] in {"dead", "queues", "jobs"} else 1]
                if word.islower() and not word.startswith("-")
            ]
            options = {option for parameter in _command(names).params for option in parameter.opts}
            assert {word for word in words if word.startswith("--")} <= options | {"--json"}, text
            found += 1
    assert found > 10


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    """`leveret --help` is where a stranger looks first."""
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("work", "cron", "publish", "describe", "queues", "dead"))


@pytest.mark.rabbit
async def test_the_permissions_that_operations_asks_for_are_enough(rabbit_node: StartNode, shop: Path) -> None:
    """Too few of them, and it fails in production alone, where nobody is guest."""
    node = await rabbit_node()
    [line] = [
        line for block in BLOCKS for line in block.text.splitlines() if line.startswith("rabbitmqctl set_permissions")
    ]
    _, verb, user, *patterns = shlex.split(line)
    await node.ctl("add_user", user, "secret")
    await node.ctl(verb, user, *patterns)
    url = node.url.replace("guest:guest@", f"{user}:secret@")
    assert url != node.url
    # publish, take, a retry with its wait, look
    for command in ("python shop.py", "leveret work shop:app", "leveret dead list emails --app shop:app"):
        await asyncio.to_thread(typed, command, shop, LEVERET_BROKER=url)


def test_every_setting_stands_in_the_readme_with_its_default() -> None:
    """An operator looks there, not into the code."""
    rows: dict[str, str] = {}
    for names, default in re.findall(
        r"^\| (`[a-z_`, ]+) \| ([^|]+) \|", README.read_text(encoding="utf-8"), re.MULTILINE
    ):
        values = [value.strip().strip('`"') for value in default.split(",")]
        rows |= dict(zip(re.findall(r"`(\w+)`", names), values, strict=False))
    units = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20}
    words = {"True": True, "False": False, "none": ()}
    settings = [field for field in msgspec.structs.fields(Settings) if field.default is not None]  # None: deprecated
    for field in (*settings, *msgspec.structs.fields(RabbitSettings)):
        value, _, unit = rows[field.name].partition(" ")
        assert field.default == (float(value) * units[unit] if value[0].isdigit() else words.get(value, value)), (
            field.name
        )


def test_every_variable_of_the_environment_stands_in_the_readme() -> None:
    """A variable that nobody knows of is set by nobody."""
    documented = set(re.findall(r"^\| `(LEVERET_\w+)` \|", README.read_text(encoding="utf-8"), re.MULTILINE))
    read = set(re.findall(r"LEVERET_\w+", (ROOT / "framework/settings.py").read_text(encoding="utf-8")))
    assert documented == read
    assert len(documented) == len(msgspec.structs.fields(Environment))


def _anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    """A file was moved, a heading renamed."""
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


def test_the_newest_entry_of_the_changelog_is_this_version() -> None:
    """A release whose changes nobody wrote down."""
    headings = re.findall(
        r"^## \[([\d.]+)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert headings[0] == leveret.__version__
