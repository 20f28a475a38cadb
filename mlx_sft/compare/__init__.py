"""`mlx-sft compare`: which method, and at which learning rate? All on the same rows, by a small search, measured alike.

settings.py    what a comparison can be told
candidates.py  what is compared
trials.py      one run of one candidate at one learning rate
search.py      which runs there are, and how long they are
forgetting.py  how far a trained model has moved on general text
comparison.py  all of it, kept as it comes, so that it can be gone on with
table.py, page.py  what came out
"""
