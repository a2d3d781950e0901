"""A Django view that publishes in its transaction, and a worker that uses the same models.

One file for once: settings, model, view and handler. It needs a PostgreSQL in which `leveret migrate --url "$DATABASE_URL"` ran:
DATABASE_URL=postgresql://… python examples/django_view.py
"""

import asyncio
import os
from collections.abc import Generator
from contextlib import contextmanager
from urllib.parse import unquote, urlsplit

import django
from django.conf import settings
from django.db import close_old_connections, connection, models, transaction
from django.http import HttpRequest, HttpResponse, HttpResponseBadRequest
from django.test import Client
from django.urls import path

from leveret import App, Attempt, Job, Queue

URL = os.environ["DATABASE_URL"]
parts = urlsplit(URL)
settings.configure(
    DATABASES={"default": {
        "ENGINE": "django.db.backends.postgresql", "NAME": parts.path[1:], "HOST": parts.hostname, "PORT": parts.port,
        "USER": parts.username, "PASSWORD": unquote(parts.password or ""),
    }},
    ROOT_URLCONF=__name__, ALLOWED_HOSTS=["testserver"], DEFAULT_AUTO_FIELD="django.db.models.AutoField", SECRET_KEY="only an example",
)  # fmt: skip
django.setup()


class Order(models.Model):
    email = models.CharField(max_length=200)
    invoiced = models.BooleanField(default=False)

    class Meta:
        app_label = "shop"


class SendInvoice(Job, name="invoice.send", queue=Queue("emails")):
    order_id: int


@contextmanager
def connections() -> Generator[None, None, None]:
    """Django closes old database connections round a request; round a job nobody else does."""
    close_old_connections()
    try:
        yield
    finally:
        close_old_connections()


app = App("shop", broker=URL, around_sync=connections)
publisher = app.blocking_publisher()  # a module's variable: nothing starts before its first use


@app.handler
def send_invoice(job: SendInvoice, attempt: Attempt) -> None:
    changed = Order.objects.filter(pk=job.order_id).update(invoiced=True)
    attempt.log.info("order %d: %d invoice sent", job.order_id, changed)


@transaction.atomic
def take_order(request: HttpRequest) -> HttpResponse:
    order = Order.objects.create(email=request.POST["email"])
    publisher.publish(SendInvoice(order_id=order.pk), connection=connection)  # in the transaction, with the order
    if "@" not in order.email:
        transaction.set_rollback(True)
        return HttpResponseBadRequest("no email address")
    return HttpResponse(status=202)


urlpatterns = [path("orders", take_order)]


def try_out() -> None:
    post = Client().post
    bad, good = post("/orders", {"email": "nobody"}), post("/orders", {"email": "a@example.org"})
    assert (bad.status_code, good.status_code) == (400, 202)
    asyncio.run(work())
    invoiced = list(Order.objects.values_list("email", "invoiced"))
    assert invoiced == [("a@example.org", True)], invoiced  # the order that was rolled back has no job either
    publisher.close()


async def work() -> None:
    async with app.worker(), asyncio.timeout(30):
        while await asyncio.to_thread(waiting):
            await asyncio.sleep(0.05)


def waiting() -> bool:
    with connections():
        return Order.objects.filter(invoiced=False).exists()


if __name__ == "__main__":
    with connection.schema_editor() as editor:
        editor.create_model(Order)
    try_out()
