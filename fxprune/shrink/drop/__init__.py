"""Residual blocks, and branches of residual sums, that leave."""
