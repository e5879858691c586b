"""Checkpoint layouts of self-supervised frameworks, as data: the prefix of the trunk, and why all else is left out.

A tensor's name is its full path through the file's containers: ``state_dict.module.encoder_q.conv1.weight``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from mixmask.engine.errors import ConfigError
from mixmask.engine.registry import load_entry_points
from mixmask.transfer.checkpoints.names import DETECTRON2, SEQUENTIAL, TORCHVISION, TRANSFORMERS, Names

# C: containers that training scripts put a state dict in. W: the prefix of (Distributed)DataParallel, once per wrapper.
C = r"(?:(?:state_dict|model_state_dict|model_state|state\.model|model|network)\.)?"
W = r"(?:module\.)*"

HEAD, EMA, QUEUE, STATE = "head", "momentum or averaged copy", "queue of negatives", "optimizer and training state"
TWIN = "the trunk's tensors by another name"  # checked: they must be equal
CURRENT = "weights that were not averaged"
STUDENT = "student network"


@dataclass(frozen=True)
class Layout:
    """How a framework names the tensors of its checkpoints.

    Attributes:
        name: What ``--as`` takes.
        about: The framework or library that writes it, in words.
        trunk: Regular expression of the prefix before the trunk's names.
        signs: Regular expressions, each of which some tensor must match for the layout to be recognised.
        others: (regular expression, reason) of tensors that are left out. The expression must match the full name. With
            the reason `TWIN`, the group ``same`` captures the tensor's name without the trunk's prefix.
        namings: The naming schemes that the trunk may use after the prefix.
        framework: The framework's name in tables.
    """

    name: str
    about: str
    trunk: str
    signs: tuple[str, ...] = ()
    others: tuple[tuple[str, str], ...] = ()
    namings: tuple[Names, ...] = (TORCHVISION, SEQUENTIAL)
    framework: str = "unknown"


# Tried in this order, the specific before the general: several of them keep the trunk under ``backbone.``.
LAYOUTS = (
    Layout(
        "mixmask-checkpoint",
        "the checkpoint of an unfinished run of this project",
        r"model\.(?:query_encoder|encoder|online)\.trunk\.",
        signs=(r"model\.(?:query_encoder|encoder|online)\.projector\..*",),
        others=((r"model\.(key_encoder|target)\..*", EMA), (r"model\.queue(_position)?", QUEUE)),
    ),
    Layout(
        "lucidrains-byol",
        "the BYOL learner of byol-pytorch, of which the online network is taken",
        rf"{C}{W}(?:learner\.)?net\.",
        signs=(rf"{C}{W}(?:learner\.)?online_encoder\.net\..*",),
        others=(
            # byol-pytorch registers the network twice: as ``net``, and inside ``online_encoder``.
            (rf"{C}{W}(?:learner\.)?online_encoder\.net\.(?P<same>.*)", TWIN),
            (rf"{C}{W}(?:learner\.)?target_encoder\..*", EMA),
        ),
        framework="byol",
    ),
    Layout(
        "openmmlab",
        "OpenSelfSup, MMSelfSup and MMPretrain",
        rf"{C}{W}backbone\.",
        signs=(rf"{C}{W}(?:neck|encoder_q\.0|online_net\.0)\..*",),
        others=(
            # The encoder is Sequential(backbone, neck), and its first child is registered as ``backbone``, too.
            (rf"{C}{W}(?:encoder_q|online_net|encoder|base_encoder)\.0\.(?P<same>.*)", TWIN),
            (rf"{C}{W}(?:encoder_q|online_net|encoder|base_encoder)\.1\..*", HEAD),
            (rf"{C}{W}(?:encoder_k|target_net|target|momentum_\w+|teacher)\..*", EMA),
            (rf"{C}{W}\w*(?:queue|memory)\w*(?:\..*)?", QUEUE),
        ),
        namings=(TORCHVISION,),
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
    # DINO's own evaluation takes the teacher, too (``--checkpoint_key teacher``).
    Layout(
        "dino",
        "DINO's full checkpoint, of which the teacher is taken",
        rf"teacher\.{W}(?:backbone\.)?",
        signs=(r"student\..*backbone\..*|dino_loss\..*",),
        others=((r"student\..*", STUDENT), (r"dino_loss\..*", STATE)),
        framework="dino",
    ),
    Layout(
        "lightly-dino",
        "lightly's DINO, of which the teacher is taken",
        rf"{C}{W}(?:teacher_)?backbone\.",
        signs=(rf"{C}{W}student_(?:backbone|head|projection_head)\..*",),
        others=((rf"{C}{W}student_\w+\..*", STUDENT), (rf"{C}{W}teacher_(?!backbone)\w*head\..*", HEAD)),
        framework="dino",
    ),
    Layout(
        "stable-pretraining",
        "stable-pretraining's teacher and student, of which the teacher is taken",
        rf"{C}{W}backbone\.teacher\.",
        signs=(rf"{C}{W}backbone\.student\..*",),
        others=((rf"{C}{W}\w+\.student\..*", STUDENT), (rf"{C}{W}\w+\.\w*ema_coefficient", STATE)),
    ),
    Layout(
        "ema-pytorch",
        "ema_pytorch, of which the averaged network is taken",
        r"ema_model\.",
        signs=(r"online_model\..*",),
        others=((r"online_model\..*", CURRENT), (r"initted|step", STATE)),
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
            (rf"{C}{W}(?:momentum|teacher|key|target)_\w+\..*", EMA),
            (r"current_model_state\..*", CURRENT),
            (rf"{C}{W}\w*(queue|memory)\w*", QUEUE),
            (rf"{C}{W}(?:transformer_encoder|pos_enc)\..*", HEAD),
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
            (rf"{C}{W}(momentum|teacher|target|key)_\w+\..*", EMA),
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
        "Detectron2's backbone, alone or in a detector",
        rf"{C}(?:backbone\.(?:bottom_up\.)?)?",
        others=(
            (
                rf"{C}(roi_heads|proposal_generator|pixel_mean|pixel_std|backbone\.(fpn_|top_block))\w*\b.*",
                "the detector around the trunk",
            ),
        ),
        namings=(DETECTRON2,),
    ),
    Layout("transformers", "a ResNet of transformers", rf"{C}{W}(?:resnet\.)?", namings=(TRANSFORMERS,)),
    Layout("plain", "a plain ResNet of torchvision or timm", rf"{C}{W}"),
    Layout(
        "inner",
        "a plain ResNet as a part of a module",
        rf"{C}{W}(?:model|net|network|resnet|encoder|trunk|backbone\.backbone|feature_extractor)\.{W}",
    ),
    Layout("averaged", "a file of an averaged network alone", rf"(?:state_dict_ema|model_ema|ema_state_dict|ema)\.{W}"),
)

# Tensors that any file may hold beside the trunk. Tried after the layout's own rules.
ANYWHERE = (
    (r"(state_dict_ema|model_ema|ema_state_dict|ema)\..*", EMA),
    (
        r"(state\.)?(optim\w*|scaler|amp|\w*scheduler\w*|\w*callbacks\w*|loops|loss|criterion|best_\w+|hyper_parameters"
        r"|trainer|message_hub|averaging_state|(\w+_)?rng(_\w+)?|random_state|args|config|cfg|meta|metrics|history)(\..*)?",
        STATE,
    ),
    (
        r"(.*\.)?(n_averaged|num_updates|temperature|log_temperature|logit_scale|tau|center|callbacks_modules\..*)",
        STATE,
    ),
    (
        r"(.*\.)?(\w*acc|\w*accuracy|\w*metrics?|\w*auroc|\w*top[0-9]+)(\..*)?\.(tp|fp|tn|fn|confmat|total|correct)",
        STATE,
    ),
    (
        r"(.*\.)?(fc|heads?|neck|classifiers?|projection|projetion|mlp(_head)?|(\w+_)?(projector|projection_head|prediction_head"
        r"|predictor)s?(_\w+|[0-9]+)?|online_classifier|classification_head|prototypes|linear\w*|contrastive_head|stem\.fc)\..*",
        HEAD,
    ),
)


@cache
def known_layouts() -> tuple[Layout, ...]:
    """Every layout, in the order in which they are tried: those of other packages (entry points) before ours.

    An entry point of the group ``mixmask.layouts`` names a module with ``LAYOUTS``.

    Raises:
        ConfigError: If an entry point cannot be loaded, or two layouts have the same name.
    """
    theirs = [layout for module in load_entry_points("mixmask.layouts") for layout in module.LAYOUTS]
    names = [layout.name for layout in (*theirs, *LAYOUTS)]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ConfigError(f"the layout '{twice[0]}' is defined twice; rename that of your package")
    return (*theirs, *LAYOUTS)
