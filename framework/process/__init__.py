"""One process of `leveret work` or `leveret cron`: its options, signals, logs and children."""
