"""Encodes jobs to bytes and decodes them, without pickle. A body that can't be decoded raises `UndecodableError`, never anything else."""

from __future__ import annotations

from asyncio import CancelledError
from collections.abc import Callable
from typing import Literal

import msgspec

from .envelope import JSON, MSGPACK
from .job import Job, hooks_of
from .texts import named, said_by

_NOT_ENCODED = frozenset({"utf-8", "utf8", "us-ascii", "binary"})
"""Content encodings that change nothing in a JSON or MessagePack body. kombu, Celery and pika programs set one on every message."""


class UndecodableError(Exception):
    """The body isn't a job of the expected class; the text is the reason."""


def content_type(encoding: Literal["json", "msgpack"]) -> str:
    """Return the content type of `encoding`."""
    return JSON if encoding == "json" else MSGPACK


def encoder(job_class: type[Job], encoding: Literal["json", "msgpack"]) -> Callable[[Job], bytes]:
    """Return the function that encodes jobs of `job_class`. The function raises whatever the class's `enc_hook` raises.

    Without an `enc_hook`, it raises TypeError for values that msgspec can't encode. NaN and fields of a wrong type pass
    unnoticed; only decoding the result again finds them.
    """
    enc_hook, _ = hooks_of(job_class)
    return (msgspec.json.Encoder if encoding == "json" else msgspec.msgpack.Encoder)(enc_hook=enc_hook).encode


class Decoder:
    """Decodes one job class. Made once per class, since building msgspec's decoder costs more than a decode."""

    __slots__ = ("_by_type", "job_class")

    def __init__(self, job_class: type[Job]) -> None:
        _, dec_hook = hooks_of(job_class)
        self.job_class = job_class
        self._by_type: dict[str, Callable[[bytes], Job]] = {
            JSON: msgspec.json.Decoder(job_class, dec_hook=dec_hook).decode,
            MSGPACK: msgspec.msgpack.Decoder(job_class, dec_hook=dec_hook).decode,
        }

    def decode(self, body: bytes, content_type: str, content_encoding: str | None = None) -> Job:
        """Return the job in `body`, or raise `UndecodableError`.

        The content type must be JSON or MessagePack; parameters such as `; charset=utf-8` are allowed. The content encoding
        may be the name of a character set (`utf-8`, `us-ascii`) or `binary`, in any case. Compressed bodies can't be decoded.
        Whatever a `__post_init__` or a `dec_hook` raises, and the RecursionError of deep nesting, become `UndecodableError`.
        """
        if content_encoding and content_encoding.lower() not in _NOT_ENCODED:
            msg = f"content encoding {content_encoding!r:.80} isn't supported"
            raise UndecodableError(msg)
        decode = self._by_type.get(content_type) or self._by_type.get(content_type.partition(";")[0].strip().lower())
        if decode is None:
            msg = f"content type {content_type!r:.80} is neither {JSON} nor {MSGPACK}"
            raise UndecodableError(msg)
        try:
            return decode(body)
        except msgspec.MsgspecError as error:
            msg = f"the body can't be decoded as {self.job_class.__name__}: {said_by(error)}"
            raise UndecodableError(msg) from error
        except RecursionError as error:
            msg = f"the body can't be decoded as {self.job_class.__name__}: the value is nested too deeply"
            raise UndecodableError(msg) from error
        except (Exception, CancelledError) as error:
            msg = f"the body can't be decoded as {self.job_class.__name__}: {named(error)}"
            raise UndecodableError(msg) from error
