"""One file a migration, named by its revision. A released one is never edited."""
