"""Real PostgreSQLs for tests: `node` finds and runs one, with standbys and PgBouncers; `installation` has the programs, `process` the signals."""
