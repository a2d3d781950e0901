"""`LeveretInstrumentor`: traces without a line in the program."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from leveret import App
from leveret.middleware import Retries, Tracing
from leveret.middleware.instrumentor import LeveretInstrumentor
from leveret.testing import running
from tests.unit.middleware.test_tracing import Spans
from tests.unit.runs import Greet


@pytest.fixture
def spans() -> Iterator[Spans]:
    """Spans of apps, instrumented meanwhile."""
    made = Spans()
    LeveretInstrumentor().instrument(tracer_provider=made.provider)
    yield made
    LeveretInstrumentor().uninstrument()
    made.provider.shutdown()


def app_with(*layers: object) -> App:
    app = App("shop", middleware=list(layers))  # type: ignore[arg-type]

    @app.handler
    async def greet(job: Greet) -> None: ...

    return app


async def test_an_app_that_lists_no_tracing_is_traced(spans: Spans) -> None:
    """`opentelemetry-instrument leveret work` would run and record nothing."""
    app = app_with(Retries())
    async with running(app) as lab:
        await lab.publish(Greet())
        await lab.drain()
    assert [span.name for span in spans.all()] == ["send emails", "process emails"]


async def test_tracing_stands_outermost(spans: Spans) -> None:
    """Inside `Retries` it would see no outcome, and no republication's context."""
    app = app_with(Retries())
    assert [type(layer) for layer in app.layers] == [Tracing, Retries]
    (handler,) = app.handlers()
    assert [type(layer) for layer in handler.layers] == [Tracing, Retries]


async def test_an_app_that_lists_tracing_keeps_its_own_and_has_no_span_twice(spans: Spans) -> None:
    """Each publish and each run would be there twice."""
    own = Tracing(tracer_provider=spans.provider)
    app = app_with(Retries(), own)
    assert app.layers[1] is own
    async with running(app) as lab:
        await lab.publish(Greet())
        await lab.drain()
    assert [span.name for span in spans.all()] == ["send emails", "process emails"]


async def test_uninstrumented_it_is_gone() -> None:
    """A test suite that switches it off would go on recording."""
    app = app_with(Retries())
    LeveretInstrumentor().instrument()
    LeveretInstrumentor().uninstrument()
    assert [type(layer) for layer in app.layers] == [Retries]


SHOP = '''
import os, signal
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor
from leveret import App, Job, Queue

spans = open("spans.txt", "a")
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter(out=spans, formatter=lambda span: f"{span.name} {span.parent is not None}\\n")))
trace.set_tracer_provider(provider)

class Greet(Job, name="greet", queue=Queue("emails")):
    """A job."""

app = App("shop", default_broker="sqlite:///jobs.db")

@app.handler
async def greet(job: Greet) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
'''


def test_opentelemetry_instrument_leveret_work_traces_a_program_that_says_nothing_of_it(tmp_path: Path) -> None:
    """The command that people know from other libraries would run and record nothing."""
    (tmp_path / "shop.py").write_text(SHOP)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "LEVERET_"))}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"

    def run(*command: str) -> None:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, timeout=60, check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr

    run("opentelemetry-instrument", "python", "-c", "import shop; shop.app.blocking_publisher().publish(shop.Greet())")
    run("opentelemetry-instrument", "leveret", "work", "shop:app")
    assert (tmp_path / "spans.txt").read_text().splitlines() == ["send emails False", "process emails True"]


def test_a_worker_never_imports_it_by_itself() -> None:
    """It takes as long to import as all the rest."""
    program = "import sys, leveret, leveret.middleware, leveret.process.main; print([name for name in sys.modules if 'instrument' in name])"
    done = subprocess.run([sys.executable, "-c", program], check=True, timeout=60, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
