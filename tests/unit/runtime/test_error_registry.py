"""The registry of errors over all rooms: numbers by room, exit codes that tell kinds apart."""

import importlib
import pkgutil
from collections import defaultdict

import lazarette.backup
import lazarette.runtime
import lazarette.storage
from lazarette.storage.errors import EXIT_FAULT, EXIT_OK, EXIT_USAGE, LazaretteError, registry

_SHARED = {EXIT_OK, EXIT_FAULT, EXIT_USAGE}
_PROGRAMS = (".serve",)


def _all_errors() -> dict[int, type[LazaretteError]]:
    for room in (lazarette.storage, lazarette.backup, lazarette.runtime):
        for module in pkgutil.walk_packages(room.__path__, room.__name__ + "."):
            if not module.name.endswith(_PROGRAMS):
                importlib.import_module(module.name)
    return registry()


def test_numbers_say_the_room() -> None:
    first = {"lazarette.storage": 1, "lazarette.backup": 2, "lazarette.runtime": 3}
    for number, kind in _all_errors().items():
        room = ".".join(kind.__module__.split(".")[:2])
        if room in first:
            assert number // 100 == first[room], kind


def test_an_exit_code_means_one_kind_of_failure() -> None:
    """Classes that share an exit code are of one kind: the one is a case of the other's base."""
    holders: defaultdict[int, list[type[LazaretteError]]] = defaultdict(list)
    for kind in _all_errors().values():
        if "exit_code" in kind.__dict__ and kind.exit_code not in _SHARED:
            holders[kind.exit_code].append(kind)
    for code, kinds in holders.items():
        assert 3 < code <= 127, kinds  # 125-127 as the docker command line
        first, *others = kinds
        for other in others:
            common = [base for base in other.__mro__ if base in first.__mro__]
            assert common[0] is not LazaretteError, (code, kinds)
