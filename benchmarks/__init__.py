"""Measurements of whole models. Each is a command (`python -m benchmarks.minilm`); figures go to results/."""
