"""Tests of the outbox, its relays and the inbox, on a real PostgreSQL and a real RabbitMQ."""
