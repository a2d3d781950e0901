"""`python -m web ORDER EMAIL`: take an order."""

import sys

from shop_contract import SendInvoice, SendReset

from leveret import App

app = App("web")  # its broker is LEVERET_BROKER
publisher = app.blocking_publisher()


def main(order: str, email: str) -> None:
    publisher.publish(SendInvoice(int(order), email))
    publisher.publish(SendReset(email))
    assert not any(name.startswith("mailer") for name in sys.modules)


if __name__ == "__main__":
    main(*sys.argv[1:])
