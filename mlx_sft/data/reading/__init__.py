"""A file's bytes → rows: streams (compression, encodings) ─► lines, JSON ─► one reader a format."""
