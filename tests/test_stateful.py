"""TIE's rounds in any order and any settings, each move beside the slow reference's."""

from contextlib import suppress
from copy import deepcopy
from dataclasses import replace

import reference
import torch
from hypothesis import reject, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from reference import Unclear, Watched
from test_tie import SCORES, near, one_row, problems

import tie
from tie import Canvas

STEPS = st.sampled_from([1, 2, 2, 3, 3, 4])
LOGIT_SCORE = st.none() | st.sampled_from(SCORES[1:])  # none: the score of the member's own steps, as configured


def values(means: list) -> torch.Tensor:
    return torch.tensor([float(mean.value) for mean in means])


def blocks(canvas: Canvas, size: int) -> torch.Tensor:
    """(L,) the number of each position's block, -1 for what is fixed."""
    number = torch.full(canvas.tokens.shape[1:], -1)
    for k, block in enumerate(reference.blocks(canvas.reasoning, canvas.answer, size)):
        number[block.start : block.stop] = k
    return number


def holds(canvas: Canvas, b: int, state: reference.State) -> bool:
    """What stands under a mask is of no account."""
    mine, committed = one_row(canvas, b), [token for token, hole in zip(state.tokens, state.masked) if not hole]
    return mine.masked[0].tolist() == state.masked and mine.tokens[~mine.masked].tolist() == committed


def agree(result: tie.Result, rows: list[reference.Row]) -> None:
    assert (type(result.forwards), type(result.not_relayed)) == (float, int)
    assert result.forwards == sum(row.forwards for row in rows) / len(rows)
    assert result.not_relayed == sum(row.not_relayed for row in rows)
    for b, row in enumerate(rows):
        n = len(row.leaders)
        assert result.winner[b] == row.winner
        assert result.leaders[:n, b].tolist() == row.leaders and (result.leaders[n:, b] == -1).all()
        assert near(result.scores[:n, :, b], torch.tensor(row.scores).view(n, len(row.states)))
        assert (result.scores[n:, :, b] == -torch.inf).all()
        assert near(result.tcc[:, b], torch.tensor([float(count) for count in row.tcc]))
        assert near(result.top1[:, b], torch.tensor(row.top1))
        assert all(holds(candidate, b, state) for candidate, state in zip(result.candidates, row.states))


class Rounds(RuleBasedStateMachine):
    """Any move may follow any other; `self.runs` are the members at work, `self.rows` the same by the reference."""

    @initialize(problem=problems(mixed=True))
    def begin(self, problem):
        self.problem, self.given, self.rows = problem, deepcopy(problem.canvases), reference.rows(*problem)
        watched = [replace(member, denoise=Watched(member.denoise)) for member in problem.members]
        self.runs = [tie.Run(i, m, c, problem.config) for i, (m, c) in enumerate(zip(watched, problem.canvases))]
        M, B, self.not_relayed = len(self.runs), len(self.rows), 0
        self.leaders, self.relay_scores = torch.zeros(0, B, dtype=torch.int64), torch.zeros(0, M, B)
        with suppress(Unclear):
            agree(tie.ensemble(*problem), reference.ensemble(*problem))

    @precondition(lambda self: all(run.canvas.complete.all() for run in self.runs))
    @rule(problem=problems(mixed=True))
    def begin_anew(self, problem):
        self.begin(problem)

    def configure(self, **settings):
        for run in self.runs:
            run.config = replace(self.problem.config, **settings)

    @rule(n=STEPS)
    def generate(self, n):
        before, size = [run.canvas for run in self.runs], self.problem.config.block_size
        try:
            steps = max(row.generate(n) for row in self.rows)
        except Unclear:
            reject()
        self.configure(interval=n)
        assert tie.generate(self.runs) == steps
        for old, new in zip(before, [run.canvas for run in self.runs]):
            assert not (new.masked & ~old.masked).any()  # what is committed stays
            assert torch.equal(new.tokens[~old.masked], old.tokens[~old.masked])
            latest = blocks(new, size).where(old.masked & ~new.masked, -1).amax(1, keepdim=True)
            assert not (new.masked & (blocks(new, size) < latest)).any()  # blocks in order, answers last

    def score_round(self):
        self.scores, self.tops = map(torch.stack, zip(*[run.score_round() for run in self.runs]))  # (M, B)
        closed = [row.score_round() for row in self.rows]
        self.slow_scores, self.slow_tops = [scores for scores, _ in closed], [tops for _, tops in closed]
        assert near(self.scores.T, torch.stack([values(scores) for scores in self.slow_scores]))
        assert near(self.tops.T, torch.stack([values(tops) for tops in self.slow_tops]))
        assert all(len(run.history) <= 1 for run in self.runs)  # the step that the next one is compared with
        result = tie.respond(self.runs, self.leaders, self.relay_scores, self.not_relayed)  # were this the end
        for winner, row in zip(result.winner, self.rows):
            row.winner = winner
            with suppress(Unclear):
                row.winner = row.select()
        agree(result, self.rows)

    @rule(n=STEPS, logit_score=LOGIT_SCORE, cross_model=st.booleans())
    def elect(self, n, logit_score, cross_model):
        self.one_round(n, logit_score, cross_model, lambda elected, b: elected)

    @rule(n=STEPS, logit_score=LOGIT_SCORE, cross_model=st.booleans(), leaders=st.tuples(*[st.integers(-1, 3)] * 3))
    def appoint(self, n, logit_score, cross_model, leaders):
        """Whoever was elected; -1 is nobody."""
        self.one_round(n, logit_score, cross_model, lambda elected, b: min(leaders[b], len(self.runs) - 1))

    def one_round(self, n, logit_score, cross_model, appointed):
        """No relay in rows that a member has completed."""
        self.generate(n)
        self.score_round()
        ended = torch.stack([run.canvas.complete for run in self.runs]).any(0)
        if ended.all():
            return
        readings, going_on, before = [], (~ended).nonzero().flatten().tolist(), [run.canvas for run in self.runs]
        received = [[tie.receive(run, sender) for sender in self.runs] for run in self.runs]
        if logit_score:
            self.configure(score=logit_score, cross_model=cross_model)
            self.scores, readings = tie.assess(self.runs, received, ended)
        leaders = tie.lead(self.scores, self.tops).masked_fill(ended, -1)
        for b in going_on:
            row, scores = self.rows[b], self.slow_scores[b]
            if logit_score:
                scores = row.assess(logit_score, cross_model)
                assert near(self.scores[:, b], values(scores))
            with suppress(Unclear):
                assert leaders[b] == reference.leader(scores, self.slow_tops[b])
            leaders[b] = appointed(int(leaders[b]), b)
            row.relay(int(leaders[b]), scores)
        self.not_relayed += tie.relay(self.runs, received, readings, leaders)
        self.leaders = torch.cat([self.leaders, leaders[None]])
        self.relay_scores = torch.cat([self.relay_scores, self.scores.masked_fill(ended, -torch.inf)[None]])
        for r, run in enumerate(self.runs):
            for b, m in enumerate(leaders.tolist()):
                sent = before[m if m >= 0 else r]
                if m < 0 or self.runs[m].member.codec is run.member.codec:  # bit for bit, but for the prompt
                    own = blocks(sent, 1) >= 0
                    assert torch.equal(run.canvas.tokens[b, own], sent.tokens[b, own])
                    assert torch.equal(run.canvas.masked[b], sent.masked[b])

    @invariant()
    def every_state_is_the_references(self):
        for b, row in enumerate(self.rows):
            for run, slow in zip(self.runs, row.trajectories):
                assert holds(run.canvas, b, slow.state)
                ahead = run.next is not None and row.ended and any(slow.state.masked)  # made while others were assessed
                assert run.forwards[b] == slow.forwards + ahead and run.compared[b] == slow.compared
                assert near(run.tcc[b].float(), torch.tensor(float(slow.tcc)))
                assert near(run.top1[b], torch.tensor(float(slow.top1.value)))

    @invariant()
    def fixed_positions_and_the_canvases_given_are_never_touched(self):
        for run, canvas, given in zip(self.runs, self.problem.canvases, self.given):
            fixed = blocks(given, 1) < 0
            assert torch.equal(run.canvas.tokens[:, fixed], given.tokens[:, fixed])
            assert torch.equal(canvas.tokens, given.tokens) and torch.equal(canvas.masked, given.masked)

    @invariant()
    def a_row_alone_is_forwarded_as_often_as_counted(self):
        for run in self.runs if len(self.rows) == 1 else []:
            assert len(run.member.denoise.calls) == run.forwards[0]


TestRounds = Rounds.TestCase
TestRounds.settings = settings(stateful_step_count=15)
