"""How much two texts share: F1, BLEU, ROUGE and METEOR as the release computes them; the usual F1, sacrebleu, rouge-score and CIDEr."""

import math
import re
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

_WEIGHTS = {n: tuple(1 / n for _ in range(n)) for n in (1, 2, 3, 4)}
# What the coco captions code drops after the PTB tokenizer. It also lists brackets, but in upper case, after lowering: those stay.
_DROPPED = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";", '"'}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_TOKEN = re.compile(r"\d+(?:[.,/]\d+)*|[^\W\d_]+(?:['/-]\w+)*|\.\.\.|--|\S")


def f1(prediction: str, reference: str) -> float:
    """Bag of words on normalised text, as released.

    TP counts predicted words (with repeats) that the reference has, FP those it lacks, FN reference words (with repeats) that were not
    predicted. Not the usual min-count F1. 0 when either side is empty.
    """
    predicted, wanted = Counter(prediction.split()), Counter(reference.split())
    hit = sum(count for word, count in predicted.items() if word in wanted)
    wrong = sum(count for word, count in predicted.items() if word not in wanted)
    missed = sum(count for word, count in wanted.items() if word not in predicted)
    return 2 * hit / (2 * hit + wrong + missed) if hit else 0.0


def min_count_f1(prediction: str, reference: str) -> float:
    """The usual F1 of two bags of words: a word counts as often as both sides have it."""
    predicted, wanted = Counter(prediction.split()), Counter(reference.split())
    hit = (predicted & wanted).total()
    return 2 * hit / (predicted.total() + wanted.total()) if hit else 0.0


def sentence_bleu(prediction: str, reference: str) -> tuple[float, float, float, float]:
    """Cumulative BLEU-1..4 of nltk, without smoothing."""
    from nltk.translate.bleu_score import sentence_bleu as bleu

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # nltk suggests smoothing whenever an n-gram order has no match
        one, two, three, four = (float(bleu([reference.split()], prediction.split(), weights=_WEIGHTS[n])) for n in (1, 2, 3, 4))
    return one, two, three, four


def smoothed_bleu(prediction: str, reference: str) -> tuple[float, ...]:
    """BLEU of n-grams of one length, 1 to 4, with nltk's smoothing 1: an order without a match counts 0.1; no common word: 0."""
    from nltk.translate.bleu_score import SmoothingFunction
    from nltk.translate.bleu_score import sentence_bleu as bleu

    smooth = SmoothingFunction().method1
    weights = [tuple(float(place == n) for place in range(4)) for n in range(4)]
    return tuple(float(bleu([reference.split()], prediction.split(), weights=one, smoothing_function=smooth)) for one in weights)


def has_coco() -> bool:
    """Whether pycocoevalcap and a Java runtime are there, so that its PTB tokenizer and METEOR can run."""
    try:
        import pycocoevalcap.meteor.meteor
        import pycocoevalcap.tokenizer.ptbtokenizer  # noqa: F401
    except ImportError:
        return False
    return shutil.which("java") is not None


def ptb_like(text: str) -> list[str]:
    """Lower-case words and numbers without punctuation marks: the PTB tokenizer's tokens on plain prose (contractions it would split)."""
    return [_BRACKETS.get(token, token) for token in _TOKEN.findall(text.lower()) if token not in _DROPPED]


def tokenise(texts: Sequence[str], coco: bool) -> list[list[str]]:
    """Tokens of each text, by pycocoevalcap's PTB tokenizer (``coco``) or by `ptb_like`."""
    if not coco:
        return [ptb_like(text) for text in texts]
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    lines = [" ".join(text.split()) for text in texts]  # the program counts lines, and knows more line ends than "\n"
    tokens = PTBTokenizer().tokenize({i: [{"caption": line}] for i, line in enumerate(lines)})
    return [tokens[i][0].split() for i in range(len(texts))]


def corpus_bleu(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> tuple[float, float, float, float]:
    """Corpus BLEU-1..4 with one reference each: clipped n-gram matches and lengths are summed over the corpus before dividing.

    The formula of the coco captions code, its tiny constants included, so an order without any match gives nearly 0 and not an error.
    """
    tiny, small = 1e-15, 1e-9
    matched, total = [0, 0, 0, 0], [0, 0, 0, 0]
    length = sum(len(prediction) for prediction in predictions)
    wanted_length = sum(len(reference) for reference in references)
    for prediction, reference in zip(predictions, references, strict=True):
        for n in (1, 2, 3, 4):
            have, want = _ngrams(prediction, n), _ngrams(reference, n)
            matched[n - 1] += sum(min(count, want[gram]) for gram, count in have.items())
            total[n - 1] += max(0, len(prediction) - n + 1)
    ratio = (length + tiny) / (wanted_length + small)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = [], 1.0
    for n in (1, 2, 3, 4):
        product *= (matched[n - 1] + tiny) / (total[n - 1] + small)
        scores.append(product ** (1 / n) * brevity)
    return scores[0], scores[1], scores[2], scores[3]


def _ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


@contextmanager
def _deep_calls(words: int) -> Iterator[None]:
    """The `rouge` package calls itself once a word of both texts, which Python stops at a thousand."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + 2 * words)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean F of ROUGE-1, -2 and -L by the `rouge` package; pairs with an empty side (after its own splitting) count 0."""
    from rouge import Rouge

    scorer, totals = Rouge(), {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}
    for prediction, reference in zip(predictions, references, strict=True):
        if not prediction.strip(" .") or not reference.strip(" ."):
            continue
        with _deep_calls(len(prediction.split()) + len(reference.split())):
            scores = scorer.get_scores(prediction, reference)[0]
        for ours, theirs in (("rouge1", "rouge-1"), ("rouge2", "rouge-2"), ("rougeL", "rouge-l")):
            totals[ours] += float(scores[theirs]["f"])
    return {name: total / max(1, len(predictions)) for name, total in totals.items()}


@lru_cache(maxsize=1)
def _meteor() -> Any:
    from pycocoevalcap.meteor.meteor import Meteor

    return Meteor()  # one Java process, which reads its paraphrase tables for several seconds: kept for the next call


def meteor(predictions: Sequence[str], references: Sequence[str]) -> float:
    """METEOR 1.5 of the corpus by pycocoevalcap (a Java program; ask `has_coco` first); a pair with an empty side matches nothing."""
    if not predictions:
        return 0.0
    score, _ = _meteor().compute_score({i: [text] for i, text in enumerate(references)}, {i: [text] for i, text in enumerate(predictions)})
    return float(score)


def standard_bleu(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Corpus BLEU-1..4 by sacrebleu, in 0..1: lower case, 13a tokens, exponential smoothing."""
    from sacrebleu.metrics import BLEU

    if not pairs:
        return {f"bleu{n}": 0.0 for n in (1, 2, 3, 4)}
    whole = BLEU(lowercase=True).corpus_score([one for one, _ in pairs], [[other for _, other in pairs]])
    shared = {"sys_len": whole.sys_len, "ref_len": whole.ref_len, "smooth_method": "exp"}
    orders = {n: BLEU.compute_bleu(whole.counts[:n], whole.totals[:n], **shared, max_ngram_order=n) for n in (1, 2, 3, 4)}
    return {f"bleu{n}": one.score / 100 for n, one in orders.items()}


@lru_cache(maxsize=1)
def _rouge_score() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"])


def standard_rouge(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Mean F measure of ROUGE-1, -2 and -L by rouge-score; text without a letter of a to z or a digit scores 0."""
    scores = [_rouge_score().score(wanted, given) for given, wanted in pairs]
    return {name: sum(float(one[name].fmeasure) for one in scores) / max(1, len(scores)) for name in ("rouge1", "rouge2", "rougeL")}


def cider(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """CIDEr-D of the corpus by pycocoevalcap, whose document frequencies are those of the references; {} where it is not installed."""
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError:
        return {}
    if not pairs:
        return {"cider": 0.0}
    given, wanted = ({i: [pair[side]] for i, pair in enumerate(pairs)} for side in (0, 1))
    value, _ = Cider().compute_score(wanted, given)
    return {"cider": float(value)}
