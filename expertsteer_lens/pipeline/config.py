"""Settings of the four steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

from expertsteer_lens._checks import check_choice, check_number
from expertsteer_lens._config import check_field_types, check_known_fields, config_from_dict
from expertsteer_lens.align import AlignerConfig
from expertsteer_lens.learn.rfm import RFMConfig
from expertsteer_lens.measure.calibration import BudgetUnit
from expertsteer_lens.pair.mutual_information import MIConfig
from expertsteer_lens.pair.rules import PairingConfig

Preset = Literal["anchored", "paper"]
PRESETS: tuple[Preset, ...] = get_args(Preset)
MIOn = Literal["tokens", "texts"]
Reading = Literal["answer", "mean", "last", "attention"] | int

# What a field acts on, where that is not the choices made after reading; `refit`, which reads
# nothing, refuses changes of these, unless to the value "unread", for which nothing is read.
READING = {"acts_on": "reading"}
PASSES = {"acts_on": "passes"}


@dataclass(frozen=True, kw_only=True)
class ExpertSteerConfig:
    """Settings of the four steps. `ExpertSteerConfig.preset("anchored")` and `.preset("paper")` are
    the two to start from.

    A part may be given as a dict of its fields, so a config reads like the JSON it comes from.

    Raises:
        ArgumentError: a value that a field cannot take; the message names the field.

    Example:
        >>> config = ExpertSteerConfig(rfm={"n_rounds": 3}, budget=0.05)
        >>> config.rfm.n_rounds
        3
        >>> ExpertSteerConfig.from_dict(config.to_dict()) == config
        True
    """

    aligner: AlignerConfig = field(
        default_factory=lambda: AlignerConfig(kind="anchored_autoencoder")
    )
    """Step 1: how expert states are placed in the target's space. Chosen on the validation prompts
    of `benchmarks/real_pair.py`, where it steered further than the other kinds."""
    mi: MIConfig = field(default_factory=MIConfig)
    """Step 2: how layers are compared."""
    mi_on: MIOn = field(default="tokens", metadata={**READING, "unread": "texts"})
    """Step 2: on what layers are compared: "tokens", about a thousand pairs of tokens that end at
    the same character in both models (null and interval redraw whole texts), or "texts", one state
    a text. Tokens are used where the maps are fitted on token pairs, from the same passes. They
    say the order of the layer pairs far more reliably (docs/results.md)."""
    pairing: PairingConfig = field(default_factory=PairingConfig)
    """Step 2: which pairs are kept."""
    rfm: RFMConfig = field(default_factory=RFMConfig)
    """Step 3: how directions are learnt."""
    reading: Reading = field(default="answer", metadata=READING)
    """What state represents a text when states are *read*: "answer" (mean over the tokens of the
    answer: the last message of a chat, the part in which two plain texts of a pair differ, else the
    whole text), "mean" (over all tokens), "last" (the last token, which in most texts is the same
    full stop), "attention" (the answer's tokens, each weighted by the attention that the text's
    last token pays to it in that layer; needs a model that gives its weights), or an absolute token
    index. Which tokens are *steered* is another question: `positions` of the plan."""
    pair_tokens: bool = field(default=True, metadata=READING)
    """Fit the maps on the states of all tokens that end at the same character in both models, tens
    a text, instead of one state a text. For rules that need effects; where a tokenizer does not
    say which characters its tokens cover, one state a text is used and the steps say so."""
    align_on_pairs: bool = True
    """Fit the maps on the texts of the pairs too, without their labels, beside the anchors. They
    say most about the texts that will be mapped; with them a mapped mean difference comes close to
    the target's own."""
    batch_size: int = field(default=16, metadata=PASSES)
    """Texts per forward pass when states are read, and per backward pass of the attribution, which
    stores a pass of the whole target; >= 1. Calibration keeps nothing of a pass and takes 32."""
    held_out: float = field(default=0.3, metadata=READING)
    """Share of the anchors, in (0, 0.9], not used for fitting: half of it calibrates the
    coefficient, half is kept for the evaluation."""
    validation: float = field(default=0.5, metadata=READING)
    """Share of the behaviour's prompts, in (0, 1], used for choices; the rest is kept for the
    evaluation."""
    budget: float = 0.10
    """Largest damage to neutral texts, nats per token, > 0, that `coefficient="auto"` accepts."""
    budget_unit: BudgetUnit = "nll"
    """What the budget counts: "nll", the rise of the mean NLL, or "kl", the mean KL to the
    unsteered target."""

    def __post_init__(self) -> None:
        check_field_types(self)
        check_number("batch_size", self.batch_size, low=1, integer=True)
        check_number("held_out", self.held_out, low=0.0, high=0.9, low_open=True)
        check_number("validation", self.validation, low=0.0, high=1.0, low_open=True)
        check_number("budget", self.budget, low=0.0, low_open=True)

    @classmethod
    def preset(cls, name: Preset | str) -> ExpertSteerConfig:
        """ "anchored" (default; ours) or "paper" (reconstruction-only auto-encoder, lowest MI;
        depends on its seed)."""
        check_choice("preset", name, PRESETS)
        if name == "paper":
            return cls(
                aligner=AlignerConfig(kind="autoencoder"),
                pairing=PairingConfig(rule="min_mi"),
                reading="last",
                mi_on="texts",
                pair_tokens=False,
                align_on_pairs=False,
            )
        return cls()

    def to_dict(self) -> dict[str, Any]:
        """Nested JSON-able fields."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ExpertSteerConfig:
        """Inverse of `to_dict`; fields left out keep their defaults. "read_positions", the name
        of `reading` in version 0.1, is understood.

        Raises:
            ArgumentError: an unknown field, here or in a part, or a value that cannot be used; the
                message names the field, e.g. `config.aligner.kind`.
        """
        if isinstance(data, Mapping) and "read_positions" in data:
            data = {("reading" if k == "read_positions" else k): v for k, v in data.items()}
        return config_from_dict(cls, data)

    def changed(self, changes: Mapping[str, Any]) -> ExpertSteerConfig:
        """This config with some fields replaced; a part is replaced as a whole.

        Raises:
            ArgumentError: an unknown field, or a value that cannot be used.
        """
        check_known_fields(type(self), changes, "config")
        return replace(self, **changes)


def reading_settings(config: ExpertSteerConfig) -> dict[str, Any]:
    """The fields that act where texts are divided and models read, by name."""
    return {
        f.name: getattr(config, f.name)
        for f in fields(config)
        if f.metadata.get("acts_on") == READING["acts_on"]
    }


def reading_changes(
    old: ExpertSteerConfig, new: ExpertSteerConfig, *, passes_are_run: bool
) -> list[str]:
    """Names of the fields that differ but could act only where models are read.

    Args:
        old: the settings that the states were read under.
        new: the settings asked for now.
        passes_are_run: whether gradients will be taken, which `batch_size` divides into passes.
    """
    without_effect = {"reading"} if passes_are_run else {"reading", "passes"}
    return [
        f.name
        for f in fields(old)
        if f.metadata.get("acts_on") in without_effect
        and getattr(new, f.name) not in (getattr(old, f.name), f.metadata.get("unread"))
    ]
