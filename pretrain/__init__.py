"""Pretraining: masks, mixtures, frameworks, and the stage that turns a recipe into a backbone.

``mixmask.pretrain(recipe, overrides)`` runs it: see `mixmask.api.stages.pretrain`.
"""
