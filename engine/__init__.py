"""Ground floor: what every stage needs and no stage owns.

Configs, data sets, loaders, augmentation, backbones, schedules, the training loop, run directories, records.
"""
