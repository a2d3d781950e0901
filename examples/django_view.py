"""A Django view that publishes once its transaction is committed, and a worker that uses the same models.

One file for once: settings, model, view and handler. `python examples/django_view.py` tries it out.
"""

import asyncio
import atexit
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager

import django
from django.conf import settings
from django.db import close_old_connections, connection, models, transaction
from django.http import HttpRequest, HttpResponse, HttpResponseBadRequest
from django.test import Client
from django.urls import path

from leveret import App, Attempt, Job, Queue
from leveret.testing import running

folder = tempfile.mkdtemp()
atexit.register(shutil.rmtree, folder)
settings.configure(
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": f"{folder}/orders.db", "OPTIONS": {"timeout": 20}}},
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


app = App("shop", default_broker=f"sqlite:///{folder}/jobs.db", around_sync=connections)
publisher = app.blocking_publisher()  # a module's variable: nothing starts before its first use


@app.handler
def send_invoice(job: SendInvoice, attempt: Attempt) -> None:
    changed = Order.objects.filter(pk=job.order_id).update(invoiced=True)
    attempt.log.info("order %d: %d invoice sent", job.order_id, changed)


@transaction.atomic
def take_order(request: HttpRequest) -> HttpResponse:
    order = Order.objects.create(email=request.POST["email"])
    # Published in the middle of the transaction, the job could run before its order can be seen, or without one.
    transaction.on_commit(lambda: publisher.publish(SendInvoice(order_id=order.pk)))
    if "@" not in order.email:
        transaction.set_rollback(True)
        return HttpResponseBadRequest("no email address")
    return HttpResponse(status=202)


urlpatterns = [path("orders", take_order)]


async def try_out() -> None:
    post = Client().post
    async with running(app) as lab:
        bad = await asyncio.to_thread(post, "/orders", {"email": "nobody"})
        good = await asyncio.to_thread(post, "/orders", {"email": "a@example.org"})
        assert (bad.status_code, good.status_code) == (400, 202)
        [published] = lab.published  # the rolled back order published nothing
        await lab.drain()
        assert len(lab.done) == 1
    invoiced = await asyncio.to_thread(lambda: list(Order.objects.values_list("email", "invoiced")))
    assert invoiced == [("a@example.org", True)], invoiced
    assert published.envelope.job == "invoice.send"


if __name__ == "__main__":
    with connection.schema_editor() as editor:
        editor.create_model(Order)
    asyncio.run(try_out())
