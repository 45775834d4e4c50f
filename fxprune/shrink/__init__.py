"""What leaves for good: blocks, indices of groups, and channels that masks left without effect."""
