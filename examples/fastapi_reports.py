"""A FastAPI service whose clients start a report, watch its progress, fetch its result or abort it.

The service holds nothing: any of its processes answers for any report, by the job's id. Serve it with
`uvicorn examples.fastapi_reports:api`, beside `leveret work examples.fastapi_reports:app`; run by itself it tries itself out.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import httpx
import msgspec
from fastapi import FastAPI, HTTPException, Request

from leveret import App, Attempt, Job, Keep, Publisher, Queue, ResultError, StoreUnavailable
from leveret.testing import running


class Report(msgspec.Struct):
    year: int
    orders: int


class MakeReport(Job[Report], name="report.make", queue=Queue("reports"), keep=Keep(result_s=3600)):
    year: int


app = App("reports", default_broker="sqlite:///reports.db")  # SQLite and PostgreSQL also keep the results


@app.handler
async def make_report(job: MakeReport, attempt: Attempt) -> Report:
    orders = 0
    for month in range(1, 13):
        attempt.progress(month / 12, f"month {month} of {job.year}")
        await asyncio.sleep(0.02)
        orders += 100
    return Report(job.year, orders)


@asynccontextmanager
async def lifespan(service: FastAPI) -> AsyncGenerator[None, None]:
    async with app.publisher() as publisher:
        service.state.publisher = publisher
        yield


api = FastAPI(lifespan=lifespan)


def publisher_of(request: Request) -> Publisher:
    publisher: Publisher = request.app.state.publisher
    return publisher


@api.post("/reports/{year}", status_code=202)
async def start(year: int, request: Request) -> dict[str, str]:
    handle = await publisher_of(request).publish(MakeReport(year), timeout_s=2)
    return {"id": handle.job_id}


@api.get("/reports/{job_id}/status")
async def status(job_id: str, request: Request) -> dict[str, object]:
    try:
        now = await publisher_of(request).handle(job_id, MakeReport).status()
    except StoreUnavailable as error:
        raise HTTPException(503, "try again in a moment") from error
    return {"state": now.state, "progress": now.progress, "note": now.note}


@api.get("/reports/{job_id}")
async def result(job_id: str, request: Request) -> dict[str, int]:
    try:
        report = await publisher_of(request).handle(job_id, MakeReport).result(timeout_s=20)
    except TimeoutError as error:
        raise HTTPException(504, "not finished yet: ask again") from error
    except ResultError as error:  # it failed, was aborted or expired, or its result is gone
        raise HTTPException(410, str(error)) from error
    return {"year": report.year, "orders": report.orders}


@api.delete("/reports/{job_id}")
async def abort(job_id: str, request: Request) -> dict[str, str]:
    return {"said": await publisher_of(request).handle(job_id, MakeReport).abort()}


async def try_out() -> None:
    async with (
        running(app) as lab,  # the app's publishers go to a broker and a store in memory meanwhile
        api.router.lifespan_context(api),
        httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://reports") as client,
    ):
        job_id = (await client.post("/reports/2026")).json()["id"]
        await lab.drain()
        assert (await client.get(f"/reports/{job_id}")).json() == {"year": 2026, "orders": 1200}
        finished = (await client.get(f"/reports/{job_id}/status")).json()
        assert finished == {"state": "done", "progress": 1.0, "note": "month 12 of 2026"}

        job_id = (await client.post("/reports/2027")).json()["id"]
        said = (await client.delete(f"/reports/{job_id}")).json()["said"]
        assert said in {"aborted", "asked"}  # whether it had begun by then
        lab.advance(1)
        await lab.drain()
        gone = await client.get(f"/reports/{job_id}")
        assert (gone.status_code, gone.json()["detail"]) == (410, f"job report.make {job_id} was aborted")


if __name__ == "__main__":
    asyncio.run(try_out())
