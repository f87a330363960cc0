"""custodyctl, the administrators' command line. See docs/custodyctl.md.

Rules: standard output carries data, standard error carries talk; no PIN, token or key is taken from or shown on a command
line; everything that asks the sidecar goes through the Python client on the administration socket; what loads gRPC, rich or
PKCS#11 is imported inside the command that needs it, so that help is instant.
"""
