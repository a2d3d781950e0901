"""What a program shows that publishes without a broker, and catches nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.examples.markdown import SHOP

NOWHERE = "amqp://guest:guest@127.0.0.1:1/"
ASYNCHRONOUS = """\
import asyncio

from shop import SendInvoice, app


async def main() -> None:
    async with app.publisher() as publisher:
        await publisher.publish(SendInvoice(order_id=7, email="a@example.org"), timeout_s=0.2)


asyncio.run(main())
"""


@pytest.mark.parametrize("kind", ["blocking", "asynchronous"])
def test_a_program_without_a_broker_ends_in_a_few_lines(tmp_path: Path, kind: str) -> None:
    """The first thing that many see of leveret is what it prints without a broker: fifty lines, with the user's own in the middle."""
    published = 'email="a@example.org"))'
    assert published in SHOP.text
    shop = SHOP.text.replace(published, published.removesuffix(")") + ", timeout_s=0.2)")
    (tmp_path / "shop.py").write_text(shop, encoding="utf-8")
    (tmp_path / "main.py").write_text(ASYNCHRONOUS, encoding="utf-8")
    program, users_line = ("shop.py", "receipt = app.bl") if kind == "blocking" else ("main.py", "await publisher.publ")

    ended = subprocess.run(
        [sys.executable, program],
        check=False,
        cwd=tmp_path,
        env={**os.environ, "LEVERET_BROKER": NOWHERE},
        capture_output=True,
        text=True,
        timeout=60,
    )

    lines = ended.stderr.splitlines()
    said = "invoice.send to queue emails: no connection in time: RabbitMQ at 127.0.0.1:1: Connection refused"
    assert ended.returncode == 1
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == f"leveret.errors.BrokerUnavailable: {said}"
    assert [line for line in lines if line.strip().startswith(users_line)]
    # Newer Pythons mark parts of more lines; 9 lines are asyncio.run's.
    assert len([line for line in lines if sys.version_info < (3, 13) or line.strip("~^ ")]) <= 15, ended.stderr
