"""Residual blocks that leave."""
