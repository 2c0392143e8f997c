"""A tokenizer for small models, trained on the texts they will read.

Words are learned pieces (byte-level BPE: every text can be written). What the prompts repeat is one token each: the instruction marks, the
task tags, and every box coordinate `<0>` ... `<100>`, so that a box is six tokens and a number is one decision instead of a spelling.
"""

import re
from collections.abc import Iterable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from unimed.errors import UserError
from unimed.io import write_text
from unimed.literal import plain, split
from unimed.models.unimed.configuration import TASKS

IMAGE_TOKEN = "<image>"
SPECIAL = ("<pad>", "<s>", "</s>", IMAGE_TOKEN)
MARKS = ("[INST]", "[/INST]", "<Img>", "</Img>", *(f"[{task}]" for task in (*TASKS, "qa")))
COORDINATES = tuple(f"<{number}>" for number in range(101))
KEPT = 20  # tokenizers
_MARK = re.compile("|".join(map(re.escape, ("\0", *SPECIAL, *MARKS, *COORDINATES))))


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1024, kept: Path | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most `vocab_size` tokens; the same texts give the same tokenizer.

    kept: a file for the tokenizer of these texts, which are not read where it is there.
    """
    tokenizer = _read(kept) if kept else None
    if tokenizer is None:
        tokenizer = _learned(texts, vocab_size)
        if kept:
            _write(kept, tokenizer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=[IMAGE_TOKEN],
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def _read(path: Path) -> Tokenizer | None:
    """The tokenizer as it was written; None where the file is missing or damaged."""
    try:
        digest, _, text = path.read_text(encoding="utf-8").partition("\n")
        return Tokenizer.from_str(text) if digest == sha256(text.encode()).hexdigest() else None
    except (OSError, ValueError):
        return None


def _write(path: Path, tokenizer: Tokenizer) -> None:
    text = tokenizer.to_str()
    with suppress(OSError):  # it is made again at the next start
        write_text(path, f"{sha256(text.encode()).hexdigest()}\n{text}")
        for old in sorted(path.parent.iterdir(), key=lambda file: file.stat().st_mtime)[:-KEPT]:
            old.unlink()


def _learned(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learned = vocab_size - len(MARKS) - len(COORDINATES)
    least = len(SPECIAL) + len(alphabet) + len(MARKS) + len(COORDINATES)
    if vocab_size < least:
        raise UserError(f"tokenizer: vocab_size is {vocab_size}, it must be at least {least} (bytes, marks and coordinates)")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # Marks and coordinates never take part in merges: the trainer sees the text between them, as encoding will.
    pieces = (piece for text in texts for piece in _between_marks(text))
    tokenizer.train_from_iterator(
        pieces, trainers.BpeTrainer(vocab_size=learned, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False)
    )
    # A mark swallows the blanks before it, so one blank or two make no other prompt. Not "special": decoded answers keep them.
    tokenizer.add_tokens([AddedToken(mark, lstrip=True, normalized=False, special=False) for mark in MARKS])
    tokenizer.add_tokens([AddedToken(number, normalized=False, special=False) for number in COORDINATES])
    return tokenizer


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """The id of a token that the vocabulary must have."""
    index = tokenizer.convert_tokens_to_ids(token)
    if not isinstance(index, int) or index == tokenizer.unk_token_id:
        raise UserError(f"tokenizer: {token!r} is not in the vocabulary")
    return index


def _between_marks(text: str) -> list[str]:
    found = []
    for place, piece in enumerate(split(text)):
        if place % 2:
            found.append(plain(piece))  # written by a user, spelled when it is encoded
            continue
        found += _MARK.split(piece)
    return [piece for piece in found if piece]
