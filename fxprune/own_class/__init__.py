"""A smaller model of the user's own class, held against the same oracle as any other result."""
