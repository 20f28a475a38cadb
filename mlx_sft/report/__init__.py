"""The run, seen: what a run folder's files say, as a page and in columns. It reads files only, of runs that train and of those that ended.

metrics.py  metrics.jsonl in one pass, as curves that stay small
run.py      the other files: settings, machine, data
verdict.py  what it all says, in sentences
page.py     report.html
runs.py     the runs of a folder, listed and removed
side_by_side.py  several runs beside each other
"""
