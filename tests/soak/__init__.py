"""A steady load on three nodes while a seeded script breaks one thing after another: `python -m tests.soak`, or `make soak`."""
