"""A Flask service that publishes, and handlers that use the service's context.

Serve it with `LEVERET_BROKER=… flask --app examples.flask_service run`; run by itself it tries itself out.
"""

import asyncio

from flask import Flask, current_app, request

from leveret import App, Attempt, Job, PublishError, Queue
from leveret.testing import running


class SendInvoice(Job, name="invoice.send", queue=Queue("emails")):
    order_id: int
    email: str


service = Flask(__name__)
service.config["SENDER"] = "shop@example.org"

app = App("shop", default_broker="sqlite:///shop.db", around_sync=service.app_context)
publisher = app.blocking_publisher()  # a module's variable: nothing starts before its first use


@app.handler
def send_invoice(invoice: SendInvoice, attempt: Attempt) -> None:
    attempt.log.info("%s invoices order %d to %s", current_app.config["SENDER"], invoice.order_id, invoice.email)


@service.post("/orders")
def take_order() -> tuple[dict[str, str], int]:
    order = request.get_json()
    try:
        receipt = publisher.publish(SendInvoice(order["id"], order["email"]), timeout_s=2)
    except PublishError:  # not confirmed: say so, rather than lose an order
        return {"error": "try again in a moment"}, 503
    return {"job": receipt.job_id}, 202


async def try_out() -> None:
    post = service.test_client().post
    async with running(app) as lab:  # the app's publishers go to a memory broker meanwhile
        answer = await asyncio.to_thread(post, "/orders", json={"id": 7, "email": "a@example.org"})
        assert answer.status_code == 202, answer.text
        await lab.drain()
        [run] = lab.done
        assert run.job == SendInvoice(order_id=7, email="a@example.org")


if __name__ == "__main__":
    asyncio.run(try_out())
