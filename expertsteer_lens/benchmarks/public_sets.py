"""The public benchmarks that are known by name: where each is found and how its rows are read. No
data is here.

The choice is ours: sets in wide use in four domains whose published columns we could confirm."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from . import readers
from .readers import Reader

Domain = Literal["medicine", "finance", "mathematics", "general"]
DOMAINS: tuple[Domain, ...] = get_args(Domain)
QUESTION = "Question: {question}\nAnswer: {choice}"
BARE = "{question}\nAnswer: {choice}"
CONTINUED = "{question} {choice}"


@dataclass(frozen=True, eq=False)
class PublicBenchmark:
    """Where a public benchmark is found and how its rows are read; it holds no data."""

    name: str
    domain: Domain
    hub_id: str
    """Data set on the Hugging Face hub."""
    config: str | None
    """Its configuration, if it has several."""
    split: str
    """Split read by default; always one that is published with answers."""
    columns: tuple[str, ...]
    """Published columns that are read; a local file needs these."""
    read: Reader
    licence: str
    """As its publishers state it; check before use."""
    template: str = QUESTION
    """Text of one answer; the prompt is what stands before `{choice}`."""
    note: str = ""
    only: tuple[str, str] | None = None
    """(column, value): other rows are left out."""
    data_files: str | None = None
    """Files on the hub where the data set itself cannot be loaded by name."""

    def __repr__(self) -> str:
        config = f", {self.config!r}" if self.config else ""
        where = f"{self.hub_id!r}{config}, split {self.split!r}"
        return f"PublicBenchmark({self.name!r}, {self.domain}: {where}, {self.licence})"


def _mmlu(subject: str, domain: Domain) -> PublicBenchmark:
    return PublicBenchmark(
        f"mmlu_{subject}",
        domain,
        "cais/mmlu",
        subject,
        "test",
        ("question", "choices", "answer"),
        readers.columns("question", "choices", "answer"),
        "MIT",
        note="a subject's own dev split has five items, so the test split is read; "
        "report no accuracy on it afterwards",
    )


def _mmlu_pro(category: str, domain: Domain) -> PublicBenchmark:
    return PublicBenchmark(
        f"mmlu_pro_{category}",
        domain,
        "TIGER-Lab/MMLU-Pro",
        None,
        "test",
        ("question", "options", "answer_index", "category"),
        readers.columns("question", "options", "answer_index"),
        "MIT",
        only=("category", category),
    )


_LABELLED = ("choices", "answerKey")
_ARC = PublicBenchmark(
    "arc_challenge",
    "general",
    "allenai/ai2_arc",
    "ARC-Challenge",
    "train",
    ("question", *_LABELLED),
    readers.labelled_choices("question"),
    "CC BY-SA 4.0",
)
_FPB = "hf://datasets/takala/financial_phrasebank@refs/convert/parquet/sentences_allagree/train/*.parquet"
_ALL = (
    PublicBenchmark(
        "pubmedqa",
        "medicine",
        "qiaojin/PubMedQA",
        "pqa_labeled",
        "train",
        ("question", "context", "final_decision"),
        readers.pubmedqa,
        "MIT",
        BARE,
        "long prompts: the abstract is part of the question",
    ),
    PublicBenchmark(
        "medmcqa",
        "medicine",
        "openlifescienceai/medmcqa",
        None,
        "train",
        ("question", "opa", "opb", "opc", "opd", "cop"),
        readers.medmcqa,
        "Apache-2.0",
        note="the test split has no answers",
    ),
    PublicBenchmark(
        "medqa",
        "medicine",
        "GBaker/MedQA-USMLE-4-options",
        None,
        "train",
        ("question", "options", "answer_idx"),
        readers.columns("question", "options", "answer_idx"),
        "CC BY 4.0",
    ),
    *(
        _mmlu(s, "medicine")
        for s in (
            "anatomy",
            "clinical_knowledge",
            "college_biology",
            "college_medicine",
            "medical_genetics",
            "professional_medicine",
        )
    ),
    _mmlu_pro("health", "medicine"),
    PublicBenchmark(
        "financial_phrasebank",
        "finance",
        "takala/financial_phrasebank",
        "sentences_allagree",
        "train",
        ("sentence", "label"),
        readers.sentiment("sentence", ("negative", "neutral", "positive")),
        "CC BY-NC-SA 3.0",
        BARE,
        "read from the hub's parquet copy: the set itself is a loading script",
        data_files=_FPB,
    ),
    PublicBenchmark(
        "twitter_financial_news",
        "finance",
        "zeroshot/twitter-financial-news-sentiment",
        None,
        "train",
        ("text", "label"),
        readers.sentiment("text", ("bearish", "bullish", "neutral")),
        "MIT",
        BARE,
    ),
    *(
        _mmlu(s, "finance")
        for s in (
            "econometrics",
            "high_school_macroeconomics",
            "high_school_microeconomics",
            "professional_accounting",
        )
    ),
    _mmlu_pro("business", "finance"),
    _mmlu_pro("economics", "finance"),
    PublicBenchmark(
        "gsm8k",
        "mathematics",
        "openai/gsm8k",
        "main",
        "train",
        ("question", "answer"),
        readers.gsm8k,
        "MIT",
        note="free answers: wrong numbers are made, three within 20 % of the right one, "
        "by the seed",
    ),
    PublicBenchmark(
        "aqua_rat",
        "mathematics",
        "deepmind/aqua_rat",
        "raw",
        "train",
        ("question", "options", "correct"),
        readers.aqua_rat,
        "Apache-2.0",
    ),
    PublicBenchmark(
        "math_qa",
        "mathematics",
        "regisss/math_qa",
        None,
        "train",
        ("Problem", "options", "correct"),
        readers.math_qa,
        "Apache-2.0",
    ),
    *(
        _mmlu(s, "mathematics")
        for s in (
            "abstract_algebra",
            "college_mathematics",
            "elementary_mathematics",
            "high_school_mathematics",
            "high_school_statistics",
        )
    ),
    _mmlu_pro("math", "mathematics"),
    PublicBenchmark(
        "truthfulqa",
        "general",
        "truthfulqa/truthful_qa",
        "multiple_choice",
        "validation",
        ("question", "mc1_targets"),
        readers.truthfulqa,
        "Apache-2.0",
        note="one right answer (MC1)",
    ),
    _ARC,
    replace(_ARC, name="arc_easy", config="ARC-Easy"),
    PublicBenchmark(
        "openbookqa",
        "general",
        "allenai/openbookqa",
        "main",
        "train",
        ("question_stem", *_LABELLED),
        readers.labelled_choices("question_stem"),
        "not stated on the hub",
    ),
    PublicBenchmark(
        "commonsense_qa",
        "general",
        "tau/commonsense_qa",
        None,
        "train",
        ("question", *_LABELLED),
        readers.labelled_choices("question"),
        "MIT",
        note="the test split has no answers",
    ),
    PublicBenchmark(
        "hellaswag",
        "general",
        "Rowan/hellaswag",
        None,
        "train",
        ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
        readers.hellaswag,
        "MIT",
        CONTINUED,
        "the test split has no answers",
    ),
    PublicBenchmark(
        "boolq",
        "general",
        "google/boolq",
        None,
        "train",
        ("question", "passage", "answer"),
        readers.boolq,
        "CC BY-SA 3.0",
        BARE,
        "long prompts: the passage is part of the question",
    ),
    PublicBenchmark(
        "winogrande",
        "general",
        "allenai/winogrande",
        "winogrande_xl",
        "train",
        ("sentence", "option1", "option2", "answer"),
        readers.winogrande,
        "not stated on the hub",
        CONTINUED,
        "the test split has no answers",
    ),
    PublicBenchmark(
        "piqa",
        "general",
        "baber/piqa",
        None,
        "train",
        ("goal", "sol1", "sol2", "label"),
        readers.piqa,
        "AFL-3.0",
    ),
    PublicBenchmark(
        "sciq",
        "general",
        "allenai/sciq",
        None,
        "train",
        ("question", "correct_answer", "distractor1", "distractor2", "distractor3"),
        readers.sciq,
        "CC BY-NC 3.0",
    ),
)
PUBLIC_BENCHMARKS: dict[str, PublicBenchmark] = {p.name: p for p in _ALL}
