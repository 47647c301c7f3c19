"""The text of tokens that come one by one, as bytes, as soon as they are known."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from dilated_models.text.vocabulary import ByteVocabulary, Vocabulary


def text_pieces(
    vocabulary: Vocabulary, before: Sequence[int], tokens: Iterable[int]
) -> Iterator[bytes]:
    r"""The bytes that each token adds to a text.

    Of bytes, every token is a piece. A tokenizer may need several tokens for a character; they are
    one piece.

    Args:
        vocabulary: Of the tokens.
        before: Tokens before the first one. A tokenizer may write a token in another way where a
            text begins.
        tokens: The new tokens.

    Example:
        >>> list(text_pieces(ByteVocabulary(), [], [97, 195, 169]))
        [b'a', b'\xc3', b'\xa9']
    """
    if isinstance(vocabulary, ByteVocabulary):
        for token in tokens:
            yield bytes([token])
        return
    # Decode the last few tokens only: to decode the whole text for each token would be quadratic.
    known = list(before)[-8:]
    written = len(vocabulary.decode(known))
    shown = len(known)  # of the known tokens, how many are written
    for token in tokens:
        known.append(token)
        text = vocabulary.decode(known)
        # U+FFFD at the end is a character whose other bytes are still to come.
        if len(text) > written and not text.endswith("\ufffd"):
            yield text[written:].encode("utf-8")
            known = known[shown:]
            shown, written = len(known), len(vocabulary.decode(known))
    if rest := vocabulary.decode(known)[written:]:
        yield rest.encode("utf-8")
