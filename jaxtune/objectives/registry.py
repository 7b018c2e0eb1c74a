"""The objectives by name.

Each lies in a file of its own, named like the objective, which registers a function that builds it
from its section of the configuration.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

from jaxtune.config.schema import Config
from jaxtune.core.errors import UserError
from jaxtune.objectives.objective import Objective

Builder = Callable[[Config], Objective]

_BUILDERS: dict[str, Builder] = {}


def register(name: str) -> Callable[[Builder], Builder]:
    """Return a decorator that registers a builder under the name of its objective.

    A file of this package needs nothing more: `build_objective` imports the one named like the
    objective. Code outside the package registers in the same way:

        @register("mine")
        def build_mine(config: Config) -> Objective:
            return Objective(my_loss)

    Raises:
        ValueError: another module has registered this name.

    """

    def add(builder: Builder) -> Builder:
        previous = _BUILDERS.get(name)
        if previous is not None and previous.__module__ != builder.__module__:
            raise ValueError(
                f"The objective {name!r} is registered by {previous.__module__}. Choose another "
                f"name in {builder.__module__}."
            )
        _BUILDERS[name] = builder
        return builder

    return add


def build_objective(config: Config, name: str | None = None) -> Objective:
    """Build what the run minimizes.

    Args:
        config: the resolved configuration.
        name: a registered objective, where it is not `train.objective`; the schema limits the
            names that `train.objective` may have, and does not limit these.

    Raises:
        UserError: no objective of this name is registered.

    """
    name = name or config.train.objective
    module = f"{__package__}.{name}"
    if name not in _BUILDERS and name.isidentifier() and find_spec(module) is not None:
        import_module(module)
    if name not in _BUILDERS:
        raise UserError(
            f"There is no objective {name!r}. Register it first, with "
            f"jaxtune.objectives.registry.register({name!r})."
        )
    return _BUILDERS[name](config)
