"""Transfer: checkpoints in and out, classification and detection protocols on a given backbone.

``mixmask.transfer(recipe, overrides)`` runs one: see `mixmask.api.stages.transfer`.
"""
