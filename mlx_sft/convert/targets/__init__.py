"""The forms that a run is exported to, other than a checkpoint and an adapter: a GGUF file, and a folder for TRL."""
