"""Masks become constants, and weights go to the layouts that measured fastest."""
