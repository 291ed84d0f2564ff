"""The expert of a fit, or several experts, whose layers then stand under one another like those of
one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

from torch import Tensor

from expertsteer_lens._checks import unknown_hook
from expertsteer_lens.data.activations import MEDIAN_TOKEN_NORMS, ActivationStore
from expertsteer_lens.data.chat import Text
from expertsteer_lens.data.states import CheckedStates
from expertsteer_lens.data.texts import are_states_of
from expertsteer_lens.errors import ArgumentError, DataError, HookNameError
from expertsteer_lens.hosts import as_host, fingerprints_match
from expertsteer_lens.hosts.facts import TOGETHER
from expertsteer_lens.hosts.side_by_side import StoredTokens

if TYPE_CHECKING:
    from expertsteer_lens.hosts import Host

FACTS = ("name", "fingerprint", "d_model", "n_layers", "basis", "prepend_bos")
"""What a fit keeps of each model."""
T = TypeVar("T")


class Experts:
    """One expert or several: each a model, or its states captured before.

    The hook points of one expert keep their names; those of several have the expert's name before
    them, as in `qwen/blocks.12.hook_resid_post`.

    Args:
        sources: by name; the name of a single one is empty.
        tokens: every token of a single one that is given as states.

    Example:
        >>> from expertsteer_lens import zoo
        >>> expert, target = zoo.load_pair(host="huggingface")
        >>> Experts.of([expert, target]).hook_names()[6]
        'target/blocks.0.hook_resid_post'
    """

    def __init__(
        self, sources: Mapping[str, Host | ActivationStore], tokens: StoredTokens | None = None
    ) -> None:
        self.sources, self.tokens = dict(sources), tokens

    @classmethod
    def of(cls, given: Any) -> Experts:
        """Of what `ExpertSteer.fit` is given.

        Raises:
            ArgumentError: an empty list, or the same model twice in it.
        """
        if isinstance(given, Experts):
            return given
        if not isinstance(given, list | tuple):
            return cls({"": given if isinstance(given, ActivationStore) else as_host(given)})
        if not given:
            raise ArgumentError("expert is an empty list; give a model, or a list of models.")
        sources = [one if isinstance(one, ActivationStore) else as_host(one) for one in given]
        for i, one in enumerate(sources):
            if any(_model(one) is _model(other) for other in sources[:i]):
                raise ArgumentError(f"expert holds the same model twice: {_short_name(one)!r}.")
        if len(sources) == 1:
            return cls({"": sources[0]})
        named: dict[str, Host | ActivationStore] = {}
        for source in sources:
            name, again = _short_name(source), 2
            while name in named:
                name, again = f"{_short_name(source)}-{again}", again + 1
            named[name] = source
        return cls(named)

    @property
    def hosts(self) -> list[Host]:
        """Those that are models."""
        return [s for s in self.sources.values() if not isinstance(s, ActivationStore)]

    @property
    def are_models(self) -> bool:
        """Whether none is given as states."""
        return len(self.hosts) == len(self.sources)

    def with_tokens(self, tokens: ActivationStore, texts: Sequence[Text]) -> Experts:
        """The same with the states of every token of these texts.

        Raises:
            ArgumentError: the expert is a model, or there are several.
            DataError: the tokens are of other texts or of another model, or do not say where they
                end.
        """
        if self.hosts or len(self.sources) > 1:
            raise ArgumentError(
                "expert_tokens goes with one expert that is given as states; a model is read."
            )
        if not are_states_of(tokens.provenance, texts):
            raise DataError(
                "expert_tokens holds states of other texts than those of pairs and anchors, in "
                "this order; make them with ExpertSteer(...).capture(expert, pairs, "
                "anchors=anchors, tokens=True)."
            )
        found = str(tokens.provenance.get("fingerprint"))
        if not fingerprints_match(found, self.fingerprint):
            raise DataError(
                f"expert_tokens holds states of another model (fingerprint {found}) than expert "
                f"({self.fingerprint})."
            )
        known = self.hook_names()
        unknown = [name for name in tokens if name not in known]
        if unknown:
            raise DataError(
                f"expert_tokens holds {unknown[0]!r}, at which expert has no states; read both at "
                "the same hook points."
            )
        return Experts(self.sources, StoredTokens(tokens, texts))

    @property
    def gives_tokens(self) -> bool:
        """Whether tokens of all of them can be paired with the target's."""
        return self.are_models or self.tokens is not None

    @property
    def fingerprint(self) -> str:
        """Of all of them."""
        return TOGETHER.join(
            str(
                s.provenance.get("fingerprint") if isinstance(s, ActivationStore) else s.fingerprint
            )
            for s in self.sources.values()
        )

    def are_as_wide_as(self, target: Host) -> bool:
        """Whether all have the target's width."""
        return all(s.d_model == target.d_model for s in self.sources.values())

    def hook_names(self) -> list[str]:
        """Where they are read by default: the residual after every block."""
        return [
            self.name_of(label, hook)
            for label, source in self.sources.items()
            for hook in (source if isinstance(source, ActivationStore) else source.hook_names())
        ]

    def check(self, hook_names: Sequence[str]) -> list[str]:
        """Whether they can be read there.

        Raises:
            HookNameError: one has no such hook point.
            ModelStateError: one cannot be read.
        """
        checked = []
        for label, names in self.split(hook_names).items():
            source = self.sources[label]
            if isinstance(source, ActivationStore):
                for name in names:
                    if name not in source:
                        raise unknown_hook(name, list(source), "the expert's states")
            else:
                source.check_ready()
                names = source.check_hook_names(names)
            checked += [self.name_of(label, name) for name in names]
        return checked

    def split(self, hook_names: Sequence[str]) -> dict[str, list[str]]:
        """The hook points of each expert, under the names they have in it.

        Raises:
            HookNameError: a name says no expert.
            ArgumentError: an expert is left out.
        """
        if list(self.sources) == [""]:
            return {"": list(hook_names)}
        found: dict[str, list[str]] = {label: [] for label in self.sources}
        for name in hook_names:
            label, _, hook = name.partition("/")
            if label not in found or not hook:
                raise HookNameError(
                    f"expert_hook_names: {name!r} must begin with the name of an expert and a "
                    f"slash, one of {', '.join(f'{label}/' for label in found)}."
                )
            found[label].append(hook)
        left_out = [label for label, names in found.items() if not names]
        if left_out:
            raise ArgumentError(
                f"expert_hook_names names no hook point of {left_out[0]!r}; name one, or leave "
                "this expert out."
            )
        return found

    def join(self, of_each: Sequence[Mapping[str, T]]) -> dict[str, T]:
        """One mapping by hook name, of those of each expert."""
        return {
            self.name_of(label, hook): value
            for label, mapping in zip(self.sources, of_each, strict=True)
            for hook, value in mapping.items()
        }

    def joined(self, stores: Sequence[ActivationStore]) -> ActivationStore:
        """One store of the same texts, of those of each expert."""
        if len(stores) == 1:
            return stores[0]
        places = self.join([{hook: (store, hook) for hook in store} for store in stores])
        parts = [cast("CheckedStates", store.activations) for store in stores]

        def read(hook_name: str) -> Tensor:
            """The states of one expert at one hook point."""
            store, hook = places[hook_name]
            return store[hook]

        states = CheckedStates(
            self.join([part.shapes for part in parts]), read, held=all(p.held for p in parts)
        )
        facts = {**stores[0].provenance, "hook_names": list(states)}
        medians = self.join([store.provenance.get(MEDIAN_TOKEN_NORMS, {}) for store in stores])
        facts |= {MEDIAN_TOKEN_NORMS: medians} if medians else {}
        return ActivationStore(
            states, stores[0].labels, facts | self._facts([s.provenance for s in stores])
        )

    def _facts(self, of_each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What is said of all of them together: what they share, or the facts of each in turn."""
        together: dict[str, Any] = {}
        for name in FACTS:
            values = [facts.get(name) for facts in of_each]
            is_shared = name not in ("name", "fingerprint") and len(set(values)) == 1
            together[name] = values[0] if is_shared else TOGETHER.join(map(str, values))
        return together

    @staticmethod
    def name_of(label: str, hook_name: str) -> str:
        """What a hook point of an expert is called here."""
        return f"{label}/{hook_name}" if label else hook_name

    def __repr__(self) -> str:
        return f"Experts({', '.join(self.sources)})" if len(self.sources) > 1 else "Experts(one)"


def model_facts(store: ActivationStore) -> dict[str, Any]:
    """What a fit keeps of the model whose states these are."""
    return {name: store.provenance.get(name) for name in FACTS}


def _model(source: Host | ActivationStore) -> Any:
    return source if isinstance(source, ActivationStore) else source.model


def _short_name(source: Host | ActivationStore) -> str:
    """The last part of its name, which stands before hook names."""
    name = source.provenance.get("name") if isinstance(source, ActivationStore) else source.name
    return str(name or "expert").rstrip("/").rpartition("/")[2]
