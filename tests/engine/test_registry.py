"""Things that are found by being there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import pytest
from pydantic import BaseModel

from mixmask.engine.errors import ConfigError
from mixmask.engine.registry import Registry, literal_of


def registry(base: type[BaseModel]) -> Registry[BaseModel]:
    return Registry(base, "mixmask.engine.data", "mixmask.tests", "thing", literal_of("kind"))


def test_classes_are_found_under_all_their_names_and_bases_under_none() -> None:
    class Thing(BaseModel):
        kind: str

    class Between(Thing):
        shared: int = 0

    class Two(Between):
        kind: Literal["one", "two"] = "one"

    class Three(Thing):
        kind: Literal["three"] = "three"

    things = registry(Thing)
    assert things.by_name() == {"one": Two, "two": Two, "three": Three}
    assert things.classes() == [Two, Three]
    assert things.get("two") is Two
    with pytest.raises(ConfigError, match=r"^x: there is no thing 'thre'; valid: three, one, two$"):
        things.get("thre", "x")
    with pytest.raises(ConfigError, match=r"^no thing is given; valid: one, two, three$"):
        things.get(None)


def test_one_name_for_two_classes_is_a_mistake() -> None:
    class Thing(BaseModel):
        kind: str
        number: ClassVar[int] = 0

    class First(Thing):
        kind: Literal["same"] = "same"

    class Second(Thing):
        kind: Literal["same"] = "same"

    with pytest.raises(ConfigError, match=r"the thing 'same' is defined twice: .*First and .*Second"):
        registry(Thing).by_name()


def test_a_class_that_lacks_a_method_is_a_mistake() -> None:
    class Thing(BaseModel, ABC):
        kind: str

        @abstractmethod
        def work(self) -> None: ...

    class Unready(Thing):
        kind: Literal["unready"] = "unready"

    with pytest.raises(ConfigError, match=r"Unready: the thing 'unready' does not define work$"):
        registry(Thing).by_name()


@pytest.mark.parametrize(
    ("module", "name", "valid"),
    [
        ("mixmask.transfer.protocols", "PROTOCOLS", {"knn", "linear", "semisup", "detect_voc", "detect_coco"}),
        (
            "mixmask.pretrain.frameworks",
            "FRAMEWORKS",
            {
                "moco",
                "mocov2",
                "simclr",
                "byol",
                "simsiam",
                "mocov3",
                "barlowtwins",
                "vicreg",
                "swav",
                "dino",
                "densecl",
            },
        ),
        ("mixmask.pretrain.mixtures", "MIXTURES", {"none", "mixmask", "unmix", "mixmask+unmix", "erase"}),
        ("mixmask.engine.data", "KINDS", {"folder", "tiny_imagenet", "cifar"}),
    ],
)
def test_what_comes_with_the_project(module: str, name: str, valid: set[str]) -> None:
    import importlib

    assert valid <= {*getattr(importlib.import_module(module), name).by_name()}
