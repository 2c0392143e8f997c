"""A tokenizer for small models, trained on the texts they will read.

Words are learned pieces (byte-level BPE: every text can be written). What the prompts repeat is one token each: the instruction marks, the
task tags, and every box coordinate `<0>` ... `<100>`, so that a box is six tokens and a number is one decision instead of a spelling.
"""

from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from unimed.errors import UserError
from unimed.literal import plain, split
from unimed.models.unimed.configuration import TASKS

IMAGE_TOKEN = "<image>"
SPECIAL = ("<pad>", "<s>", "</s>", IMAGE_TOKEN)
MARKS = ("[INST]", "[/INST]", "<Img>", "</Img>", *(f"[{task}]" for task in (*TASKS, "qa")))
COORDINATES = tuple(f"<{number}>" for number in range(101))


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most `vocab_size` tokens; the same texts give the same tokenizer."""
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
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=[IMAGE_TOKEN],
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


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
        for mark in (*SPECIAL, *MARKS, *COORDINATES):
            piece = piece.replace(mark, "\0")
        found += piece.split("\0")
    return [piece for piece in found if piece]
