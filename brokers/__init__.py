"""The brokers: `memory` for tests, `sqlite` embedded, `rabbitmq` in production.

A program names its broker by URL and doesn't import it: `leveret.schemes` looks the scheme up in a table and imports only
the package for that scheme, so that a worker doesn't pay for the other brokers.

Brokers that keep rows in a store share `turns`, `leases` and `rows`.
"""
