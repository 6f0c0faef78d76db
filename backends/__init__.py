"""The targets: adding a folder with a `BACKEND` adds a backend."""
