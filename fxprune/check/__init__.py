"""The oracle, the calls that it is asked on, and comparisons with it."""
