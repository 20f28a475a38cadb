"""How a chat template writes a conversation, and which characters of it the model must write itself.

reference ─► instrument ─► watch + colour ─► writing ─► headers, turns (or tags, or prefix);   `template` is the way in
"""
