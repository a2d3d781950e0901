"""The jobs of this Django app. They import no model, so every module may import them."""

from leveret import Job, Queue


class SendInvoice(Job, name="invoice.send", queue=Queue("emails")):
    order_id: int
