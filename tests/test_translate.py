"""Relay between vocabularies: what the translation of a text with holes must keep."""

from dataclasses import replace
from itertools import chain, groupby

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import ALPHABET, LONG, SHORT, Pieces, blank, member, units_of, with_holes
from test_tie import problems, same

import tie
from tie import Canvas, Config, Member

PAIRS = st.permutations([member(SHORT), member(LONG)])
WORDS = st.text(ALPHABET, min_size=1, max_size=8)
WIDE = Pieces(*SHORT.pieces, b"\xef", b"\xbf", b"\xbd")  # can spell U+FFFD byte by byte


def regions(sender):
    """The sender's ids of a region, None where masked: words, masks and EOS in any order."""
    masks = st.lists(st.none(), min_size=1, max_size=3)
    ends = st.lists(st.sampled_from(sender.eos_ids), min_size=1, max_size=3)
    parts = st.lists(WORDS.map(sender.codec.encode) | masks | ends, max_size=6)
    return parts.map(lambda parts: list(chain(*parts)))


def content(ids, of):
    """What a region says: the bytes of its texts, and how many masks and EOS stand between them."""
    kinds = groupby(
        ids, key=lambda i: "mask" if i is None else "eos" if i in of.eos_ids else "text"
    )
    return [
        (kind, of.codec.decode([*run]) if kind == "text" else len([*run])) for kind, run in kinds
    ]


def without_filler(ids, parts):
    """Drops the last part if it may stretch: masks if `ids` ends in a mask, EOS otherwise."""
    filler = "eos" if ids and ids[-1] is not None else "mask"
    return parts[:-1] if parts and parts[-1][0] == filler else parts


def translated(ids, sender, receiver, length):
    """The region `ids` in the receiver's `length` positions; None if it doesn't fit."""
    tokens = torch.tensor([[5, *(4 if i is None else i for i in ids), 4]])  # text under the masks
    masked = torch.tensor([[False, *(i is None for i in ids), True]])
    sent = Canvas(tokens, masked, slice(1, 1 + len(ids)), slice(1 + len(ids), 2 + len(ids)))
    own = Canvas.blank([[6, 7]], [8], length, 2, mask_id=receiver.mask_id, pad_id=0)
    own.tokens[0, 2] = 9
    own.masked[0, 2] = False
    got, fits = tie.translate(sent, sender, own, receiver)
    units = units_of(got, 0)
    assert units[:2] + units[-3:] == [6, 7, 8, None, None]
    assert fits or units == units_of(own, 0)
    return units[2:-3] if fits else None


@given(PAIRS, st.data(), st.integers(-9, 9))
def test_text_masks_and_eos_keep_their_order_and_the_region_its_length(pair, data, spare):
    sender, receiver = pair
    ids = data.draw(regions(sender))
    parts = without_filler(ids, content(ids, sender))
    needed = 0
    for kind, part in parts:
        needed += len(receiver.codec.encode(part.decode())) if kind == "text" else part
    length = max(1, needed + spare)
    got = translated(ids, sender, receiver, length)
    assert (got is not None) == (needed <= length)
    if got is not None:
        assert len(got) == length
        assert without_filler(ids, content(got, receiver)) == parts


@given(PAIRS, st.data())
def test_there_and_back_is_the_identity_on_the_text(pair, data):
    sender, receiver = pair
    ids = data.draw(regions(sender))
    back = translated(translated(ids, sender, receiver, 300), receiver, sender, 300)
    assert without_filler(ids, content(back, sender)) == without_filler(ids, content(ids, sender))


@given(PAIRS, st.data())
def test_each_token_of_a_broken_character_becomes_one_mask(pair, data):
    sender, receiver = pair
    pieces = [i for i, piece in enumerate(sender.codec.pieces) if piece]
    words = st.tuples(WORDS.map(sender.codec.encode), st.integers(0, 3)).map(lambda x: x[0][x[1] :])
    parts = st.lists(
        st.lists(st.sampled_from(pieces), max_size=4) | words | st.just([None]), max_size=5
    )
    ids = list(chain(*data.draw(parts)))
    got = content(translated(ids, sender, receiver, 300), receiver)
    assert without_filler(ids, got) == without_filler(ids, content(with_holes(ids, sender), sender))
    assert not any(kind == "text" and "\ufffd" in part.decode() for kind, part in got)


def test_half_a_character_next_to_a_broken_one_is_masked_too():
    """e-acute with a byte that isn't UTF-8, then two thirds of a euro sign."""
    sender = Member(None, 5, 6, codec=Pieces(b"\xc3", b"\xa9\xff", b"\xe2", b"", b"\x82"))
    for ids in ([0, 1], [2, 3, 4]):
        assert translated(ids, sender, member(SHORT), 3) == [None, None, SHORT.special[1]]


def test_a_vocabulary_may_have_a_token_for_the_replacement_character():
    sender = Member(None, 1, 2, codec=Pieces("\ufffd".encode()))
    got = translated([0, 0], sender, member(WIDE), 9)
    assert content(got, member(WIDE))[0] == ("text", "\ufffd\ufffd".encode())


def test_rows_that_do_not_fit_keep_the_receivers_state():
    one = LONG.encode("a")
    row = LONG.encode("aA" * 9)  # SHORT has only single letters for these
    tokens = torch.tensor([one + row, one + one * len(row)])
    sent = Canvas(tokens, tokens < 0, slice(0, 1), slice(1, 1 + len(row)))
    own = blank(SHORT, 1, len(row))
    got, fits = tie.translate(sent, member(LONG), own, member(SHORT))
    assert fits.tolist() == [False, True]
    assert torch.equal(got.tokens[0], own.tokens[0]) and torch.equal(got.masked[0], own.masked[0])
    assert not got.masked[1].any() and own.masked.sum() == 2 + 2 * len(row)  # `own` is not changed


def test_a_reader_that_cannot_hold_a_text_has_no_say_in_its_score():
    members = [member(LONG, 15), member(SHORT, 2)]
    canvases = [blank(LONG, 8, 4), blank(SHORT, 4, 4)]
    rounds = []
    config = Config(interval=3, score="top1_probability")
    both = tie.ensemble(members, canvases, config, rounds.append).scores[0]  # (M, B)
    own = tie.ensemble(members, canvases, replace(config, cross_model=False)).scores[0]
    tokens, masked = [rounds[0][name][0] for name in ("tokens", "masked")]
    sent = replace(canvases[0], tokens=tokens, masked=masked)
    _, fits = tie.translate(sent, members[0], canvases[1], members[1])
    assert fits.tolist() == [True, False]
    assert torch.equal(both[0] == own[0], ~fits) and (both[1] != own[1]).all()


def test_members_that_undo_each_others_progress_end_too():
    """Both put half a character at every position, which the other must mask again."""

    def stubborn(codec):
        half = codec.pieces.index(b"\x90")
        logits = torch.eye(len(codec.pieces))[half]

        def denoise(tokens, positions, _):  # most confident with one half committed, not two
            sure = (tokens == half).sum(1) == 1  # (B,)
            return (logits * torch.where(sure, 9, 1)[:, None, None]).expand(*positions.shape, -1)

        return replace(member(codec), denoise=denoise)

    members = [stubborn(SHORT), stubborn(LONG)]
    canvases = [blank(SHORT, 0, 5), blank(LONG, 0, 6)]
    for m, canvas in zip(members, canvases):  # the second row has its last position already
        canvas.tokens[1, -1] = m.eos_ids[0]
        canvas.masked[1, -1] = False
    config = Config(interval=1, score="top1_probability", cross_model=False)
    result = tie.ensemble(members, canvases, config)
    assert all(canvas.complete.all() for canvas in result.candidates)
    # No relay after twice the steps of the longest: 12, and 10 in the second row.
    assert result.leaders.T.tolist() == [[0, 1] * 5 + [0], [0, 1] * 4 + [0, -1, -1]]


@given(problems((2, 3), mixed=False))
def test_one_vocabulary_copies_ids_without_its_codec(problem):
    bare = [replace(m, codec=None) for m in problem.members]
    same(tie.ensemble(bare, *problem[1:]), tie.ensemble(*problem))


class Careless:
    """A codec with mistakes that people make when they wrap a tokenizer."""

    def __init__(self, encode=WIDE.encode, decode=WIDE.decode):
        self.encode = encode
        self.decode = decode


def replacing(ids):
    return WIDE.decode(ids).decode(errors="replace").encode()  # half a character becomes U+FFFD


MASK, EOS, CLS = SHORT.special
HALF = SHORT.encode("\u00d0")[1:]
TEXT = SHORT.encode("a A")
DECODERS = [
    (TEXT, lambda ids: "a"),
    (TEXT, lambda ids: WIDE.decode(ids).strip()),
    (SHORT.encode("\u00d0"), replacing),
    (HALF + TEXT, replacing),
    (TEXT, lambda ids: b"\xef\xbf\xbd\xc3" * len(ids)),
]
ENCODERS = [
    lambda text: [MASK],
    lambda text: [*SHORT.encode(text), EOS],
    lambda text: [CLS, *SHORT.encode(text)],
    lambda text: [2, *SHORT.encode(text)],
    lambda text: SHORT.encode(text.lower()),
    lambda text: SHORT.encode(text.strip("a")),
]


@pytest.mark.parametrize(
    "message, ids, sender, receiver",
    [("m0.*each token's raw bytes", ids, Careless(decode=decode), LONG) for ids, decode in DECODERS]
    + [("m1.*round-trip text.*'a A'", TEXT, SHORT, Careless(encode)) for encode in ENCODERS],
)
def test_a_codec_that_does_not_keep_the_text_is_named(message, ids, sender, receiver):
    members = [
        Member(None, MASK, (EOS, CLS), f"m{m}", codec) for m, codec in enumerate((sender, receiver))
    ]
    with pytest.raises(ValueError, match=message) as error:
        translated(ids, *members, 30)
    assert "\n" not in str(error.value)
