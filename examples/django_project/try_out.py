"""A Django project with a worker: an order is taken in one process, and `leveret work` sends its invoice in another."""

import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
LEVERET = str(Path(sysconfig.get_path("scripts")) / "leveret")

with tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)
    sys.path.insert(0, str(HERE))
    os.environ |= {"PYTHONPATH": str(HERE)}

    # A worker that imports models before django.setup() names the line, and what to do.
    for settings in ({}, {"DJANGO_SETTINGS_MODULE": "shop.settings"}):
        refused = subprocess.run(
            [LEVERET, "describe", "orders.models:Order"],
            env={**os.environ, **settings},
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert refused.returncode == 2, refused
        assert f"({HERE / 'orders' / 'models.py'}, line " in refused.stderr, refused.stderr
        assert "call django.setup() before anything imports models" in refused.stderr, refused.stderr

    import shop.worker  # noqa: F401 - sets Django up, as manage.py would
    from django.core.management import call_command
    from orders.models import Order

    call_command("migrate", run_syncdb=True, verbosity=0)
    order = Order.take("a@example.org")

    with Path("log").open("w") as log:
        worker = subprocess.Popen([LEVERET, "work", "shop.jobs:app"], stderr=log)
        deadline = time.monotonic() + 60
        while not (done := Order.objects.get(pk=order.pk).invoiced) and time.monotonic() < deadline:
            time.sleep(0.05)
        worker.send_signal(signal.SIGTERM)
        code = worker.wait(60)
    assert done, Path("log").read_text()
    assert code == 0, Path("log").read_text()
    print(Path("log").read_text())
