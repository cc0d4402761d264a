"""One suite a file; the file is its name."""
