"""An order, which publishes its invoice once it is committed."""

from django.db import models, transaction
from shop.jobs import publisher

from orders.jobs import SendInvoice


class Order(models.Model):
    email = models.CharField(max_length=200)
    invoiced = models.BooleanField(default=False)

    @classmethod
    @transaction.atomic
    def take(cls, email: str) -> "Order":
        order = cls.objects.create(email=email)
        transaction.on_commit(lambda: publisher.publish(SendInvoice(order_id=order.pk)))
        return order
