"""The lean step: pieces that make a training step smaller and faster and do not change what it computes.

Each file begins with what it computes, as a formula with shapes, then what it saves, and why the result is the same.
"""
