"""A real RabbitMQ for tests: `node` finds and runs one, `raw` speaks plain AMQP to it, `proxy` makes the link to it faulty."""
