"""The consuming service: `leveret work mailer:app`. Its handlers are imported by its worker alone."""

from leveret import App
from leveret.middleware import Retries, Timeout

app = App("mailer", modules=["mailer.handlers"], middleware=[Retries(), Timeout(30)])
