"""Metrics of RULER, LongBench and SQuAD: prediction and references -> a score between 0 and 1.

Each takes one prediction and one reference, except the two string matches, which take all references; `score` is the
entry that knows them by name and takes the best reference, as the benchmarks do.
"""

from __future__ import annotations

import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Sequence

from cacheclip_jax.errors import BadInput

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CHINESE = ("！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣"  # noqa: RUF001
            "､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏.")  # noqa: RUF001
_CHINESE_PUNCTUATION = str.maketrans("", "", string.punctuation + _CHINESE)
_CONTROL = re.compile(r"[\x00-\x1f]")


def normalize(text: str) -> str:
    """Lower case, without ASCII punctuation, articles and extra white space (SQuAD v1.1's evaluation)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """Share of the references that the prediction contains, case aside (RULER: needles, vt, cwe, fwe)."""
    found = _CONTROL.sub("\n", prediction).strip().lower()
    return sum(r.lower() in found for r in references) / len(references) if references else 0.0


def string_match_part(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction contains any of the references, case aside (RULER: qa)."""
    found = _CONTROL.sub("\n", prediction).strip().lower()
    return float(any(r.lower() in found for r in references))


def exact_match(prediction: str, reference: str) -> float:
    """1 if both are the same after normalisation."""
    return float(normalize(prediction) == normalize(reference))


def f1(prediction: str, reference: str) -> float:
    """Token F1 after normalisation (SQuAD, LongBench). 0 where either has no token left."""
    return _f1(normalize(prediction).split(), normalize(reference).split())


def f1_zh(prediction: str, reference: str) -> float:
    """F1 over Chinese words as jieba cuts them (LongBench)."""
    predicted, expected = ([t for word in _words_zh(text) if (t := _normalize_zh(word))]
                           for text in (prediction, reference))
    return _f1(predicted, expected)


def rouge_l(prediction: str, reference: str) -> float:
    """F of summary-level ROUGE-L as the package `rouge` computes it, which is LongBench's.

    LongBench scores 0 where that package's recursion runs too deep, in sentences of about 1,000 words; here it goes on.
    """
    from rouge import Rouge

    if not prediction.strip(" .\n\t") or not reference.strip(" .\n\t"):
        return 0.0
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, 2 * (len(prediction.split()) + len(reference.split())) + 1000))
    try:
        return float(Rouge(metrics=["rouge-l"]).get_scores([prediction], [reference])[0]["rouge-l"]["f"])
    finally:
        sys.setrecursionlimit(limit)


def rouge_l_zh(prediction: str, reference: str) -> float:
    """ROUGE-L over Chinese words as jieba cuts them (LongBench)."""
    return rouge_l(" ".join(_words_zh(prediction)), " ".join(_words_zh(reference)))


def code_similarity(prediction: str, reference: str) -> float:
    """Edit similarity of the first line that looks like code, that is without `, # or // (LongBench: lcc, repobench-p).

    Rounded to hundredths like fuzzywuzzy's ratio, which LongBench calls.
    """
    from rapidfuzz import fuzz

    lines = prediction.lstrip("\n").split("\n")
    line = next((x for x in lines if not any(mark in x for mark in ("`", "#", "//"))), "")
    return round(fuzz.ratio(line, reference)) / 100


def classification(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """1 over the number of classes that the prediction names, if the reference is one of them (LongBench: trec, lsht).

    A class whose name is part of the reference's doesn't count.
    """
    if not classes:
        raise BadInput("classification needs the classes' names: give classes=")
    named = [c for c in classes if c in prediction and (c == reference or c not in reference)]
    return 1 / len(named) if reference in named else 0.0


def count(prediction: str, reference: str) -> float:
    """Share of the numbers in the prediction that are the reference (LongBench: passage_count)."""
    numbers = re.findall(r"\d+", prediction)
    return sum(n == reference.strip() for n in numbers) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, reference: str) -> float:
    """Share of the numbers in the prediction that are the number of the reference, "Paragraph 7" or "段落7"."""
    number = re.search(r"(?:Paragraph |段落)(\d+)", reference)
    if number is None:
        raise BadInput(f"the reference {reference!r} names no paragraph: expected \"Paragraph 7\" or \"段落7\"")
    return count(prediction, number[1])


OVER_ALL: dict[str, Callable[[str, Sequence[str]], float]] = {
    "string_match_all": string_match_all, "string_match_part": string_match_part}
PER_REFERENCE: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match, "f1": f1, "f1_zh": f1_zh, "rouge_l": rouge_l, "rouge_l_zh": rouge_l_zh,
    "code_similarity": code_similarity, "count": count, "retrieval": retrieval}
METRICS = (*OVER_ALL, *PER_REFERENCE, "classification")


def score(metric: str, prediction: str, references: Sequence[str], *, classes: Sequence[str] = (),
          first_line: bool = False) -> float:
    """The best score over the references, by a metric's name; 0 where there is no reference.

    `first_line` keeps the prediction's first line only, as LongBench does for trec, triviaqa, samsum and lsht.
    Raises BadInput for an unknown name.
    """
    if metric not in METRICS:
        raise BadInput(f"metric {metric!r} is unknown: choose one of {', '.join(METRICS)}")
    if first_line:
        prediction = prediction.lstrip("\n").split("\n")[0]
    if metric in OVER_ALL:
        return OVER_ALL[metric](prediction, references)
    if metric == "classification":
        return max((classification(prediction, r, classes) for r in references), default=0.0)
    return max((PER_REFERENCE[metric](prediction, r) for r in references), default=0.0)


def _f1(predicted: Sequence[str], expected: Sequence[str]) -> float:
    same = sum((Counter(predicted) & Counter(expected)).values())
    return 2 * same / (len(predicted) + len(expected)) if same else 0.0


def _normalize_zh(text: str) -> str:
    return "".join(text.lower().translate(_CHINESE_PUNCTUATION).split())


def _words_zh(text: str) -> list[str]:
    import logging

    import jieba

    jieba.setLogLevel(logging.WARNING)
    return list(jieba.cut(text, cut_all=False))
