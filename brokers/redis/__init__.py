"""`redis://…`: a broker on a Redis or Valkey that is already there; it says itself how durable it is."""
