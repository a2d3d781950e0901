"""Real RabbitMQs for tests: `node` finds and runs one, `cluster` three on a `network` that can be cut; `raw` speaks plain AMQP, `proxy` spoils a link."""
