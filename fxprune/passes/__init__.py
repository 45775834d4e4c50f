"""Passes: the only code that edits a program. Each takes a program and returns a new one."""
