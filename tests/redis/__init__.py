"""Real Redis and Valkey servers for tests: `node` finds and runs one, with replicas, sentinels and clusters; `installation` has the programs."""
