"""Relay between vocabularies: text with holes between two byte-level BPEs, and ensembles of mixed vocabularies."""

from dataclasses import replace
from itertools import chain, groupby

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import Fake, Watched
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import tie
from tie import Canvas, Config, Member

TEXTS = [
    "3472*6=20832, 0.125 + 17 = 17.125; 1234567890",
    "def add(a, b):\n    return a + b\n\n\tfor i in range(10): print(i)",
    "déjà vu, naïve façade, Größe, señor, ångström; 机器学习模型可以一起解决问题，数字和文字",
    "well done 😀😀 and 👩‍🚀 go 🎉, the answer is 42",
]
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # byte-level BPE shows these bytes as themselves
SHOWN = [chr(b) for b in PRINTABLE] + [chr(256 + i) for i in range(256 - len(PRINTABLE))]
BYTE = dict(zip(SHOWN, PRINTABLE + [b for b in range(256) if b not in PRINTABLE]))
SEED, LENGTH = st.integers(0, 10**6), st.integers(4, 9)


class BPE:
    def __init__(self, texts, merges):
        self.tokenizer = Tokenizer(models.BPE())
        self.tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(vocab_size=256 + merges, initial_alphabet=SHOWN, show_progress=False)
        self.tokenizer.train_from_iterator(texts, trainer)
        self.size = self.tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def decode(self, ids: list[int]) -> bytes:
        return bytes(BYTE[shown] for i in ids for shown in self.tokenizer.id_to_token(i))


def member(codec: BPE, seed: int = 0) -> Member:
    mask_id, eos_id = codec.size, codec.size + 1  # and one more EOS
    return Member(Fake(seed, codec.size + 3, mask_id, eos_id), mask_id, (eos_id, eos_id + 1), f"m{seed}", codec)


SHORT, LONG = BPE(TEXTS[:2], 30), BPE(TEXTS * 2, 200)
PAIRS = st.sampled_from([(member(SHORT), member(LONG)), (member(LONG), member(SHORT))])
WORDS = st.text(alphabet=sorted(set("".join(TEXTS))), min_size=1, max_size=8) | st.sampled_from(TEXTS)


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
    tokens = torch.tensor([[5, *(sender.mask_id if i is None else i for i in ids), sender.mask_id]])
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


@given(PAIRS, st.data(), st.integers(1, 60))
def test_text_masks_and_eos_keep_their_order_and_the_region_its_length(pair, data, length):
    sender, receiver = pair
    ids = data.draw(regions(sender))
    told = tell(ids, sender, receiver, length)
    said = without_rest(ids, runs(ids, sender))
    needed = sum(len(receiver.codec.encode(part.decode())) if kind == "text" else part for kind, part in said)
    assert (told is not None) == (needed <= length)  # what does not fit is not handed over
    assert told is None or (without_rest(ids, runs(told, receiver)) == said and len(told) == length)


@given(PAIRS, st.data())
def test_there_and_back_is_the_identity_on_the_text(pair, data):
    sender, receiver = pair
    ids = data.draw(regions(sender))
    back = tell(tell(ids, sender, receiver, 500), receiver, sender, 500)
    assert without_rest(ids, runs(back, sender)) == without_rest(ids, runs(ids, sender))


def with_holes(ids, sender) -> list:
    """Each token with a byte that belongs to no character is a hole; again, as long as that breaks others."""
    told = []
    for text, group in groupby(ids, key=lambda i: i is not None and i not in sender.eos_ids):
        run = list(group)
        owner = [k for k, i in enumerate(run) for _ in sender.codec.decode([i])] if text else []
        data = sender.codec.decode(run) if text else b""
        parts = [(i, j) for i in range(len(data)) for j in range(i + 1, i + 5)]  # a character has four bytes at most
        whole = [(i, j) for i, j in parts if data[i:j].decode(errors="ignore").encode() == data[i:j]]
        holes = {k for byte, k in enumerate(owner) if not any(i <= byte < j for i, j in whole)}
        told += [None if k in holes else i for k, i in enumerate(run)]
    return told if told == list(ids) else with_holes(told, sender)


@given(PAIRS, st.data())
def test_broken_characters_become_one_mask_a_token_and_never_a_replacement_character(pair, data):
    sender, receiver = pair
    tokens = st.lists(st.integers(0, sender.codec.size - 1), max_size=4)
    halves = WORDS.map(sender.codec.encode).flatmap(lambda ids: st.integers(0, len(ids)).map(lambda i: ids[i:]))
    ids = list(chain(*data.draw(st.lists(tokens | halves | st.just([None]), max_size=5))))
    told = tell(ids, sender, receiver, 500)
    expected = with_holes(ids, sender)
    assert without_rest(ids, runs(told, receiver)) == without_rest(ids, runs(expected, sender))
    assert not any(kind == "text" and "\ufffd" in part.decode() for kind, part in runs(told, receiver))


def test_rows_that_do_not_fit_keep_the_receivers_state():
    one, row = LONG.encode("1"), LONG.encode(TEXTS[2])  # SHORT has single bytes alone for the second
    tokens = torch.tensor([one + row, one + one * len(row)])
    own = Canvas.blank([[1]] * 2, [2], 1, len(row), mask_id=SHORT.size, pad_id=0)
    sent = Canvas(tokens, tokens < 0, slice(0, 1), slice(1, 1 + len(row)))
    with torch.device("meta"):  # tensors that name no device land where nothing can be read
        got, fits = tie.translate(sent, member(LONG), own, member(SHORT))
    assert fits.tolist() == [False, True] and torch.equal(got.tokens[0], own.tokens[0])
    assert torch.equal(got.masked[0], own.masked[0]) and not got.masked[1].any()
    assert own.masked.sum() == 2 + 2 * len(row)  # a copy


def test_half_a_character_that_a_broken_neighbour_leaves_behind_is_masked_too():
    # e-acute, then no UTF-8; two thirds of a euro sign, with nothing between them
    pieces = {0: b"\xc3", 1: b"\xa9\xff", 2: b"\xe2", 3: b"", 4: b"\x82"}

    class Bytes:
        encode = None
        decode = staticmethod(lambda ids: b"".join(pieces[i] for i in ids))

    for ids in ([0, 1], [2, 3, 4]):
        assert tell(ids, Member(None, 5, 6, codec=Bytes()), member(SHORT), 3) == [None, None, SHORT.size + 1]


def test_a_vocabulary_may_have_a_token_for_the_replacement_character():
    own = Careless(encode=lambda text: [0] * len(text), decode=lambda ids: "\ufffd".encode() * len(ids))
    told = tell([0, 0], Member(None, 1, 2, codec=own), member(SHORT), 9)
    assert runs(told, member(SHORT))[0] == ("text", "\ufffd\ufffd".encode())


@pytest.mark.parametrize("silent", [0, 1])
def test_text_cannot_be_translated_without_a_codec(silent):
    pair = [replace(m, codec=None) if i == silent else m for i, m in enumerate((member(SHORT, 1), member(LONG, 2)))]
    with pytest.raises(ValueError, match="'m1' and member 'm2' need codecs"):
        tell([5], *pair, 3)


def canvas_for(receiver: Member, reasoning: int, answer: int) -> Canvas:
    first, second, suffix = map(receiver.codec.encode, ("What is 17 + 25?", "3*4=", "Answer:"))
    return Canvas.blank([first, second], suffix, reasoning, answer, mask_id=receiver.mask_id, pad_id=0)


@given(
    st.lists(st.tuples(st.sampled_from([SHORT, LONG]), SEED), min_size=2, max_size=3), st.tuples(LENGTH, LENGTH),
    st.sampled_from(["token_change_count", "top1_probability", "negative_entropy", "probability_margin"]),
    st.integers(1, 5), st.booleans(), st.sampled_from([{"top_k": 1}, {"top_k": 2}, {"threshold": 0.5}]),
)  # fmt: skip
def test_mixed_ensembles_end_and_hand_over_what_translate_gives(kinds, lengths, score, interval, cross_model, quota):
    members = [member(codec, seed) for codec, seed in kinds]
    watched = [Watched(m.denoise) for m in members]
    canvases = [canvas_for(m, *(lengths if m.codec is SHORT else (7, 5))) for m in members]
    config = Config(interval=interval, block_size=4, score=score, cross_model=cross_model, **quota)
    missed, wanted = [], [None] * len(members)
    def handed(r, s, state):
        states = zip(state["tokens"], state["masked"], canvases)
        states = [replace(c, tokens=tokens, masked=masked) for tokens, masked, c in states]
        if members[r].codec is members[s].codec:
            return states[s], torch.tensor([True, True])
        return tie.translate(states[s], members[s], states[r], members[r])

    def on_round(state):
        leader, relaying = state["leader"].tolist(), state["leader"] >= 0
        for r, w in enumerate(watched):
            seen = [handed(r, s, state) for s in range(len(members))]
            asked = torch.stack([canvas.tokens.masked_fill(canvas.masked, members[r].mask_id) for canvas, _ in seen])
            if wanted[r] is not None and w.calls:  # the first step after a relay
                assert torch.equal(w.calls[0][0][wanted[r][0]], wanted[r][1])
            if score == "token_change_count":
                wanted[r] = relaying, torch.stack([asked[m, b] for b, m in enumerate(leader)])[relaying]
            elif cross_model and relaying.any():
                shown = torch.stack([tokens for tokens, _, _ in w.calls[-len(members) :]])
                assert torch.equal(shown[:, relaying], asked[:, relaying])
            missed.extend(b for b, m in enumerate(leader) if m >= 0 and not seen[m][1][b])
            w.calls = []
    result = tie.ensemble([replace(m, denoise=w) for w, m in zip(watched, members)], canvases, config, on_round)
    assert result.not_relayed == len(missed) and all(canvas.complete.all() for canvas in result.candidates)
    assert all(torch.equal(a.tokens[~a.masked], b.tokens[~a.masked]) for a, b in zip(canvases, result.candidates))


def test_members_that_take_each_others_progress_away_end_too():
    def stubborn(codec):  # half a character at every position, and surest after one step
        me, half = member(codec), codec.tokenizer.token_to_id(SHOWN[-1])
        logits = torch.eye(codec.size + 3)[half] * torch.tensor([[1.0], [9.0]])
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
    members = [member(LONG, 1), member(SHORT, 3)]
    canvases, rounds = [canvas_for(members[0], 8, 4), canvas_for(members[1], 1, 4)], []
    config = Config(interval=3, score="top1_probability")
    both, own = (
        tie.ensemble(members, canvases, replace(config, cross_model=c), rounds.append).scores[0] for c in (True, False)
    )
    sent = replace(canvases[0], tokens=rounds[0]["tokens"][0], masked=rounds[0]["masked"][0])
    _, fits = tie.translate(sent, members[0], canvases[1], members[1])
    assert fits.tolist() == [True, False] and torch.equal(both[0] == own[0], ~fits) and (both[1] != own[1]).all()


@given(st.lists(SEED, min_size=2, max_size=3), st.integers(1, 5), st.booleans())
def test_equal_vocabularies_copy_ids_bit_for_bit(seeds, interval, logit_score):
    members = [member(LONG, seed) for seed in seeds]
    bare = [Member(m.denoise, m.mask_id, m.eos_id) for m in members]
    config = Config(interval=interval, block_size=4, score="top1_probability" if logit_score else "token_change_count")
    canvases = [canvas_for(members[0], 6, 5)] * len(members)
    mine, theirs = tie.ensemble(members, canvases, config), tie.ensemble(bare, canvases, config)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(mine.candidates, theirs.candidates))
    assert torch.equal(mine.leaders, theirs.leaders) and mine.not_relayed == 0


class Careless:
    """What is written first over a tokenizer that adds [CLS], lowers case, or knows no other word than its own."""

    def __init__(self, codec=SHORT, encode=None, decode=None):
        self.encode, self.decode = encode or codec.encode, decode or codec.decode


def lossy_text(ids):
    return SHORT.decode(ids).decode(errors="replace").encode()  # half a character becomes U+FFFD


MASK, EOS = SHORT.size, SHORT.size + 1
HALF = SHORT.encode("é")[1:]


@pytest.mark.parametrize("message, ids, sender, receiver", [
    ("m0.*raw bytes", SHORT.encode("ab"), Careless(decode=lambda ids: "a"), LONG),
    ("m0.*raw bytes", SHORT.encode("ab"), Careless(decode=lambda ids: "a" if len(ids) == 1 else b"ab"), LONG),
    ("m0.*raw bytes", SHORT.encode("é"), Careless(decode=lossy_text), LONG),
    ("m0.*raw bytes", HALF + SHORT.encode("0123"), Careless(decode=lossy_text), LONG),
    ("m0.*raw bytes", SHORT.encode("ab"), Careless(decode=lambda ids: b"\xef\xbf\xbd\xc3" * len(ids)), LONG),
    ("m0.*raw bytes", SHORT.encode("a b"), Careless(decode=lambda ids: SHORT.decode(ids).strip()), LONG),
    ("m1.*list of ids.*not None", SHORT.encode("ab"), SHORT, Careless(encode=lambda text: None)),
    ("m1.*list of ids.*not 'ab'", SHORT.encode("ab"), SHORT, Careless(encode=lambda text: text)),
    ("m1.*list of ids.*not .0[.]5", SHORT.encode("ab"), SHORT, Careless(encode=lambda text: [0.5])),
    ("m1.*none of them mask or EOS", SHORT.encode("ab"), SHORT, Careless(encode=lambda text: [MASK])),
    ("m1.*none of them mask or EOS", SHORT.encode("ab"), SHORT, Careless(encode=lambda text: [*SHORT.encode(text), EOS])),
    ("m1.*within the vocabulary", SHORT.encode("ab"), SHORT, Careless(encode=lambda text: [SHORT.size + 3])),
    ("m1.*within the vocabulary", SHORT.encode("ab"), SHORT, Careless(encode=lambda text: [-1])),
    ("m1.*within the vocabulary", SHORT.encode("ab"), SHORT, Careless(encode=lambda text: [0, SHORT.size + 9])),
    ("m1.*neither add.*'Ab'", SHORT.encode("Ab"), SHORT, Careless(encode=lambda text: SHORT.encode(text.lower()))),
    ("m1.*neither add.*'ab'", SHORT.encode("ab"), SHORT, Careless(encode=lambda text: [0, *SHORT.encode(text)])),
    ("m1.*neither add.*'ab'", SHORT.encode("ab"), SHORT,  # [CLS], which decode leaves out
     Careless(encode=lambda text: [SHORT.size + 2, *SHORT.encode(text)],
              decode=lambda ids: SHORT.decode([i for i in ids if i < SHORT.size]))),
])  # fmt: skip
def test_a_codec_that_does_not_keep_the_text_is_named(message, ids, sender, receiver):
    pair = [Member(None, MASK, EOS, f"m{m}", codec) for m, codec in enumerate((sender, receiver))]
    sent = Canvas.blank([[1]], [], len(ids), 1, mask_id=MASK, pad_id=0)
    sent.tokens[0, sent.reasoning], sent.masked[0, sent.reasoning] = torch.tensor(ids), False
    own = Canvas.blank([[1]], [], 30, 1, mask_id=MASK, pad_id=0)
    with pytest.raises(ValueError, match=message) as error:
        tie.translate(sent, pair[0], own, pair[1], SHORT.size + 3)
    assert "\n" not in str(error.value)
