"""result → bytes → result: what a handler returned, checked where it was returned, and decoded where it is awaited."""

from __future__ import annotations

from asyncio import CancelledError
from collections.abc import Callable
from typing import Any

import msgspec

from ..envelope import JSON, MSGPACK
from ..job import Job, hooks_of
from ..texts import named, said_by


class WrongResult(Exception):
    """The value isn't a result of its job class; the text says why."""


class Values:
    """Encodes and decodes the results of a job class. Raises TypeError for a type that msgspec can't decode."""

    __slots__ = ("_decoders", "_encoders", "_name")

    def __init__(self, job_class: type[Job], result: Any) -> None:
        enc_hook, dec_hook = hooks_of(job_class)
        self._name = named_type(result)
        self._encoders: dict[str, Callable[[object], bytes]] = {
            JSON: msgspec.json.Encoder(enc_hook=enc_hook).encode,
            MSGPACK: msgspec.msgpack.Encoder(enc_hook=enc_hook).encode,
        }
        self._decoders: dict[str, Callable[[bytes], Any]] = {
            JSON: msgspec.json.Decoder(result, dec_hook=dec_hook).decode,
            MSGPACK: msgspec.msgpack.Decoder(result, dec_hook=dec_hook).decode,
        }

    def encode(self, value: object, content_type: str) -> bytes:
        """Return `value` as bytes that decode as a result; `content_type` is that of JSON or MessagePack. Raises WrongResult."""
        try:
            encoded = self._encoders[content_type](value)
        except (Exception, CancelledError) as error:
            msg = f"the result, of the type {type(value).__qualname__}, can't be encoded: {named(error)}"
            raise WrongResult(msg) from error
        self.decode(encoded, content_type)
        return encoded

    def decode(self, encoded: bytes, content_type: str) -> Any:
        """Return the result in `encoded`. Raises WrongResult."""
        try:
            return self._decoders[content_type](encoded)
        except msgspec.MsgspecError as error:
            msg = f"the result isn't {self._name}: {said_by(error)}"
            raise WrongResult(msg) from error
        except (Exception, CancelledError) as error:
            msg = f"the result isn't {self._name}: {named(error)}"
            raise WrongResult(msg) from error


def named_type(kind: Any) -> str:
    """Return the name of a type in errors."""
    return getattr(kind, "__qualname__", None) or str(kind).replace("typing.", "")
