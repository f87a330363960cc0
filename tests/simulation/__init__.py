"""The real custody code in a world that a seed decides: docs/reliability.md, "The simulation"."""
