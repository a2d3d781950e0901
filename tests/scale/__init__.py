"""The PostgreSQL broker at scale: see `__main__`."""
