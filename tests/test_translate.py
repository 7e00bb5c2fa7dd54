"""Relay between vocabularies: text with holes, and ensembles of mixed vocabularies."""

from dataclasses import replace
from itertools import chain, groupby

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import ALPHABET, LONG, SHORT, Fake, Pieces, Watched, with_holes
from test_tie import problems

import tie
from tie import Canvas, Config, Member


def member(codec: Pieces, seed: int = 0) -> Member:
    mask_id, *ends = codec.special
    return Member(Fake(seed, len(codec.pieces), mask_id, ends[0]), mask_id, tuple(ends), f"m{seed}", codec)


PAIRS = st.permutations([member(SHORT), member(LONG)])
WORDS = st.text(ALPHABET, min_size=1, max_size=8)


def regions(sender):
    """Ids of one region of the sender, None where masked: text, masks and EOS in turns."""
    masks, ends = (st.lists(st.sampled_from(ids), min_size=1, max_size=3) for ids in ([None], sender.eos_ids))
    return st.lists(WORDS.map(sender.codec.encode) | masks | ends, max_size=6).map(lambda parts: list(chain(*parts)))


def runs(ids, member) -> list[tuple]:
    """What a region says: runs of text by their bytes, runs of masks and of EOS by their number."""
    kinds = groupby(ids, key=lambda i: "mask" if i is None else "eos" if i in member.eos_ids else "text")
    return [(kind, member.codec.decode(list(run)) if kind == "text" else len(list(run))) for kind, run in kinds]


def without_rest(ids, said) -> list[tuple]:
    """Less the last run, where it fills the region: masks where the sender's `ids` end in a mask, EOS otherwise."""
    rest = "eos" if ids and ids[-1] is not None else "mask"
    return said[:-1] if said and said[-1][0] == rest else said


def tell(ids, sender, receiver, length):
    """The region `ids` in the receiver's `length` positions, None where masked; None where it does not fit."""
    tokens = torch.tensor([[5, *(4 if i is None else i for i in ids), 4]])  # under a mask anything may stand
    masked = torch.tensor([[False, *(i is None for i in ids), True]])
    own = Canvas.blank([[6, 7]], [8], length, 2, mask_id=receiver.mask_id, pad_id=0)
    own.tokens[0, 2], own.masked[0, 2] = 9, False
    sent = Canvas(tokens, masked, slice(1, 1 + len(ids)), slice(1 + len(ids), 2 + len(ids)))
    got, fits = tie.translate(sent, sender, own, receiver)
    assert got.tokens[0, [0, 1, -3]].tolist() == [6, 7, 8] and got.masked[0, -2:].all()
    if not fits:
        assert torch.equal(got.tokens, own.tokens) and torch.equal(got.masked, own.masked)
        return None
    pairs = zip(*(x[0, own.reasoning].tolist() for x in (got.tokens, got.masked)))
    return [None if hole else token for token, hole in pairs]


@given(PAIRS, st.data(), st.integers(-9, 9))
def test_text_masks_and_eos_keep_their_order_and_the_region_its_length(pair, data, more):
    sender, receiver = pair
    ids = data.draw(regions(sender))
    said = without_rest(ids, runs(ids, sender))
    needed = sum(len(receiver.codec.encode(part.decode())) if kind == "text" else part for kind, part in said)
    length = max(1, needed + more)
    told = tell(ids, sender, receiver, length)
    assert (told is not None) == (needed <= length)  # what does not fit is not handed over
    assert told is None or (without_rest(ids, runs(told, receiver)) == said and len(told) == length)


@given(PAIRS, st.data())
def test_there_and_back_is_the_identity_on_the_text(pair, data):
    sender, receiver = pair
    ids = data.draw(regions(sender))
    back = tell(tell(ids, sender, receiver, 500), receiver, sender, 500)
    assert without_rest(ids, runs(back, sender)) == without_rest(ids, runs(ids, sender))


@given(PAIRS, st.data())
def test_broken_characters_become_one_mask_a_token_and_never_a_replacement_character(pair, data):
    sender, receiver = pair
    tokens = st.lists(st.sampled_from([i for i, piece in enumerate(sender.codec.pieces) if piece]), max_size=4)
    halves = WORDS.map(sender.codec.encode).flatmap(lambda ids: st.integers(0, len(ids)).map(lambda i: ids[i:]))
    ids = list(chain(*data.draw(st.lists(tokens | halves | st.just([None]), max_size=5))))
    told = tell(ids, sender, receiver, 500)
    expected = with_holes(ids, sender)
    assert without_rest(ids, runs(told, receiver)) == without_rest(ids, runs(expected, sender))
    assert not any(kind == "text" and "\ufffd" in part.decode() for kind, part in runs(told, receiver))


def test_rows_that_do_not_fit_keep_the_receivers_state():
    one, row = LONG.encode("a"), LONG.encode("aA" * 9)  # SHORT has single letters alone for the second
    tokens = torch.tensor([one + row, one + one * len(row)])
    own = Canvas.blank([[1]] * 2, [2], 1, len(row), mask_id=SHORT.special[0], pad_id=0)
    sent = Canvas(tokens, tokens < 0, slice(0, 1), slice(1, 1 + len(row)))
    with torch.device("meta"):  # tensors that name no device land where nothing can be read
        got, fits = tie.translate(sent, member(LONG), own, member(SHORT))
    assert fits.tolist() == [False, True] and torch.equal(got.tokens[0], own.tokens[0])
    assert torch.equal(got.masked[0], own.masked[0]) and not got.masked[1].any()
    assert own.masked.sum() == 2 + 2 * len(row)  # a copy


def test_half_a_character_that_a_broken_neighbour_leaves_behind_is_masked_too():
    # e-acute, then no UTF-8; two thirds of a euro sign, with nothing between them
    codec = Pieces(b"\xc3", b"\xa9\xff", b"\xe2", b"", b"\x82")
    for ids in ([0, 1], [2, 3, 4]):
        assert tell(ids, Member(None, 5, 6, codec=codec), member(SHORT), 3) == [None, None, SHORT.special[1]]


def test_a_vocabulary_may_have_a_token_for_the_replacement_character():
    told = tell([0, 0], Member(None, 1, 2, codec=Pieces("\ufffd".encode())), member(WIDE), 9)
    assert runs(told, member(WIDE))[0] == ("text", "\ufffd\ufffd".encode())


@pytest.mark.parametrize("silent", [0, 1])
def test_text_cannot_be_translated_without_a_codec(silent):
    pair = [replace(m, codec=None) if i == silent else m for i, m in enumerate((member(SHORT, 1), member(LONG, 2)))]
    with pytest.raises(ValueError, match="'m1' and member 'm2' need codecs"):
        tell([5], *pair, 3)


def canvas_for(receiver: Member, reasoning: int, answer: int) -> Canvas:
    first, second, suffix = map(receiver.codec.encode, ("a A a", "A", "AaA"))
    return Canvas.blank([first, second], suffix, reasoning, answer, mask_id=receiver.mask_id, pad_id=0)


@given(problems(st.integers(2, 3), mixed=True, blank=True).filter(lambda p: len({m.codec for m in p.members}) == 2))
def test_mixed_ensembles_end_and_hand_over_what_translate_gives(problem):
    members, canvases, config = problem
    watched = [Watched(m.denoise) for m in members]
    missed, wanted = [], [None] * len(members)

    def handed(r, s, state):
        states = zip(state["tokens"], state["masked"], canvases)
        states = [replace(c, tokens=tokens, masked=masked) for tokens, masked, c in states]
        if members[r].codec is members[s].codec:
            return states[s], [True] * len(states[s].tokens)
        return tie.translate(states[s], members[s], states[r], members[r])

    def on_round(state):
        leader, relaying = state["leader"].tolist(), state["leader"] >= 0
        for r, w in enumerate(watched):
            seen = [handed(r, s, state) for s in range(len(members))]
            asked = torch.stack([canvas.tokens.masked_fill(canvas.masked, members[r].mask_id) for canvas, _ in seen])
            if wanted[r] is not None and w.calls:  # the first step after a relay
                assert torch.equal(w.calls[0][0][wanted[r][0]], wanted[r][1])
            if config.score == "token_change_count":
                wanted[r] = relaying, torch.stack([asked[m, b] for b, m in enumerate(leader)])[relaying]
            elif config.cross_model and relaying.any():
                shown = torch.stack([tokens for tokens, _, _ in w.calls[-len(members) :]])
                assert torch.equal(shown[:, relaying], asked[:, relaying])
            missed.extend(b for b, m in enumerate(leader) if m >= 0 and not seen[m][1][b])
            w.calls = []
    result = tie.ensemble([replace(m, denoise=w) for w, m in zip(watched, members)], canvases, config, on_round)
    assert result.not_relayed == len(missed) and all(canvas.complete.all() for canvas in result.candidates)
    assert all(torch.equal(a.tokens[~a.masked], b.tokens[~a.masked]) for a, b in zip(canvases, result.candidates))


def test_members_that_take_each_others_progress_away_end_too():
    def stubborn(codec):  # half a character at every position, and surest after one step
        me, half = member(codec), codec.pieces.index(b"\x90")
        logits = torch.eye(len(codec.pieces))[half] * torch.tensor([[1.0], [9.0]])
        one = lambda x: ((x == half).sum(1) == 1).long()
        return replace(me, denoise=lambda x, p, _: logits[one(x)][:, None].expand(*p.shape, -1))

    members, config = [stubborn(SHORT), stubborn(LONG)], Config(interval=1, score="top1_probability", cross_model=False)
    canvases = [canvas_for(m, 0, length) for m, length in zip(members, (5, 6))]
    for me, canvas in zip(members, canvases):  # the second row has its last position already
        canvas.tokens[1, -1], canvas.masked[1, -1] = me.eos_ids[0], False
    result = tie.ensemble(members, canvases, config)
    assert all(canvas.complete.all() for canvas in result.candidates)
    assert result.leaders.T.tolist() == [[0, 1] * 5 + [0], [0, 1] * 4 + [0, -1, -1]]  # twice the steps of the longest


def test_a_reader_that_cannot_hold_a_text_has_no_say_in_its_score():
    members = [member(LONG, 15), member(SHORT, 2)]
    canvases, rounds = [canvas_for(members[0], 8, 4), canvas_for(members[1], 4, 4)], []
    config = Config(interval=3, score="top1_probability")
    both, own = (
        tie.ensemble(members, canvases, replace(config, cross_model=c), rounds.append).scores[0] for c in (True, False)
    )
    sent = replace(canvases[0], tokens=rounds[0]["tokens"][0], masked=rounds[0]["masked"][0])
    _, fits = tie.translate(sent, members[0], canvases[1], members[1])
    assert fits.tolist() == [True, False] and torch.equal(both[0] == own[0], ~fits) and (both[1] != own[1]).all()


@given(problems(st.integers(2, 3)))
def test_equal_vocabularies_copy_ids_bit_for_bit(problem):
    mine, theirs = (
        tie.ensemble([replace(m, codec=codec) for m in problem.members], *problem[1:]) for codec in (LONG, None)
    )
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(mine.candidates, theirs.candidates))
    assert torch.equal(mine.leaders, theirs.leaders) and mine.not_relayed == 0


WIDE = Pieces(*SHORT.pieces, b"\xef", b"\xbf", b"\xbd")  # can spell U+FFFD, as all that know every byte can


class Careless:
    """What is written first over a tokenizer that adds [CLS], lowers case, or knows no other word than its own."""

    def __init__(self, codec=WIDE, encode=None, decode=None):
        self.encode, self.decode = encode or codec.encode, decode or codec.decode


def lossy_text(ids):
    return SHORT.decode(ids).decode(errors="replace").encode()  # half a character becomes U+FFFD


MASK, EOS, CLS = SHORT.special
HALF = SHORT.encode("\u00d0")[1:]


@pytest.mark.parametrize("message, ids, sender, receiver", [
    ("m0.*raw bytes", SHORT.encode("aA"), Careless(decode=lambda ids: "a"), LONG),
    ("m0.*raw bytes", SHORT.encode("aA"), Careless(decode=lambda ids: "a" if len(ids) == 1 else b"aA"), LONG),
    ("m0.*raw bytes", SHORT.encode("\u00d0"), Careless(decode=lossy_text), LONG),
    ("m0.*raw bytes", HALF + SHORT.encode("aA"), Careless(decode=lossy_text), LONG),
    ("m0.*raw bytes", SHORT.encode("aA"), Careless(decode=lambda ids: b"\xef\xbf\xbd\xc3" * len(ids)), LONG),
    ("m0.*raw bytes", SHORT.encode("a A"), Careless(decode=lambda ids: SHORT.decode(ids).strip()), LONG),
    ("m1.*list of ids.*not None", SHORT.encode("aA"), SHORT, Careless(encode=lambda text: None)),
    ("m1.*list of ids.*not 'aA'", SHORT.encode("aA"), SHORT, Careless(encode=lambda text: text)),
    ("m1.*list of ids.*not .0[.]5", SHORT.encode("aA"), SHORT, Careless(encode=lambda text: [0.5])),
    ("m1.*none of them mask or EOS", SHORT.encode("aA"), SHORT, Careless(encode=lambda text: [MASK])),
    ("m1.*none of them mask or EOS", SHORT.encode("aA"), SHORT, Careless(encode=lambda text: [*SHORT.encode(text), EOS])),
    ("m1.*within the vocabulary", SHORT.encode("aA"), SHORT, Careless(encode=lambda text: [len(WIDE.pieces)])),
    ("m1.*within the vocabulary", SHORT.encode("aA"), SHORT, Careless(encode=lambda text: [-1])),
    ("m1.*within the vocabulary", SHORT.encode("aA"), SHORT, Careless(encode=lambda text: [2, len(WIDE.pieces) + 6])),
    ("m1.*neither add.*'Aa'", SHORT.encode("Aa"), SHORT, Careless(encode=lambda text: SHORT.encode(text.lower()))),
    ("m1.*neither add.*'aA'", SHORT.encode("aA"), SHORT, Careless(encode=lambda text: [2, *SHORT.encode(text)])),
    ("m1.*neither add.*'aA'", SHORT.encode("aA"), SHORT, Careless(encode=lambda text: [CLS, *SHORT.encode(text)])),
])  # fmt: skip
def test_a_codec_that_does_not_keep_the_text_is_named(message, ids, sender, receiver):
    pair = [Member(None, MASK, EOS, f"m{m}", codec) for m, codec in enumerate((sender, receiver))]
    sent = Canvas.blank([[1]], [], len(ids), 1, mask_id=MASK, pad_id=0)
    sent.tokens[0, sent.reasoning], sent.masked[0, sent.reasoning] = torch.tensor(ids), False
    own = Canvas.blank([[1]], [], 30, 1, mask_id=MASK, pad_id=0)
    with pytest.raises(ValueError, match=message) as error:
        tie.translate(sent, pair[0], own, pair[1], len(WIDE.pieces))
    assert "\n" not in str(error.value)
