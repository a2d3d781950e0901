"""A real RabbitMQ for tests: `node` finds and runs one, `raw` speaks plain AMQP to it, `proxy` spoils the link to it."""
