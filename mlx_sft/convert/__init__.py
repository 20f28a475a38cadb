"""Checkpoints in and out: what was trained merged into weights, the forms it leaves in, and the proof that they are what was trained."""
