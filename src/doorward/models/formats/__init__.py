"""Model files and directories of each format: reading, writing, wrapping."""
