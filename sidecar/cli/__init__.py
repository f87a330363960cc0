"""custodyctl: the administrators' command line."""
