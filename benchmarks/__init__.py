"""Measurements: one command per question, peers in the same run, medians over interleaved repetitions."""
