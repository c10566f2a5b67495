"""The machine: the same numbers sooner or in less memory. What changes them in any way is not here.

Each way has a plain twin, and tests compare the two (docs/numerics.md, fast paths).
"""
