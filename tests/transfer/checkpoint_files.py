"""Checkpoint files as the projects of their names write them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixmask.transfer.checkpoints.names import COUNTER, to_detectron2


def moco_checkpoint(path: Path, state: dict[str, Tensor], **extra: Tensor) -> Path:
    """The layout that MoCo's main_moco.py writes: query and key encoder, two-layer heads, queue, optimizer."""
    tensors = {}
    for encoder in ("encoder_q", "encoder_k"):
        tensors.update({f"module.{encoder}.{name}": value for name, value in state.items()})
        for layer in (0, 2):
            tensors[f"module.{encoder}.fc.{layer}.weight"] = torch.zeros(2, 2)
            tensors[f"module.{encoder}.fc.{layer}.bias"] = torch.zeros(2)
    tensors.update({"module.queue": torch.zeros(4, 8), "module.queue_ptr": torch.zeros(1, dtype=torch.int64)}, **extra)
    optimizer = {"state": {}, "param_groups": [{"lr": 0.03}]}
    torch.save({"epoch": 200, "arch": "resnet50", "state_dict": tensors, "optimizer": optimizer}, path)
    return path


def save(tmp_path: Path, content: object) -> Path:
    torch.save(content, tmp_path / "x.pth")
    return tmp_path / "x.pth"


def sequential(state: dict[str, Tensor], numbers: Sequence[int]) -> dict[str, Tensor]:
    places = dict(zip(("conv1", "bn1", "layer1", "layer2", "layer3", "layer4"), map(str, numbers), strict=True))
    return {f"{places[name.split('.')[0]]}.{name.split('.', 1)[1]}": value for name, value in state.items()}


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


ONE = torch.zeros(1)

MLP = {"0.weight": torch.zeros(2, 2), "0.bias": ONE, "1.running_mean": ONE, "1.num_batches_tracked": ONE.long()}

OPTIMIZER = {"state": {0: {"momentum_buffer": ONE, "step": torch.zeros(())}}, "param_groups": [{"lr": 0.1}]}


def in_the_wild(state: dict[str, Tensor]) -> dict[str, tuple[str, str, Any]]:
    """File name to (layout, framework, content as the project of that name saves it)."""
    other = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    plain = {**state, "fc.weight": torch.zeros(10, 2), "fc.bias": ONE}
    listed = sequential(state, (0, 1, 4, 5, 6, 7))
    cifar_like = {
        name.replace("downsample", "shortcut"): tensor for name, tensor in sequential(state, (0, 1, 2, 3, 4, 5)).items()
    }
    arrays = {to_detectron2(name): tensor.numpy() for name, tensor in state.items() if not name.endswith(COUNTER)}
    detector = {
        **{
            f"{'roi_heads' if name.startswith('res5') else 'backbone'}.{name}": torch.from_numpy(array)
            for name, array in arrays.items()
        },
        **under("proposal_generator.rpn_head.conv.", {"weight": ONE}),
        **under("roi_heads.", {"res5.norm.weight": ONE, "box_predictor.cls_score.weight": ONE}),
    }
    moco1 = {
        **under("module.encoder_q.", {**state, "fc.weight": ONE, "fc.bias": ONE}),
        **under("module.encoder_k.", {**other, "fc.weight": ONE, "fc.bias": ONE}),
        "module.queue": ONE,
        "module.queue_ptr": ONE,
    }
    trunk = {"trunk": {"_feature_blocks": state}, "heads": under("0.clf.", MLP)}
    return {
        "moco_v1.pth.tar": ("moco", "moco", {"epoch": 200, "arch": "x", "state_dict": moco1, "optimizer": OPTIMIZER}),
        "moco_v3.pth.tar": (
            "mocov3",
            "mocov3",
            {
                "state_dict": {
                    **under("module.base_encoder.", {**state, **under("fc.", MLP)}),
                    **under("module.momentum_encoder.", other),
                    **under("module.predictor.", MLP),
                }
            },
        ),
        "simsiam.pth.tar": (
            "simsiam",
            "simsiam",
            {
                "state_dict": {
                    **under("module.encoder.", {**state, **under("fc.", MLP)}),
                    **under("module.predictor.", MLP),
                },
                "optimizer": OPTIMIZER,
            },
        ),
        "barlow_full.pth": (
            "barlowtwins",
            "barlowtwins",
            {
                "epoch": 1,
                "model": {
                    **under("module.backbone.", state),
                    **under("module.projector.", MLP),
                    "module.bn.running_mean": ONE,
                    "module.bn.running_var": ONE,
                },
                "optimizer": OPTIMIZER,
            },
        ),
        "barlow_resnet50.pth": ("plain", "unknown", state),
        "swav.pth.tar": (
            "swav",
            "swav",
            {**under("module.", state), **under("module.projection_head.", MLP), "module.prototypes.weight": ONE},
        ),
        "swav_ckp.pth": (
            "swav",
            "swav",
            {
                "state_dict": {
                    **under("module.", state),
                    **under("module.projection_head.", MLP),
                    "module.prototypes.weight": ONE,
                },
                "optimizer": OPTIMIZER,
                "amp": {"loss_scaler0": {"loss_scale": 1.0}},
            },
        ),
        "byol_a.pth": (
            "byol",
            "byol",
            {**under("online_network.", state), **under("target_network.", other), **under("predictor.", MLP)},
        ),
        "byol_b.pth": (
            "byol",
            "byol",
            {
                "model": {
                    **under("module.online_encoder.", {**state, **under("projector.", MLP)}),
                    **under("module.target_encoder.", other),
                    **under("module.online_predictor.", MLP),
                }
            },
        ),
        "byol_c.pth": (
            "byol",
            "byol",
            {
                "online_network_state_dict": {**under("encoder.", listed), **under("projetion.", MLP)},
                "target_network_state_dict": other,
                "optimizer_state_dict": OPTIMIZER,
            },
        ),
        "vicreg.pth": (
            "vicreg",
            "vicreg",
            {
                "epoch": 1,
                "model": {**under("module.backbone.", state), **under("module.projector.", MLP)},
                "optimizer": OPTIMIZER,
            },
        ),
        "dino.pth": (
            "dino",
            "dino",
            {
                "student": {**under("module.backbone.", other), **under("module.head.", MLP)},
                "teacher": {**under("module.backbone.", state), **under("module.head.", MLP)},
                "optimizer": OPTIMIZER,
                "args": Namespace(arch="x"),
                "dino_loss": {"center": ONE},
            },
        ),
        "dino_one_gpu.pth": (
            "dino",
            "dino",
            {
                "student": under("module.backbone.", other),
                "teacher": {**under("backbone.", state), **under("head.", MLP)},
            },
        ),
        "vissl.torch": (
            "vissl",
            "unknown",
            {
                "phase_idx": 3,
                "classy_state_dict": {
                    "base_model": {"model": trunk, "meta": {}},
                    "optimizer": OPTIMIZER,
                    "losses": ONE,
                },
            },
        ),
        "solo.ckpt": (
            "solo-learn",
            "unknown",
            {
                "epoch": 1,
                "pytorch-lightning_version": "1",
                "state_dict": {
                    **under("backbone.", state),
                    **under("momentum_backbone.", other),
                    **under("projector.", MLP),
                    **under("momentum_projector.", MLP),
                    **under("classifier.", {"weight": ONE}),
                    "queue": ONE,
                },
                "optimizer_states": [OPTIMIZER],
                "lr_schedulers": [],
                "callbacks": {},
            },
        ),
        "lightly.ckpt": (
            "lightly",
            "unknown",
            {
                "state_dict": {
                    **under("backbone.", listed),
                    **under("backbone_momentum.", listed),
                    **under("projection_head.layers.", MLP),
                    **under("projection_head_momentum.layers.", MLP),
                    "criterion.memory_bank.bank": ONE,
                },
                "optimizer_states": [OPTIMIZER],
            },
        ),
        "lightly_small.ckpt": (
            "lightly",
            "unknown",
            {"state_dict": {**under("backbone.", cifar_like), **under("prediction_head.layers.", MLP)}},
        ),
        "timm.pth.tar": (
            "plain",
            "unknown",
            {"arch": "x", "state_dict": plain, "state_dict_ema": plain, "optimizer": OPTIMIZER},
        ),
        "torchvision.pth": ("plain", "unknown", plain),
        "compiled.pth": ("plain", "unknown", under("module._orig_mod.", plain)),
        "detectron2.pkl": (
            "detectron2",
            "unknown",
            {"model": {**arrays, "stem.fc.0.weight": np.zeros(2)}, "__author__": "x"},
        ),
        "detector.pth": ("detectron2", "unknown", {"model": detector, "optimizer": OPTIMIZER, "iteration": 7}),
        "ours.pt": (
            "mixmask-checkpoint",
            "unknown",
            {
                "fingerprint": "x",
                "step": 3,
                "model": {
                    **under("query_encoder.trunk.", state),
                    **under("query_encoder.projector.", MLP),
                    **under("key_encoder.trunk.", other),
                    **under("key_encoder.projector.", MLP),
                    "queue": ONE,
                    "queue_position": ONE,
                },
                "optimizer": OPTIMIZER,
            },
        ),
    }
