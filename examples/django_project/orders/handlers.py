"""The handlers of this Django app. A `def` runs in a thread, where the ORM works as in a view."""

from shop.jobs import app

from leveret import Attempt, Bury
from orders.jobs import SendInvoice
from orders.models import Order


@app.handler
def send_invoice(job: SendInvoice, attempt: Attempt) -> Bury | None:
    order = Order.objects.filter(pk=job.order_id).first()
    if order is None:
        return Bury("the order was deleted")
    attempt.log.info("the invoice of order %d goes to %s", order.pk, order.email)
    Order.objects.filter(pk=order.pk).update(invoiced=True)
    return None
