"""The layouts of the checkpoints of self-supervised methods, as data: what stands before the trunk, and what beside it.

A tensor is called by its whole way through the file's containers: ``state_dict.module.encoder_q.conv1.weight``.
"""

from __future__ import annotations

from dataclasses import dataclass

from transfer.checkpoints.names import DETECTRON2, SEQUENTIAL, TORCHVISION, Names

# Containers that the training scripts put a state dict in, and what wrappers put before every name.
C = r"(?:(?:state_dict|model_state_dict|model|network)\.)?"
W = r"(?:(?:module|_orig_mod)\.)*"

HEAD, EMA, QUEUE, STATE = "head", "momentum or averaged copy", "queue of negatives", "optimizer and training state"


@dataclass(frozen=True)
class Layout:
    """A way in which a framework names its tensors.

    Attributes:
        name: What ``--as`` takes.
        about: Whose it is, in words.
        trunk: Regular expression of all that stands before the trunk's names.
        signs: Regular expressions, each of which some tensor must match for the layout to be recognised.
        others: (regular expression, reason) of tensors that are left out; of whole names.
        namings: How the trunk's tensors may be named after ``trunk``.
        framework: The method's name in tables.
    """

    name: str
    about: str
    trunk: str
    signs: tuple[str, ...] = ()
    others: tuple[tuple[str, str], ...] = ()
    namings: tuple[Names, ...] = (TORCHVISION, SEQUENTIAL)
    framework: str = "unknown"


LAYOUTS = (
    Layout(
        "mixmask-checkpoint",
        "the checkpoint of an unfinished run of this project",
        r"model\.(?:query_encoder|encoder|online)\.trunk\.",
        signs=(r"model\.(?:query_encoder|encoder|online)\.projector\..*",),
        others=((r"model\.(key_encoder|target)\..*", EMA), (r"model\.queue(_position)?", QUEUE)),
    ),
    Layout(
        "moco",
        "MoCo v1 and v2, Un-Mix, MixMask",
        rf"{C}{W}encoder_q\.",
        others=((rf"{C}{W}encoder_k\..*", EMA), (rf"{C}{W}queue\w*", QUEUE)),
        framework="moco",
    ),
    Layout(
        "mocov3",
        "MoCo v3",
        rf"{C}{W}base_encoder\.",
        others=((rf"{C}{W}momentum_encoder\..*", EMA),),
        framework="mocov3",
    ),
    Layout(
        "dino",
        "DINO's full checkpoint, of which the teacher is taken",
        rf"teacher\.{W}(?:backbone\.)?",
        signs=(r"student\..*backbone\..*|dino_loss\..*",),
        others=((r"student\..*", "student network"), (r"dino_loss\..*", STATE)),
        framework="dino",
    ),
    Layout(
        "vissl",
        "VISSL",
        r"classy_state_dict\.base_model\.model\.trunk\.(?:base_model\.)?(?:_feature_blocks\.)?",
        others=(
            (r"classy_state_dict\.base_model\.model\.heads\..*", HEAD),
            (r"classy_state_dict\.loss\..*(encoder|momentum|teacher).*", EMA),
            (r"classy_state_dict\.(?!base_model\.model\.trunk\.).*", STATE),
        ),
    ),
    Layout(
        "swav",
        "SwAV",
        rf"{C}{W}",
        signs=(rf"{C}{W}prototypes\..*", rf"{C}{W}projection_head\..*"),
        framework="swav",
    ),
    Layout(
        "byol",
        "ports of BYOL, of which the online network is taken",
        rf"{C}{W}(?:online_network|online_encoder|online_backbone|online)(?:_state_dict)?\.{W}"
        r"(?:(?:encoder|net|backbone|trunk|resnet)\.)?",
        others=((rf"{C}{W}target_?\w*\..*", EMA),),
        framework="byol",
    ),
    Layout(
        "barlowtwins",
        "Barlow Twins' full checkpoint",
        rf"{C}{W}backbone\.",
        signs=(rf"{C}{W}projector\..*", rf"{C}{W}bn\.running_mean"),
        others=((rf"{C}{W}bn\..*", HEAD),),
        framework="barlowtwins",
    ),
    Layout(
        "vicreg",
        "VICReg's full checkpoint",
        r"model\.module\.backbone\.",
        signs=(r"model\.module\.projector\..*",),
        framework="vicreg",
    ),
    Layout(
        "solo-learn",
        "solo-learn, or another Lightning module",
        rf"{C}{W}backbone\.",
        others=(
            (rf"{C}{W}momentum_\w+\..*", EMA),
            (rf"{C}{W}\w*(queue|memory)\w*", QUEUE),
            (rf"{C}{W}\w*loss\w*\..*", STATE),
        ),
        namings=(TORCHVISION,),
    ),
    Layout(
        "lightly",
        "lightly",
        rf"{C}{W}(?:query_|student_)?backbone\.",
        others=(
            (rf"{C}{W}(backbone|projection_head)_momentum\..*", EMA),
            (rf"{C}{W}(momentum|teacher|target)_\w+\..*", EMA),
            (rf"{C}{W}(criterion|memory_bank)\..*", QUEUE),
        ),
        namings=(SEQUENTIAL,),
    ),
    Layout(
        "simsiam",
        "SimSiam",
        rf"{C}{W}encoder\.",
        signs=(rf"{C}{W}predictor\..*",),
        framework="simsiam",
    ),
    Layout(
        "detectron2",
        "Detectron2's backbone, alone or in a C4 detector",
        rf"{C}(?:backbone\.)?",
        others=((rf"{C}(roi_heads|proposal_generator|pixel_mean|pixel_std)\b.*", "the detector around the trunk"),),
        namings=(DETECTRON2,),
    ),
    Layout("plain", "a plain ResNet of torchvision or timm", rf"{C}{W}"),
)

# What may stand in any file beside the trunk; looked at after a layout's own.
ANYWHERE = (
    (r"(state_dict_ema|model_ema|ema)\..*", EMA),
    (
        r"(optim\w*|scaler|amp|\w*scheduler\w*|callbacks|loops|loss|criterion|best_\w+|hyper_parameters|trainer)(\..*)?",
        STATE,
    ),
    (
        r"(.*\.)?(fc|heads?|classifiers?|projectors?|projection|projetion|projection_head|prediction_head|mlp(_head)?"
        r"|predictor|online_predictor|online_classifier|classification_head|prototypes|linear\w*|contrastive_head|stem\.fc)\..*",
        HEAD,
    ),
)
