"""Set-up of a working copy: virtual environment, locked packages, the project on the path, the development HSM, a
PostgreSQL to test against.

Standard library only, since it runs before anything is installed. `make setup` starts it; with nothing to do it takes a moment.
"""
