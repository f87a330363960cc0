"""Provider standards. Pure: a connector renders requests and reads answers; it sends nothing and keeps nothing.

What differs between providers of one standard stands in `catalog/*.yaml`, never in code.
"""
