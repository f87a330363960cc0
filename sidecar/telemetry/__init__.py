"""Every metric and every log field, defined once (docs/telemetry.md)."""
