"""Who races beside this project, one runner a file."""
