"""Pretraining: masks, mixtures, frameworks, and the stage that turns a recipe into a backbone."""
