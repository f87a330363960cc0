"""A PostgreSQL server for development: found or fetched, and run from a folder of its own until it is not needed any more."""
