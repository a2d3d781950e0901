"""The publishing service: it knows the contract, and none of the code that does the work."""
