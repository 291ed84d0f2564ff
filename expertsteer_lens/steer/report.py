"""What steering has done so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from expertsteer_lens._html import repr_html

if TYPE_CHECKING:
    import pandas


@dataclass(eq=False)
class RunReport:
    """What steering has done so far: the counts of one `hooks`, `attach`, `apply` or `fwd_hooks`.

    Counts of tokens stay on the model's device until somebody reads them: a hook never waits.

    Example:
        >>> RunReport(n_forwards=2)
        RunReport(2 forward passes, tokens edited: {})
    """

    n_forwards: int = 0
    """Forward passes seen."""
    n_fired: dict[str, int] = field(default_factory=dict)
    """Calls of each hook."""
    _selected: dict[str, list[Any]] = field(default_factory=dict, repr=False)
    """By hook name: a number, and tensors yet to be added to it."""
    _edited: dict[str, list[Any]] = field(default_factory=dict, repr=False)

    @property
    def n_selected(self) -> dict[str, int]:
        """Tokens the position rule selected, by hook name."""
        return _add_up(self._selected)

    @property
    def n_edited(self) -> dict[str, int]:
        """Tokens edited (selected, gate open, coefficient not 0), by hook name, summed over its
        vectors."""
        return _add_up(self._edited)

    def to_pandas(self) -> pandas.DataFrame:
        """One row a hook: how often it fired, tokens selected and tokens edited.

        Example:
            >>> list(RunReport(n_forwards=2).to_pandas())
            ['hook_name', 'fired', 'selected', 'edited']
        """
        import pandas as pd

        selected, edited = self.n_selected, self.n_edited
        names = list(dict.fromkeys([*self.n_fired, *selected, *edited]))
        rows = [(n, self.n_fired.get(n, 0), selected.get(n, 0), edited.get(n, 0)) for n in names]
        return pd.DataFrame(rows, columns=["hook_name", "fired", "selected", "edited"])

    _repr_html_ = repr_html

    def __repr__(self) -> str:
        return f"RunReport({self.n_forwards} forward passes, tokens edited: {self.n_edited})"


def _add_up(counts: dict[str, list[Any]]) -> dict[str, int]:
    for parts in counts.values():
        parts[:] = [sum(int(part) for part in parts)]  # in place: the hooks go on counting here
    return {name: parts[0] for name, parts in counts.items()}
