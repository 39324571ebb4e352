"""A release's files: read, written as a stream, and put in their place whole."""
