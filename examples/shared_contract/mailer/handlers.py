"""How the mailer does what the contract says. The outbox is a folder here."""

import os
from pathlib import Path

from shop_contract import SendInvoice, SendReset

from . import app


def mail(name: str, text: str) -> None:
    Path(os.environ["OUTBOX"], name).write_text(text, encoding="utf-8")


@app.handler
def send_invoice(job: SendInvoice) -> None:
    mail(f"invoice-{job.order_id}", f"to {job.email} ({job.language})")


@app.handler
def send_reset(job: SendReset) -> None:
    mail(f"reset-{job.email}", f"to {job.email}")
