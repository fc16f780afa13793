"""Scores of predictions, in percent, each as its official scorer gives it.

- captions: pycocoevalcap (CIDEr, BLEU, ROUGE-L, METEOR) after its PTB tokenizer. Tokenizer and METEOR are Java programs that come with it.
- answers: the accuracy of visualqa.org/evaluation.html.
- classes: accuracy, and for two classes the area under the ROC curve.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

# ---------------------------------------------------------------------------------------------------------------------
# Captions


def check_caption_scorer(tokenizer: str) -> None:
    """Raises ValueError, saying what to install, where captions could not be scored."""
    package = importlib.util.find_spec("pycocoevalcap")
    if package is None:
        raise ValueError("--task caption needs pycocoevalcap: pip install 'open_flamingo[evaluate]'")
    if tokenizer == "ptb" and shutil.which("java") is None:
        raise ValueError(
            "--task caption needs Java, in which the official tokenizer is written: apt-get install default-jre-headless. "
            "Or --caption_tokenizer simple, which needs none; its scores are near the official ones, not equal, and lack METEOR"
        )
    folders = package.submodule_search_locations or []
    if tokenizer == "ptb" and not all(os.access(os.path.join(folder, "tokenizer"), os.W_OK) for folder in folders):
        raise ValueError(
            f"--task caption: the official tokenizer writes a file into its own folder, {folders[0]}/tokenizer, which is not allowed here: "
            "install pycocoevalcap where you may write, or --caption_tokenizer simple"
        )


PUNCTUATION = re.compile(r"[^\w\s'-]|(?<!\w)['-]+|['-]+(?!\w)")


def simple_tokens(caption: str) -> str:
    """Lower case, without punctuation but within words: about what the PTB tokenizer and its list of punctuation leave."""
    caption = PUNCTUATION.sub(" ", caption.lower())
    return " ".join(re.sub(r"(n't|'(?:s|re|ve|ll|d|m))\b", r" \1", caption).split())


class CaptionScorer:
    """Scores captions of the same images again and again.

    Args:
        references: id → the captions that people gave.
        tokenizer: "ptb", the official one, or "simple".
    """

    def __init__(self, references: Mapping[str, Sequence[str]], tokenizer: str = "ptb") -> None:
        self._tokenizer = tokenizer
        self._references = self._tokens(references)
        self._meteor: Any = None  # its program takes seconds to start

    def _tokens(self, captions: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        if self._tokenizer == "simple":
            return {key: [simple_tokens(text) for text in texts] for key, texts in captions.items()}
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        # One line is one caption there.
        rows = {key: [{"caption": " ".join(text.split())} for text in texts] for key, texts in captions.items()}
        return PTBTokenizer().tokenize(rows)

    def __call__(self, captions: Mapping[str, str]) -> dict[str, float]:
        """`captions`: id → what the model says, of every reference."""
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge

        said = self._tokens({key: [captions[key]] for key in self._references})
        with contextlib.redirect_stdout(io.StringIO()):
            bleu, _ = Bleu(4).compute_score(self._references, said, verbose=0)
            cider, _ = Cider().compute_score(self._references, said)
            rouge, _ = Rouge().compute_score(self._references, said)
        scores = {"CIDEr": cider, "ROUGE-L": rouge} | {f"BLEU-{n}": value for n, value in enumerate(bleu, start=1)}
        if self._tokenizer == "ptb":
            from pycocoevalcap.meteor.meteor import Meteor

            self._meteor = self._meteor or Meteor()
            scores["METEOR"], _ = self._meteor.compute_score(self._references, said)
        return {name: 100 * float(value) for name, value in scores.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Answers

ARTICLES = {"a", "an", "the"}
NUMBERS = {
    **{"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"},
    **{"seven": "7", "eight": "8", "nine": "9", "ten": "10"},
}
MARKS = ';/[]"{}()=+\\_-><@`,?!'
# A word that lacks one apostrophe of these gets it.
CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd how'll
how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't
she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've
we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
FULL_FORMS = {
    word[:i] + word[i + 1 :]: word for word in CONTRACTIONS.split() for i, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}  # as the official table has it
PERIOD = re.compile(r"\.(?!\d)")
MAX_PERIODS = 32  # that the official program removes: it gives `re.sub` a flag where the count stands


@lru_cache(maxsize=1 << 18)  # the same answers are compared in every condition
def normalize_answer(text: str) -> str:
    """An answer as the VQA evaluation compares it: in lower case, without articles and punctuation, numbers as digits, contractions with
    their apostrophe."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    has_number = re.search(r"\d,\d", text) is not None  # 100,978 becomes 100978; its other marks go without a space too
    without = text
    for mark in MARKS:
        is_apart = f"{mark} " in text or f" {mark}" in text
        without = without.replace(mark, "" if is_apart or has_number else " ")
    without = PERIOD.sub("", without, count=MAX_PERIODS)
    words = [NUMBERS.get(word, word) for word in without.lower().split()]
    return " ".join(FULL_FORMS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """0 to 1: a third for each person who gave this answer, at most 1, averaged over leaving each person out.

    Of fewer than four answers, which could not give 1, one that is the same is enough.
    """
    said = normalize_answer(prediction)
    matches = [normalize_answer(answer) == said for answer in answers]
    if len(matches) < 4:
        return float(any(matches))
    return sum(min(1.0, (sum(matches) - match) / 3) for match in matches) / len(matches)


# ---------------------------------------------------------------------------------------------------------------------
# Classes


def roc_auc(is_positive: Sequence[bool], scores: Sequence[float]) -> float:
    """The chance that a positive has a higher score than a negative, half of equal ones counted; NaN without both kinds."""
    from scipy.stats import rankdata

    positives = sum(is_positive)
    negatives = len(is_positive) - positives
    if not positives or not negatives:
        return float("nan")
    ranks = rankdata(scores)
    of_positives = sum(rank for rank, positive in zip(ranks, is_positive, strict=True) if positive)
    return float(of_positives - positives * (positives + 1) / 2) / (positives * negatives)
