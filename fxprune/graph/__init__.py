"""What any captured graph is: its nodes, its weights, its memory, its trace."""
