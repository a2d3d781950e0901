"""`postgresql://…`: a durable broker in a database that is already there."""
