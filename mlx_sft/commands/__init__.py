"""The commands that train nothing and write no model; `cli.py` has the others, and adds these."""
