"""The brokers: `memory` for tests, `sqlite` embedded, `rabbitmq` in production.

A program names one by URL and imports none of them: `leveret.broker` looks the scheme up in a table and imports the
module that it needs, so that a worker pays for no other.
"""
