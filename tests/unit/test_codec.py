"""Which bodies are decoded, by their content type and content encoding."""

from typing import Any

import pytest

from leveret import Job
from leveret.codec import Decoder, UndecodableError, encoder
from tests.unit.runs import Greet

decoder = Decoder(Greet)


@pytest.mark.parametrize(
    "encoding", [None, "", "utf-8", "UTF-8", "utf8", "Utf8", "us-ascii", "US-ASCII", "binary", "Binary"]
)
@pytest.mark.parametrize(("kind", "content_type"), [("json", "application/json"), ("msgpack", "application/msgpack")])
def test_an_encoding_that_changes_nothing_is_decoded(encoding: str | None, kind: Any, content_type: str) -> None:
    """kombu, Celery and pika programs send one with every message, so every one of their jobs would be buried."""
    job: Job = Greet("Grace")

    assert decoder.decode(encoder(Greet, kind)(job), content_type, encoding) == job


@pytest.mark.parametrize(
    "encoding", ["gzip", "GZIP", "deflate", "base64", "utf-16", "latin-1", "utf-8, gzip", "utf_8x"]
)
def test_a_real_encoding_is_named(encoding: str) -> None:
    """The text is all that who looks at the dead letter has; a body that is decoded as something else would run as a wrong job."""
    with pytest.raises(UndecodableError, match=f"^content encoding '{encoding}' isn't supported$"):
        decoder.decode(b'{"who": "Grace"}', "application/json", encoding)
