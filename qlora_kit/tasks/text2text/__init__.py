"""Text to text: an encoder reads a source, and a decoder writes the target."""
