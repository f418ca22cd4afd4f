"""The controllers against each other, and the objectives in training, on the demo task.

``arms`` says what is run, ``runs`` runs one of them and keeps its results in a file, ``pool`` runs all that are
missing, ``tables`` and ``plots`` read the collected results alone.
"""
