"""The proof that a command was carried out."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a command wrote. Pass it as `after=` to read it back."""

    command_id: UUID
    aggregates: tuple[tuple[UUID, int], ...]
    """Pairs of an aggregate's id and its version after the command."""
    position: int
    """Position in the log of the command's last event; 0 if it wrote none."""
    repeated: bool = False
    """The command had been carried out before; this is the first receipt again."""
    behind: tuple[str, ...] = ()
    """Views that were to be waited for, and have not seen what was written in time."""

    @classmethod
    def at(cls, position: int) -> Receipt:
        """Return what stands for a receipt of which only the position has come along."""
        return cls(UUID(int=0), (), position)
