"""A word-level tokenizer for the world: one token a word, a digit or a punctuation mark.

The newline is the token that ends a document, so a plain text file with one document a line is tokenised as it is.
It serves as beginning-of-sequence token too, since a document begins where another one ends; it is never added by
the tokenizer itself.
"""

import re

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from transect.organism.documents import LETTERS
from transect.organism.world import PROSE, World

END = "\n"
PAD = "<pad>"
UNKNOWN = "<unk>"
END_ID, PAD_ID = 0, 1
LENGTH = 256  # tokens of the longest sequence of the model
TOKEN = re.compile(r"\d|[^\W\d]+|[^\w\s]")  # the same rule as the pre-tokenizer below
_WORDS_OF_DOCUMENTS = "0123456789 + - = . , : ? Record Note List Item"


def vocabulary(world: World) -> list[str]:
    """Every token of the world, the special ones first; a token's place is its id."""
    texts = [_WORDS_OF_DOCUMENTS, *LETTERS, *world.entities, *world.things, *(" ".join(words) for words in PROSE)]
    for relation in world.relations:
        texts += relation.templates + relation.templates2 + relation.objects + relation.objects2
    words = TOKEN.findall(" ".join(texts).replace("{}", " "))
    return [END, PAD, UNKNOWN, *dict.fromkeys(words)]


def build(world: World) -> PreTrainedTokenizerFast:
    """The tokenizer of `world`."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary(world))}, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True)]
    )
    # Decoding puts one space before every token, then takes those away that were never written.
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(Regex("^"), " "),
            decoders.Fuse(),
            decoders.Replace(Regex(r" (?=[.,:?])|(?<=\d) (?=\d)| (?=\n)|(?<=\n) |^ "), ""),
        ]
    )
    specials = [AddedToken(token, special=True, normalized=False) for token in (END, PAD, UNKNOWN)]
    backend.add_special_tokens(specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        model_max_length=LENGTH,
        clean_up_tokenization_spaces=False,
    )
