"""What other distributions add to qeff-ir, each in one file."""
