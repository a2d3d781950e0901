"""The job store in a SQLite file, beyond what every store promises."""

from pathlib import Path

from leveret.brokers.sqlite import open_store
from leveret.runtime import Runtime
from leveret.store import Change, Key


async def test_looking_makes_no_file(tmp_path: Path) -> None:
    """A mistyped path leaves a file behind, which looks like a store from then on."""
    path, key = tmp_path / "mistyped.db", Key("one", 1)
    store = open_store(f"sqlite:///{path}", Runtime(app="shop"))

    assert [await store.list(limit=5), await store.find("one"), await store.ended([key])] == [[], [], []]
    assert (list(await store.read([key])), await store.newest(["one"])) == ([None], [None])
    assert (await store.abort(key), await store.drop([key]), await store.trim(5)) == ("unknown", 0, 0)
    assert not path.exists()

    change = Change(
        job_id="one", publish=1, queue="q", job="j", state="queued", passes=0, attempt=1, keep_s=60, at_ms=1
    )
    await store.write([change])
    assert await store.newest(["one"]) == [key]
    await store.close()
