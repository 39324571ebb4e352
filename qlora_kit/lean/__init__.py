"""The lean step: pieces that make a training step smaller and faster and change nothing that it computes."""
