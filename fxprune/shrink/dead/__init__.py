"""Channels that masks left without effect, and the constants that stand in for them."""
