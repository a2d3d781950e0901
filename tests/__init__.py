"""The tests of leveret; a folder a kind, and `rabbit`, which starts real brokers for them."""
