"""Relay between vocabularies: two byte-level BPEs trained here, text with holes, and ensembles of mixed vocabularies."""

from itertools import groupby

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
    "déjà vu, naïve façade, Größe, señor, ångström",
    "机器学习模型可以一起解决问题，数字和文字",
    "well done 😀😀 and 👩‍🚀 go 🎉, the answer is 42",
]
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # byte-level BPE shows these bytes as themselves
SHOWN = [chr(b) for b in PRINTABLE] + [chr(256 + i) for i in range(256 - len(PRINTABLE))]
BYTE = dict(zip(SHOWN, PRINTABLE + [b for b in range(256) if b not in PRINTABLE]))
SEED = st.integers(0, 10**6)


class BPE:
    def __init__(self, texts, merges):
        self.tokenizer = Tokenizer(models.BPE())
        self.tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=256 + merges, initial_alphabet=alphabet, show_progress=False)
        self.tokenizer.train_from_iterator(texts, trainer)
        self.size = self.tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def decode(self, ids: list[int]) -> bytes:
        return bytes(BYTE[shown] for i in ids for shown in self.tokenizer.id_to_token(i))


def member(codec: BPE, seed: int = 0) -> Member:
    """A fake model; mask and EOS follow the codec's own tokens, and EOS has two ids."""
    mask_id, eos_id = codec.size, codec.size + 1
    return Member(Fake(seed, codec.size + 3, mask_id, eos_id), mask_id, (eos_id, eos_id + 1), f"m{seed}", codec)


SHORT, LONG = BPE(TEXTS[:2], 30), BPE(TEXTS * 2, 200)
PAIRS = st.sampled_from([(member(SHORT), member(LONG)), (member(LONG), member(SHORT))])
WORDS = st.text(alphabet=sorted(set("".join(TEXTS))), min_size=1, max_size=8) | st.sampled_from(TEXTS)


@st.composite
def regions(draw, sender, texts=WORDS):
    """Ids of one region of the sender, None where masked: text, masks and EOS in turns."""
    parts = [texts.map(sender.codec.encode), st.integers(1, 3).map(lambda k: [None] * k)]
    parts.append(st.lists(st.sampled_from(sender.eos_ids), min_size=1, max_size=2))
    return [i for part in draw(st.lists(st.one_of(parts), max_size=6)) for i in part]


def runs(ids, member) -> list[tuple]:
    """What a region says: runs of text by their bytes, of masks and EOS by their number."""
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
    reasoning, answer = slice(1, 1 + len(ids)), slice(1 + len(ids), 2 + len(ids))
    got, fits = tie.translate(tokens, masked, reasoning, answer, sender, receiver, own)
    assert (got.reasoning, got.answer, got.tokens.shape) == (own.reasoning, own.answer, own.tokens.shape)
    assert got.tokens[0, [0, 1, -3]].tolist() == [6, 7, 8] and got.masked[0, -2:].all()
    if not fits:
        assert torch.equal(got.tokens, own.tokens) and torch.equal(got.masked, own.masked)
        return None
    open_ = got.masked[0, own.reasoning].tolist()
    return [None if hole else token for token, hole in zip(got.tokens[0, own.reasoning].tolist(), open_)]


def needed(ids, said, receiver) -> int:
    """Positions that the receiver needs for what was said, less the rest of the region."""
    parts = without_rest(ids, said)
    return sum(len(receiver.codec.encode(part.decode())) if kind == "text" else part for kind, part in parts)


@pytest.mark.parametrize("text", TEXTS)
def test_the_codecs_differ_and_keep_every_byte(text):
    assert SHORT.encode(text) != LONG.encode(text)
    assert SHORT.decode(SHORT.encode(text)) == LONG.decode(LONG.encode(text)) == text.encode()


@given(PAIRS, st.data(), st.integers(1, 60))
def test_text_masks_and_eos_keep_their_order_and_the_region_its_length(pair, data, length):
    """With the rest of the region: masks where the sender's ends in masks, EOS where it is complete."""
    sender, receiver = pair
    ids = data.draw(regions(sender))
    told = tell(ids, sender, receiver, length)
    said = runs(ids, sender)
    assert (told is not None) == (needed(ids, said, receiver) <= length)  # what does not fit is not handed over
    if told is not None:
        assert without_rest(ids, runs(told, receiver)) == without_rest(ids, said) and len(told) == length


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
        whole = set()
        for start in range(len(data)):
            for end in range(start + 1, min(start + 4, len(data)) + 1):
                if len(data[start:end].decode(errors="ignore").encode()) == end - start == len(data[start:end]):
                    whole |= set(range(start, end))
        holes = {owner[j] for j in range(len(data)) if j not in whole}
        told += [None if k in holes else i for k, i in enumerate(run)]
    return told if told == list(ids) else with_holes(told, sender)


@given(PAIRS, st.data())
def test_broken_characters_become_one_mask_a_token_and_never_a_replacement_character(pair, data):
    sender, receiver = pair
    any_ids = st.lists(st.integers(0, sender.codec.size - 1), max_size=4)
    halves = WORDS.map(sender.codec.encode).flatmap(lambda ids: st.integers(0, len(ids)).map(lambda i: ids[i:]))
    parts = data.draw(st.lists(any_ids | halves | st.just([None]), max_size=5))
    ids = [i for part in parts for i in part]
    told = tell(ids, sender, receiver, 500)
    expected = with_holes(ids, sender)
    assert without_rest(ids, runs(told, receiver)) == without_rest(ids, runs(expected, sender))
    assert "\ufffd".encode() not in receiver.codec.decode([i for i in told if i is not None and i not in receiver.eos_ids])


def test_rows_left_out_and_rows_that_do_not_fit_keep_the_receivers_state():
    sender, receiver = member(LONG), member(SHORT)
    row = LONG.encode(TEXTS[3])
    tokens = torch.tensor([row, row, LONG.encode("1")[:1] * len(row)])
    own = Canvas.blank([[1]] * 3, [2], len(row), 0, mask_id=receiver.mask_id, pad_id=0)
    state = (tokens, torch.zeros_like(tokens, dtype=torch.bool), slice(0, len(row)), slice(len(row), len(row)))
    got, fits = tie.translate(*state, sender, receiver, own, torch.tensor([True, False, True]))
    assert fits.tolist() == [False, False, True]  # LONG has words for these characters, SHORT single bytes
    assert torch.equal(got.tokens[:2], own.tokens[:2]) and torch.equal(got.masked[:2], own.masked[:2])
    assert not got.masked[2].any()


def canvas_for(receiver: Member, reasoning: int, answer: int) -> Canvas:
    prompts = [receiver.codec.encode("What is 17 + 25?"), receiver.codec.encode("3*4=")]
    return Canvas.blank(prompts, receiver.codec.encode("Answer:"), reasoning, answer, mask_id=receiver.mask_id, pad_id=0)


@given(
    st.lists(st.tuples(st.sampled_from([SHORT, LONG]), SEED), min_size=2, max_size=3), st.integers(1, 5),
    st.sampled_from(["token_change_count", "top1_probability", "negative_entropy", "probability_margin"]),
    st.booleans(), st.sampled_from([{"top_k": 1}, {"top_k": 2}, {"threshold": 0.5}]), st.tuples(*[st.integers(4, 9)] * 2),
)  # fmt: skip
def test_mixed_ensembles_end_and_relay_and_score_what_translate_gives(kinds, interval, score, cross_model, quota, lengths):
    members = [member(codec, seed) for codec, seed in kinds]
    watched = [Watched(m.denoise) for m in members]
    canvases = [canvas_for(m, *(lengths if m.codec is SHORT else (7, 5))) for m in members]
    config = Config(interval=interval, block_size=4, score=score, cross_model=cross_model, **quota)
    missed, wanted = [], [None] * len(members)

    def handed(r, s, state):
        own, theirs = ({"tokens": state["tokens"][m], "masked": state["masked"][m]} for m in (r, s))
        own = Canvas(reasoning=canvases[r].reasoning, answer=canvases[r].answer, **own)
        if members[r].codec is members[s].codec:
            return Canvas(**{**vars(own), **theirs}), torch.tensor([True, True])
        return tie.translate(*theirs.values(), canvases[s].reasoning, canvases[s].answer, members[s], members[r], own)

    def on_round(state):
        for r, w in enumerate(watched):
            seen = [handed(r, s, state) for s in range(len(members))]
            asked = [canvas.tokens.masked_fill(canvas.masked, members[r].mask_id) for canvas, _ in seen]
            relaying = state["leader"] >= 0
            if wanted[r] is not None and w.calls:  # the first step after a relay
                rows, tokens = wanted[r]
                assert torch.equal(w.calls[0][0][rows], tokens[rows])
            if score != "token_change_count" and cross_model and relaying.any():
                for call, tokens in zip(w.calls[-len(members) :], asked):
                    assert torch.equal(call[0][relaying], tokens[relaying])
            led = torch.stack([asked[max(m, 0)][b] for b, m in enumerate(state["leader"].tolist())])
            wanted[r] = (relaying, led) if score == "token_change_count" else None
            missed.extend(b for b, m in enumerate(state["leader"].tolist()) if m >= 0 and not seen[m][1][b])
            w.calls = []

    twins = [Member(w, m.mask_id, m.eos_id, m.name, m.codec) for w, m in zip(watched, members)]
    result = tie.ensemble(twins, canvases, config, on_round)
    assert all(canvas.complete.all() for canvas in result.candidates)
    assert result.not_relayed == len(missed)
    for canvas, candidate in zip(canvases, result.candidates):
        assert torch.equal(canvas.tokens[~canvas.masked], candidate.tokens[~canvas.masked])


@given(st.lists(SEED, min_size=2, max_size=3), st.integers(1, 5), st.booleans())
def test_equal_vocabularies_copy_ids_bit_for_bit(seeds, interval, logit_score):
    """Whatever the ids are, valid text or not: as if there were no codec at all."""
    members = [member(LONG, seed) for seed in seeds]
    bare = [Member(m.denoise, m.mask_id, m.eos_id) for m in members]
    config = Config(interval=interval, block_size=4, score="top1_probability" if logit_score else "token_change_count")
    canvases = [canvas_for(members[0], 9, 7)] * len(members)
    mine, theirs = tie.ensemble(members, canvases, config), tie.ensemble(bare, canvases, config)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(mine.candidates, theirs.candidates))
    assert torch.equal(mine.leaders, theirs.leaders) and mine.not_relayed == 0
