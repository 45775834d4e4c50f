"""What the user asks for. A plan knows nothing of graphs."""
