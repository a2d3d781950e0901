"""Run every example, each in a process of its own: `make examples`. One that finds something wrong ends with an error."""

import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
EXAMPLES = {
    "index_files/try_out.py": ["--limit", "200"],
    "fastapi_service.py": [],
    "embedded_worker.py": [],
    "django_view.py": [],
    "django_project/try_out.py": [],
    "flask_service.py": [],
    "shared_contract/try_out.py": [],
    "database_pool.py": [],
    "retry_rules.py": [],
    "pydantic_fields.py": [],
    "own_layers.py": [],
}
# of their own, whatever the shell has set
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("LEVERET_")}


def run(name: str, arguments: list[str]) -> tuple[bool, str]:
    command = [sys.executable, str(HERE / name), *arguments]
    try:
        ended = subprocess.run(
            command,
            env=ENVIRONMENT,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
    except subprocess.TimeoutExpired as error:
        return False, f"{error}\n{error.output}\n"
    return ended.returncode == 0, ended.stdout


def main() -> int:
    failed = 0
    for name, arguments in EXAMPLES.items():
        began = time.monotonic()
        good, output = run(name, arguments)
        failed += not good
        print(
            f"{'ok' if good else 'FAILED':6} {time.monotonic() - began:5.1f} s  {name}\n{'' if good else output}",
            end="",
            flush=True,
        )
    return failed


if __name__ == "__main__":
    sys.exit(main())
