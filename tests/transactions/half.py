"""A program that publishes in a transaction, says so, and waits in the middle: `python -m tests.transactions.half CLIENT URL`."""

import asyncio
import sys

from tests.transactions.clients import Order, client


async def main(name: str, url: str) -> None:
    """Commit one transaction, and stay in the second."""
    async with client(name, url) as shop:
        async with shop.begin():
            await shop.order(1)
            await shop.publish(Order(1), job_id=f"{name} committed")
        async with shop.begin():
            await shop.order(2)
            await shop.publish(Order(2), job_id=f"{name} open")
            sys.stdout.write("published\n")
            sys.stdout.flush()
            await asyncio.sleep(3600)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
