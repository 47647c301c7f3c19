"""The text of a run as tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from dilated_models.text.order import RowOrder
from dilated_models.text.streams import ByteStream, TokenStream
from dilated_models.text.vocabulary import TokenizerVocabulary, token_cache
from dilated_models.training.evaluation import scored_ranges
from dilated_models.training.ranks import Ranks

if TYPE_CHECKING:
    from dilated_models.training.run import Run

_CACHE_FOLDER = "tokens"


class Text(NamedTuple):
    """The text of a run as tokens.

    Attributes:
        train: Tokens to train on.
        validation: Tokens to validate on.
        order: Order of the windows of `train`.
    """

    train: TokenStream
    validation: TokenStream
    order: RowOrder


def open_text(run: Run, announce: Callable[[str], None], ranks: Ranks) -> Text:
    """Open the text of a run; with a tokenizer, tokenise it into the run's folder, once.

    Args:
        run: The run.
        announce: Called with one line before tokenising, which can take long.
        ranks: The processes; rank 0 tokenises.

    Raises:
        ValueError: If either side of the text is too short.
    """
    if ranks.size > 1 and isinstance(run.vocabulary, TokenizerVocabulary):
        ranks.first(lambda: _streams(run, announce) and None)
    train, validation = ranks.together(lambda: _streams(run, announce))
    order = RowOrder(num_tokens=len(train), seq_len=run.training.seq_len, seed=run.training.seed)
    scored_ranges(len(validation), seq_len=run.training.seq_len)
    return Text(train, validation, order)


def _streams(run: Run, announce: Callable[[str], None]) -> tuple[TokenStream, TokenStream]:
    """Training and validation tokens; with a tokenizer, through a cache in the run's folder."""
    sides = [(ByteStream(pieces), pieces) for pieces in (run.split.train, run.split.validation)]
    vocabulary = run.vocabulary
    if not isinstance(vocabulary, TokenizerVocabulary):
        return sides[0][0], sides[1][0]
    announce("tokenising the text, unless that was done before")
    folder = run.folder / _CACHE_FOLDER
    train, validation = (token_cache(text, pieces, vocabulary, folder) for text, pieces in sides)
    return train, validation
