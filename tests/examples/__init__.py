"""What other distributions add to qeff-ir, each in one file: the public API alone is enough for them."""
