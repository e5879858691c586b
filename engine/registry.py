"""Plugins without registration: classes are found in the modules of a folder, or by entry points of other packages.

A framework, a mixture, a transfer protocol, a detector or a kind of data is a class derived from the base of its kind.
Put the class in a new file in the right folder, and it is found. If it lives in a package of your own, name its module
as an entry point:

    [project.entry-points."mixmask.protocols"]
    fewshot = "our_lab.fewshot"
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from types import ModuleType
from typing import Annotated, Any, Generic, TypeVar, Union, get_args

from pydantic import BaseModel, Field

from mixmask.engine.errors import ConfigError
from mixmask.engine.wording import closest_first

T = TypeVar("T")


def literal_of(field: str) -> Callable[[type[BaseModel]], tuple[str, ...]]:
    """A function from a recipe class to its names: what its ``field`` (``kind: Literal["moco", "mocov2"]``) allows."""
    return lambda model: tuple(map(str, get_args(model.model_fields[field].annotation)))


class Registry(Generic[T]):
    """All classes derived from a base class, by name.

    Args:
        base: The base class. A derived class without a name is a base, too.
        package: The package whose modules are imported to find the classes.
        group: The entry-point group in which other packages name their modules.
        what: What messages call such a class, for example ``protocol``.
        names_of: Returns the names of a class; none for a base.
    """

    def __init__(
        self, base: Any, package: str, group: str, what: str, names_of: Callable[[Any], Iterable[str]]
    ) -> None:
        self.base: type[T] = base
        self.package, self.group, self.what, self._names_of = package, group, what, names_of
        self._loaded = False

    def load(self) -> None:
        """Import every module of the folder and every entry point, once.

        Raises:
            ConfigError: If an entry point cannot be imported; names it and its package.
        """
        if self._loaded:
            return
        self._loaded = True
        home: ModuleType = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(home.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        load_entry_points(self.group)

    def classes(self) -> list[type[T]]:
        """Every class, in the order in which they were defined.

        Raises:
            ConfigError: If two classes share a name.
        """
        return list(dict.fromkeys(self.by_name().values()))

    def by_name(self) -> dict[str, type[T]]:
        """Every class under each of its names.

        Raises:
            ConfigError: If two classes share a name, a concrete class has no name, or a class with a name is abstract.
        """
        self.load()
        found: dict[str, type[T]] = {}
        for one in _derived(self.base):
            names = list(self._names_of(one))
            if not names and not one.__subclasses__() and not inspect.isabstract(one):
                raise ConfigError(
                    f"{one.__module__}.{one.__qualname__}: a {self.what} has a name, and this class gives none "
                    f'(such as kind: Literal["mine"])'
                )
            if names and inspect.isabstract(one):
                missing = ", ".join(sorted(getattr(one, "__abstractmethods__", ())))
                raise ConfigError(
                    f"{one.__module__}.{one.__qualname__}: the {self.what} '{names[0]}' does not define {missing}"
                )
            for name in names:
                if found.setdefault(name, one) is not one:
                    both = " and ".join(f"{c.__module__}.{c.__qualname__}" for c in (found[name], one))
                    raise ConfigError(f"the {self.what} '{name}' is defined twice: {both}")
        return found

    def get(self, name: object, where: str = "") -> type[T]:
        """The class with a given name.

        Args:
            name: The name that the user gave; None if none was given.
            where: Prefix of the error message, such as the file and the key.

        Raises:
            ConfigError: If there is none; lists all names, the closest first.
        """
        found = self.by_name()
        if name in found:
            return found[str(name)]
        given = f"there is no {self.what} {name!r}" if name is not None else f"no {self.what} is given"
        raise ConfigError(f"{where}{': ' if where else ''}{given}; valid: {', '.join(closest_first(name, found))}")


def one_of(registry: Registry[Any]) -> Any:
    """The type of a field that takes any of the registered recipes, discriminated by their ``kind``."""
    return Annotated[Union[tuple(registry.classes())], Field(discriminator="kind")]  # noqa: UP007


def load_entry_points(group: str) -> list[Any]:
    """Load all entry points of a group, and return what they name.

    Raises:
        ConfigError: If one cannot be imported; names it and its package.
    """
    found = []
    for entry in entry_points(group=group):
        try:
            found.append(entry.load())
        except Exception as error:
            owner = entry.dist.name if entry.dist is not None else "a package"
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ConfigError(
                f"entry point '{entry.name}' ({entry.value}) in the group {group} of {owner} cannot be loaded "
                f"({reason}); fix or uninstall {owner}"
            ) from error
    return found


def _derived(base: type[T]) -> Iterable[type[T]]:
    for one in base.__subclasses__():
        yield one
        yield from _derived(one)
