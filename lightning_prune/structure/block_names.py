"""Block names: what tensors are called once blocks of a container are taken out, and the others move up."""

from collections.abc import Callable, Collection

Change = Callable[[int, list[int]], int]  # from the number of a block, and those of the ones that are removed


def is_inside(name: str, blocks: Collection[str]) -> bool:
    """Return whether a name is that of a block, or of something in it.

    >>> is_inside("layers.1.weight", ["layers.1"]), is_inside("layers.10.weight", ["layers.1"])
    (True, False)
    """
    return any(name == block or name.startswith(f"{block}.") for block in blocks)


def name_after(name: str, removed: Collection[str]) -> str:
    """Return the name that something has once blocks are removed.

    >>> name_after("layers.5.weight", ["layers.1", "layers.7"])
    'layers.4.weight'
    """
    return _renumbered(name, removed, lambda number, gone: number - sum(each < number for each in gone))


def name_before(name: str, removed: Collection[str]) -> str:
    """Return the name that something had before blocks were removed.

    >>> name_before("layers.4.weight", ["layers.1", "layers.7"])
    'layers.5.weight'
    """
    return _renumbered(name, removed, _earlier, back=True)


def _earlier(number: int, gone: list[int]) -> int:
    for each in gone:
        number += each <= number
    return number


def _renumbered(name: str, removed: Collection[str], change: Change, back: bool = False) -> str:
    """Return a name with the numbers of its blocks changed; ``removed`` has the names of before."""
    before: list[str] = []
    found: list[str] = []
    for part in name.split("."):
        gone = _numbers(".".join(before), removed) if part.isdigit() else []
        changed = str(change(int(part), gone)) if gone else part
        before.append(changed if back else part)
        found.append(changed)
    return ".".join(found)


def _numbers(container: str, removed: Collection[str]) -> list[int]:
    """Return the numbers of the blocks that are removed from a container, in ascending order."""
    places = [block.rpartition(".") for block in removed]
    return sorted(int(number) for owner, _, number in places if owner == container and number.isdigit())
