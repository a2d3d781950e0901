"""What the services agree on: queues, jobs, their fields. It needs no app, no handler and no broker; make it a package.

New fields get defaults; unknown ones are ignored: so either side may be deployed first.
"""

from leveret import Job, Priority, Queue

emails = Queue("emails")


class SendInvoice(Job, name="invoice.send", queue=emails):
    order_id: int
    email: str
    language: str = "en"  # added later


class SendReset(Job, name="password.reset", queue=emails, priority=Priority.HIGH, expires_s=900):
    email: str
