"""A checkpoint layout: how this lab's training code names its tensors."""

from mixmask.transfer.checkpoints.layouts import HEAD, QUEUE, Layout

LAYOUTS = (
    Layout(
        "our-lab",
        "our lab's training code",
        trunk=r"student\.convnet\.",  # regular expression for the prefix of the trunk's names
        signs=(r"student\.align_head\..*",),  # keys that identify the layout
        others=((r"student\.align_head\..*", HEAD), (r"bank\..*", QUEUE)),  # what is left out, and why
        framework="align",
    ),
)
