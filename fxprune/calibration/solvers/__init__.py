"""Masks and values of one weight, fitted to what it should give."""
