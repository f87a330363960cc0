"""Process 1: gRPC in, decisions, the database. It is the parent of the other two and never holds a secret of theirs.

`links` speaks to the children, `supervisor` starts, watches and replaces them.
"""
