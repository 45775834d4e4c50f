"""Times: interleaved timing, and two models side by side."""
