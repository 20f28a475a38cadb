"""The commands that are no part of a run; `cli.py` has the others, and adds these."""
