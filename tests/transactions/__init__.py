"""Publishing inside a transaction of each library, on a real PostgreSQL. `clients` has the libraries, `model` what must be there afterwards."""
