"""What is handed out: the compiled result, or a module that trains, with its report."""
