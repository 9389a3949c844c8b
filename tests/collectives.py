"""What devices say to each other in a compiled program."""

import re

_COLLECTIVE = re.compile(
    r"\b(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast)"
    r"(?:-start)?\("
)


def collectives(program: str) -> list[str]:
    """The kinds of the communicating operations, in order, of a program as XLA prints it."""
    return _COLLECTIVE.findall(program)
